"""Writes, reads and verifies checkpoints, each one file with everything that a resume needs."""
# ruff: noqa: F401, I001

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.checkpoints import callback_state, transfer
    from engine.checkpoints.best import best_of, is_best, is_lower_better
    from engine.checkpoints.checkpoint import (
        HISTORY_CSV, LOOP_STATE, RESTORE_ALL, RESTORE_WEIGHTS, Checkpoint, Snapshot,
        by_unique_path, load_weights, path_of, read_others, saved_variables, variables_of,
    )  # fmt: skip
    from engine.checkpoints.differences import Cells, Difference, history_difference, rows_in
    from engine.checkpoints.file import (
        BEST, LATEST, PREVIOUS, Commit, DamagedCheckpointError, commit_after, commit_difference,
        commits_of, digest_of, first_difference, is_done, read_state, require_inside, run_of,
        value_of, verify,
    )  # fmt: skip
    from engine.checkpoints.history import csv_lines, shortest
    from engine.checkpoints.transfer import freeze
else:
    __getattr__ = lazy(__name__, __file__)
