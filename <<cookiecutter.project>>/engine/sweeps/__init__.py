"""Trains many trials: on this machine, in SLURM, on Ray; chooses and prunes them."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.sweeps import definition as definition
    from engine.sweeps import search as search
    from engine.sweeps import slurm as slurm
    from engine.sweeps import sweep as sweep
    from engine.sweeps.local import Launcher as Launcher
    from engine.sweeps.local import LocalLauncher as LocalLauncher
    from engine.sweeps.page import SWEEP_PAGE as SWEEP_PAGE
    from engine.sweeps.page import sweep_of as sweep_of
    from engine.sweeps.page import write_sweep as write_sweep
    from engine.sweeps.pruning import StopPoorTrial as StopPoorTrial
    from engine.sweeps.ray_cluster import RayLauncher as RayLauncher
    from engine.sweeps.search import Search as Search
else:
    __getattr__ = lazy(__name__, __file__)
