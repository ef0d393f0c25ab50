"""What the commands do besides what a project's own tests look at."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import forked
import pytest
from machinery import ROOT, Command
from test_fingerprint import edit_state

from engine.building import require_registered
from engine.checkpoints import verify
from engine.training import fingerprint
from vegab import UsageError
from vegab.config import flatten

SMALL = ("--n_filters=4", "--n_layers=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the tests below share."""
    folder = tmp_path_factory.mktemp("results") / "run"
    words = ["bin/train.py", "digits", str(folder), "--num_epochs=3", *SMALL]
    done = forked.run(words, ROOT, os.environ)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_evaluate_and_export_name_the_source_that_has_changed(
    quick_command: Command, run: Path, tmp_path: Path
) -> None:
    quick_command("bin/evaluate.py", run, f"--checkpoint={run / 'model_previous.h5'}")
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert (summary["checkpoint"], summary["code_differs"]) == ("model_previous.h5", [])
    model = run / "model_best.h5"
    stored = fingerprint.of(model)
    assert stored is not None
    edit_state(model, fingerprint=stored | {"code": stored["code"] | {"src/models.py": "0"}})
    changed = "src/models.py has changed since the run; this is of the present code"
    for words in (("bin/evaluate.py", run), ("bin/export.py", run, tmp_path / "exported")):
        done = quick_command(*words)
        assert done.returncode == 0, done.stderr
        assert changed in done.stderr
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert summary["code_differs"] == ["src/models.py"]


@pytest.mark.slow
def test_a_finished_run_that_has_lost_its_checkpoints_says_so_or_makes_them_again(
    quick_command: Command, run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    words = ("bin/train.py", "digits", folder, "--num_epochs=3", *SMALL)
    assert "already finished" in quick_command(*words).stdout
    content = (run / "model.h5").read_bytes()
    (folder / "model.h5").unlink()
    (folder / "model.h5").write_bytes(content[:-9])
    done = quick_command(*words)
    assert done.returncode == 0, done.stderr
    verify(folder / "model.h5")  # it went on from the previous one
    assert (folder / "history.csv").read_bytes() == (run / "history.csv").read_bytes()
    (folder / "model_best.h5").unlink()
    assert "already finished" not in quick_command(*words).stdout
    verify(folder / "model_best.h5")
    assert "already finished" in quick_command(*words).stdout
    for name in ("model.h5", "model_previous.h5"):
        (folder / name).unlink()
    done = quick_command(*words)
    assert done.returncode == 2
    assert "is finished, and has lost its checkpoints (model.h5 is gone; model_prev" in done.stderr


def test_help_tells_the_defaults_that_are_something(command: Command) -> None:
    text = " ".join(command("bin/plot.py", "--help").stdout.split())
    assert "what the x axis shows (epoch)" in text
    assert "SUPPRESS" not in text
    assert "default" not in text.replace("by default: results", "")


def test_help_explains_every_key(command: Command) -> None:
    from configs import registry

    text = " ".join(command("bin/train.py", "--help").stdout.split())
    for key in registry.get_root_config():
        assert f"--{key}" in text or f"--[no_]{key}" in text
    for name in ("digits", "cifar10", "cifar100", "digits_wide"):
        assert name in text


# ------------------------------------------------------------------------------- the first minute


@pytest.mark.slow
def test_what_tensorflow_logs_at_its_start_stays_in_the_file(
    command: Command, tmp_path: Path
) -> None:
    noise = re.compile(r"oneDNN custom operations|absl::InitializeLog")
    words = ("bin/train.py", "digits", tmp_path / "run", "--num_epochs=1", *SMALL)
    done = command(*words)
    assert not done.stderr
    assert noise.search((tmp_path / "run" / "stderr.txt").read_text())
    lines = done.stdout.splitlines()
    assert [line[:8] for line in lines[:4]] == ["importin", "data    ", "model   ", "device  "]
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].startswith(f"{tmp_path / 'run'} is finished; next: python bin/evaluate.py")
    assert not command("bin/evaluate.py", tmp_path / "run").stderr
    assert noise.search(command(*words, "--num_epochs=2", "-l", "DEBUG").stderr)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model=resnet",), "there is no 'resnet'"),
        (("--dataset=mnist",), "there is no 'mnist'"),
        (("--learning_rate=0.1", "--lr_schedule=[[1, 0.1]]"), "exclude each other"),
        (("-p", "learning_rate", "0.1", "--dropout=2"), "dropout is 2"),
        (("--lr=0.1",), "did you mean 'learning_rate'?"),
        (("--hooks=[{path: a.b}]",), "hooks is {'path': 'a.b'}; expected an import path"),
        (("--callbacks=[3]",), "callbacks is 3; expected an import path"),
    ],
)
def test_a_mistake_does_not_wait_for_tensorflow(
    words: tuple[str, ...], sentence: str, command: Command, tmp_path: Path
) -> None:
    for program in ("bin/train.py", "bin/check_resume.py"):
        place = (tmp_path / "run",) if program == "bin/train.py" else ()
        done = command(program, "digits", *place, *words)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
        assert "importing" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("T = {'one': 1}", True),
        ("T: dict[str, int] = {'one': 1}", True),
        ("T = {'one': 1}\nT['two'] = 2", False),
        ("T = {'one': 1}\nT['three'] = 3", True),
        ("T = {'one': 1}\nT[three] = 3", False),
        ("T = {'one': 1}\nT.update(others)", False),
        ("T = {'one': 1}\nif is_there:\n    T['two'] = 2", False),
        ("T = {'one': 1, 'two': 2}\ndel T['one']", False),
        ("T = {**others}", False),
        ("T = dict(one=1)", False),
        ("T = {", False),
    ],
)
def test_only_a_table_that_is_written_out_refuses_a_name(
    source: str, is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "models.py").write_text(source)
    refusal = pytest.raises(UsageError, match="no 'two'") if is_refused else nullcontext()
    with refusal:
        require_registered({"model": "two"}, "model", tmp_path / "models.py", "T")


