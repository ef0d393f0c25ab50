"""Reads, writes and feeds TFRecord files, and builds the variants that train on them (Deephub)."""
# ruff: noqa: F401

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.records import features, files
    from engine.records.build import build_variant
    from engine.records.files import MetadataError
    from engine.records.ranges import check_ranges_of_variant
else:
    __getattr__ = lazy(__name__, __file__)
