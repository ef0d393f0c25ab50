"""Trains in SLURM's jobs, which submitit submits: the trials of a sweep, or one run.

SLURM says which jobs there are; all else crosses machines in the shared folder. A job that SLURM
interrupts, because its time is up or another job needs its place, saves a checkpoint and is queued
again as the same job. One that is told to stop is not: SLURM itself then refuses to.
"""

import argparse
import contextlib
import functools
import io
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.sweeps import definition
from engine.sweeps.local import SECONDS_BETWEEN, Commands, Launcher, Tell
from vegab import ROOT, UsageError
from vegab.files import read_json, write_json

SITE = ROOT / "configs" / "slurm.yaml"
OF_SBATCH = ("account", "qos", "cpus_per_task", "mem", "constraint", "gres", "exclude")
DEFAULTS: dict[str, Any] = dict.fromkeys(OF_SBATCH)
DEFAULTS |= {"seconds_to_commit": 120, "setup": [], "sbatch": {}}
INSTALL = 'pip install "submitit>=1.5.2"'
JOBS, LOGS = "slurm.json", "slurm"
FLAGS = ("launcher", "nodes", "gpus", "partition", "time")  # of bin/train.py
LARGEST_ARRAY = 1000  # SLURM's own limit is 1,001 tasks, where the site has set no other
KILLED = -9
NOT_NOW = "Requested node configuration is not available"  # so says sbatch of nodes that are down
LOOKS = 10  # so many waits for each squeue, which burdens a cluster
# 75: it has saved a checkpoint; 138 and 143: SIGUSR1 or SIGTERM came before it had begun.
QUEUE_AGAIN = """\
code=$?
task=${SLURM_ARRAY_TASK_ID:-}
case $code in
  75|138|143) scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+_$task}" && exit ;;
esac"""


class Task(NamedTuple):
    """A place in SLURM's queue."""

    job: str  # the name of the array of jobs
    position: int  # in the array
    number: str  # what SLURM calls it, such as 12_3; "" while that is not known
    state: str  # such as PENDING or RUNNING


