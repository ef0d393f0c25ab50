"""Trains in SLURM's jobs, which submitit submits: the trials of a sweep, or one run.

SLURM says which jobs there are; all else crosses machines in the shared folder. A job that SLURM
interrupts, because its time is up or another job needs its place, saves a checkpoint and is queued
again as the same job. A job that is told to stop is not: SLURM itself then refuses to."""

import argparse
import contextlib
import functools
import io
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.runs import MOST_DEATHS
from engine.sweeps import definition
from engine.sweeps.local import KILLED, SECONDS_BETWEEN, Commands, Launcher, Tell
from vegab import ROOT, UsageError
from vegab.execution import say
from vegab.exits import FAILED, FINISHED, REFUSED
from vegab.files import read_json, write_json

SITE = ROOT / "configs" / "slurm.yaml"
OF_SBATCH = ("account", "qos", "cpus_per_task", "mem", "constraint", "gres", "exclude")
DEFAULTS: dict[str, Any] = dict.fromkeys(OF_SBATCH)
DEFAULTS |= {"seconds_to_commit": 120, "setup": [], "sbatch": {}}
INSTALL = 'pip install "submitit>=1.5.2"'
JOBS, LOGS = "slurm.json", "slurm"
FLAGS = ("launcher", "nodes", "gpus", "partition", "time")  # of bin/train.py
LARGEST_ARRAY = 1000  # whatever the site allows
NODES_DOWN = "Requested node configuration is not available"  # so says sbatch --test-only of them
LIMITS = re.compile(r"\b(?:QOS|Assoc)\w+")  # sbatch names the one that was reached, if it may
LATER = re.compile(
    r"(?i)accounting/QOS policy|timed out|temporarily|try again|unable to con(tact|nect)|standby"
    r"|zero (bytes|length)|message (send|receive) failure|connection (failure|refused)"
)
SECONDS_TO_WAIT = (2, 300)  # before SLURM is asked again: at first, and at most
MOST_NUMBERS = 8  # of jobs that a line of `status` names
LOOKS = 10  # waits for each squeue, which burdens a cluster
ENDINGS = {
    "OUT_OF_MEMORY": "it ran out of memory; ask for more by mem in configs/slurm.yaml",
    "TIMEOUT": "its time was up before it had saved a checkpoint; give a longer --time",
    "NODE_FAIL": "its node failed",
    "CANCELLED": "it was cancelled",
}
# 75: it has saved a checkpoint; 138 and 143: SIGUSR1 or SIGTERM came before it had begun. A run
# that gets nowhere is not queued again for ever.
QUEUE_AGAIN = f"""\
code=$?
task=${{SLURM_ARRAY_TASK_ID:-}}
mine=${{place}}_${{task:-0}}
case $code in
  75|138|143)
    restarts=${{SLURM_RESTART_COUNT:-0}}
    if [ $restarts -lt {MOST_DEATHS} ] || [ "$(cat "$mine.run")/model.h5" -nt "$mine.run" ]
    then scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{task:+_$task}}" && exit
    fi ;;
esac
echo $code > "$mine.code"
exit $code"""


class NotNowError(UsageError):
    """SLURM takes no job or does not answer, but will later."""


class Task(NamedTuple):
    """A place in SLURM's queue."""

    job: str  # the name of the array of jobs
    position: int  # in the array
    number: str  # what SLURM calls it, such as 12_3; "" while that is not known
    state: str  # such as PENDING or RUNNING
    reason: str  # why it waits


