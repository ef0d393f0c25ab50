"""Chooses GPUs, and keeps several workers and copies of the model in step."""
# ruff: noqa: F401

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.devices import gpus, replicas, workers
    from engine.devices.replicas import components
    from engine.devices.workers import INTERRUPTED, Workers
else:
    __getattr__ = lazy(__name__, __file__)