class SlurmLauncher(Launcher):
    """Runs command lines of `bin/train.py`, each in a job of an array.

    Jobs outlive this process: another launcher with the same `outputs` finds them again. The
    arguments are flags of `bin/sweep.py` and `Launcher`'s. Raises what `options_of` does.
    """

    def __init__(
        self, gpus: str, partition: str, time: str, max_parallel: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self.options = options_of(gpus, partition, time)
        self.max_parallel = max_parallel

    def adopted(self) -> set[str]:
        return set(tasks_of(self.outputs))

    def run(self, commands: Commands, tell: Tell) -> dict[str, int]:
        """See `Launcher.run`. What an earlier launcher has submitted is not submitted again."""
        self.outputs.mkdir(exist_ok=True)
        self._take_back()
        there = tasks_of(self.outputs)
        queued = {name: task for name, task in there.items() if name in commands}
        codes: dict[str, int] = {}
        while True:
            waiting = [name for name in commands if name not in queued and name not in codes]
            was_stopped = self.is_stopped()
            if was_stopped:
                stop(queued.values())
            elif waiting and not (queued and self.max_parallel):
                queued |= self._submit({name: commands[name] for name in waiting[:LARGEST_ARRAY]})
                continue
            if not queued:
                break
            for _ in range(LOOKS):
                running = [name for name, task in queued.items() if task.state != "PENDING"]
                commands = {**commands, **tell(running, codes)}
                time.sleep(SECONDS_BETWEEN)
                if self.is_stopped() != was_stopped:
                    break
            with contextlib.suppress(UsageError):  # SLURM's controller may be away for a while
                there = tasks_of(self.outputs)
                for name in queued.keys() - there.keys():
                    task = queued.pop(name)
                    file = self.outputs / LOGS / f"{task.job}_{task.position}.code"
                    text = file.read_text().strip() if file.exists() else ""
                    if text or not self.is_stopped():
                        codes[name] = int(text or KILLED)
                queued = {name: there[name] for name in queued}
        tell([], codes)
        jobs = read_json(self.outputs / JOBS) or {}
        write_json(self.outputs / JOBS, {task.job: jobs[task.job] for task in there.values()})
        return codes

    def said(self, name: str) -> str:
        return f"{super().said(name)} ({self.outputs / LOGS} holds what the jobs said)"

    def _submit(self, commands: Commands) -> dict[str, Task]:
        """Submit an array, and return its tasks. It is noted before, and again when it is whole,
        after submitit has written what jobs wait for: what was cut short is taken back.
        """
        job = f"{_safe(self.outputs.resolve().parent.name)}-{secrets.token_hex(4)}"
        lines = []
        for name, words in commands.items():
            output = self.output(name)
            output.unlink(missing_ok=True)
            lines.append(f"{line_of(words, self.options)} > {shlex.quote(str(output))} 2>&1")
        before = read_json(self.outputs / JOBS) or {}
        noted = {"commands": list(commands), "is_whole": False}
        write_json(self.outputs / JOBS, before | {job: noted})
        try:
            submit(self.options, job, lines, self.outputs / LOGS, self.max_parallel)
        except UsageError:
            write_json(self.outputs / JOBS, before)
            raise
        write_json(self.outputs / JOBS, before | {job: noted | {"is_whole": True}})
        return {name: Task(job, i, "", "PENDING") for i, name in enumerate(commands)}

    def _take_back(self) -> None:
        """Cancel what was not submitted as a whole; what runs of it saves a checkpoint."""
        jobs = read_json(self.outputs / JOBS) or {}
        whole = {job: noted for job, noted in jobs.items() if noted["is_whole"]}
        for job in jobs.keys() - whole.keys():
            ask("scancel", f"--name={job}")
        while any(task.job not in whole for task in tasks_of(self.outputs).values()):
            time.sleep(SECONDS_BETWEEN)
        write_json(self.outputs / JOBS, whole)


def submit_run(
    argv: Sequence[str], save_path: str, gpus: str, partition: str, time: str, nodes: int
) -> str:
    """Submit a job that runs `bin/train.py` on each of its nodes, and return a line about it."""
    definition.require_numbers(1, nodes=nodes)
    options = options_of(gpus, partition, time, nodes)
    own_flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in FLAGS:
        own_flags.add_argument(f"--{flag}")
    words = own_flags.parse_known_args(argv)[1]
    run = Path(os.path.normpath(save_path))
    logs = run.parent / ".slurm"
    number = submit(options, _safe(run.name), [line_of(words, options)], logs)
    return f"job {number} trains {run}; what it says: {logs / f'{number}_0_log.out'}"


def options_of(gpus: str, partition: str, time: str, nodes: int = 1) -> dict[str, Any]:
    """Return what is asked of SLURM, and `setup`; UsageError if SLURM, or what is here, says no."""
    if gpus and not re.fullmatch("[1-9][0-9]*", gpus):
        raise UsageError(f"gpus is {gpus!r}; with --launcher slurm give how many, such as 1")
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(f"--launcher slurm needs submitit; type {INSTALL}") from None
    if not shutil.which("sbatch"):
        raise UsageError("--launcher slurm finds no sbatch; type it on the cluster's login node")
    path = Path(os.path.relpath(SITE))
    site = DEFAULTS | (definition.read_known(path, DEFAULTS) if path.exists() else {})
    typed = {"partition": partition, "time": time, "gpus_per_node": int(gpus or 0)}
    asked = {
        **site["sbatch"],
        **{key: site[key] for key in OF_SBATCH if site[key] is not None},
        **{key: value for key, value in typed.items() if value},
        "nodes": nodes,
        "ntasks_per_node": 1,
        "signal": f"USR1@{site['seconds_to_commit']}",
        "requeue": True,
    }
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in asked.items()
    ]
    try:
        ask("sbatch", "--test-only", *flags, "--wrap=true")
    except UsageError as error:
        if NOT_NOW not in str(error):
            raise
    return asked | {"setup": site["setup"]}


