"""Runs worker processes that call functions with an object that was pickled for them."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from engine import endings


class Processes:
    """Processes that call functions with an object; they end with this process. `remedy` says what
    to do if it cannot be pickled."""

    def __init__(self, thing: Any, number: int, remedy: str) -> None:
        self._thing, self._number = thing, number
        name = type(thing).__name__
        self._refusal = f"{name} cannot be pickled for worker processes ({{}}); {remedy}"
        self._pickled: bytes | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._version = 0
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def renew(self) -> None:
        """Hand the object to the processes as it is now; none of them may be at work."""
        try:
            pickled = pickle.dumps(self._thing)
        except Exception as error:  # pickle raises half a dozen types
            raise ValueError(self._refusal.format(" ".join(str(error).split()))) from error
        if pickled != self._pickled:
            self._version += 1
            Path(self._folder.name, str(self._version)).write_bytes(pickled)
            self._pickled = pickled

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return, or raise, what `function(thing, *arguments)` does in one of the processes."""
        children: list[Any] = []
        for _ in range(2):
            with self._lock:
                if self._pickled is None:
                    self.renew()
                if self._pool is None:
                    # A fork would copy TensorFlow's locks without the threads that release them.
                    context = multiprocessing.get_context("spawn")
                    self._pool = ProcessPoolExecutor(self._number, context, initializer=_start)
                pool = self._pool
            path = os.path.join(self._folder.name, str(self._version))
            try:
                future = pool.submit(_call, path, self._refusal, function, arguments)
                children = multiprocessing.active_children()
                return future.result()
            except BrokenProcessPool:
                # A batch scheduler sends its SIGTERM to the workers too, and the step that this
                # process wants to end before it stops needs them.
                with self._lock:  # of several threads that meet the same, one ends it
                    if self._pool is pool:
                        self._pool = None
                        pool.shutdown(cancel_futures=True)
        # The pool ends the others by SIGTERM.
        codes = {child.exitcode or 0 for child in children} - {0}
        code = min(codes - {-signal.SIGTERM} or codes, default=1)
        whose, how = type(self._thing).__name__, endings.ending(code)
        raise RuntimeError(f"a worker process of {whose} died twice: {how}")

    def close(self) -> None:
        """End the processes; what is called later starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)


# What follows runs in a worker process. The object stays pickled there until something is asked of
# it: an error then reaches the one who asked, an error at the start would not.
_given: dict[str, Any] = {}


def _start() -> None:
    # A terminal sends these to workers too; the process that started them decides what to do.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The GPU's memory is for training, should the object use TensorFlow.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone; the pool's pipes do not tell of a SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(path: str, refusal: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if path not in _given:
        _given.clear()
        try:
            _given[path] = pickle.loads(Path(path).read_bytes())
        except Exception as error:
            raise ValueError(refusal.format(" ".join(str(error).split()))) from error
    return function(_given[path], *arguments)
