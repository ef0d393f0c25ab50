"""Chooses GPUs, and keeps several workers and copies of the model in step."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.devices import gpus as gpus
    from engine.devices import replicas as replicas
    from engine.devices import workers as workers
    from engine.devices.replicas import components as components
    from engine.devices.workers import INTERRUPTED as INTERRUPTED
    from engine.devices.workers import Workers as Workers
else:
    __getattr__ = lazy(__name__, __file__)
