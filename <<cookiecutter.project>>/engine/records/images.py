"""Turns folders of pictures into TFRecord files: a folder per label, a record per picture."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.records.files import LABELS, generate, write_records
from vegab.files import replacing_folder

SHARD_SIZE = 100 * 10**6  # bytes of pictures in a file
SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"BM": "bmp"}


class PictureError(ValueError):
    """Pictures that cannot be made into records: none at all, or one that is unreadable."""


class Picture(NamedTuple):
    """A picture that is to become a record."""

    path: Path
    name: str  # path in the folder of all, with "/"; it begins with the name of the label
    label: int  # which of the sorted names of labels it has, from 0


def pictures_of(folder: Path) -> tuple[list[Picture], list[str]]:
    """Return the pictures in a folder, sorted by label and name, and the labels: its subfolders."""
    labels = sorted(each.name for each in folder.glob("[!.]*") if each.is_dir())
    if not labels:
        raise PictureError(f"{folder} has no subfolder; put the pictures of each label into one")
    pictures = []
    for label, label_name in enumerate(labels):
        paths = [path for path in (folder / label_name).rglob("*") if path.is_file()]
        names = sorted(path.relative_to(folder).as_posix() for path in paths)
        names = [name for name in names if "/." not in name]
        if not names:
            raise PictureError(f"{folder / label_name} holds no picture; fill or remove it")
        pictures += [Picture(folder / name, name, label) for name in names]
    return pictures, labels


def split_and_shuffle(pictures: Sequence[Picture], share: float) -> dict[str, list[Picture]]:
    """Divide pictures into "train" and, where the share for it is above 0, "validation".

    Place and order are functions of the names, so that of pictures that come later about the share
    goes to validation. Raises PictureError if nothing is left for training."""
    number = max(1, round(share * len(pictures))) if share else 0
    if number >= len(pictures):
        raise PictureError(f"{number} of {len(pictures)} pictures are for validation; none is left")
    ranked = sorted(pictures, key=lambda picture: _hash(picture.name))
    splits = {"train": ranked[number:]} | ({"validation": ranked[:number]} if number else {})
    for split in splits.values():
        split.sort(key=lambda picture: _hash(f"0/{picture.name}"))
    return splits


def number_of_shards(pictures: Sequence[Picture]) -> int:
    """Return among how many files pictures are spread, so that each has 100 MB or less of them."""
    size = sum(picture.path.stat().st_size for picture in pictures)
    return min(max(1, -(-size // SHARD_SIZE)), len(pictures))


def write_pictures(
    output: Path,
    splits: dict[str, list[Picture]],
    labels: Sequence[str],
    shards: dict[str, int],
    progress: Callable[[Sequence[Picture]], Iterable[Picture]] = iter,
) -> None:
    """Write records, labels, metadata and index into a folder, which is there when all is written.

    Each split has as many files as `shards` says. Raises PictureError for what is not a picture."""
    with replacing_folder(output.resolve()) as partial:
        files = []
        for split, pictures in splits.items():
            for shard in range(shards[split]):
                files.append(partial / f"{split}-{shard:05}-of-{shards[split]:05}")
                first, last = (len(pictures) * n // shards[split] for n in (shard, shard + 1))
                write_records(files[-1], map(record_of, progress(pictures[first:last])))
        (partial / LABELS).write_text("".join(f"{label}\n" for label in labels))
        generate(files)


def record_of(picture: Picture) -> bytes:
    """Return a picture as a serialized Example, with its bytes as they are.

    Its features are image/encoded, image/format (jpeg, png, gif or bmp), image/label_name and
    image/filename (bytes), image/height, image/width, image/channels and image/label (int64). Of an
    animated GIF they are those of the first picture. PictureError: it cannot be decoded."""
    import tensorflow as tf

    from engine.records.features import first_line

    encoded = picture.path.read_bytes()
    kind = next((kind for head, kind in SIGNATURES.items() if encoded.startswith(head)), None)
    if kind is None:
        raise PictureError(f"{picture.path} is not a JPEG, PNG, GIF or BMP file")
    try:
        shape = tf.io.decode_image(encoded, expand_animations=False).shape
    except tf.errors.InvalidArgumentError as error:
        reason = first_line(error)
        raise PictureError(f"{picture.path} is not a {kind} that can be read: {reason}") from error
    values = {
        "encoded": encoded,
        "format": kind.encode(),
        "label_name": os.fsencode(picture.name.partition("/")[0]),
        "filename": os.fsencode(picture.name),
        "label": picture.label,
        **dict(zip(("height", "width", "channels"), shape, strict=True)),
    }
    features = tf.train.Features()
    for name, value in values.items():
        feature = features.feature[f"image/{name}"]
        (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
    return tf.train.Example(features=features).SerializeToString(deterministic=True)


def _hash(text: str) -> bytes:
    return hashlib.sha256(os.fsencode(text)).digest()
