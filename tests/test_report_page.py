"""The report in a real browser, from the file system; what it shows is compared with the files."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TEMPLATE_FOLDER
from conftest import run as run_command
from fault_lab import INTERRUPTED, KILLED, SMALL, Lab, two_at_once

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
CLIPBOARD: dict[str, Any] = {"permissions": ["clipboard-read", "clipboard-write"]}
EPOCHS = "--num_epochs=3"
NOTHING = "\u2013"  # stands in the page where there is no value
HOSTILE_NAME = '"><img src=x onerror=window.struck=1> <script>window.struck=1 & ünï 名 #?%41'
HOSTILE_VALUE = "</script><script>window.struck=1</script>\"'&amp;\u2028 --> ]]>"
HOSTILE = {"dataset": HOSTILE_VALUE, HOSTILE_VALUE: 1}


# ---- runs, and what their files say --------------------------------------------------------------


@pytest.fixture(scope="module")
def results(lab: Lab) -> Path:
    """Runs of every kind: finished, failed, died, interrupted, broken, and one with a bad name."""
    folder = lab.project / "results"

    def train(name: str, code: int, *words: str, **faults: Any) -> None:
        done = lab.attempt(folder / name, (*SMALL, "--batch_size=126", EPOCHS, *words), **faults)
        assert done.code == code, done.said

    def killed(number: int) -> dict[str, Any]:
        harm = {"at": "step", "call": 25, "when": "before", "number": number}
        return {"faults": [harm], "most_steps": 1}

    two_at_once(
        [
            lambda: train("a", 0, "--n_filters=10"),
            lambda: train("c", 0, "--n_filters=2", "--seed=1"),
            lambda: train("diverged", 1, "--optimizer=sgd", "--learning_rate=1e9"),
            lambda: train("killed", KILLED, **killed(9)),
            lambda: train("stopped", INTERRUPTED, **killed(15)),
        ]
    )
    done = lab.start(folder / "c", (), program="bin/evaluate.py").wait()
    assert done.code == 0, done.said
    copy_run(folder / "c", folder / HOSTILE_NAME, dropout=math.nan, seed=2**70, **HOSTILE)
    copy_run(folder / "c", folder / "b", seed=0)
    (folder / "b" / "history.csv").write_text((folder / "a" / "history.csv").read_text())
    copy_run(folder / "a", folder / "torn")
    os.truncate(folder / "torn" / "config.json", 200)
    notes = {"note": f"'odd' {HOSTILE_VALUE}", "tags": ["good", "new"]}
    (folder / "c" / "notes.json").write_text(json.dumps(notes))
    return folder


def copy_run(source: Path, copy: Path, **config: Any) -> None:
    """Copy a run, as if it had another config."""
    shutil.copytree(source, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def write_report(project: Path, *arguments: object) -> str:
    return run_command(sys.executable, "bin/report.py", *arguments, cwd=project).stdout


@pytest.fixture(scope="module")
def page_path(lab: Lab, results: Path) -> Path:
    """A report that lies elsewhere than the runs."""
    path = lab.project / "a folder" / "page.html"
    path.parent.mkdir()
    said = write_report(lab.project, "results", "-o", path)
    assert said == f"{path}: 8 runs, {path.stat().st_size / 1e6:.2f} MB\n"
    assert os.listdir(path.parent) == ["page.html"]
    return path


def runs_of(results: Path) -> list[Path]:
    return [path for path in results.iterdir() if path.is_dir()]


def history_of(run: Path) -> list[dict[str, str]]:
    if not (run / "history.csv").exists():  # its first epoch was not done
        return []
    with open(run / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def setting_of(run: Path, key: str) -> Any:
    try:
        return json.loads((run / "config.json").read_text()).get(key)
    except ValueError:
        return None


def meta_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "meta.json").read_text())


# ---- the browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is needed to look at the report")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Opener = Callable[..., Any]


@pytest.fixture
def look(browser: Any) -> Iterator[Opener]:
    """Open a page of the file system; in the end there must have been no error and no request."""
    contexts, heard = [], []

    def opened_at(path: Path, viewport: dict[str, int] = DESKTOP, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        address = path.as_uri()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on(
            "request",
            lambda request: (
                heard.append(f"asks for {request.url}")
                if request.url.split("#")[0] != address
                and not re.fullmatch(r"file:.*/eval/\w+\.png", request.url)
                else None
            ),
        )
        page.goto(address)
        return page

    yield opened_at
    for context in contexts:
        context.close()
    assert heard == []


def runs_in(page: Any) -> list[str]:
    """The runs in the table, in its order."""
    return page.eval_on_selector_all(
        "#runs tbody tr:not([hidden])", "rows => rows.map(r => r.dataset.run)"
    )


def cell(page: Any, run: Path, column: str) -> str:
    """What stands in a cell of the table."""
    script = """([run, column]) => {
      const at = [...document.querySelectorAll("#runs thead th")]
        .findIndex((th) => th.dataset.column === column);
      const row = [...document.querySelectorAll("#runs tbody tr")]
        .find((tr) => tr.dataset.run === run);
      return row.cells[at].textContent;
    }"""
    return page.evaluate(script, [f"results/{run.name}", column])


def row(page: Any, run: Path) -> Any:
    name = json.dumps(f"results/{run.name}", ensure_ascii=False)
    return page.locator(f"#runs tbody tr[data-run={name}]")


def test_the_table_says_what_the_files_say(look: Opener, page_path: Path, results: Path) -> None:
    page = look(page_path)
    assert page.title() == page.inner_text("h1") == "8 runs in results"
    assert sorted(runs_in(page)) == sorted(f"results/{run.name}" for run in runs_of(results))
    states = {"diverged": "failed", "killed": "died", "stopped": "interrupted", "torn": "broken"}
    for run in runs_of(results):
        assert cell(page, run, "state") == states.get(run.name, "finished")
        rows = history_of(run)
        assert cell(page, run, "epoch").split("/")[0] == str(len(rows))
        losses = [float(line["val_loss"]) for line in rows]
        if losses:
            assert float(cell(page, run, "best val_loss")) == pytest.approx(min(losses), rel=1e-3)
            best = max(float(line["val_accuracy"]) for line in rows)
            assert float(cell(page, run, "best val_accuracy")) == pytest.approx(best, rel=1e-3)
        if run.name in ("b", "c"):
            test = json.loads((run / "eval" / "test.json").read_text())
            assert float(cell(page, run, "test loss")) == pytest.approx(test["loss"], rel=1e-3)
        if run.name not in ("torn", HOSTILE_NAME):
            assert cell(page, run, "setting n_filters") == str(setting_of(run, "n_filters"))
    # Nothing but what differs is a column; a run whose config cannot be read has none.
    assert page.locator("th[data-column='setting n_layers']").count() == 0
    assert cell(page, results / "torn", "setting n_filters") == NOTHING
    # It says of itself what made it.
    footer = page.inner_text("footer")
    assert "python bin/report.py results -o" in footer
    commit = run_command("git", "rev-parse", "HEAD", cwd=page_path.parent, check=False)
    assert commit.returncode or commit.stdout.strip() in footer
    provenance = json.loads(page.inner_text("#data") or page.text_content("#data"))["provenance"]
    assert {entry["path"] for entry in provenance["runs"]} == set(runs_in(page))


def expected(run: Path) -> dict[str, Any]:
    """What columns are sorted by."""
    rows, attempts = history_of(run), meta_of(run)["attempts"]
    values = {
        "name": run.name,
        "epoch": len(rows),
        "best val_loss": min((float(line["val_loss"]) for line in rows), default=None),
        "last accuracy": float(rows[-1]["accuracy"]) if rows else None,
        "setting n_filters": setting_of(run, "n_filters"),
        "start": attempts[0]["start"],
    }
    if run.name != "killed":  # how long a run was alive that was killed is not in its meta.json
        (start, end) = (datetime.fromisoformat(attempts[0][key]) for key in ("start", "end"))
        values["duration"] = (end - start).total_seconds()
    return values


def in_order(values: list[Any], descending: bool) -> bool:
    there = [value for value in values if value is not None]
    if values != there + [None] * (len(values) - len(there)):
        return False  # what is not there comes last
    return all(a >= b if descending else a <= b for a, b in pairwise(there))


def test_a_click_on_a_heading_sorts(look: Opener, page_path: Path, results: Path) -> None:
    page = look(page_path)
    page.click("summary:text-is('Columns')")
    page.get_by_label("accuracy, last", exact=True).check()
    page.keyboard.press("Escape")
    assert page.get_attribute("th[data-column='best val_loss']", "aria-sort") == "ascending"
    for column in expected(results / "a"):
        heading = page.locator(f"th[data-column='{column}']")
        for how in ("click", "keyboard"):
            if how == "click":
                heading.locator("button").click()
            else:
                heading.locator("button").focus()
                page.keyboard.press("Enter")
            direction = heading.get_attribute("aria-sort")
            assert page.locator("th[aria-sort$=scending]").count() == 1
            runs = [results / name.removeprefix("results/") for name in runs_in(page)]
            values = [expected(run).get(column, ...) for run in runs]
            values = [value for value in values if value is not ...]
            if column == "name":
                plain = [value for value in values if value.isalpha()]
                assert in_order(plain, direction == "descending")
            else:
                assert in_order(values, direction == "descending"), (column, direction, values)
        assert len(runs) == 8
    # The best come first at the first click, whichever way is better.
    page.click("th[data-column='best val_accuracy'] button")
    assert page.get_attribute("th[data-column='best val_accuracy']", "aria-sort") == "descending"


def test_a_filter_takes_words_and_conditions(
    look: Opener, lab: Lab, page_path: Path, results: Path
) -> None:
    page = look(page_path)
    best = {run.name: expected(run)["best val_loss"] for run in runs_of(results)}
    middle = sorted(value for value in best.values() if value is not None)[2]
    filters = {
        "": {run.name for run in runs_of(results)},
        "KILLED": {"killed"},
        "state=finished n_filters=2": {"b", "c", HOSTILE_NAME},
        "n_filters=1": set(),  # not those with 10
        "n_filters>2": {"a"},
        "n_filters == 2 seed = 1": {"c"},
        "test_loss>0": {"b", "c", HOSTILE_NAME},  # those that were evaluated
        "seed=1 state!=broken": {"c"},
        f"val_loss<{middle}": {n for n, v in best.items() if v is not None and v < middle},
        "finished struck": {HOSTILE_NAME, "c"},  # by its name, and by its note
        '"src=x onerror"': {HOSTILE_NAME},
        "loss is": {"diverged"},  # its error
        "tag=good": {"c"},
        "'odd'": {"c"},  # its note
        "batch_size=126 name=c": {"c"},  # which is the same in all runs
        "dataset=digits best>0 run=results/a": {"a"},
        "nothing has this": set(),
        "(.*": set(),
    }
    for text, names in filters.items():
        page.fill("#filter", text)
        assert {name.removeprefix("results/") for name in runs_in(page)} == names, text
        assert page.is_visible("#nothing") == (not names)
        assert page.inner_text("#count").startswith(str(len(names)))
        # What the page takes, the commands take.
        words = ("compare", "results", "--columns=state", "--format=json", "--where", text)
        said = run_command(sys.executable, "bin/runs.py", *words, cwd=lab.project, check=False)
        found = json.loads(said.stdout)["rows"] if names else []
        assert {row["run"].removeprefix("results/") for row in found} == names, text
        assert said.returncode == (0 if names else 2)
    for text, wrong in {
        "n_filter>1": "“n_filter” is unknown; did you mean “n_filters”?",
        "val_loss<O.3": "a number is expected after <",
        "n_filters=>2": "=> is not one of =, ==, !=",
    }.items():
        page.fill("#filter", text)
        assert wrong in page.inner_text("#nothing") and not runs_in(page)
    # The address keeps it, also with a run that is looked at.
    page.fill("#filter", "state=finished n_filters=2")
    row(page, results / "c").locator("a.run").click()
    wait_for(page, lambda: "?" in page.url)
    again = look(page_path)
    again.goto(page.url)
    again.reload()
    assert again.input_value("#filter") == "state=finished n_filters=2"
    assert len(runs_in(again)) == 3
    assert again.locator("#details h2").inner_text() == "c"
    page.keyboard.press("Escape")
    page.fill("#filter", "")
    page.click("#states button:has-text('1 failed')")
    assert runs_in(page) == ["results/diverged"]
    page.click("#states button:has-text('1 failed')")
    assert len(runs_in(page)) == 8


def legend(page: Any) -> dict[str, str]:
    """The values in the legend by run, and what they are."""
    script = """() => Object.fromEntries([
      ["", document.querySelector("#legend .head").lastChild.textContent],
      ...[...document.querySelectorAll("#legend li")].map((item) =>
        [item.title.split(": ")[0], item.querySelector(".value").textContent])])"""
    return page.evaluate(script)


def picture_of(page: Any) -> str:
    return page.evaluate("document.querySelector('#chart canvas').toDataURL()")


def test_curves_are_chosen_and_read(look: Opener, page_path: Path, results: Path) -> None:
    page = look(page_path)
    rows = {run.name: history_of(run) for run in runs_of(results)}
    assert set(legend(page)) == {"", *(f"results/{name}" for name in rows if rows[name])}
    page.click("#choose-none")
    assert legend(page) == {"": "last"}
    for name in ("a", "b"):
        row(page, results / name).locator("input").check()
    assert "n_filters=10" in page.inner_text("#legend"), "what tells them apart"
    assert "seed" not in page.inner_text("#legend"), "what does not"
    blank = picture_of(page)
    for metric in ("val_loss", "accuracy", "learning_rate"):
        page.select_option("#metric", metric)
        page.locator("#chart").scroll_into_view_if_needed()
        frame = page.locator("#chart").bounding_box()
        seen = set()
        for share in (0.12, 0.5, 0.97):
            place = frame["x"] + share * frame["width"], frame["y"] + frame["height"] / 2
            page.mouse.move(*place)
            values = legend(page)
            epoch = int(values.pop("").removeprefix("epoch "))
            seen.add(epoch)
            for name in ("a", "b"):
                value = float(rows[name][epoch - 1][metric])
                assert float(values[f"results/{name}"]) == pytest.approx(value, rel=1e-3)
        assert seen == {1, 2, 3}
        page.mouse.move(5, 5)
        assert legend(page)[""] == "last"
    page.focus("#chart")
    page.keyboard.press("ArrowRight")
    assert legend(page)[""] == "epoch 1"

    page.select_option("#metric", "val_loss")
    pictures = {blank, picture_of(page)}
    page.check("#log")
    pictures.add(picture_of(page))
    page.fill("#smoothing", "0.9")
    pictures.add(picture_of(page))
    page.uncheck("#log")
    pictures.add(picture_of(page))
    assert len(pictures) == 4  # the first two are of the same
    page.click("#runs thead input")
    assert len(legend(page)) == 1 + 8
    assert legend(page)["results/diverged"] == NOTHING


def test_a_run_has_details(look: Opener, lab: Lab, page_path: Path, results: Path) -> None:
    page = look(page_path, **CLIPBOARD)
    run = results / "c"
    row(page, run).locator("td").nth(1).click()
    panel = page.locator("#details")
    assert meta_of(run)["command"]["line"] in panel.inner_text()
    assert f"'odd' {HOSTILE_VALUE}" in panel.text_content()
    assert cell(page, run, "tags") == "good, new"
    page.click("#details .command button")
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "python bin/reproduce.py results/c"
    done = run_command(sys.executable, *shlex.split(copied)[1:], "--epochs=1", cwd=lab.project)
    assert "identical bit for bit" in done.stdout
    terms = panel.locator("dl.settings").first.locator("dt, dd").all_inner_texts()
    settings = dict(zip(terms[::2], terms[1::2], strict=True))
    assert settings["n_filters"] == "2"
    assert "n_layers" not in settings
    shared = panel.locator("details dl.settings dt").all_text_contents()
    assert set(shared) | set(settings) >= set(json.loads((run / "config.json").read_text())) - {
        HOSTILE_VALUE
    }

    # Links lead where they say, from where the page lies.
    links = panel.locator(".links a")
    names = links.all_inner_texts()
    assert {"folder", "history.csv", "stdout.txt", "learning_curve.png", "meta.json"} <= set(names)
    for link in links.all():
        href = link.get_attribute("href")
        target = Path(os.path.normpath(page_path.parent / urllib.parse.unquote(href)))
        wanted = run if link.inner_text() == "folder" else run / link.inner_text()
        assert target == wanted
        assert target.exists()

    pictures = panel.locator("img")
    shown = {picture.get_attribute("alt") for picture in pictures.all()}
    assert shown == {"confusion matrix", "examples"}
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        page.wait_for_function(
            "picture => picture.naturalWidth > 500", arg=picture.element_handle()
        )

    page.keyboard.press("Escape")
    assert panel.is_hidden()
    row(page, results / "diverged").locator("a.run").click()
    assert meta_of(results / "diverged")["attempts"][-1]["error"] in panel.inner_text()
    # The address names the run, so that it can be shown to others.
    again = look(page_path)
    again.goto(page.url)
    assert again.locator("#details h2").inner_text() == "diverged"


def test_what_a_run_is_called_is_text(look: Opener, page_path: Path, results: Path) -> None:
    page = look(page_path)
    run = results / HOSTILE_NAME
    assert cell(page, run, "name").startswith(HOSTILE_NAME)
    assert cell(page, run, "setting dataset") == HOSTILE_VALUE
    assert cell(page, run, "setting seed") == str(2**70)
    assert cell(page, run, "setting dropout") == "nan"
    row(page, run).locator("td").nth(1).click()
    page.wait_for_selector("#details .small-charts")
    assert HOSTILE_VALUE in page.text_content("#details")
    href = row(page, run).locator("a.folder").get_attribute("href")
    assert Path(os.path.normpath(page_path.parent / urllib.parse.unquote(href))) == run
    page.click("#choose-shown", force=True) if page.is_visible("#choose-shown") else None
    page.fill("#filter", HOSTILE_NAME)
    page.wait_for_timeout(100)
    assert page.evaluate("window.struck") is None
    sources = [image.get_attribute("src") for image in page.locator("img").all()]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.locator("script").count() == 2


def test_a_telephone_shows_it_without_scrolling_sideways(
    look: Opener, page_path: Path, results: Path
) -> None:
    page = look(page_path, viewport=PHONE)

    def hidden_width() -> int:
        return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    assert hidden_width() <= 0
    tops = [page.locator(f"#{name}").bounding_box()["y"] for name in ("table", "curves")]
    assert tops == sorted(tops) and tops[0] < PHONE["height"] / 2  # the table comes first
    assert page.evaluate("(b => b.scrollWidth > b.clientWidth)(document.querySelector('.box'))")
    page.click("summary:text-is('Columns')")
    assert hidden_width() <= 0
    page.keyboard.press("Escape")
    row(page, results / "c").locator("td").nth(1).click()
    assert hidden_width() <= 0
    box = page.locator("#details").bounding_box()
    assert (box["x"], box["width"]) == (0, PHONE["width"])
    assert (
        page.evaluate("(d => d.scrollWidth - d.clientWidth)(document.querySelector('#details'))")
        <= 0
    )


def test_600_runs_are_in_one_page(look: Opener, lab: Lab, results: Path, tmp_path: Path) -> None:
    config = json.loads((results / "c" / "config.json").read_text())
    meta = (results / "c" / "meta.json").read_text()
    header = (results / "c" / "history.csv").read_text().splitlines()[0]
    num_columns, num_epochs = header.count(",") + 1, 400
    for number in range(600):
        run = tmp_path / "many" / f"run_{number}"
        shutil.copytree(results / "c" / "eval", run / "eval")
        config |= {"seed": number % 5, "learning_rate": 10 ** -(number % 50 / 10), "note": "x" * 99}
        (run / "config.json").write_text(json.dumps(config))
        (run / "meta.json").write_text(meta)
        lines = [
            ",".join(
                [str(i), str(10 * (i + 1))] + [repr(number + 1 / (i + 1.7))] * (num_columns - 2)
            )
            for i in range(num_epochs)
        ]
        (run / "history.csv").write_text("\n".join([header, *lines, ""]))
    path = tmp_path / "report.html"
    write_report(lab.project, tmp_path / "many", "-o", path)
    assert path.stat().st_size < 10_000_000
    page = look(path)
    # The first rows are drawn, whatever comes first.
    assert page.inner_text("#count") == "600 runs; the first 500 are drawn"
    assert [int(name.rpartition("_")[2]) for name in runs_in(page)] == [*range(500)]
    page.click("th[data-column='best val_loss'] button")
    assert [int(name.rpartition("_")[2]) for name in runs_in(page)] == [*range(599, 99, -1)]
    # The others are there, too.
    page.fill("#filter", "run_0")
    assert [Path(name).name for name in runs_in(page)] == ["run_0"]
    assert page.inner_text("#count") == "1 of 600 runs"
    page.fill("#filter", "")
    page.locator("#best a").click()
    assert page.locator("#details h2").inner_text() == "run_0"
    page.keyboard.press("Escape")
    assert page.is_hidden("#details")
    page.fill("#filter", "seed=3")
    page.click("#choose-shown")
    assert len(runs_in(page)) == len(legend(page)) - 1 == 120
    # Curves are thinned, and it says so; what is drawn is what the file says.
    assert "thinned" in page.inner_text("#notes")
    page.locator("#chart").scroll_into_view_if_needed()
    frame = page.locator("#chart").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + 100)
    values = legend(page)
    epoch = int(values.pop("").removeprefix("epoch "))
    assert abs(epoch - num_epochs / 2) < 20
    for name, value in values.items():
        number = int(name.rpartition("_")[2])
        assert float(value) == pytest.approx(number + 1 / (epoch - 1 + 1.7), rel=1e-3)


# ---- settings ------------------------------------------------------------------------------------

SETTINGS: dict[str, list[Any]] = {
    "n_filters": [8, 16],
    "lr_schedule": [None, [[3, 0.1]], HOSTILE_VALUE],
    "learning_rate": [0.1, 0.001],
}


def make_trials(folder: Path, settings: dict[str, list[Any]], num_seeds: int) -> dict[str, float]:
    """Write a run of each combination and seed; the values of what they monitor, by name."""
    values = {}
    combinations = itertools.product(*settings.values(), range(num_seeds))
    for number, combination in enumerate(combinations):
        config = dict(zip([*settings, "seed"], combination, strict=True))
        run = folder / f"run_{number}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(config))
        line = f"python bin/train.py digits {run} --note='a b'"
        meta = {"status": "finished", "attempts": [], "command": {"line": line}}
        (run / "meta.json").write_text(json.dumps(meta))
        values[run.name] = (number * 37 % 100 + 1) / 100
        (run / "history.csv").write_text(f"epoch,step,val_loss\n0,9,{values[run.name]}\n")
    return values


@pytest.fixture
def look_at_trials(look: Opener, tmp_path: Path) -> Callable[..., Any]:
    """Open the report on runs that are made of settings; each has a value of its own."""

    def opened(
        names: list[str], num_seeds: int = 1, **options: Any
    ) -> tuple[Any, dict[str, float]]:
        folder = tmp_path / "trials"
        values = make_trials(folder, {name: SETTINGS[name] for name in names}, num_seeds)
        write_report(ROOT / TEMPLATE_FOLDER, folder, "-o", tmp_path / "page.html")
        return look(tmp_path / "page.html", **options), values

    return opened


def test_groups_of_seeds_are_a_table_of_means(look_at_trials: Callable[..., Any]) -> None:
    page, values = look_at_trials(["lr_schedule", "n_filters"], num_seeds=2)
    assert page.locator(".effect canvas").count() == 2 * 2
    means = [(values[f"run_{n}"] + values[f"run_{n + 1}"]) / 2 for n in range(0, 12, 2)]
    # The best comes first, and leads to the runs of each seed.
    best = page.locator("#groups tbody tr").first
    shown = best.locator("td").nth(2).inner_text()
    assert float(shown.partition("±")[0]) == pytest.approx(min(means), abs=0.006)
    assert shown.endswith("(2)")
    assert page.locator("#groups tbody tr").count() == 6
    assert best.locator("a").all_inner_texts() == ["0", "1"]
    link = best.locator("a").last
    path = link.get_attribute("title")
    link.click()
    assert page.locator("#details h2").inner_text() == Path(path).name
    assert "seed" in page.inner_text("#details dl.settings")
    assert page.evaluate("window.struck") is None


def test_three_settings_are_lines_that_lead_to_runs(look_at_trials: Callable[..., Any]) -> None:
    page, values = look_at_trials(list(SETTINGS), **CLIPBOARD)
    assert page.locator(".effect canvas").count() == 2 * 3
    in_order = sorted(values, key=lambda name: values[name])
    best = page.locator("#best")
    assert f"{in_order[0]} with val_loss {values[in_order[0]]:.4f}" in best.inner_text()
    command = best.locator("code").inner_text()
    assert command.startswith("python bin/reproduce.py ") and command.endswith(in_order[0])
    best.locator("button").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == command

    # The pointer finds the line that ends where it is, at the right edge.
    lines = page.locator(".parallel")
    lines.scroll_into_view_if_needed()
    frame = lines.bounding_box()
    found = set()
    for share in range(12, 100, 2):
        page.mouse.move(frame["x"] + frame["width"] - 9, frame["y"] + frame["height"] * share / 100)
        found.add(page.inner_text(".whole figcaption a"))
    assert found == set(values)
    page.mouse.click(frame["x"] + frame["width"] - 9, frame["y"] + frame["height"] - 22)
    assert page.locator("#details h2").inner_text() == in_order[0]
    page.keyboard.press("Escape")
    # So do the arrow keys, from the best to the worst.
    lines.focus()
    page.mouse.move(1, 1)
    for _ in values:
        page.keyboard.press("ArrowRight")
    assert page.inner_text(".whole figcaption a") == in_order[-1]
    page.keyboard.press("Enter")
    assert page.locator("#details h2").inner_text() == in_order[-1]
    assert page.evaluate("window.struck") is None


def test_an_effect_tells_its_levels_and_its_runs(look_at_trials: Callable[..., Any]) -> None:
    page, values = look_at_trials(["learning_rate"], num_seeds=3, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    chart = page.locator(".effect .chart")
    caption = page.locator(".effect figcaption")
    chart.focus()
    page.keyboard.press("ArrowRight")
    mean = sum(values[f"run_{n}"] for n in (3, 4, 5)) / 3  # of 0.001, the smaller one
    assert caption.inner_text().split()[:2] == ["learning_rate", "0.001"]
    assert float(caption.inner_text().split()[2]) == pytest.approx(mean, abs=0.006)
    page.keyboard.press("ArrowRight")
    assert caption.inner_text().split()[1] == "0.1"
    # Somewhere there is the point of each run, and a click opens it.
    frame = chart.bounding_box()
    found = {}
    for x in range(40, round(frame["width"]), 4):
        for y in range(5, 150, 8):
            place = frame["x"] + x, frame["y"] + y
            page.mouse.move(*place)
            found[caption.locator("span").first.inner_text()] = place
    assert set(found) - {"0.1", "0.001"} == set(values)
    page.mouse.click(*found["run_4"])
    assert page.locator("#details h2").inner_text() == "run_4"


def wait_for(page: Any, condition: Callable[[], bool]) -> None:
    """Give the page time until something is so."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(100)
    pytest.fail("it took more than a minute")