def test_config_and_folder_in_the_wrong_order_are_noticed(command: Command, tmp_path: Path) -> None:
    done = command("bin/train.py", tmp_path / "run", "digits")
    assert done.returncode == 2
    assert f"CONFIG comes first: train.py digits {tmp_path / 'run'}" in done.stderr


@pytest.mark.parametrize("name", ["digits", "cifar10", "gan", "toy"])
def test_the_help_on_a_config_is_short_and_has_its_own_keys(name: str, command: Command) -> None:
    from configs import registry

    text = command("bin/train.py", name, "--help").stdout
    assert len(text.splitlines()) <= 110
    flags = re.findall(r"^  (?:-\w, )?--(\S+?)=", text, re.MULTILINE)
    assert len(flags) == len(set(flags))
    assert set(flatten(registry.draft(name).kind.defaults)) <= set(flags)
    assert ("n_filters" in flags) == (name in ("digits", "cifar10"))


def test_the_version_is_told(command: Command) -> None:
    said = command("bin/train.py", "--version").stdout
    assert re.fullmatch(r".* 0\.1\.0(, commit \w+)?, Python 3\.\d+\.\d+\n", said)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bin/train.py dig", {"digits", "digits_wide"}),
        ("bin/train.py digits {}/run --n_f", {"--n_filters"}),
        ("bin/train.py gan {}/run --n_f", set()),
        ("bin/train.py digits {}/", {"{}/run/", "{}/more/"}),
        ("bin/train.py {}/m", {"{}/more/"}),
        ("bin/evaluate.py {}/r", {"{}/run/"}),
        ("bin/evaluate.py {}/run --che", {"--checkpoint"}),
        ("bin/runs.py com", {"compare"}),
        ("bin/runs.py list {}/m", {"{}/more/"}),
    ],
)
def test_a_shell_completes_keys_configs_and_runs(
    line: str, expected: set[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "more").mkdir()
    line = line.format(tmp_path)
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    asked |= {"_ARGCOMPLETE_SHELL": "bash"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    program = ROOT / line.split()[0]
    assert "PYTHON_ARGCOMPLETE_OK" in program.read_text()[:1024]
    asked["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # As fish has it: by its own name.
    script = f"{shlex.quote(str(program))} 8>&1 9>/dev/null >/dev/null 2>&1"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | asked, capture_output=True, text=True
    )
    assert set(done.stdout.splitlines()) == {word.format(tmp_path) for word in expected}


def test_a_runner_without_pytorch_is_refused_in_one_sentence(
    command: Command, tmp_path: Path
) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "torch.py").write_text(missing)
    words = ("src/examples/torch_loop.py", "root", tmp_path / "run")
    done = command(*words, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "torch_loop.py: error: PyTorch is missing; type pip install torch\n"
    assert not (tmp_path / "run").exists()
