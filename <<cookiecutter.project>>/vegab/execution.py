"""Calls a function in its run folder: the order of this file is the order of events.

The folder is looked at, output is captured, what can only be checked after imports is checked, the
folder is opened and locked, the function runs, and its end is recorded and told."""

import contextlib
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from vegab.capture import Capture
from vegab.config import Config
from vegab.exits import EXIT_CODES, UsageError, outcome
from vegab.plugins import VegabPlugin
from vegab.run_folder import RunFolder

Func = Callable[..., Any]
Plugins = Sequence[VegabPlugin]
# Exceptions whose message says it all: their traceback goes to stderr.txt only.
EXPLAINED = (OSError, FloatingPointError)
_IGNORED = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]


def execute(
    func: Func, folder: RunFolder, keywords: Config, plugins: Plugins, prepare: Func | None
) -> int:
    """Calls `func(config, save_path[, prepare(config)], **keywords)`; returns the exit code. Raises
    UsageError, or AlreadyFinished, while the folder is untouched."""
    config = folder.config
    folder.check()
    _signals(_interrupt)
    capture = Capture()
    arguments: list[Any] = [config, folder.path]
    error: BaseException | None = None
    try:
        try:
            arguments += _prepared(prepare, folder, keywords)
        except UsageError:
            raise
        except Exception as failure:  # what the user did not cause belongs to the run's story
            error = failure
        folder.open()
    except BaseException as refusal:
        capture.stop()
        folder.close()
        if outcome(refusal) != "interrupted":
            raise
        say("interrupted before the run folder was opened")
        return EXIT_CODES["interrupted"]
    try:
        capture.move_to(folder.absolute)
        for plugin in plugins:
            plugin.on_before_call(config, folder.path)
        if error is not None:
            raise error
        _call(func, arguments, keywords)
        for plugin in plugins:
            plugin.on_after_call(config, folder.path)
    except BaseException as failure:
        error = failure
    # From here on a second Ctrl-C would only spoil the record of the first.
    _signals(signal.SIG_IGN)
    status = outcome(error)
    failures: list[BaseException] = []
    if error is not None:
        failures += [error] if status == "failed" else []
        for plugin in plugins:
            try:
                plugin.on_failure(config, folder.path, error)
            except Exception as another:
                failures.append(another)
    _signals(signal.SIG_DFL)
    capture.stop()
    is_kept = capture.append(_tracebacks(failures))
    folder.close()
    if capture.is_watched or not is_kept:
        loud = [one for one in failures if not isinstance(one, EXPLAINED)]
        with contextlib.suppress(OSError):  # the terminal is gone
            sys.stderr.write(_tracebacks(loud if is_kept else failures))
    if status == "interrupted":
        reason = f" by {error}" if isinstance(error, KeyboardInterrupt) and error.args else ""
        # A name that was made for this run would be another the next time.
        has_new_name = any(getattr(plugin, "has_named", False) for plugin in plugins)
        again = "the same command" + ", with this path as SAVE_PATH," * has_new_name
        say(f"interrupted{reason}; {again} continues {folder.path}")
    elif status == "failed":
        is_explained = isinstance(error, (*EXPLAINED, UsageError))
        kind = "" if is_explained else f"{type(error).__name__}: "
        where = f"in {os.path.join(folder.path, 'stderr.txt')}" if is_kept else "above"
        say(f"failed: {kind}{one_line(error)} (traceback {where})")
    return EXIT_CODES[status]


def accompany(func: Func, folder: RunFolder, keywords: Config, prepare: Func | None) -> int:
    """As `execute`, next to the process that writes the run folder. Plugins are told nothing."""
    folder.check(writes=False)
    _signals(_interrupt)
    error: BaseException | None = None
    try:
        arguments = [folder.config, folder.path, *_prepared(prepare, folder, keywords)]
        _call(func, arguments, keywords)
    except UsageError:
        raise
    except BaseException as failure:
        error = failure
        if outcome(failure) == "failed" and not isinstance(failure, EXPLAINED):
            traceback.print_exception(failure)
    status = outcome(error)
    if status == "failed":
        say(f"failed: {one_line(error)}")
    return EXIT_CODES[status]


def _prepared(prepare: Func | None, folder: RunFolder, keywords: Config) -> list[Any]:
    if prepare is None:
        return []
    known = {"save_path": folder.path, **keywords}
    wanted = list(inspect.signature(prepare).parameters)[1:]
    return [prepare(folder.config, **{k: known[k] for k in wanted if k in known})]


def _call(func: Func, arguments: list[Any], keywords: Config) -> None:
    try:
        func(*arguments, **keywords)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def _signals(handler: Any) -> None:
    """Sets what the signals that ask for an end do. nohup's choice to ignore one is respected."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if name not in _IGNORED:
            signal.signal(name, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _tracebacks(errors: Sequence[BaseException]) -> str:
    texts = []
    for error in errors:
        trace = error.__traceback__ and error.__traceback__.tb_next  # without our own frame
        texts += traceback.format_exception(type(error), error, trace)
    return "".join(texts)


def one_line(error: BaseException | None) -> str:
    """An exception's message without line breaks, or its type."""
    return " ".join(str(error).split()) or type(error).__name__


def script() -> str:
    """The name that the program goes by in its messages."""
    return os.path.basename(sys.argv[0]) or "script"


def say(sentence: str) -> None:
    """One line on stderr, with the script's name in front."""
    # The terminal may be gone by now, or stderr closed from the start.
    with contextlib.suppress(OSError, AttributeError, ValueError):
        print(f"{script()}: {printable(sentence)}", file=sys.stderr, flush=True)


def print_line(sentence: str) -> None:
    """One line on stdout, at once."""
    print(printable(sentence), flush=True)


def printable(text: str) -> str:
    """The text with an escape for what would not be seen, or would move the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
