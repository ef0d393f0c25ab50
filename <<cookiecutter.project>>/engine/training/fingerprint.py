"""Takes and compares what has to be the same for a resumed run to have the same bits.

Of that, a resumed process takes over the settings from the checkpoint, before TensorFlow starts."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.training import sources
from vegab import UsageError, read_run
from vegab.config import without
from vegab.names import import_libraries
from vegab.provenance import usable_cores

Fingerprint = dict[str, Any]

# Changing only these continues a run instead of making another of it.
MAY_GROW = ("num_epochs", "num_steps", "train.epochs")
# What the numbers of TensorFlow, oneDNN and NumPy depend on, of all that a processor can do.
# TensorFlow, too, chooses by them whether it uses oneDNN, where the environment does not say.
FEATURES = ("sse4_2", "avx", "avx2", "fma", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16")
# What TensorFlow takes from the environment when it is imported, or at its first step.
READ_AT_IMPORT = {
    "onednn": "TF_ENABLE_ONEDNN_OPTS",
    "onednn_isa": "ONEDNN_MAX_CPU_ISA",
    "onednn_fpmath": "ONEDNN_DEFAULT_FPMATH_MODE",
    "onednn_fpmath_of_tensorflow": "TF_SET_ONEDNN_FPMATH_MODE",
    "xla_flags": "TF_XLA_FLAGS",
}


def stored_in(run: str | Path) -> Fingerprint | None:
    """Return the fingerprint in a run's latest checkpoint, or None; it needs no Keras."""
    from engine.checkpoints import LATEST, PREVIOUS

    return of(Path(run, LATEST)) or of(Path(run, PREVIOUS))


def of(commit: Path) -> Fingerprint | None:
    """Return the fingerprint in a checkpoint, or None; it needs no Keras."""
    from engine.checkpoints import read_state, verify

    try:
        verify(commit)
        found = read_state(commit)["fingerprint"]
        return found if found and "settings" in found else None
    except (OSError, KeyError, ValueError):
        return None  # missing or corrupt; restoring says so


def settings_of(
    config: Mapping[str, Any], stored: Fingerprint | None, start: Fingerprint | None = None
) -> dict[str, Any]:
    """Return what can be set, as in the run's checkpoint, or as config, `start` or machine say."""
    if stored is not None:
        return stored["settings"]
    here = {"threads": usable_cores(), "deterministic": False, **read_at_import()}
    before = start["settings"] if start is not None else here
    threads = config["threads"] or before["threads"]
    return before | {"threads": threads, "deterministic": config["deterministic"]}


def read_at_import() -> dict[str, str]:
    """Return the settings that TensorFlow takes from the environment, as they are in it."""
    return {key: os.environ.get(name, "") for key, name in READ_AT_IMPORT.items()}


def apply(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Set what `settings_of` returned and import TensorFlow; return the settings as they are."""
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # or ~/.keras/keras.json decides
    if backend != "tensorflow":
        raise UsageError(f"KERAS_BACKEND is {backend!r}, but must be tensorflow; unset it")
    for key, name in READ_AT_IMPORT.items():
        os.environ.pop(name, None)
        if settings.get(key):
            os.environ[name] = settings[key]
    if "tensorflow" not in sys.modules:
        import_libraries(["keras"])
    import tensorflow as tf

    threading = tf.config.threading
    if threading.get_intra_op_parallelism_threads() != settings["threads"]:
        with contextlib.suppress(RuntimeError):
            threading.set_intra_op_parallelism_threads(settings["threads"])
            # Never only one: data is made ready next to the operation that waits for it.
            threading.set_inter_op_parallelism_threads(max(settings["threads"], 2))
    if settings["deterministic"]:
        tf.config.experimental.enable_op_determinism()
    return {**settings, "threads": threading.get_intra_op_parallelism_threads()}


def take(
    config: Mapping[str, Any], settings: Mapping[str, Any], dataset: Any, layout: str
) -> Fingerprint:
    """Return the fingerprint of a run that is about to start or to go on."""
    import keras
    import numpy as np
    import tensorflow as tf

    from engine.batches import FunctionBatches, digest

    lasting = dict(config)
    for key in MAY_GROW:
        with contextlib.suppress(KeyError):
            lasting = without(lasting, key)
    devices = [device.device_type for device in tf.config.list_physical_devices()]
    for device in tf.config.list_physical_devices("GPU"):
        devices.append(tf.config.experimental.get_device_details(device).get("device_name", "GPU"))
    both = {"train": dataset.train, "valid": dataset.valid}
    counted = {n: s.steps_per_epoch for n, s in both.items() if isinstance(s, FunctionBatches)}
    return {
        **({"counted": counted} if counted else {}),
        "settings": dict(settings),
        "versions": {module.__name__: module.__version__ for module in (tf, keras, np)},
        "processor": processor_features(),
        "devices": devices,
        "layout": layout,
        "config": hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest(),
        "data": digest(dataset.train, dataset.valid),
        "code": sources.digests(config),
    }


def differences(stored: Fingerprint, now: Fingerprint, where: str = "") -> list[str]:
    """Return a phrase for each thing that differs, such as "versions numpy: 2.3.1, now 2.4.6"."""
    found = []
    for key in sorted({*stored, *now}):
        old, new = stored.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}{key} ")
        elif old != new and key in ("data", "config"):
            found.append(f"the {key} has changed")
        elif old != new and where == "code " and key == sources.ENGINE:
            found.append("the engine is another version")
        elif old != new and where == "code ":
            verb = "is new" if old is None else "is gone" if new is None else "has changed"
            found.append(f"{key} {verb}")
        elif old != new:
            shown = [" ".join(map(str, v)) if isinstance(v, list) else v for v in (old, new)]
            found.append(f"{where}{key}: {shown[0]}, now {shown[1]}")
    return found


def processor_features() -> list[str]:
    """Return the kind of processor, and those of its instructions that numbers depend on."""
    lines = []
    with contextlib.suppress(OSError):  # not Linux: the kind has to do
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    words = set(flags.partition(":")[2].split())
    return [platform.machine(), *sorted(word for word in words if word.startswith(FEATURES))]


def code_differs(commit: Path, run: Path) -> list[str]:
    """Return the source files that have changed since a run's checkpoint was made; warn of them."""
    then = (of(commit) or {}).get("code", {})
    now = sources.digests(read_run(run)["config"])
    if found := [name for name, digest in then.items() if now.get(name) != digest]:
        names = f"{', '.join(found)} {'have' if len(found) > 1 else 'has'}"
        hint = "this is of the present code (--own_code: the run's)"
        logging.getLogger(__name__).warning("%s changed since the run; %s", names, hint)
    return found
