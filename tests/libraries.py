"""Imports what most tests need before they fork or run: without garbage collections, which find
nothing here, and are quicker later on where they need not look at it."""

import contextlib
import gc
import importlib

# triton, where it is installed, comes before TensorFlow; see `engine`.
NAMES = (
    "triton",
    "h5py",
    "keras",
    "matplotlib.figure",
    "tensorboard.summary",
    "tensorflow",
    "tqdm",
)

gc.disable()
for name in NAMES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
gc.enable()
