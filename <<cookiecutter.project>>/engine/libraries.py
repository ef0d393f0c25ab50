"""Imports what a process that trains needs, once for all that a server of processes forks."""

from vegab.names import import_libraries

NAMES = ["tensorflow", "keras", "h5py", "tensorboard.summary", "argh", "ruamel.yaml", "tqdm"]
import_libraries([*NAMES, "matplotlib.backends.backend_agg"])
