"""Reads, writes and feeds TFRecord files, and builds the variants that train on them (Deephub)."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.records import files as files
    from engine.records import images as images
    from engine.records.build import build_variant as build_variant
    from engine.records.files import INDEX as INDEX
    from engine.records.files import LABELS as LABELS
    from engine.records.files import METADATA as METADATA
    from engine.records.files import MetadataError as MetadataError
    from engine.records.ranges import check_ranges_of_variant as check_ranges_of_variant
else:
    __getattr__ = lazy(__name__, __file__)
