"""What the commands say of sixty real runs is what their files say, read by another path."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from fault_lab import INTERRUPTED, KILLED, Lab, two_at_once
from slurm_cluster import wait_for

pytestmark = pytest.mark.slow

FILTERS, RATES, SEEDS = (2, 3), (0.01, 0.003, 0.001), range(9)
SMALL = (
    *("root", "--n_layers=1", "--batch_size=126", "--num_epochs=2", "--no_tensorboard"),
    "--threads=1",
)
HOSTILE = """it's "<script>alert(1)<!--" & 100 % $x_1$ | é\t"""


@pytest.fixture(scope="module")
def grid(lab: Lab) -> Iterator[Path]:
    """A project whose results/ has runs of all kinds and states."""
    results = lab.project / "results"
    every = [(n, rate, seed) for n in FILTERS for rate in RATES for seed in SEEDS]
    tasks = [functools.partial(train, lab, results / name_of(*one), *one) for one in every]
    killed = {"at": "step", "call": 12, "when": "after"}
    after_a_commit = {"at": "views", "call": 1, "when": "after"}
    harmed = [
        (f"killed_{seed}", seed, KILLED, {"faults": [after_a_commit]}) for seed in (90, 91, 92)
    ]
    stop = killed | {"number": signal.SIGTERM}
    harmed.append(("stopped", 93, INTERRUPTED, {"faults": [stop]}))
    for name, seed, code, faults in harmed:
        tasks.append(functools.partial(train, lab, results / name, 2, 0.01, seed, code, **faults))
    tasks.append(functools.partial(train, lab, results / "diverged", 2, 1e38, 94, 1))
    tasks.append(functools.partial(train, lab, results / HOSTILE, 2, 0.01, 95))
    two_at_once(tasks)
    frozen = killed | {"number": signal.SIGSTOP}
    words = (*SMALL, "--n_filters=2", "--learning_rate=0.01", "--seed=96")
    alive = lab.start(results / "alive", words, faults=[frozen], most_steps=1)
    # By hand: a config that is torn, a history that is being written, a run of an older version.
    for name in ("torn", "writing", "older"):
        shutil.copytree(results / name_of(2, 0.01, 0), results / name)
    config = results / "torn" / "config.json"
    config.write_text(config.read_text()[:100])
    with open(results / "writing" / "history.csv", "a") as file:
        file.write("2,30,0.01,0.5")
    for name in ("run.lock", "loop_state.pkl", "timing.csv"):
        (results / "older" / name).unlink()
    meta = json.loads((results / "older" / "meta.json").read_text())
    older = {key: meta[key] for key in ("status", "attempts")}
    (results / "older" / "meta.json").write_text(json.dumps(older))
    (results / "notes").mkdir()
    (results / "notes" / "ideas.txt").write_text("no run")
    wait_for(Path(f"{alive.terminal}.signal").exists)
    try:
        yield lab.project
    finally:
        os.kill(alive.pid, signal.SIGKILL)
        alive.wait()


def name_of(n_filters: int, rate: float, seed: int) -> str:
    return f"n{n_filters}_lr{rate}_s{seed}"


def train(
    lab: Lab, path: Path, n: int, rate: float, seed: int, code: int = 0, **faults: Any
) -> None:
    words = (*SMALL, f"--n_filters={n}", f"--learning_rate={rate}", f"--seed={seed}")
    done = lab.attempt(path, words, **(faults and {"most_steps": 1}), **faults)
    assert done.code == code, done.said


