"""One run on several devices and by several workers: as exact as on one, and never a hang."""

import filecmp
import hashlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from machinery import ROOT, Command

from configs import registry
from engine.devices import gpus as devices
from engine.devices import workers
from engine.runs.results import read_history as rows
from src.experiment import build
from vegab import UsageError
from vegab.config import flatten

LIMIT = 1800  # seconds, after which a worker counts as hung
EXACT = ("model.h5", "model_best.h5", "history.csv")
# Dropout, augmentation and batch normalisation; commits in the middle of epochs.
SMALL = ("--n_filters=2", "--n_layers=1", "--batch_size=63", "--lr_schedule=null")
WORDS = ("digits", *SMALL, "--num_epochs=8", "--checkpoint_steps=7", "--no_tensorboard")


def start(run: Path, *more: str, number: int = 2) -> list[BaseProcess]:
    """Start the same command for each worker; what they say goes to folders beside the run."""
    command = ["bin/train.py", WORDS[0], str(run), *WORDS[1:], *more]
    started = []
    for index, config in enumerate(workers.on_this_machine(number)):
        said = Path(f"{run}-{index}")
        said.mkdir(exist_ok=True)
        started.append(forked.start(command, ROOT, os.environ | {"TF_CONFIG": config}, str(said)))
    return started


def ends(processes: list[BaseProcess]) -> list[int | None]:
    """Return the exit codes; none is left behind."""
    until = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def said(run: Path) -> str:
    return "\n".join(path.read_text() for path in run.parent.glob(f"{run.name}-*/*"))


def require_same_bits(run: Path, other: Path) -> None:
    for name in EXACT:
        assert filecmp.cmp(run / name, other / name, shallow=False), name


def wait_for_epochs(run: Path, number: int, processes: list[BaseProcess]) -> None:
    until = time.monotonic() + LIMIT
    while len(rows(run)) < number:
        assert time.monotonic() < until and processes[0].is_alive(), said(run)
        time.sleep(0.05)


@pytest.mark.slow
def test_two_workers_are_killed_stopped_and_continued(tmp_path: Path) -> None:
    straight, killed, alone = (tmp_path / name for name in ("straight", "killed", "alone"))
    assert ends(start(straight)) == [0, 0], said(straight)
    assert len(rows(straight)) == 8

    processes = start(killed)
    wait_for_epochs(killed, 2, processes)
    processes[1].kill()
    assert ends(processes) == [75, -signal.SIGKILL], said(killed)
    kept = rows(killed)
    assert 2 <= len(kept) < 8
    shutil.copytree(killed, alone)
    at_first = (alone / "model.h5").read_bytes()

    processes = start(killed)
    wait_for_epochs(killed, len(kept) + 1, processes)
    assert processes[1].pid
    os.kill(processes[1].pid, signal.SIGTERM)  # not to the chief
    assert ends(processes) == [75, 75], said(killed)
    assert len(rows(killed)) < 8

    assert ends(start(killed)) == [0, 0], said(killed)
    require_same_bits(straight, killed)
    attempts = json.loads((killed / "meta.json").read_text())["attempts"]
    assert [attempt["exit_status"] for attempt in attempts] == [75, 75, 0]  # of the chief alone

    # It is made again by as many.
    again = forked.run(["bin/reproduce.py", str(killed)], ROOT, os.environ, LIMIT)
    assert (
        "identical bit for bit: history.csv (8 epochs), model.h5, model_best.h5" in again.stdout
    ), again.stderr

    # By one process it goes on only where that is asked for.
    command = ["bin/train.py", WORDS[0], str(alone), *WORDS[1:]]
    refused = forked.run(command, ROOT, os.environ)
    assert refused.returncode == 2
    assert "layout: 2 workers with 1 device each, now 1 device;" in refused.stderr
    assert (alone / "model.h5").read_bytes() == at_first
    gone_on = forked.run([*command, "--resume_inexact"], ROOT, os.environ)
    assert gone_on.returncode == 0, gone_on.stderr
    assert rows(alone)[: len(kept)] == kept
    assert len(rows(alone)) == 8
    (note,) = json.loads((alone / "meta.json").read_text())["attempts"][-1]["to"]["inexact"]
    assert note["differs"] == ["layout: 2 workers with 1 device each, now 1 device"]


