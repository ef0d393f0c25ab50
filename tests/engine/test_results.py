"""Reading runs back, and the notebook that does it."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from machinery import ROOT, Command
from nbclient import NotebookClient
from test_plot import write_run

from engine import pictures as figures
from engine.runs import RunRecord, comparison, results, selection
from vegab import UsageError


@pytest.fixture
def records(tmp_path: Path) -> list[RunRecord]:
    """Six runs: three settings with two seeds each, one of them failed, one with notes."""
    for n, (filters, dropout) in enumerate([(4, 0.0), (8, 0.0), (8, 0.5)]):
        for seed in (0, 1):
            config = {
                "n_filters": filters,
                "opt": {"lr": 0.1, "name": "a b"},
                "by_list": [n],
                "seed": seed,
            }
            config |= {"dropout": dropout, "augmented": n == 0, "best": "mse"}
            status = "failed" if (n, seed) == (2, 1) else "finished"
            values = (1.0, 0.4 - n / 10 + seed / 100)
            write_run(tmp_path / f"r{n}{seed}", values, config, "val_loss", status)
    results.write_notes(RunRecord(str(tmp_path / "r00")), "the good one", ["paper", "old"])
    return results.runs_matching([str(tmp_path)])[0]


def names_of(records: Sequence[RunRecord]) -> str:
    return " ".join(Path(record.path).name for record in records)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "r00 r01 r10 r11 r20 r21"),
        ("n_filters>=8 state=finished", "r10 r11 r20"),
        ("lr=0.1 opt.lr<=1e-1 dropout>0", "r20 r21"),
        ("val_loss<0.31 seed!=1", "r10 r20"),
        ('"val_loss last">=.41', "r01"),
        ("tag=paper", "r00"),
        ("tag!=paper seed=0", "r10 r20"),
        ("augmented=True", "r00 r01"),
        ('opt.name="A B" name=r11', "r11"),
        ("epoch=2 best<0.25", "r20 r21"),
        ("r1 seed=1", "r11"),
        ('"good one"', "r00"),
        ('"seed=1" Failed', "r21"),
        ('"best=mse"', ""),  # that is the same in all of them
        ("n_filters=four", ""),
        ("config.best=mse seed=0", "r00 r10 r20"),
        ("n_filters == 8  dropout> 0 seed != 1", "r20"),
        ("val_loss <.31 failed", "r21"),
        ("!", ""),  # a word
    ],
)
def test_a_filter_takes_conditions_and_words(
    records: list[RunRecord], text: str, names: str
) -> None:
    assert names_of(selection.matching(records, text)) == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_filter=4", "unknown key 'n_filter'; did you mean 'n_filters'?"),
        ("no_run_has_this val_los<3", "did you mean 'val_loss'?"),
        ("opt=3", "unknown key 'opt'"),
        ("Seed=0", "did you mean 'seed'?"),
        ("val_loss<O.3", "a number is expected after <"),
        ("n_filters=>4", "'n_filters=>4': => is not one of =, ==, !=, <, <=, >, >="),
        ("seed=0 val_loss <", "a number is expected after <"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(
    records: list[RunRecord], text: str, said: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        selection.matching(records, text)
    assert said in str(refusal.value)


def test_the_best_are_chosen_by_run_or_by_the_mean_over_seeds(
    records: list[RunRecord], tmp_path: Path
) -> None:
    folder = [str(tmp_path)]
    best, _ = selection.chosen(folder, best=2)
    assert names_of(best) == "r20 r10"  # the failed run has no place
    groups, _ = selection.chosen(folder, "state=finished", best=2, by_group=True)
    assert names_of(groups) == "r20 r10 r11"
    with pytest.raises(UsageError, match="none of 6 runs fits 'seed=7'"):
        selection.chosen(folder, "seed=7")


def test_the_index_knows_when_notes_change(
    records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FEWEST", 1)
    paths = [record.path for record in records]
    assert results.read_runs(paths)[5].tags == []
    assert (tmp_path / results.INDEX).exists()
    results.write_notes(records[5], "", ["new"])
    assert results.read_runs(paths)[5].tags == ["new"]


def test_columns_are_asked_for_by_name(records: list[RunRecord]) -> None:
    table = comparison.listing(records[:1], ["run", "lr", "val_loss", "tags", "note"])
    assert (
        comparison.as_csv(table)
        .splitlines()[1]
        .endswith(',0.1,0.4,"[""paper"", ""old""]",the good one')
    )
    for names in (["run", "lr"], ["lr"], ["lr", "run"]):
        assert comparison.listing(records, names, "lr").columns == ["run", "lr"]
    shown = comparison.as_text(comparison.listing(records))
    assert "paper, old  the good one" in shown and "problem" not in shown


def test_a_narrow_terminal_shows_what_tells_most(records: list[RunRecord]) -> None:
    for record in records:
        record.path = Path(record.path).name
    table = comparison.comparison(records, ["val_loss"])
    whole = comparison.as_text(table)
    width = max(map(len, whole.splitlines()))
    assert comparison.as_text(table, width) == whole
    for narrow in range(width - 1, 20, -7):
        *lines, note = comparison.as_text(table, narrow).splitlines()
        assert max(map(len, lines)) <= narrow
        shown = [name.strip() for name in lines[0].split("  ") if name]
        left_out = note.partition("wide: ")[2].partition(";")[0].split(", ")
        assert sorted([*shown, *left_out]) == sorted(table.columns)
        if narrow == width - 1:
            assert left_out == ["epoch"]  # the same in all rows
    assert shown[:2] == ["run", "state"]  # one has failed
    finished = comparison.comparison(records[:-1], ["val_loss"])
    assert comparison.as_text(finished, 20).splitlines()[0].split() == ["run", "val_loss", "best"]
    # Rows of several runs have no name, and are told apart by their settings.
    grouped = comparison.grouped(records[:-1], ["val_loss"])
    head = comparison.as_text(grouped, 60).splitlines()[0].split()
    assert {"n_filters", "dropout"} <= {*head} and "last" not in head
    # What does not fit makes room for what is narrower.
    wide = comparison.Table(["run", "best", "age"], [[n, "b" * 30 + n, n] for n in "xyz"])
    assert comparison.as_text(wide, 20).splitlines()[0].split() == ["run", "age"]
    many = comparison.Table(["run", *map(str, range(40))], [["a", *[10**9] * 40]] * 2)
    assert ", 11, 12, 27 more; name columns" in comparison.as_text(many, 20)


def test_a_paper_has_means_over_seeds_and_the_best_in_bold(
    records: list[RunRecord], tmp_path: Path
) -> None:
    finished = [record for record in records if record.state == "finished"]
    table, doubts = comparison.for_paper(records, [], ["n_filters"], "dropout")
    assert comparison.as_markdown(table).splitlines() == [
        "| n\\_filters | dropout=0.0 | dropout=0.5 |",
        "| ---: | ---: | ---: |",
        "| 4 | 0.4050 ± 0.0071 (2) |  |",
        "| 8 | 0.3050 ± 0.0071 (2) | **0.2 (1)** |",
        "",
        "val\\_loss",  # which no column says
    ]
    assert comparison.as_csv(table).startswith('n_filters,"val_loss, dropout=0.0 mean",')
    assert not doubts
    table, doubts = comparison.for_paper(finished[:4], [], ["n_filters"], "")
    latex = comparison.as_latex(table)
    assert r"8 & \textbf{0.3050 $\pm$ 0.0071} \\" in latex  # each is of two runs, ...
    assert latex.startswith(
        "% mean ± standard deviation (n - 1) over 2 runs\n"
    )  # ... which stands once
    assert r"n\_filters & val\_loss \\" in latex
    _, doubts = comparison.for_paper(records, [], ["opt.lr"], "")
    assert "also differ by n_filters, by_list, dropout, augmented; add" in doubts[0]
    table, _ = comparison.for_paper(records, [], ["by_list"], "by_list")
    assert table.columns == ["by_list", *(f"by_list=[{n}]" for n in range(3))]
    for record, accuracy in zip(finished, (0.5, 0.7, 0.8, 0.8, 0.6), strict=True):
        folder = Path(record.path, "eval")
        folder.mkdir()
        (folder / "test.json").write_text(json.dumps({"split": "test", "accuracy": accuracy}))
    tested = results.runs_matching([str(tmp_path)])[0]
    table, _ = comparison.for_paper(tested, [], ["n_filters", "dropout"], "")
    assert table.columns == ["n_filters", "dropout", "test_accuracy"]
    means = [(row[2].mean, row[2].is_best) for row in table.rows]
    assert means == [(0.6, False), (0.8, True), (0.6, False)]
    # Who has no such metric, or has failed, makes no row, and no mean that would be doubtful.
    (tmp_path / "r00" / "eval" / "test.json").unlink()
    some = results.runs_matching([str(tmp_path)])[0]
    table, doubts = comparison.for_paper(some, ["test_accuracy"], ["seed"], "n_filters")
    assert (len(table.rows), len(table.columns)) == (2, 3) and "dropout" in doubts[0]
    table, doubts = comparison.for_paper(some[:2], ["test_accuracy"], ["n_filters"], "")
    assert [row[1].num_runs for row in table.rows] == [1] and not doubts
    with pytest.raises(UsageError, match="no finished run has val_loss"):
        comparison.for_paper(records[-1:], [], ["seed"], "")


def runs(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bin" / "runs.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_notes_and_tags_are_kept_apart_from_what_the_run_says(
    records: list[RunRecord], tmp_path: Path
) -> None:
    def held() -> dict[str, Any]:
        return {p.name: p.read_bytes() for p in (tmp_path / "r11").iterdir()}

    before = held()
    assert runs("note", tmp_path / "r11", "odd \x1b[31m, <b>").returncode == 0
    assert runs("tag", tmp_path / "r11", "a", "b", "a").stdout.endswith("r11: a, b\n")
    assert runs("tag", tmp_path, "all", "--remove", "a").returncode == 0
    after = held()
    assert json.loads(after.pop("notes.json")) == {
        "note": "odd \x1b[31m, <b>",
        "tags": ["b", "all"],
    }
    assert after == before
    asked = ("--columns=tags", "--sort=-n_filters", "--format=csv", "--best=1")
    compared = runs("compare", tmp_path, *asked).stdout.splitlines()
    assert compared[0] == "run,tags,n_filters" and compared[1].endswith('r20,"[""all""]",8')
    listed = runs("list", tmp_path, "--where", "tag=b")
    assert listed.stdout.splitlines()[1].endswith("  b, all  odd \\x1b[31m, <b>")
    for words, said in (
        (("tag", tmp_path, "a b"), "'a b' cannot be a tag"),
        (("note", tmp_path, "x"), "holds 6 runs; name one of them"),
        (("list", tmp_path, "--where", "tags=c"), "none of 6 runs fits 'tags=c'"),
        (("compare", tmp_path, "--by=seed"), "--by goes with --rows"),
    ):
        done = runs(*words)
        assert (done.returncode, done.stdout) == (2, "") and said in done.stderr


def test_the_learning_curve_is_drawn_for_whatever_the_history_holds(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "step": 3, "learning_rate": 0.1, "loss": 1.0}]
    for history, best in ((rows, None), ([rows[0] | {"val_loss": 2.0, "f1": float("nan")}], 0)):
        figures.draw_learning_curve(tmp_path, history, best)
        assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_notebook_runs_on_a_run(
    quick_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--num_epochs=2", "--n_filters=4", "--n_layers=1")
    assert quick_command("bin/train.py", "digits", tmp_path / "run", *arguments).returncode == 0
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": ROOT}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)


def test_epochs_are_read_as_they_are_written_or_from_0(tmp_path: Path) -> None:
    text = "epoch,step,loss\n1,4,0.5\n2,8,0.25\n"
    (tmp_path / "history.csv").write_text(text)
    assert [row["epoch"] for row in results.rows_in(tmp_path)] == ["1", "2"]
    assert list(results.load_history(tmp_path).index) == [1, 2]
    assert [row["epoch"] for row in results.read_history(tmp_path)] == [0, 1]


def test_colours_are_for_terminals_only(
    records: list[RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = comparison.comparison(records, ["val_loss"])
    plain = comparison.as_text(table)
    assert comparison.for_terminal(table, True) == plain, "stdout is none"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = comparison.for_terminal(table, True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    place = table.columns.index("val_loss best")
    best = min(row[place] for row in table.rows if row[place] is not None)
    assert f"{best:.4g}\x1b[0m" in coloured
    assert re.search(r"\x1b\[32mfinished *\x1b\[0m", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert comparison.for_terminal(table, True) == plain