def look(project: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Call bin/runs.py, which must end with the code and without a traceback."""
    done = run(sys.executable, "bin/runs.py", *words, cwd=project, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def lines_of(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line) for line in text.splitlines()]


def history_of(project: Path, path: str) -> list[dict[str, float]]:
    """The history, read with nothing of the project's."""
    with open(project / path / "history.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [{key: float(cell) for key, cell in row.items() if cell} for row in rows]


def best_of(project: Path, path: str, metric: str) -> float:
    choose = max if "accuracy" in metric else min
    return choose(row[metric] for row in history_of(project, path))


# ---- list ----------------------------------------------------------------------------------------


def test_list_says_what_each_run_is(grid: Path) -> None:
    header, *lines = lines_of(look(grid, "list", "results").stdout)
    assert " ".join(header[:9]) == "run state epoch step best age duration config commit"
    rows = {line[0].removeprefix("results/"): line for line in lines}
    names = {path.name for path in (grid / "results").iterdir() if (path / "config.json").exists()}
    assert len(names) >= 63
    shown = {name.replace("\t", "\\t") for name in names}
    assert {re.sub(" +", " ", name) for name in rows} == shown
    states = {name: row[1] for name, row in rows.items() if row[1] != "finished"}
    assert states == {
        **{f"killed_{seed}": "died" for seed in (90, 91, 92)},
        **{"stopped": "interrupted", "diverged": "failed", "alive": "running", "torn": "broken"},
    }
    for name in (name_of(3, 0.003, 4), "stopped", "killed_90"):
        history = history_of(grid, f"results/{name}")
        best = min(history, key=lambda row: row["val_loss"])
        assert rows[name][2] == f"{len(history)}/2", name
        assert rows[name][4] == f"val_loss {best['val_loss']:.4g} ({best['epoch']:.0f})", name
        assert rows[name][7] == "root"
    assert rows[name_of(3, 0.003, 4)][3] == "20/20"
    assert rows["stopped"][3] == "12/20"
    commit = run("git", "rev-parse", "HEAD", cwd=grid).stdout
    assert rows["stopped"][8] == f"{commit[:8]}+"  # the fault tests' files are not committed
    assert "cannot read results/torn/config.json" in rows["torn"][-1]
    assert "loss" in rows["diverged"][-1]


def test_list_sorts_numbers_as_numbers_and_names_as_people_do(grid: Path) -> None:
    def losses(*words: str) -> list[float]:
        paths = [line[0] for line in lines_of(look(grid, "list", "results", *words).stdout)]
        known = [path for path in paths if (grid / path / "history.csv").is_file()]
        return [best_of(grid, path, "val_loss") for path in known if history_of(grid, path)]

    rising = losses("--sort=best")
    assert len(rising) > 55
    assert rising == sorted(rising)
    assert losses("--sort=-best") == rising[::-1]
    paths = [line[0] for line in lines_of(look(grid, "list", "results").stdout)[1:]]
    backwards = lines_of(look(grid, "list", "results", "--sort=-run").stdout)[1:]
    assert [line[0] for line in backwards] == paths[::-1]
    by_epoch = table_of(grid, "compare", "results", "--sort=epoch", "--format=csv")
    epochs = [int(row["epoch"]) for row in by_epoch]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) > 2
    names = [line[0] for line in lines_of(look(grid, "list", "results/n2*_s?").stdout)]
    assert names[1:10] == [f"results/{name_of(2, 0.001, seed)}" for seed in SEEDS]


def test_list_watches_until_it_is_told_to_stop(grid: Path) -> None:
    master, slave = pty.openpty()
    words = (sys.executable, "bin/runs.py", "list", "results/alive", "--watch")
    process = subprocess.Popen(words, cwd=grid, stdout=slave, stderr=subprocess.PIPE)
    os.close(slave)
    said = b""
    while said.count(b"running") < 2:
        said += os.read(master, 10_000)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    os.close(master)


# ---- compare -------------------------------------------------------------------------------------


def table_of(project: Path, *words: object) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(look(project, *words).stdout)))


def test_compare_shows_what_differs_and_the_figures_of_the_files(grid: Path) -> None:
    rows = table_of(grid, "compare", "results/n*", "results/stopped", "--format=csv")
    assert len(rows) == 55
    metrics = ("loss", "accuracy", "val_loss", "val_accuracy")
    figures = [f"{metric} {which}" for metric in metrics for which in ("best", "last")]
    settings = [key for key in rows[0] if key not in ("run", "state", "epoch", *figures)]
    assert sorted(settings) == ["learning_rate", "n_filters", "seed"]
    for row in rows:
        config = json.loads((grid / row["run"] / "config.json").read_text())
        assert {key: json.loads(row[key]) for key in settings} == {k: config[k] for k in settings}
        history = history_of(grid, row["run"])
        for metric in metrics:
            assert float(row[f"{metric} best"]) == best_of(grid, row["run"], metric)
            assert float(row[f"{metric} last"]) == history[-1][metric]
    assert [row["state"] for row in rows].count("interrupted") == 1


def test_groups_have_mean_and_standard_deviation_of_the_finished_runs(grid: Path) -> None:
    words = ("compare", "results", "--group", "--metric=val_loss", "--format=json")
    found = json.loads(look(grid, *words).stdout)
    for n in FILTERS:
        for rate in RATES:
            (row,) = [
                row
                for row in found["rows"]
                if (row["n_filters"], row["learning_rate"]) == (n, rate)
            ]
            paths = [path for path in grid.glob("results/*") if own(path) == (n, rate)]
            finished = [path for path in paths if state(path) == "finished"]
            bests = [best_of(grid, str(path.relative_to(grid)), "val_loss") for path in finished]
            assert row["runs"] == len(paths) >= 9
            assert row["val_loss best count"] == len(bests) >= 9
            assert math.isclose(row["val_loss best mean"], statistics.mean(bests))
            assert math.isclose(row["val_loss best std"], statistics.stdev(bests))
    number = len(list(grid.glob("results/*/config.json")))
    assert sum(row["runs"] for row in found["rows"]) == number
    torn = [row["state"] for row in found["rows"] if "torn" in row["state"]]
    assert torn == ["broken: results/torn"]
    assert "3 died" in next(r["state"] for r in found["rows"] if r["runs"] > 15)


