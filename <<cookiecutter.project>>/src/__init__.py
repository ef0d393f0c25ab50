"""Holds what the researcher writes: data, models, and how they are trained."""

import engine  # noqa: F401
