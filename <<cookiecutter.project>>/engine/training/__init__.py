"""Runs many steps in one call, begins and resumes a run, and knows what its bits depend on."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.training import fingerprint as fingerprint
    from engine.training import guard as guard
    from engine.training.guard import Guard as Guard
    from engine.training.objects import KEEPERS as KEEPERS
    from engine.training.objects import VARIABLES as VARIABLES
    from engine.training.objects import handles_of as handles_of
    from engine.training.objects import walk as walk
    from engine.training.session import Session as Session
    from engine.training.session import Start as Start
    from engine.training.session import Work as Work
    from engine.training.session import work_on as work_on
    from engine.training.steps import Before as Before
    from engine.training.steps import Call as Call
    from engine.training.steps import Validation as Validation
    from engine.training.steps import culprit as culprit
    from engine.training.steps import floats as floats
    from engine.training.steps import make_variables as make_variables
else:
    __getattr__ = lazy(__name__, __file__)
