"""Chooses the GPUs that a run may use, before TensorFlow is imported, and uses several at once."""

import contextlib
import os
from contextlib import AbstractContextManager

from engine.devices import workers
from vegab import UsageError
from vegab.provenance import ask_nvidia_smi

IDLE = "-1"
SEVERAL = "PROJECT_NUM_GPUS"  # how many were asked for, for this process and its children
MOST_PERCENT, MOST_MEMORY = 5, 5  # of use, and MiB: below both a GPU is idle


def choose_gpus(gpus: str) -> None:
    """Let TensorFlow see some GPUs only: numbers such as "0,1", "none" for the CPU, "-1" for those
    that are idle, "" for what the environment says. UsageError for others, or if none is idle."""
    if not gpus:
        return
    numbers = [] if gpus == "none" else gpus.split(",")
    if gpus == IDLE and not (numbers := idle_gpus()):
        raise UsageError("--gpus=-1: no GPU is idle here; wait, or give --gpus=none for the CPU")
    if not all(number.isdecimal() for number in numbers):
        raise UsageError(f"--gpus={gpus}: give numbers such as 0 or 0,1, or none, or -1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(numbers) or "-1"
    os.environ[SEVERAL] = str(len(numbers))


def scope(together: bool = False) -> AbstractContextManager[object]:
    """Return what a model is to be built in: a copy on each GPU, and, `together`, other workers."""
    wanted = int(os.environ.get(SEVERAL, "0"))
    with_others = together and workers.worker().number > 1
    if wanted < 2 and not with_others:
        return contextlib.nullcontext()
    import tensorflow as tf

    # To ask for logical devices would start TensorFlow before it knows of the others.
    names = tf.config.list_physical_devices("GPU") if with_others else device_names()
    if len(names) < wanted:
        raise UsageError(f"--gpus asks for {wanted} GPUs; TensorFlow sees {len(names)}")
    if with_others:
        return workers.strategy().scope()
    # TensorFlow's own choice for processors crashes in synchronised batch normalisation.
    on_processors = not any("GPU" in name for name in names)
    reduction = tf.distribute.ReductionToOneDevice() if on_processors else None
    return tf.distribute.MirroredStrategy(names, cross_device_ops=reduction).scope()


def device_names() -> list[str]:
    """Return the names of the GPUs that TensorFlow sees."""
    import tensorflow as tf

    return [device.name for device in tf.config.list_logical_devices("GPU")]


def idle_gpus() -> list[str]:
    """Return the numbers of the GPUs that nobody uses, as nvidia-smi tells; none without it."""
    found = []
    for line in ask_nvidia_smi("index,utilization.gpu,memory.used", "csv,noheader,nounits"):
        number, percent, memory = (part.strip() for part in line.split(","))
        if int(percent) < MOST_PERCENT and int(memory) < MOST_MEMORY:
            found.append(number)
    return found