def own(path: Path) -> tuple[Any, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return (None, None)
    return (config["n_filters"], config["learning_rate"])


def state(path: Path) -> str:
    return json.loads((path / "meta.json").read_text())["status"]


def test_every_form_of_the_table_is_sound(grid: Path, tmp_path: Path) -> None:
    words = ("compare", "results/[!a]*", "--metric=val_loss", "--sort=val_loss")
    number = len(list(grid.glob("results/[!a]*/config.json")))
    text = look(grid, *words).stdout
    assert len(text.splitlines()) == number + 1
    assert "\t" not in text
    markdown = look(grid, *words, "--format=markdown").stdout
    assert len(markdown.splitlines()) == number + 2
    assert "<script" not in markdown
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()}) == 1
    latex = look(grid, *words, "--format=latex").stdout
    (line,) = [line for line in latex.splitlines() if "alert" in line]
    assert r"{\ttfamily\char34}\textless{}script" in line
    assert r"\& 100 \% \$x\_1\$" in line
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {body[0].count("&")}
    rows = table_of(grid, *words, "--format=csv")
    assert f"results/{HOSTILE}" in [row["run"] for row in rows]
    losses = [float(row["val_loss best"]) for row in rows if row["val_loss best"]]
    assert losses == sorted(losses)
    table = tmp_path / "a table.tex"
    look(grid, *words, "--format=latex", "-o", table)
    assert table.read_text() == latex
    beside = json.loads((tmp_path / "a table.tex.json").read_text())
    assert len(beside["runs"]) == number
    assert "--format=latex" in beside["command"]
    assert beside["project_commit"] == run("git", "rev-parse", "HEAD", cwd=grid).stdout.strip()


# ---- diff ----------------------------------------------------------------------------------------


def test_diff_shows_config_command_packages_and_code(grid: Path) -> None:
    one, other = f"results/{name_of(2, 0.01, 1)}", "results/older_code"
    shutil.copytree(grid / one, grid / other)
    (grid / other / "code.zip").unlink()  # perhaps another name of the first one's
    with zipfile.ZipFile(grid / one / "code.zip") as archive:
        code = {name: archive.read(name) for name in archive.namelist()}
    models = code["src/models.py"].replace(b"import keras", b"import keras  # changed", 1)
    with zipfile.ZipFile(grid / other / "code.zip", "w") as archive:
        for name, content in {**code, "src/models.py": models, "src/added.py": b"x = 1\n"}.items():
            archive.writestr(name, content)
    meta = json.loads((grid / other / "meta.json").read_text())
    meta["packages"]["numpy"] = "1.0"
    (grid / other / "meta.json").write_text(json.dumps(meta))
    try:
        said = look(grid, "diff", one, other).stdout
        assert "config: the same" in said
        assert re.search(r"^  numpy: \S+ -> \"1\.0\"$", said, re.MULTILINE)
        shown = said[said.index("\ncode:") :].partition("\n")[2].partition("\n")[2]
        (grid / "patch").write_text(shown)
        changed = grid / "changed"
        shutil.unpack_archive(grid / one / "code.zip", changed)
        run("patch", "-p3", "-i", grid / "patch", cwd=changed)
        assert (changed / "src" / "models.py").read_bytes() == models
        assert (changed / "src" / "added.py").read_text() == "x = 1\n"
    finally:
        shutil.rmtree(grid / other)
    said = look(grid, "diff", one, f"results/{name_of(3, 0.01, 2)}").stdout
    assert "  n_filters: 2 -> 3\n  seed: 1 -> 2" in said
    assert "\ncode: the same" in said


# ---- the index -----------------------------------------------------------------------------------


