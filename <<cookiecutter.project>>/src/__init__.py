"""The researcher's rooms: data, models, and what trains, records and reads them back."""

from src import import_order  # noqa: F401
