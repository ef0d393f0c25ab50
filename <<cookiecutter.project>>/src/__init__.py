"""The researcher's rooms: data, models, and how they are trained."""

import engine  # noqa: F401
