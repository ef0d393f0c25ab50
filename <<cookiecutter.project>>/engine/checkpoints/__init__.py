"""Writes, reads and verifies checkpoints, each one file with everything that a resume needs."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.checkpoints import callback_state as callback_state
    from engine.checkpoints import differences as differences
    from engine.checkpoints import transfer as transfer
    from engine.checkpoints.checkpoint import RESTORE_ALL as RESTORE_ALL
    from engine.checkpoints.checkpoint import RESTORE_WEIGHTS as RESTORE_WEIGHTS
    from engine.checkpoints.checkpoint import Checkpoint as Checkpoint
    from engine.checkpoints.checkpoint import Snapshot as Snapshot
    from engine.checkpoints.checkpoint import load_weights as load_weights
    from engine.checkpoints.checkpoint import saved_variables as saved_variables
    from engine.checkpoints.checkpoint import variables_of as variables_of
    from engine.checkpoints.checkpoint import wanted_variables as wanted_variables
    from engine.checkpoints.checkpoint import write_atomically as write_atomically
    from engine.checkpoints.differences import Cells as Cells
    from engine.checkpoints.differences import Difference as Difference
    from engine.checkpoints.differences import commit_difference as commit_difference
    from engine.checkpoints.differences import history_difference as history_difference
    from engine.checkpoints.differences import rows_in as rows_in
    from engine.checkpoints.file import BEST as BEST
    from engine.checkpoints.file import LATEST as LATEST
    from engine.checkpoints.file import PREVIOUS as PREVIOUS
    from engine.checkpoints.file import STATE as STATE
    from engine.checkpoints.file import Commit as Commit
    from engine.checkpoints.file import DamagedCheckpointError as DamagedCheckpointError
    from engine.checkpoints.file import commit_after as commit_after
    from engine.checkpoints.file import commits_of as commits_of
    from engine.checkpoints.file import is_done as is_done
    from engine.checkpoints.file import leads_out as leads_out
    from engine.checkpoints.file import read_state as read_state
    from engine.checkpoints.file import require_inside as require_inside
    from engine.checkpoints.file import run_of as run_of
    from engine.checkpoints.file import verify as verify
    from engine.checkpoints.history import best_of as best_of
    from engine.checkpoints.history import csv_lines as csv_lines
    from engine.checkpoints.history import is_best as is_best
    from engine.checkpoints.history import is_lower_better as is_lower_better
    from engine.checkpoints.history import shortest as shortest
    from engine.checkpoints.transfer import freeze as freeze
else:
    __getattr__ = lazy(__name__, __file__)