def test_it_is_light_or_dark(look_at_trials: Callable[..., Any]) -> None:
    page, _ = look_at_trials(list(SETTINGS), color_scheme="light")

    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(float(part) for part in colour.strip("rgba()").split(",")[:3]) / 3

    def pictures() -> list[str]:
        settings = "...document.querySelectorAll('#pictures canvas:first-child')"
        script = f"[document.querySelector('#chart canvas'), {settings}].map(c => c.toDataURL())"
        return page.evaluate(script)

    before = pictures()
    assert brightness() > 240
    page.emulate_media(color_scheme="dark")
    wait_for(page, lambda: brightness() < 40)
    assert len(before) == 1 + 4
    # Everything is drawn again.
    wait_for(page, lambda: all(a != b for a, b in zip(before, pictures(), strict=True)))
    # Paper is white, whatever the screen is.
    page.emulate_media(color_scheme="dark", media="print")
    assert brightness() > 240


WCAG = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_violation_of_levels_a_and_aa(
    look_at_trials: Callable[..., Any], viewport: dict[str, int], scheme: str
) -> None:
    page, _ = look_at_trials(list(SETTINGS), num_seeds=2, viewport=viewport, color_scheme=scheme)

    def violations() -> list[tuple[str, str]]:
        options = {"runOnly": list(WCAG), "resultTypes": ["violations"]}
        found = axe.Axe().run(page, options=options).response["violations"]
        return [(each["id"], each["nodes"][0]["html"]) for each in found]

    assert violations() == []
    page.click("summary:text-is('Columns')")
    assert violations() == []
    page.keyboard.press("Escape")
    page.locator("#runs tbody tr:not([hidden]) td").nth(1).click()
    assert page.locator("#details h2").is_visible()
    assert violations() == []


# ---- the command line ----------------------------------------------------------------------------


def test_report_refuses_what_it_cannot_do_and_tells_of_patterns_without_runs(
    lab: Lab, results: Path
) -> None:
    for arguments, message in (
        (("result",), "did you mean 'results'"),
        (("results", "-o", "results"), "--output=results"),
        (("results", "-o", "nowhere/page.html"), "--output=nowhere/page.html"),
    ):
        words = (sys.executable, "bin/report.py", *arguments)
        done = run_command(*words, cwd=lab.project, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (lab.project / "report.html").exists()
    words = (sys.executable, "bin/report.py", "results/a", "results/none*")
    done = run_command(*words, cwd=lab.project, check=False)
    assert done.returncode == 1
    assert "results/none*" in done.stderr
    page = lab.project / "report.html"
    assert done.stdout.startswith("report.html: 1 run, ")
    assert "results/none*" in page.read_text()
    # It does not make the next run one with uncommitted changes.
    status = run_command("git", "status", "--porcelain", "report.html", cwd=lab.project)
    assert status.stdout == ""
    page.unlink()
