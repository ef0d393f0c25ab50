"""Sweeps on a Ray cluster of two nodes on this machine; nodes, workers and sweepers are killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import run
from sweeping import EXACT, attempts_in, exact_files, is_told_to_end, kill, pid_in, start, wait_for

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason='it needs Ray: pip install "ray>=2.40"')

SMALL = (
    *("root", "--n_layers=1", "--batch_size=126", "--no_tensorboard", "--threads=1"),
    *("--checkpoint_steps=3", "--dropout=0.3", "--num_epochs=20"),
)
GRID = ("--grid", "n_filters=2,3,4")
# The first one: else it listens on all interfaces.
ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
CLUSTER = """
import json
import sys

from ray.cluster_utils import Cluster

options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster()
nodes = [cluster.add_node(**options) for _ in range(2)]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
head = nodes[0].all_processes["gcs_server"][0].process.pid
told = {"address": cluster.address, "raylets": raylets, "head": head}
print(json.dumps(told), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass
class Cluster:
    """A Ray cluster."""

    address: str
    raylets: list[int]  # the process of each of its nodes; the first one is the head's
    head: int  # the process that knows all nodes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with opened() as a_cluster:
        yield a_cluster


@contextlib.contextmanager
def opened() -> Iterator[Cluster]:
    """Two nodes with a core each."""
    place = tempfile.mkdtemp(prefix="ray-")  # a socket's path is short
    Path(place, "ray").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=os.environ | ENVIRONMENT | {"RAY_TMPDIR": place},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    told = next(line for line in process.stdout if line.startswith("{"))
    yield Cluster(**json.loads(told))
    process.stdin.close()
    process.wait(300)
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def local(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep by the local launcher."""
    folder = tmp_path_factory.mktemp("sweep") / "local"
    run(sys.executable, "bin/sweep.py", *SMALL[:1], folder, *SMALL[1:], *GRID, cwd=project)
    return folder


def sweep(project: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    config, *rest = SMALL
    return start(project, "bin/sweep.py", config, folder, *rest, *words, **ENVIRONMENT)


def parent_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(re.findall(r"PPid:\s+(\d+)", status)[0])


def trials_of(raylet: int, folder: Path) -> dict[str, int]:
    """Return the processes of the trials that have committed and train on a node, by name."""
    pids = {path.parent.name: pid_in(path.parent) for path in folder.glob("*/model.h5")}
    return {name: pid for name, pid in pids.items() if parent_of(parent_of(pid)) == raylet}


def differing(folder: Path, other: Path) -> list[str]:
    """Return the files of trials that have other bytes in another sweep's folder."""
    files, others = exact_files(folder), exact_files(other)
    assert len(files) == len(EXACT) * len(list(folder.glob("*/config.json")))
    return [name for name, content in files.items() if content != others[name]]


def test_a_worker_and_a_node_die_and_no_trial_is_lost(
    project: Path, local: Path, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    sweeper = sweep(project, folder, *GRID, "--launcher=ray", f"--address={cluster.address}")
    head, node = cluster.raylets
    # A node dies with all that it has begun.
    ((begun, trial),) = wait_for(lambda: trials_of(node, folder), sweeper).items()
    kill(node, parent_of(trial), trial)
    # A worker dies, and the trial that it had begun lives on.
    ((alone, trial),) = wait_for(lambda: trials_of(head, folder), sweeper).items()
    os.kill(trial, signal.SIGSTOP)
    kill(parent_of(trial))
    os.kill(trial, signal.SIGCONT)
    assert begun != alone
    said, problems = sweeper.communicate(timeout=1800)
    assert sweeper.returncode == 0, problems
    assert problems == ""
    assert said.startswith("3 trials: 3 finished; best val_loss ")
    assert attempts_in(folder / alone) == [0]
    assert attempts_in(folder / begun) == ["killed", 0]
    assert len(list(folder.glob("*/config.json"))) == 3
    assert not differing(folder, local)


def test_a_sweeper_is_stopped_or_killed_and_the_same_command_goes_on(
    project: Path, local: Path, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    address = f"--address={cluster.address}"
    words = ("--grid", "n_filters=2,3", "--launcher=ray", address, "--max_parallel=1")
    first = sweep(project, folder, *words)
    wait_for(lambda: list(folder.glob("*/model.h5")), first)
    (commit,) = folder.glob("*/model.h5")
    trial = pid_in(commit.parent)
    # It would be finished before Ray has told it to stop.
    os.kill(trial, signal.SIGSTOP)
    stop = start(project, "bin/sweep.py", "stop", folder)
    wait_for(lambda: is_told_to_end(trial), first)
    os.kill(trial, signal.SIGCONT)
    assert "1 waiting, 1 interrupted" in stop.communicate(timeout=1800)[0]
    assert first.wait(300) == 75
    assert attempts_in(commit.parent) == [75]
    second = sweep(project, folder, *words)
    wait_for(lambda: len(attempts_in(commit.parent)) == 2, second)
    second.kill()
    second.communicate()
    third = sweep(project, folder, *words)
    said, problems = third.communicate(timeout=1800)
    assert third.returncode == 0, problems
    assert said.startswith("2 trials: 2 finished")
    assert not differing(folder, local)


def test_a_head_that_is_gone_ends_the_sweep_which_another_one_goes_on_with(
    project: Path, local: Path, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "headless"
    words = (*GRID, "--launcher=ray")
    with opened() as other:
        first = sweep(project, folder, *words, f"--address={other.address}")
        wait_for(lambda: list(folder.glob("*/model.h5")), first)
        kill(other.head, other.raylets[0])
        _, problems = first.communicate(timeout=60)
        assert first.returncode == 75, problems
        said = f"Ray's head at {other.address} is gone; when it is back, the same command goes on"
        assert said in problems
    second = sweep(project, folder, *words, f"--address={cluster.address}")
    said, problems = second.communicate(timeout=1800)
    assert second.returncode == 0, problems
    assert said.startswith("3 trials: 3 finished")
    assert not differing(folder, local)


def test_a_cluster_that_is_not_there_is_refused_at_once(project: Path, tmp_path: Path) -> None:
    """Neither where nothing listens nor where something else does; Ray takes two minutes."""
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for port in (1, server.server_port):
        words = ("--seeds=2", "--launcher=ray", f"--address=127.0.0.1:{port}")
        process = sweep(project, tmp_path / "sweep", *words)
        _, said = process.communicate(timeout=1800)
        assert process.returncode == 2
        assert said.startswith(f"sweep.py: error: no Ray listens at '127.0.0.1:{port}'; give ")
        assert said.count("\n") == 1
    server.shutdown()
    assert not list(tmp_path.iterdir())
