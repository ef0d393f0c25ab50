"""Begins or resumes a run, runs its steps, and compares what must be the same on a resume."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.training import fingerprint as fingerprint
    from engine.training import guard as guard
    from engine.training.guard import Guard as Guard
    from engine.training.guard import Unsaved as Unsaved
    from engine.training.session import NEW_RUN as NEW_RUN
    from engine.training.session import Traced as Traced
    from engine.training.session import next_stop as next_stop
    from engine.training.session import trace as trace
    from engine.training.signals import SignalsToFlag as SignalsToFlag
    from engine.training.steps import Before as Before
    from engine.training.steps import Call as Call
    from engine.training.steps import Steps as Steps
    from engine.training.steps import Validation as Validation
    from engine.training.steps import floats as floats
    from engine.training.steps import has_all_variables as has_all_variables
    from engine.training.steps import make_variables as make_variables
else:
    __getattr__ = lazy(__name__, __file__)
