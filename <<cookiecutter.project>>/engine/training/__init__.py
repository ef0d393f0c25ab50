"""Runs many steps in one call, begins and resumes a run, and knows what its bits depend on."""
# ruff: noqa: F401

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.training import fingerprint, guard
    from engine.training.guard import Guard
    from engine.training.objects import KEEPERS, VARIABLES, handles_of, walk
    from engine.training.session import Session, Start, Work, work_on
    from engine.training.steps import Before, Call, Validation, make_variables
else:
    __getattr__ = lazy(__name__, __file__)
