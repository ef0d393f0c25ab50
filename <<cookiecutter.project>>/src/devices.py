"""Which GPUs a run may use. Chosen before TensorFlow is imported."""

import os
import shutil
import subprocess

from vegab import UsageError

IDLE = "-1"
MOST_PERCENT, MOST_MEMORY = 5, 5  # of use, and MiB: below both a GPU is idle


def choose_gpus(gpus: str) -> None:
    """Let TensorFlow see some GPUs alone.

    Args:
        gpus: numbers such as "0" or "0,1", "none" for the CPU, "-1" for the idle ones, "" for what
            the environment says.

    Raises:
        UsageError: if it is none of these, or no GPU is idle.
    """
    if not gpus:
        return
    numbers = [] if gpus == "none" else gpus.split(",")
    if gpus == IDLE:
        numbers = idle_gpus()
        if not numbers:
            raise UsageError(
                "--gpus=-1: no GPU is idle here; wait, or give --gpus=none for the CPU"
            )
    if not all(number.isdecimal() for number in numbers):
        raise UsageError(f"--gpus={gpus}: give numbers such as 0 or 0,1, or none, or -1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(numbers) or "-1"


def idle_gpus() -> list[str]:
    """Return the numbers of the GPUs that nobody uses, as nvidia-smi tells; none without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=index,utilization.gpu,memory.used"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = []
    for line in done.stdout.splitlines():
        number, percent, memory = (part.strip() for part in line.split(","))
        if int(percent) < MOST_PERCENT and int(memory) < MOST_MEMORY:
            found.append(number)
    return found