class SlurmLauncher(Launcher):
    """Runs command lines of `bin/train.py`, each in a job of an array.

    Jobs outlive this process: another launcher with the same `outputs` finds them again. The
    arguments are flags of `bin/sweep.py` and `Launcher`'s. Raises what `options_of` does."""

    def __init__(
        self, gpus: str, partition: str, time: str, max_parallel: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self.options = options_of(gpus, partition, time)
        self.max_parallel = max_parallel
        self.most = self.largest = largest_array()
        self._pause, self._not_before, self._look_at = SECONDS_TO_WAIT[0], 0.0, 0.0
        self._told: set[str] = set()  # what SLURM said
        self._queue: dict[str, Task] = {}  # as SLURM said last
        self._gone: dict[str, Task] = {}  # what was in it the time before
        self._ended: dict[str, tuple[str, str]] = {}  # where, and why, of those that were killed

    def adopted(self) -> set[str]:
        return set(self._tasks())

    def run(self, commands: Commands, tell: Tell) -> None:
        """See `Launcher.run`. What an earlier launcher has submitted is not submitted again."""
        self.outputs.mkdir(exist_ok=True)
        self._take_back()
        self._queue = self._tasks()
        super().run(commands, tell)

    def begin_some(self, waiting: Commands, num_running: int) -> dict[str, str]:
        most = self.largest
        if num_running and self.max_parallel:  # an array keeps to that by itself
            most = min(most, max(self.max_parallel - num_running, 0))
        is_there = any(name in self._queue for name in waiting)
        if waiting and most and not is_there and time.monotonic() >= self._not_before:
            self._queue |= self._submit({name: waiting[name] for name in [*waiting][:most]})
        return {name: name for name in waiting if name in self._queue}

    def at_work(self, names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if self._queue[name].state != "PENDING"]

    def ended(self, running: list[str]) -> list[str]:
        time.sleep(SECONDS_BETWEEN)
        gone: dict[str, Task] = {}
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOKS * SECONDS_BETWEEN
            with contextlib.suppress(UsageError):  # SLURM's controller may be away for a while
                there = tasks_of(self.outputs)
                gone = {name: self._queue[name] for name in running if name not in there}
                self._queue, self._gone = there, gone
                if self.is_stopped():
                    stop(there.values())
        if gone:  # there is room again
            self._not_before = 0
            self._note({task.job for task in self._queue.values()})
        return [*gone]

    def end(self, one: str) -> None:
        self._look_at = 0.0

    def said(self, name: str) -> str:
        return f"{super().said(name)} ({self.outputs / LOGS} holds what the jobs said)"

    def how(self, name: str, code: int, why: str = "") -> str:
        where, why = self._ended.get(name, ("", why))
        return where + super().how(name, code, why)

    def code_of(self, one: str, name: str) -> int | None:
        task = self._gone[name]
        logs = self.outputs / LOGS / task.job
        file = logs / f"{task.job}_{task.position}.code"
        text = file.read_text().strip() if file.exists() else ""
        if text in map(str, (FINISHED, FAILED, REFUSED)) or (self.is_stopped() and not text):
            return int(text) if text else None
        state, status = ending_of(task.number)
        where = f"job {task.number} ({logs / task.number}_0_log.out): "
        self._ended[name] = where, ENDINGS.get(state, "")
        return int(text or (state == "FAILED" and status) or KILLED)

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Return what a function returns when SLURM answers; None if that is awaited no longer."""
        while not self.is_stopped():
            try:
                return call()
            except NotNowError as error:
                self._wait(error)
                while time.monotonic() < self._not_before and not self.is_stopped():
                    time.sleep(SECONDS_BETWEEN)
        return None

    def _tasks(self) -> dict[str, Task]:
        return self._patiently(functools.partial(tasks_of, self.outputs)) or {}

    def _wait(self, error: NotNowError) -> None:
        """Say, once, what SLURM said, and wait longer each time until it is asked again."""
        if str(error) not in self._told:
            say(f"{error}; the command waits, and asks again")
        self._told.add(str(error))
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, SECONDS_TO_WAIT[1])

    def _submit(self, commands: Commands) -> dict[str, Task]:
        """Submit an array, and return its tasks. It is noted before, and again when it is whole,
        after submitit has written what jobs wait for: what was cut short is taken back. If SLURM
        does not take it now, the next one is smaller."""
        job = f"{_safe(self.outputs.resolve().parent.name)}-{secrets.token_hex(4)}"
        lines = {}
        for name, words in commands.items():
            output = shlex.quote(str(self.output(name)))
            lines[words[1]] = f"{line_of(words, self.options)} >> {output} 2>&1"
        before = read_json(self.outputs / JOBS) or {}
        noted = {"commands": list(commands), "is_whole": False}
        write_json(self.outputs / JOBS, before | {job: noted})
        logs = self.outputs / LOGS / job
        try:
            number = submit(self.options, job, lines, logs, self.max_parallel)
        except UsageError as error:
            shutil.rmtree(logs)
            if not isinstance(error, NotNowError):
                write_json(self.outputs / JOBS, before)
                raise
            self._wait(error)
            self._take_back()  # it may have been taken, and only the answer was lost
            self.largest = max(self.largest // 2, 1)
            return {}
        write_json(self.outputs / JOBS, before | {job: noted | {"is_whole": True}})
        self.largest = min(2 * self.largest, self.most)
        self._pause = SECONDS_TO_WAIT[0]
        numbers = [f"{number}_{i}" for i in range(len(lines))] if len(lines) > 1 else [number]
        return {name: Task(job, i, numbers[i], "PENDING", "") for i, name in enumerate(commands)}

    def _take_back(self) -> None:
        """Cancel what was not submitted as a whole; what runs of it saves a checkpoint."""
        jobs = read_json(self.outputs / JOBS) or {}
        incomplete = [job for job, noted in jobs.items() if not noted["is_whole"]]
        for job in incomplete:
            self._patiently(functools.partial(ask, "scancel", f"--name={job}"))
        while incomplete and any(task.job in incomplete for task in self._tasks().values()):
            time.sleep(SECONDS_BETWEEN)
        if incomplete and not self.is_stopped():
            self._note(jobs.keys() - set(incomplete))

    def _note(self, jobs: Collection[str]) -> None:
        """Forget other arrays than these."""
        noted = read_json(self.outputs / JOBS) or {}
        write_json(self.outputs / JOBS, {job: noted[job] for job in noted if job in jobs})


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
    number = submit(options, _safe(run.name), {save_path: line_of(words, options)}, logs)
    return f"job {number} trains {run}; its output: {logs / f'{number}_0_log.out'}"


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
    lead = int(site["seconds_to_commit"])
    asked = site["sbatch"] | {key: site[key] for key in OF_SBATCH if site[key] is not None}
    asked |= {key: value for key, value in typed.items() if value}
    asked |= {"nodes": nodes, "ntasks_per_node": 1, "signal": f"USR1@{lead}", "requeue": True}
    if seconds_of(str(asked.get("time", ""))) <= lead:
        raise UsageError(
            f"--time={asked['time']} is not longer than the {lead} s before its end at which a job "
            "is told to save a checkpoint (seconds_to_commit in configs/slurm.yaml); give more"
        )
    flags = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in asked.items()]
    try:
        ask("sbatch", "--test-only", *flags, "--wrap=true")
    except UsageError as error:
        if not (isinstance(error, NotNowError) or NODES_DOWN in str(error)):
            raise  # what is only not now is waited for
    return asked | {"setup": site["setup"]}


def line_of(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return the line for a shell that is `bin/train.py` with a command line."""
    program = os.path.relpath(ROOT / "bin" / "train.py")
    line = f"exec {shlex.join([sys.executable, program, *words])}"
    # Of one GPU, SLURM lets the job see no other; several are to be asked for, by their numbers.
    return line + " --gpus=$CUDA_VISIBLE_DEVICES" * (options.get("gpus_per_node", 0) > 1)


def seconds_of(limit: str) -> float:
    """Return the seconds that SLURM takes a limit of time for; infinity if it is none, or not one
    of SLURM's, which then says so: minutes, minutes:seconds, or days-hours:minutes:seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        return math.inf
    days, *rest = (int(part or 0) for part in match.groups())
    if match[1] or match[4]:
        hours, minutes, seconds = rest
    else:
        hours, (minutes, seconds, _) = 0, rest
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds or math.inf


def largest_array() -> int:
    """Return how many tasks an array may have here."""
    size = None
    with contextlib.suppress(NotNowError):
        size = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(min(int(size[1]), LARGEST_ARRAY), 1) if size else LARGEST_ARRAY


def queue_of(outputs: Path) -> list[str]:
    """Return a line for each state of jobs in the queue, with what waiting ones wait for."""
    found: dict[str, list[str]] = {}
    for task in tasks_of(outputs).values():
        reason = f" ({task.reason})" if task.reason not in ("None", "") else ""
        found.setdefault(f"{task.state.lower()}{reason}", []).append(task.number)
    return [
        f"{len(numbers)} {state}: {', '.join(numbers[:MOST_NUMBERS])}"
        + ", …" * (len(numbers) > MOST_NUMBERS)
        for state, numbers in found.items()
    ]


def submit(
    options: dict[str, Any], name: str, lines: Mapping[str, str], logs: Path, max_parallel: int = 0
) -> str:
    """Submit a job for each of the lines for a shell, by the run folder that they train in; return
    its number, or raise UsageError. `logs` gets batch scripts, what jobs say, and exit codes."""
    import submitit

    place = shlex.quote(str(logs.absolute() / name))
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
        # srun does not take these over.
        srun_args=["--open-mode=append", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        setup=[*options["setup"], "set +e"],
        teardown=[QUEUE_AGAIN.replace("$?", f"$? place={place}", 1)],
        additional_parameters={key: options[key] for key in options if key != "setup"},
    )
    # The task becomes the run: SLURM's signals reach nothing else.
    mark = f"{place}_${{SLURM_ARRAY_TASK_ID:-0}}.run"  # whose time says when this attempt began
    shells = [f"echo {shlex.quote(run)} > {mark}; {line}" for run, line in lines.items()]
    starts = [functools.partial(os.execv, "/bin/sh", ["sh", "-c", shell]) for shell in shells]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            jobs = executor.submit_array(starts)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise _refusal(str(error), "sbatch") from None
    return jobs[0].job_id.partition("_")[0]


def tasks_of(outputs: Path) -> dict[str, Task]:
    """Return SLURM's tasks by their commands' names. Raises UsageError if it does not answer."""
    jobs = read_json(outputs / JOBS)
    if not jobs:
        return {}
    found = {}
    words = ("--noheader", "--array", f"--name={','.join(jobs)}", "--format=%j %K %T %i %r")
    for line in ask("squeue", *words).splitlines():
        job, position, state, number, reason = line.split(maxsplit=4)
        index = int(position) if position.isdecimal() else 0  # a job that is not an array
        found[jobs[job]["commands"][index]] = Task(job, index, number, state, reason)
    return found


def stop(tasks: Collection[Task]) -> None:
    """Cancel jobs that wait; those that run save a checkpoint and end for good."""
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


def ending_of(number: str) -> tuple[str, int]:
    """Return how SLURM says a job ended, as TIMEOUT, and its exit code: "" and 0 if unknown."""
    of_sacct = ("--noheader", "--allocations", "--parsable2", "--format=State,ExitCode")
    for pattern, *command in (
        (r"JobState=(\w+).*? ExitCode=(\d+)", "scontrol", "show", "job", number, "--oneliner"),
        (r"(\w+).*?\|(\d+)", "sacct", f"--jobs={number}", *of_sacct),
    ):
        with contextlib.suppress(UsageError):
            if match := re.search(pattern, ask(*command)):
                return match[1], int(match[2])
    return "", 0


def ask(*command: str) -> str:
    """Return what a command of SLURM's says. Raises UsageError with its complaint, if any."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"{command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise _refusal(done.stderr, command[0])
    return done.stdout


def _refusal(complaint: str, program: str) -> UsageError:
    """Return the error for what SLURM complains of. A limit on what is submitted says "later", one
    on what a job asks for "never"."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in complaint.strip().splitlines()]
    limits = LIMITS.findall(complaint)
    is_later = "SubmitJob" in "".join(limits) if limits else LATER.search(complaint)
    kind = NotNowError if is_later else UsageError
    return kind(f"{program} says: {'; '.join(lines) or 'nothing'}")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name) or "run"