def test_the_index_is_a_cache_and_nothing_else(grid: Path) -> None:
    words = ("compare", "results", "--format=csv")
    index = grid / "results" / ".runs.json"
    first = look(grid, *words).stdout
    assert index.exists()
    assert look(grid, *words).stdout == first
    index.unlink()
    assert look(grid, *words).stdout == first
    index.write_bytes(b"no index" * 1000)
    assert look(grid, *words).stdout == first
    look(grid, *words)
    # An entry is used while its stamp is right, ...
    name = name_of(3, 0.01, 8)
    entries = json.loads(index.read_text())
    entries[name][1]["state"] = "planted"
    index.write_text(json.dumps(entries))
    assert "planted" in look(grid, *words).stdout
    # ... and not when a file has changed, be it to another of the same size.
    changed = grid / "results" / name / "history.csv"
    before = changed.read_text()
    try:
        lines = before.splitlines()
        cells = lines[-1].split(",")
        place = lines[0].split(",").index("val_loss")
        cells[place] = f"{1e-07:.{len(cells[place]) - 6}e}"
        changed.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
        rows = table_of(grid, *words)
        (row,) = [row for row in rows if row["run"].endswith(name)]
        assert len(changed.read_text()) == len(before)
        assert float(row["val_loss last"]) == 1e-07
        assert row["state"] == "finished"
    finally:
        changed.write_text(before)
    assert look(grid, *words).stdout == first


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("list", "results/notes"), "'results/notes' holds no run"),
        (("list", ""), "nothing matches ''"),
        (("list", "resluts"), "did you mean 'results'?"),
        (("compare", "results/lr_*"), "nothing matches 'results/lr_*'"),
        (("compare", "results", "--metric=val_los"), "did you mean 'val_loss'?"),
        (("compare", "results", "--sort=n_filter"), "did you mean 'n_filters'?"),
        (("compare", "results", "--format=word"), "invalid choice: 'word'"),
        (("compare", "results", "-o", "no/such/table.csv"), "no/such/table.csv"),
        (("list", "results", "--sort=speed"), "unknown key 'speed'"),
        (("diff", "results", "results/stopped"), "name one of them"),
    ],
)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], said: str, grid: Path) -> None:
    done = look(grid, *words, code=2)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_what_is_wrong_with_some_leaves_the_rest_right(grid: Path) -> None:
    good = f"results/{name_of(2, 0.01, 1)}"
    done = look(grid, "compare", good, "results/notes", "results/torn", code=1)
    assert [line[:2] for line in lines_of(done.stdout)][1:] == [
        [good, "finished"],
        ["results/torn", "broken"],
    ]
    assert len(done.stderr.splitlines()) == 2
    assert "'results/notes' holds no run" in done.stderr
    writing = table_of(grid, "compare", "results/writing", good, "--format=csv")
    assert [row["epoch"] for row in writing] == ["2", "2"]
    done = look(grid, "diff", good, "results/torn")
    assert "cannot read results/torn/config.json" in done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_files_that_hold_anything_at_all_harm_no_other_run(grid: Path) -> None:
    odd = grid / "results" / "odd"
    good = grid / "results" / name_of(2, 0.01, 1)
    meta = json.loads((good / "meta.json").read_text())
    later = {"attempts": [{"start": "yesterday"}]}
    of_another_time = {"attempts": [{"start": "2026-05-01T10:00:00"}]}
    harm: dict[str, dict[str, bytes]] = {
        "a": {"meta.json": json.dumps(meta | later).encode()},
        "b": {"meta.json": json.dumps(meta | of_another_time | {"git": {"commit": 5}}).encode()},
        "c": {"loop_state.pkl": b"\x80\x04]."},
        "d": {"loop_state.pkl": b"\x80\x04cos\nsystem\n."},
        "e": {"history.csv": b"epoch,step,loss\n" + b"\0" * 200_000 + b"\n"},
        "f": {"history.csv": (good / "history.csv").read_bytes() + b"\n"},
        "g": {"config.json": b'{"num_epochs": "many", "train": 3}'},
        "h\x1b[31m": {"config.json": b"[]"},
    }
    for name, files in harm.items():
        shutil.copytree(good, odd / name)
        for file, content in files.items():
            (odd / name / file).write_bytes(content)
    (odd / "i").mkdir()
    (odd / "i" / "run.lock").touch()
    (odd / "j").symlink_to(good.absolute())
    try:
        _, *rows = lines_of(look(grid, "list", "results/odd").stdout)
        states = {row[0].removeprefix("results/odd/"): row[1] for row in rows}
        finished = dict.fromkeys("bcdefgj", "finished")
        assert states == finished | {"a": "broken", "h\\x1b[31m": "broken", "i": "new"}
        by_name = {row[0][-1]: row for row in rows}
        assert by_name["f"][2] == "2/2"
        notes = {"c": "loop_state", "d": "os.system", "e": "history", "g": "conf"}
        for name, said in notes.items():
            assert said in by_name[name][-1], by_name[name]
        done = look(grid, "compare", "results/odd", "--format=csv")
        assert len(done.stdout.splitlines()) == 11
        assert "\x1b" not in done.stderr
        for command, output in (("plot", "odd.png"), ("report", "odd.html")):
            words = (sys.executable, f"bin/{command}.py", "results/odd", "-o", output)
            done = run(*words, cwd=grid, check=False)
            assert "Traceback" not in done.stderr, done.stderr
            assert (grid / output).stat().st_size > 10_000
    finally:
        shutil.rmtree(odd)