@pytest.mark.slow
def test_four_workers_have_the_curve_of_one_and_lose_nothing(tmp_path: Path) -> None:
    more = ("--dropout=0.0", "--num_epochs=3", "--batch_size=60")  # fifteen for each
    straight, killed, one = (tmp_path / name for name in ("straight", "killed", "one"))
    assert ends(start(straight, *more, number=4)) == [0] * 4, said(straight)

    processes = start(killed, *more, number=4)
    wait_for_epochs(killed, 1, processes)
    processes[2].kill()
    assert ends(processes) == [75, 75, -signal.SIGKILL, 75], said(killed)
    assert 1 <= len(rows(killed)) < 3
    assert ends(start(killed, *more, number=4)) == [0] * 4, said(killed)
    require_same_bits(straight, killed)

    command = ["bin/train.py", WORDS[0], str(one), *WORDS[1:], *more]
    assert forked.run(command, ROOT, os.environ).returncode == 0
    for row, other in zip(rows(straight), rows(one), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)
    assert rows(one)[-1]["loss"] < rows(one)[0]["loss"]


def tf_config(kind: str, index: int, **cluster: list[str]) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "TF_CONFIG is '{' .*; expected {"),
        ("[]", r"TF_CONFIG is '\[\]' .*; expected {"),
        ('{"task": {"type": "worker", "index": 0}}', "KeyError: 'cluster'"),
        ('{"cluster": {"worker": ["a:1", "b:2"]}}', "KeyError: 'task'"),
        (tf_config("worker", 2, worker=["a:1", "b:2"]), "worker 2 of 2;"),
        (tf_config("chief", 0, worker=["a:1", "b:2"]), "chief 0 of 0;"),
        (tf_config("worker", 0, worker=["a:1", "b"]), "the address 'b'; expected HOST:PORT"),
        (tf_config("worker", 0, worker=["a:1", "b:0"]), "the address 'b:0'; .* from 1 to 65535"),
        (tf_config("worker", 0, worker=["a:99999", "b:1"]), "'a:99999'; .* from 1 to 65535"),
        (tf_config("worker", 0, worker=["a:1", "::1:2"]), r"'::1:2'; .* \[HOST\]:PORT for IPv6"),
        (tf_config("worker", 0, worker=["a:1", "a:1"]), "the address 'a:1' twice"),
        (
            tf_config("ps", 0, worker=["a:1"], ps=["b:2"]),
            "names ps; expected only chief and worker",
        ),
    ],
)
def test_a_torn_cluster(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match=sentence):
        workers.worker()


def cluster(port: int, rank: int = 0, other: int = 1) -> str:
    """`TF_CONFIG` of one of two workers, whose ports are given."""
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{other}"]
    return tf_config("worker", rank, worker=addresses if rank == 0 else addresses[::-1])


