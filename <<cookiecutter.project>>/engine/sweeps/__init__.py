"""Trains many trials: on this machine, in SLURM, on Ray; chooses and prunes them."""
# ruff: noqa: F401

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.sweeps import definition, search, slurm, sweep
    from engine.sweeps.local import Launcher, LocalLauncher
    from engine.sweeps.pruning import StopPoorTrial
    from engine.sweeps.ray_cluster import RayLauncher
    from engine.sweeps.search import Search
    from engine.sweeps.sweep import SWEEP_PAGE, sweep_of, write_sweep
else:
    __getattr__ = lazy(__name__, __file__)
