"""Reads run folders back: lists, compares, draws and reports runs, and makes them again."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.runs import comparison as comparison
    from engine.runs import curves as curves
    from engine.runs import effects as effects
    from engine.runs import report as report
    from engine.runs import reproduction as reproduction
    from engine.runs import results as results
    from engine.runs import resume_check as resume_check
    from engine.runs import selection as selection
    from engine.runs.report import write_report as write_report
    from engine.runs.results import MOST_DEATHS as MOST_DEATHS
    from engine.runs.results import RunRecord as RunRecord
else:
    __getattr__ = lazy(__name__, __file__)