def line_of(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return the line for a shell that is `bin/train.py` with a command line."""
    program = os.path.relpath(ROOT / "bin" / "train.py")
    line = f"exec {shlex.join([sys.executable, program, *words])}"
    # Of one GPU, SLURM lets the job see no other; several are to be asked for, by their numbers.
    return line + " --gpus=$CUDA_VISIBLE_DEVICES" * (options.get("gpus_per_node", 0) > 1)


def submit(
    options: Mapping[str, Any], name: str, lines: Sequence[str], logs: Path, max_parallel: int = 0
) -> str:
    """Submit a job for each of the lines, which are for a shell, and return its number.

    The folder `logs` gets batch scripts, what jobs say, and exit codes. Raises UsageError.
    """
    import submitit

    code_file = f"{shlex.quote(str(logs.absolute() / name))}_${{task:-0}}.code"
    cpus = options.get("cpus_per_task")
    executor = submitit.SlurmExecutor(logs)
    executor.update_parameters(
        job_name=name,
        nodes=options["nodes"],
        ntasks_per_node=1,
        array_parallelism=max_parallel or len(lines),
        time=None,  # submitit's is 5 minutes
        wckey=None,
        stderr_to_stdout=True,
        srun_args=[f"--cpus-per-task={cpus}"] if cpus else [],  # srun does not take it over
        setup=[*options["setup"], "set +e"],
        teardown=[QUEUE_AGAIN, f"echo $code > {code_file}", "exit $code"],
        additional_parameters={key: options[key] for key in options if key != "setup"},
    )
    # The task becomes the run: SLURM's signals reach nothing else.
    starts = [functools.partial(os.execv, "/bin/sh", ["sh", "-c", line]) for line in lines]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            jobs = executor.submit_array(starts)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UsageError(_first_line(str(error), "sbatch")) from None
    return jobs[0].job_id.partition("_")[0]


def tasks_of(outputs: Path) -> dict[str, Task]:
    """Return SLURM's tasks by their commands' names. Raises UsageError if it does not answer."""
    jobs = read_json(outputs / JOBS)
    if not jobs:
        return {}
    found = {}
    words = ("--noheader", "--array", f"--name={','.join(jobs)}", "--format=%j %K %T %i")
    for line in ask("squeue", *words).splitlines():
        job, position, state, number = line.split()
        index = int(position) if position.isdecimal() else 0  # a job that is no array
        found[jobs[job]["commands"][index]] = Task(job, index, number, state)
    return found


def stop(tasks: Iterable[Task]) -> None:
    """Cancel jobs that wait; those that run save a checkpoint and end for good."""
    tasks = list(tasks)
    running = [task.number for task in tasks if task.state not in ("PENDING", "COMPLETING")]
    with contextlib.suppress(UsageError):  # they end, or are told again
        for job in {task.job for task in tasks if task.state == "PENDING"}:
            ask("scancel", "--state=PENDING", f"--name={job}")
        if running:
            ask("scontrol", "update", f"JobId={','.join(running)}", "Requeue=0")
            ask("scancel", "--signal=TERM", *running)


def stop_all(outputs: Path) -> bool:
    """Stop what a launcher that is gone has in SLURM's queue; return whether there was anything."""
    was_there = False
    while tasks := tasks_of(outputs):
        was_there = True
        stop(tasks.values())
        time.sleep(SECONDS_BETWEEN * LOOKS)
    return was_there


def ask(*command: str) -> str:
    """Return what a command of SLURM's says. Raises UsageError with its complaint, if any."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(_first_line(done.stderr, command[0]))
    return done.stdout


def _first_line(complaint: str, program: str) -> str:
    line = (complaint.strip().splitlines() or ["nothing"])[0]
    return f"{program} says: {line.removeprefix(f'{program}: ').removeprefix('error: ')}"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name) or "run"