def test_what_is_wrong_with_a_cluster_is_said_in_one_line(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("bin/train.py", "digits", run, env={"TF_CONFIG": '{"cluster": {}}'})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (port,) = taken.getsockname()[1:]
        done = command("bin/train.py", "digits", run, env={"TF_CONFIG": cluster(port)})
    assert done.returncode == 2
    assert f"worker 0 is to listen on port {port} (127.0.0.1:{port}), and cannot" in done.stderr
    assert not run.exists()


def test_workers_that_do_not_come_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = workers.free_ports(1)
    monkeypatch.setenv("TF_CONFIG", cluster(port))
    monkeypatch.setattr(workers, "SECONDS_TO_COME", 0.5)
    with pytest.raises(SystemExit) as ended:
        workers.strategy()
    assert ended.value.code == 75


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_worker_that_dies_as_they_meet_ends_the_others(rank: int, command: Command) -> None:
    """The other one says that it is there, or that all are, and no more."""
    port, other = workers.free_ports(2)

    def play() -> None:
        if rank == 0:
            workers._ask(1, f"127.0.0.1:{port}", workers.HERE, LIMIT)
            return
        silent.accept()[0].sendall(workers.GO)

    with socket.create_server(("127.0.0.1", other)) as silent:
        threading.Thread(target=play, daemon=True).start()
        script = (
            "from engine.devices import workers; workers.SECONDS_TO_REGISTER = 2; "
            "workers.strategy()"
        )
        ended = command("-c", script, env={"TF_CONFIG": cluster(port, rank, other)})
    assert ended.returncode == 75, ended.stderr


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("word", ["--n_filters=two", "--model=refusing:build"])
def test_a_worker_that_is_refused_tells_the_others(refused: int, word: str, tmp_path: Path) -> None:
    """Before they have met, and after: the others end as soon as they hear of it."""
    (tmp_path / "refusing.py").write_text(REFUSING)
    started = []
    for index, config in enumerate(workers.on_this_machine(2)):
        path = Path(f"{tmp_path}/run-{index}")
        path.mkdir()
        words = ["bin/train.py", WORDS[0], str(tmp_path / "run"), *WORDS[1:]]
        words += [word] if index == refused or "model" in word else []
        env = {"TF_CONFIG": config, "PYTHONPATH": str(tmp_path), "REFUSED": str(refused)}
        started.append(forked.start(words, ROOT, os.environ | env, str(path)))
    started[refused].join(LIMIT)
    at = time.monotonic()
    codes = ends(started)
    assert time.monotonic() - at < 15
    assert codes == ([2, 75] if refused == 0 else [75, 2]), said(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "another worker" in said(tmp_path / "run")


# The data of one worker are not there, say.
REFUSING = """
import os

from engine.devices import workers
from src.models import build_simple_cnn
from vegab import UsageError
from vegab.config import flatten


def build(config, input_shape, num_classes):
    if workers.worker().rank == int(os.environ["REFUSED"]):
        raise UsageError("this worker has no data")
    return build_simple_cnn(config, input_shape, num_classes)
"""


def test_workers_that_differ_are_told_in_which_file(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: dict[str, Any] = {"code": {"src/models.py": "1", "src/data.py": "2"}, "layout": "2"}
    theirs = {"code": {"src/models.py": "3", "src/data.py": "2", "src/new.py": "4"}, "layout": "2"}

    class Two(workers.Workers):
        def gather_bytes(self, content: bytes) -> list[bytes]:
            text = json.dumps(flatten(theirs), sort_keys=True).encode()
            its = hashlib.sha256(text).digest() if len(content) == 32 else text
            return [content, its.ljust(len(content))]

        def gather(self, numbers: Any) -> Any:
            return np.array([numbers, [500]])

    monkeypatch.setattr(workers, "_stage", workers.APART)
    Two(None).require_same(theirs, "")
    with pytest.raises(UsageError, match=r"differ in code\.src/models\.py, code\.src/new\.py and"):
        Two(None).require_same(ours, "and would not")


@pytest.mark.slow
def test_workers_meet_at_addresses_of_ipv6(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = []
    addresses = [f"[::1]:{port}" for port in workers.free_ports(2)]
    for index in range(2):
        words = ["bin/train.py", WORDS[0], str(folder), *WORDS[1:], "--num_epochs=1"]
        path = Path(f"{folder}-{index}")
        path.mkdir()
        env = {"TF_CONFIG": tf_config("worker", index, worker=addresses)}
        started.append(forked.start(words, ROOT, os.environ | env, str(path)))
    assert ends(started) == [0, 0], said(folder)


def test_who_a_worker_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TF_CONFIG"))]:
        monkeypatch.delenv(name)
    assert workers.worker() == (0, 1)
    monkeypatch.setenv("TF_CONFIG", tf_config("worker", 1, chief=["a:1"], worker=["b:2", "c:3"]))
    assert workers.worker() == (2, 3)
    monkeypatch.delenv("TF_CONFIG")

    # A job of one task is a run as any other.
    step = {"NODELIST": "n[9-10]", "TASKS_PER_NODE": "2,1"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for rank, number in ((0, 1), (2, 3)):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        for name, value in (step | {"NUM_TASKS": str(number)}).items():
            monkeypatch.setenv(f"SLURM_STEP_{name}", value)
        assert workers.worker() == (rank, number)
    rank, addresses = workers.cluster()
    assert rank == 2
    assert [address.partition(":")[0] for address in addresses] == ["n9", "n9", "n10"]
    assert len(set(addresses)) == 3


def test_an_iterator_trains_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = registry["iterator_numpy"]
    monkeypatch.setenv("TF_CONFIG", cluster(2))
    with pytest.raises(UsageError, match="a config with an iterator trains in one process"):
        build(config, together=True)


# Two processors in place of two GPUs, in a process of its own: TensorFlow makes them as it starts.
TWO_DEVICES = """
import os
import signal
import sys
from pathlib import Path

import tensorflow as tf

sys.path.insert(0, os.getcwd())
(processor,) = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(processor, two)

from configs import registry
from engine.devices import gpus as devices
from src.experiment import build, train as train_into
from interruptions import StopAt
from vegab import UsageError
from vegab.config import flatten

devices.device_names = lambda: ["CPU:0", "CPU:1"]
config = registry["digits"] | {
    "n_filters": 2, "n_layers": 1, "batch_size": 126, "num_epochs": 3, "lr_schedule": None,
    "checkpoint_steps": 4, "tensorboard": False,
}


def train_in(name, *hooks, **settings):
    folder = Path(sys.argv[1], name)
    folder.mkdir(exist_ok=True)
    train_into(build(config | settings, str(folder)), folder, hooks)


def refused(*arguments, **settings):
    try:
        build(config | settings, *arguments)
    except UsageError as error:
        print(error)
    else:
        raise AssertionError


# Parts of 31 and 32 examples, and gradients that are clipped.
odd = {"dropout": 0.0, "batch_size": 63, "optimizer_arguments": {"global_clipnorm": 0.5}}
train_in("one", dropout=0.0)
train_in("one-odd", **odd)
devices.choose_gpus("0,1")
train_in("two", dropout=0.0)
train_in("two-odd", **odd)
train_in("two-half", precision="mixed_float16", **odd)
sys.path.insert(0, sys.argv[1])
for kind, settings in {"": {}, "-noisy": {"model": "noisy:build"}}.items():
    train_in(f"straight{kind}", **settings)
    try:
        train_in(f"stopped{kind}", StopAt(13), **settings)
    except SystemExit as stopped:
        assert stopped.code == 75
    else:
        raise AssertionError
    train_in(f"stopped{kind}", **settings)
refused(str(Path(sys.argv[1], "one")), dropout=0.0)
refused(accumulate_steps=2)
"""


# Draws by an operation of TensorFlow's own, whose state no variable holds.
NOISY = """
import keras
import tensorflow as tf


class Noise(keras.layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def build(config, input_shape, num_classes):
    outputs = keras.layers.Dense(num_classes, "softmax")
    return keras.Sequential([keras.Input(input_shape), Noise(), keras.layers.Flatten(), outputs])
"""


@pytest.mark.slow
def test_two_devices_are_as_exact_as_one(command: Command, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    done = command("-c", TWO_DEVICES, tmp_path)
    assert done.returncode == 0, done.stderr
    for kind in ("", "-noisy"):
        require_same_bits(tmp_path / f"straight{kind}", tmp_path / f"stopped{kind}")
    assert "layout: 1 device, now 2 devices" in done.stdout
    assert "accumulate_steps needs one device" in done.stdout
    for kind in ("", "-odd"):
        one, two = rows(tmp_path / f"one{kind}"), rows(tmp_path / f"two{kind}")
        assert two[-1]["loss"] < two[0]["loss"]
        for row, other in zip(one, two, strict=True):
            assert other == pytest.approx(row, rel=1e-5), "the curve of one device"


def test_several_gpus_have_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.SEVERAL, "2")
    with pytest.raises(UsageError, match="--gpus asks for 2 GPUs; TensorFlow sees 0"):
        build(registry["digits"])
