"""Says how a child process has ended: with the name of the signal, and what is known to send it."""

import re
import signal

# How lines of TensorFlow's and SLURM's begin, which say nothing of why a program ended.
NOISE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWEF] |[IWEF]\d{4,8} |WARNING: All log messages before"
    r"|To enable the following instructions|srun: |slurmstepd: "
)
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
    """Return how a process ended, by its exit code, what it `said`, and `why` if that is known."""
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
    return f"{phrase}; its last line is: {last}" if last else phrase
