"""Says how a child process has ended: with the name of the signal, and what is known to send it."""

import importlib.util
import re
import signal

# How lines of TensorFlow's and SLURM's begin, which say nothing of why a program ended.
NOISE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWEF] |[IWEF]\d{4,8} |WARNING: All log messages before"
    r"|To enable the following instructions|srun: |slurmstepd: "
)
CRASHES = (signal.SIGSEGV, signal.SIGABRT)
OF_A_SHELL = 128  # added to the number of the signal


def signal_of(code: int) -> int:
    """Return the number of the signal that ended a process, or 0 if none did."""
    number = -code if code < 0 else code - OF_A_SHELL
    return number if number in signal.valid_signals() else 0


def last_line(said: str) -> str:
    """Return the last line of a text that a program wrote itself, or nothing."""
    lines = (line.strip() for line in reversed(said.splitlines()))
    return next((line for line in lines if line and not NOISE.match(line)), "")


def ending(code: int, said: str = "", why: str = "") -> str:
    """Return a phrase that says how a process ended, and why where that is known.

    `code` is the exit code: minus the number of the signal that ended it, or 128 more than that.
    Of what the process `said`, the last line is quoted.
    """
    last = last_line(said)
    number = signal_of(code)
    if why:
        return f"{why}; its last line is: {last}" if last else why
    if not number:
        return last or f"it ended with exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    phrase = f"it died by {names.get(number, 'a signal')} ({signal.strsignal(number)})"
    if number == signal.SIGKILL:
        phrase += ", perhaps because the memory was full"
    if number in CRASHES and importlib.util.find_spec("triton"):
        phrase += (
            "; with PyTorch next to TensorFlow this happens where triton is imported after "
            "TensorFlow (tensorflow/tensorflow#124205): import src before what imports TensorFlow"
        )
    return f"{phrase}; its last line is: {last}" if last else phrase
