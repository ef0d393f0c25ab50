"""Trains the trials of a sweep on a Ray cluster, each in a process of its own on one of its nodes.

On every node the project, the sweep and Python lie at the same path, in a shared folder."""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.sweeps.local import SECONDS_BETWEEN, Commands, Launcher, Tell
from vegab import ROOT, UsageError
from vegab.execution import one_line, say
from vegab.exits import INTERRUPTED, REFUSED
from vegab.provenance import ENVIRONMENT

OF_THE_NODE = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
# Where it finds data and code; taken along in addition to what a run records of its environment.
FROM_THE_SHELL = ("DATA_DIR", "KERAS_HOME", "PYTHONPATH")
SHARE = re.compile(r"\d*|0?\.\d+")  # of GPUs: several, or a part of one
SECONDS_TO_ANSWER = 5
SECONDS_OF_SILENCE = 20  # after which the head counts as gone; Ray itself ends the process after 60
# A server of gRPC, as Ray's are, answers the one with the other, both of HTTP/2.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS_FRAME = 4
# A cluster of this machine only: it listens on loopback, and tells nobody that it is there.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
OBJECT_STORE = 80 * 2**20  # bytes; an exit code is all that goes through it


class RayLauncher(Launcher):
    """Runs command lines of `bin/train.py`, each in a task of Ray.

    The arguments are flags of `bin/sweep.py`, the threads of each trial, which has as many cores
    (None: all cores of a node, or one next to GPUs), and `Launcher`'s; all nodes share `outputs`.
    Without an address it is what RAY_ADDRESS says, or else a cluster is started on this machine and
    ends with this process. Raises UsageError if Ray is not installed, or does not listen there."""

    def __init__(
        self, gpus: str, address: str, max_parallel: int, threads: int | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.max_parallel = max_parallel
        if not SHARE.fullmatch(gpus):
            raise UsageError(f"gpus is {gpus!r}; give how many each trial needs, such as 1 or 0.5")
        self.num_gpus, self.threads = float(gpus or 0), threads
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        if self.address == "local":
            for name, value in ALONE.items():
                os.environ.setdefault(name, value)  # Ray looks when it is imported
        try:
            import ray
        except ImportError:
            raise UsageError('--launcher ray needs Ray: pip install "ray>=2.40"') from None
        self._ray: Any = ray
        if self.address not in ("auto", "local") and not _answers(self.address):
            raise UsageError(  # to find that out, Ray itself takes two minutes
                f"no Ray listens at {self.address!r}; give the address that `ray start --head` "
                "shows, such as head:6379, or none to start one on this machine"
            )
        self._problems: dict[str, str] = {}

    def run(self, commands: Commands, tell: Tell) -> None:
        try:
            self._connect()
        except UsageError as error:
            self._problems = dict.fromkeys(commands, str(error))
            tell([], dict.fromkeys(commands, REFUSED))
            return
        options = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        self._train = self._ray.remote(max_retries=-1, **options)(_task())  # a node may die
        taken = {*FROM_THE_SHELL, *filter(ENVIRONMENT.fullmatch, os.environ)} - {*OF_THE_NODE}
        self._environment = {k: value for k, value in os.environ.items() if k in taken}
        if 0 < self.num_gpus < 1:  # else TensorFlow takes the whole memory for one
            self._environment["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
        # Of a node that died Ray tells at length, whatever it was asked to do.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            super().run(commands, tell)

    def room(self) -> int:
        return self.max_parallel or max(self._room(), 1)

    def begin(self, name: str, words: Sequence[str]) -> Any:
        output = str(self.output(name))
        return self._train.remote(list(words), os.getcwd(), self._environment, output)

    def ended(self, running: list[Any]) -> Sequence[Any]:
        return self._ray.wait(running, timeout=SECONDS_BETWEEN)[0]

    def end(self, one: Any) -> None:
        self._ray.cancel(one)  # what it runs saves a checkpoint and ends

    def code_of(self, one: Any, name: str) -> int | None:
        try:
            return self._ray.get(one)
        except self._ray.exceptions.TaskCancelledError:
            return None
        except self._ray.exceptions.RayError as error:
            problem = str(error).strip().splitlines()[-1]
            self._problems[name] = f"{name} did not begin: {problem}"
            return REFUSED

    def said(self, name: str) -> str:
        return self._problems.get(name) or super().said(name)

    def _connect(self) -> None:
        """Raise UsageError if Ray cannot be used, or none of its nodes has as many GPUs."""
        if not self._ray.is_initialized():
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if self.address == "local":
                options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
            handler = signal.getsignal(signal.SIGTERM)
            try:
                self._ray.init(self.address, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = repr(self.address)
                raise UsageError(f"Ray cannot be used at {where}: {one_line(error)}") from None
            signal.signal(signal.SIGTERM, handler)  # Ray has one of its own
            if self.address != "local":
                threading.Thread(target=self._watch, daemon=True).start()
        cores = [node["CPU"] for node in self._nodes()] or [1]
        self.num_cpus = min(self.threads or (1 if self.num_gpus else min(cores)), max(cores))
        if not self._room():
            most = max((node.get("GPU", 0) for node in self._nodes()), default=0)
            wrong = f"no node of Ray has more than {most:g}; give a smaller --gpus"
            raise UsageError(f"each trial is to have {self.num_gpus:g} GPUs, but {wrong}")

    def _watch(self) -> None:
        """End this process when the head is gone: calls of Ray's then wait, and end it without a
        word. All that it has to know is on the disk."""
        address = self.address
        if address == "auto":
            address = self._ray.get_runtime_context().gcs_address
        heard = time.monotonic()
        while time.monotonic() < heard + SECONDS_OF_SILENCE:
            time.sleep(SECONDS_TO_ANSWER)
            if _answers(address):
                heard = time.monotonic()
        say(f"Ray's head at {address} is gone; when it is back, the same command goes on")
        os._exit(INTERRUPTED)

    def _nodes(self) -> list[dict[str, float]]:
        """Return what each living node that computes has, by resource."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [node for node in nodes if node.get("CPU")]

    def _room(self) -> int:
        """Return how many trials fit on all nodes."""
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        fit = (min(node.get(k, 0) / n for k, n in needs.items() if n) for node in self._nodes())
        return sum(map(int, fit))


def _answers(address: str) -> bool:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER) as server:
            server.settimeout(SECONDS_TO_ANSWER)
            server.sendall(GREETING)
            return server.recv(4)[3:] == bytes([SETTINGS_FRAME])
    except (OSError, ValueError, OverflowError):
        return False


def _task() -> Callable[..., int]:
    """Return `train` in a form that crosses machines whole: a worker knows nothing of `engine`."""
    root = str(ROOT)

    def task(*arguments: Any) -> int:
        sys.path.insert(0, root)
        from engine.sweeps.ray_cluster import train

        return train(*arguments)

    return task


def train(words: list[str], place: str, environment: dict[str, str], output: str) -> int:
    """Run `bin/train.py` as if it were typed in the sweeper's shell, and return its exit code."""
    kept = {k: v for k, v in os.environ.items() if k in OF_THE_NODE or not ENVIRONMENT.fullmatch(k)}
    command = [sys.executable, os.path.relpath(ROOT / "bin" / "train.py", place), *words]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    process = None
    try:
        # What a worker began that is gone may live, and still write there.
        Path(place, output).unlink(missing_ok=True)
        with open(os.path.join(place, output), "a") as file:
            options |= {"stdout": file, "stderr": file, "env": kept | environment}
            process = subprocess.Popen(command, cwd=place, **options)
        # Ray's cancellation is an exception between two instructions; it ends no call of wait.
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN)
        return process.returncode
    except KeyboardInterrupt:
        if process is None:
            return INTERRUPTED
        process.terminate()
        return process.wait()
