"""Sweeps and runs in a real SLURM: jobs and their sweeper are ended, and nothing is lost."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from conftest import files_below, run
from fault_lab import INTERRUPTED, only_whole
from slurm_cluster import NODES, Cluster
from sweeping import EXACT, LIMIT, attempts_in, exact_files, pid_in, start, wait_for

from engine.devices.workers import on_this_machine

pytestmark = pytest.mark.slow

WORDS = (
    *("root", "--n_filters=2", "--n_layers=1", "--batch_size=126", "--num_epochs=30"),
    *("--no_tensorboard", "--threads=1"),
)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Site:
    """A project on the machine from which jobs are submitted."""

    project: Path
    cluster: Cluster

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """Begin a command of the project's."""
        return start(self.project, *words, **(self.cluster.environment | environment))

    def command(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the project's to its end."""
        env = self.cluster.environment | environment
        return run(sys.executable, *words, cwd=self.project, env=env, check=False)

    def sweep(self, folder: Path, *words: str) -> tuple[str, ...]:
        """Return the command that sweeps into a folder."""
        config, *rest = WORDS
        return ("bin/sweep.py", config, str(folder), *rest, f"--seeds={len(SEEDS)}", *words)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster.opened(tmp_path_factory.mktemp("slurm")) as a_cluster:
        yield a_cluster


@pytest.fixture(scope="module")
def site(project: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    copy = tmp_path_factory.mktemp("site") / "my-research"
    shutil.copytree(project, copy, symlinks=True)
    return Site(copy, cluster)


@pytest.fixture
def settings(site: Site) -> Iterator[Path]:
    """The site's settings, which a test may change."""
    path = site.project / "configs" / "slurm.yaml"
    kept = path.read_text()
    yield path
    path.write_text(kept)


@pytest.fixture(scope="module")
def swept(site: Site) -> Path:
    """The sweep of this machine, which nothing stopped."""
    folder = site.project / "results" / "straight"
    done = site.command(*site.sweep(folder, "--jobs=2"))
    assert done.returncode == 0, done.stderr
    return folder


def freeze(run: Path) -> int:
    """Wait for a run's first commit and halt its process, whose number is returned."""
    wait_for((run / "model.h5").exists)
    pid = pid_in(run)
    os.kill(pid, signal.SIGSTOP)
    assert json.loads((run / "meta.json").read_text())["status"] == "running"
    return pid


def bits_of(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in EXACT}


def arrays_in(folder: Path) -> list[Path]:
    return list((folder / ".output" / "slurm").glob("*/[0-9]*_submission.sh"))


def finish(site: Site, swept: Path, folder: Path, *words: str) -> None:
    """Give the same command once more, and compare what it ends with."""
    process = site.start(*site.sweep(folder, *words))
    while process.poll() is None:
        site.cluster.hurry()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            continue
    said, problems = process.communicate()
    assert process.returncode == 0, problems
    assert said.startswith("2 trials: 2 finished"), said
    assert exact_files(folder, "config.json") == exact_files(swept, "config.json")
    assert not site.cluster.queue()


def test_a_sweeper_that_is_killed_finds_its_jobs_again(site: Site, swept: Path) -> None:
    folder = site.project / "results" / "killed"
    words = ("--launcher=slurm", "--max_parallel=1", "--partition=main", "--time=1:00:00")
    first = site.start(*site.sweep(folder, *words))
    frozen = freeze(folder / "seed=0")
    first.kill()
    first.communicate()
    # The sweeper is gone, its jobs go on.
    status = site.command("bin/sweep.py", "status", folder).stdout
    (line,) = [line for line in status.splitlines() if "seed=0 " in line]
    assert line.split()[1] == "running"
    # Its time is up, say; it commits, and waits as the same job.
    (preempted,) = [number for number in site.cluster.queue() if number.endswith("_0")]
    site.cluster.ask("scancel", "--signal=USR1", preempted)
    os.kill(frozen, signal.SIGCONT)
    wait_for(lambda: f"{preempted} PENDING" in site.cluster.queue("%i %T"))
    finish(site, swept, folder, *words)
    assert attempts_in(folder / "seed=0") == [INTERRUPTED, 0]
    assert attempts_in(folder / "seed=1") == [0]
    assert len(arrays_in(folder)) == 1


def test_jobs_that_are_stopped_or_killed_or_half_submitted_are_made_again(
    site: Site, swept: Path
) -> None:
    folder = site.project / "results" / "stopped"
    words = ("--launcher=slurm", "--max_parallel=1")
    # What a sweeper leaves that is killed while it submits: a job that waits for ever.
    site.cluster.ask("sbatch", "--job-name=torn", "--output=/dev/null", "--wrap=sleep 600")
    (folder / ".output").mkdir(parents=True)
    noted = {"torn": {"commands": ["seed=0"], "is_whole": False}}
    (folder / ".output" / "slurm.json").write_text(json.dumps(noted))
    shutil.copy(swept / "sweep.json", folder)

    first = site.start(*site.sweep(folder, *words))
    frozen = freeze(folder / "seed=0")
    states = site.cluster.queue("%j %T")
    assert not any("torn" in state for state in states)
    assert sorted(state.split()[1] for state in states) == ["PENDING", "RUNNING"]
    stop = site.start("bin/sweep.py", "stop", folder)
    wait_for(lambda: len(site.cluster.queue()) == 1)
    os.kill(frozen, signal.SIGCONT)
    said, problems = stop.communicate(timeout=LIMIT)
    assert stop.returncode == 0, problems
    assert "1 waiting, 1 interrupted" in said
    assert first.wait(LIMIT) == INTERRUPTED
    assert not site.cluster.queue()
    assert attempts_in(folder / "seed=0") == [INTERRUPTED]

    second = site.start(*site.sweep(folder, "--launcher=slurm"))
    os.kill(freeze(folder / "seed=1"), signal.SIGKILL)
    said, problems = second.communicate(timeout=LIMIT)
    assert second.returncode == 0, problems  # it was started again
    told = json.loads((folder / ".output" / "endings.json").read_text())["seed=1"]
    assert re.match(r"job \d+_1 \(\S+_0_log\.out\): it died by SIGKILL .*\(death 1 of 3\)$", told)
    assert said.startswith("2 trials: 2 finished"), said
    finish(site, swept, folder, *words)
    assert attempts_in(folder / "seed=1") == ["killed", 0]


def test_nobody_sweeps_but_jobs_go_on_and_stop_ends_them(site: Site, swept: Path) -> None:
    folder = site.project / "results" / "left"
    shutil.copytree(swept, folder)
    shutil.rmtree(folder / "seed=1")
    first = site.start(*site.sweep(folder, "--launcher=slurm"))
    frozen = freeze(folder / "seed=1")  # it would be done before it is told
    first.kill()
    first.communicate()
    (job,) = site.cluster.queue()
    stop = site.start("bin/sweep.py", "stop", folder)
    wait_for(lambda: "Requeue=0" in site.cluster.ask("scontrol", "show", "job", job))
    os.kill(frozen, signal.SIGCONT)
    said, problems = stop.communicate(timeout=LIMIT)
    assert stop.returncode == 0, problems
    assert said.startswith(f"nobody sweeps {folder}; its jobs in SLURM were told to end")
    assert not site.cluster.queue()


def interrupt(site: Site, number: str, frozen: int, folder: Path) -> None:
    """Interrupt a job whose process is halted; it is queued again, and ends well."""
    site.cluster.ask("scancel", "--signal=TERM", number)
    os.kill(frozen, signal.SIGCONT)
    wait_for(lambda: [f"{number} PENDING"] == site.cluster.queue("%i %T"))
    wait_for(site.cluster.is_done)
    assert " ExitCode=0:0" in site.cluster.ask("scontrol", "show", "job", number)
    assert attempts_in(folder) == [INTERRUPTED, 0]


def test_a_run_is_queued_again_until_it_is_done(site: Site, swept: Path) -> None:
    config, *rest = WORDS
    folder = site.project / "results" / "one"
    words = ("bin/train.py", config, folder, *rest, "--seed=0")
    own = ("--launcher", "slurm", "--nodes=1", "--partition", "main", "--time=2:00:00")
    told = site.command(*words, *own)
    assert told.returncode == 0, told.stderr
    number = told.stdout.split()[1]
    frozen = freeze(folder)
    refused = site.command(*words, *own)
    assert refused.returncode == 2
    assert re.search(f"in use by process {frozen} on ({'|'.join(NODES)});", refused.stderr)
    interrupt(site, number, frozen, folder)
    assert bits_of(folder) == bits_of(swept / "seed=0")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["flags"] == {}
    assert "slurm" not in meta["command"]["line"]
    said = told.stdout.strip().rpartition(" ")[2]
    assert "best epoch" in (site.project / said).read_text()
    again = site.command(*words, *own)
    assert again.returncode == 0
    assert "already finished" in again.stdout


def test_a_run_on_two_nodes_is_that_of_two_workers_on_one(site: Site, tmp_path: Path) -> None:
    """Ended by a signal and queued again, it has the bits of one that nothing stopped."""
    config, *rest = WORDS
    rest.append("--num_epochs=12")
    words = ("bin/train.py", config, tmp_path / "straight", *rest)
    processes = [site.start(*words, TF_CONFIG=text) for text in on_this_machine(2)]
    for process in processes:
        _, problems = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, problems
    folder = site.project / "results" / "wide"
    own = ("--launcher=slurm", "--nodes=2")
    told = site.command("bin/train.py", config, folder, *rest, *own)
    assert told.returncode == 0, told.stderr
    number = told.stdout.split()[1]
    frozen = freeze(folder)
    assert site.cluster.queue("%N") == ["node[1-2]"]
    interrupt(site, number, frozen, folder)
    assert bits_of(folder) == bits_of(tmp_path / "straight")
    logs = [folder.parent / ".slurm" / f"{number}_{i}_log.out" for i in range(2)]
    assert [re.findall(r"hostname=(\w+)", log.read_text())[0] for log in logs] == list(NODES)


@pytest.mark.parametrize("script", ["bin/train.py", "bin/sweep.py"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition=nope"], "sbatch says: invalid partition specified: nope"),
        (["--time=1:30"], "--time=1:30 is not longer than the 120 s before its end at which a job"),
        (["--time=soon"], "sbatch says: Invalid --time specification"),
        (["--gpus=two"], "gpus is 'two'; with --launcher slurm give how many"),
        (["PATH"], "finds no sbatch"),
        (["PYTHONPATH"], 'needs submitit; type pip install "submitit>=1.5.2"'),
        (["acount: me"], "slurm.yaml: unknown key 'acount'; did you mean 'account'?"),
        (["setup: module load cuda"], 'slurm.yaml: setup: "module load cuda" was given, a list'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    site: Site, settings: Path, script: str, words: list[str], said: str, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "submitit.py").write_text("raise ModuleNotFoundError")
    environment = {words[0]: str(hidden)} if words[0].endswith("PATH") else {}
    flags = [word for word in words if word.startswith("--")]
    if script == "bin/sweep.py":
        flags.append("--seeds=2")
    if ": " in words[0]:
        settings.write_text(words[0])
    before = files_below(site.project / "results")
    flags.append("--launcher=slurm")
    done = site.command(script, "digits", "results/new", *flags, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert files_below(site.project / "results") == before
    assert not site.cluster.queue()


def test_flags_of_a_job_belong_to_a_launcher_that_there_is(site: Site) -> None:
    for flag, said in (
        ("--nodes=4", "--nodes is for a job: add --launcher=slurm"),
        ("--launcher=slrm", "launcher is 'slrm'; expected local or slurm"),
    ):
        done = site.command("bin/train.py", "digits", "results/new", flag)
        assert done.returncode == 2
        assert said in done.stderr
    assert not (site.project / "results" / "new").exists()


def test_a_command_that_no_job_can_run_says_why(site: Site, settings: Path) -> None:
    settings.write_text("setup: [echo there is no module cuda, exit 3]")
    folder = site.project / "results" / "none"
    done = site.command(*site.sweep(folder, "--launcher=slurm"))
    assert done.returncode == 1
    assert done.stdout.startswith("2 trials: 2 waiting")
    assert ".output/slurm" in done.stderr
    logs = list(folder.glob(".output/slurm/*/*_log.out"))
    assert len(logs) == 2
    assert all("there is no module cuda" in log.read_text() for log in logs)


@pytest.fixture
def small(project: Path, tmp_path: Path) -> Iterator[Site]:
    """A site that lets nobody have more than four tasks in an array, and five jobs in all."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm_cluster.opened(folder, "MaxArraySize=4") as a_cluster:
        (folder / "most").write_text("5")
        copy = tmp_path / "my-research"
        shutil.copytree(project, copy, symlinks=True)
        yield Site(copy, a_cluster)


@only_whole
def test_a_small_site_that_nobody_tidied_trains_each_trial_to_the_bit(small: Site) -> None:
    """Twenty trials: the login shell is killed, the controller is away, jobs lose their places, and
    the source is edited."""
    config, *rest = WORDS
    seeds = ("--seeds=20", "--num_epochs=6")
    straight, folder = (small.project / "results" / name for name in ("straight", "small"))
    words = ("bin/sweep.py", config, str(folder), *rest, *seeds, "--launcher=slurm")
    done = small.command("bin/sweep.py", config, str(straight), *rest, *seeds, "--jobs=2")
    assert done.returncode == 0, done.stderr
    most, said = 0, []

    def until(condition: Callable[[], Any]) -> None:
        nonlocal most
        while not condition():
            small.cluster.hurry()
            most = max(most, len(small.cluster.queue()))
            time.sleep(0.2)

    def finished() -> int:
        return len(list(folder.glob("*/learning_curve.png")))

    def has_finished(number: int) -> bool:
        return finished() >= number

    first = small.start(*words)
    until(lambda: finished() >= 3)
    status = small.command("bin/sweep.py", "status", folder).stdout
    assert re.search(r"^\d+ pending \((Resources|Priority|JobArrayTaskLimit)\): \d+", status, re.M)
    first.kill()  # as a login node that is shut does
    said.append(first.communicate()[1])
    models = small.project / "src" / "models.py"
    models.write_text(models.read_text() + "\nEDITED = True\n")
    until(lambda: finished() >= 5)
    second = small.start(*words, "--own_code")
    until(lambda: finished() >= 7)
    for _ in range(2):  # another job needs the place
        until(lambda: any("RUNNING" in line for line in small.cluster.queue("%i %T")))
        running = [line for line in small.cluster.queue("%i %T") if "RUNNING" in line]
        small.cluster.ask("scontrol", "requeue", running[0].split()[0])
        until(functools.partial(has_finished, finished() + 2))
    small.cluster.restart(seconds_away=8)
    until(lambda: finished() >= 12 or second.poll() is not None)
    until(lambda: second.poll() is not None)
    out, problems = second.communicate()
    assert second.returncode == 0, out + problems
    assert out.endswith("20 of 20 trials are finished\n")
    assert "QOSMaxSubmitJobPerUserLimit" in said[0] + problems
    assert "EDITED" not in zipfile.ZipFile(folder / "code.zip").read("src/models.py").decode()
    assert exact_files(folder) == exact_files(straight)
    assert 4 <= most <= 5
    attempts = sum(len(attempts_in(path.parent)) for path in folder.glob("*/meta.json"))
    assert 20 <= attempts <= 24
