"""Feeders: what stands in a batch, where a run goes on, what is refused."""

import logging
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from interruptions import StopAt
from loops import loop
from machinery import example

from engine.batches import digest
from engine.records.features import Decoded, ImageFeature
from engine.records.feeders import MemorySamplesFeeder, TFRecordExamplesFeeder
from engine.records.files import (
    INDEX,
    METADATA,
    MetadataError,
    RecordError,
    generate,
    write_records,
)

INT = {"type": "FixedLenFeature", "shape": [], "dtype": "int64"}
NUMBER = {"number": INT}


def write(folder: Path, files: dict[str, list[bytes]], compression: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        write_records(folder / name, records, compression)
    generate([folder / name for name in files], compression=compression)
    return folder


def numbers(first: int, last: int) -> list[bytes]:
    return [example(number=number) for number in range(first, last)]


FILES = {"a": numbers(0, 10), "b": numbers(10, 13), "c": numbers(13, 25)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """25 records, with the numbers 0 to 24, in three files."""
    return write(tmp_path / "data", FILES)


def streamed(folder: Path) -> Path:
    (folder / INDEX).unlink()
    return folder


def feeder(folder: Path, **options: Any) -> TFRecordExamplesFeeder:
    defaults: dict[str, Any] = {"features_map": NUMBER, "batch_size": 4, "shuffle_buffer_size": 6}
    options = defaults | options
    return TFRecordExamplesFeeder(str(folder / "*"), **options)


def drawn(source: Any, epochs: int = 1, key: str = "number") -> list[list[int]]:
    steps = range(source.steps_per_epoch)
    return [source.batch(epoch, step)[key].tolist() for epoch in range(epochs) for step in steps]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.fixture(params=["index", "stream", "GZIP"])
def any_way(request: Any, folder: Path, tmp_path: Path) -> Callable[..., TFRecordExamplesFeeder]:
    """A function that builds a feeder of the 25 records, read in each way."""
    if request.param == "stream":
        streamed(folder)
    elif request.param != "index":
        folder = write(tmp_path / "packed", FILES, request.param)
    compression = request.param if request.param.isupper() else ""
    return lambda **options: feeder(folder, compression=compression, **options)


# ------------------------------------------------------------------------------------- positions


def test_each_example_comes_once_in_each_pass(any_way: Any) -> None:
    made = any_way()
    assert made.steps_per_epoch == 7
    stream = flat(drawn(made, epochs=4))
    assert len(stream) == 4 * 7 * 4
    passes = [stream[i * 25 : (i + 1) * 25] for i in range(4)]
    for one in passes:
        assert sorted(one) == list(range(25))
        assert one != list(range(25))
    assert passes[0] != passes[1]


def test_a_batch_is_a_function_of_its_position(any_way: Any) -> None:
    straight = drawn(any_way(), epochs=3)
    made, other = any_way(), any_way(prefetch=3)
    for place in (20, 3, 4, 5, 0, 11, 12, 20, 19):
        expected = straight[place]
        assert made.batch(*divmod(place, 7))["number"].tolist() == expected
        assert other.batch(*divmod(place, 7))["number"].tolist() == expected
        assert any_way().batch(*divmod(place, 7))["number"].tolist() == expected
    assert drawn(any_way(seed=1), epochs=3) != straight


def test_without_shuffling_the_files_are_read_in_their_order(any_way: Any) -> None:
    stream = flat(drawn(any_way(shuffle=False), epochs=2))
    assert stream == [number % 25 for number in range(56)]


def test_the_index_shuffles_globally_and_a_stream_in_its_window(folder: Path) -> None:
    # In a window of 1, with one file at a time, records of a file keep their order.
    options: dict[str, Any] = {"shuffle_buffer_size": 1, "num_parallel_reads": 1, "batch_size": 25}
    (exact,) = drawn(feeder(folder, **options))
    assert [number for number in exact if number < 10] != list(range(10))
    (window,) = drawn(feeder(streamed(folder), **options))
    assert [number for number in window if number < 10] == list(range(10))


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "drop", "steps"),
    [
        (8, 6, 5, False, 7),
        (8, 6, 5, True, 6),
        (8, 8, 5, False, 5),
        (8, 3, 1, False, 3),
        (8, 3, 1, True, 2),
        (8, 1, 2, True, 16),
    ],
)
def test_total_steps(
    folder: Path, examples: int, batch: int, epochs: int, drop: bool, steps: int
) -> None:
    options: dict[str, Any] = {"batch_size": batch, "drop_remainder": drop}
    made = feeder(folder, max_examples=examples, **options)
    memory = MemorySamplesFeeder(np.arange(examples), **options)
    for one in (made, memory):
        assert one.total_steps(epochs) == steps
        assert one.steps_per_epoch == one.total_steps(1)
        one.until_epochs = epochs
        # Epochs of the loop are not passes: what counts is the step.
        sizes = [
            len(next(iter(one.batch(*divmod(step, one.steps_per_epoch)).values())))
            for step in range(steps)
        ]
        assert sum(sizes) == (steps * batch if drop else epochs * examples)
        assert set(sizes[:-1]) <= {batch}
        with pytest.raises(IndexError):
            one.batch(*divmod(steps, one.steps_per_epoch))


def test_the_last_batch_ends_with_the_last_pass(any_way: Any) -> None:
    made = any_way(max_examples=8, batch_size=6)
    made.until_epochs = 5
    batches = [made.batch(*divmod(step, 2))["number"] for step in range(7)]
    assert [len(batch) for batch in batches] == [6] * 6 + [4]
    stream = np.concatenate(batches)
    assert all(sorted(stream[i : i + 8]) == list(range(8)) for i in range(0, 40, 8))


def test_one_pass_is_in_order_and_ends(any_way: Any) -> None:
    made = any_way(drop_remainder=True)
    one_pass = made.one_pass()
    for _ in range(2):
        assert flat(drawn(one_pass)) == list(range(25))
    assert one_pass.steps_per_epoch == 7
    assert len(one_pass.batch(0, 6)["number"]) == 1
    with pytest.raises(IndexError):
        one_pass.batch(0, 7)
    assert drawn(made) == drawn(any_way(drop_remainder=True))


def test_max_examples_are_the_first(any_way: Any) -> None:
    made = any_way(max_examples=11)
    assert sorted(flat(drawn(made.one_pass()))) == list(range(11))
    made.until_epochs = 1
    assert sorted(flat(drawn(made))) == list(range(11))


# -------------------------------------------------------------------------------------- features


def test_with_labels_a_batch_is_a_pair(folder: Path) -> None:
    features, labels = feeder(folder, labels_map=NUMBER).batch(0, 0)
    np.testing.assert_array_equal(features["number"], labels["number"])
    assert (features["number"].dtype, features["number"].shape) == (np.int64, (4,))


def test_a_name_may_be_read_differently_by_each_map(folder: Path) -> None:
    for other in (SPELLINGS[0], {"type": "VarLenFeature", "dtype": "int64"}):
        features, labels = feeder(folder, labels_map={"number": other}).batch(0, 0)
        assert (features["number"].shape, labels["number"].shape) == ((4,), (4, 1))


SPELLINGS: list[Any] = [
    {"type": "FixedLenFeature", "shape": [1], "dtype": "int64"},
    {"type": "tf.io.FixedLenFeature", "shape": [1], "dtype": "int64"},
    {"module_path": "tensorflow", "class_type": "FixedLenFeature", "shape": [1], "dtype": "int64"},
    tf.io.FixedLenFeature([1], tf.int64),
]


@pytest.mark.parametrize("entry", SPELLINGS)
def test_a_feature_is_named_in_several_ways(folder: Path, entry: Any) -> None:
    batch = feeder(folder, features_map={"number": entry}, shuffle=False).batch(0, 0)
    np.testing.assert_array_equal(batch["number"], [[0], [1], [2], [3]])


def test_one_module_path_may_stand_for_all_features(folder: Path) -> None:
    entry = {"class_type": "FixedLenFeature", "shape": [1], "dtype": "int64"}
    features_map = {"module_path": "tensorflow", "number": entry}
    batch = feeder(folder, features_map=features_map, shuffle=False).batch(0, 0)
    np.testing.assert_array_equal(batch["number"], [[0], [1], [2], [3]])


class Length(Decoded):
    """A type of feature of one's own: how long a string is."""

    def __init__(self, unit: int) -> None:
        self.unit = unit

    def decode(self, contents: Any, num_parallel: int) -> Any:
        return tf.strings.length(contents) // self.unit


def negative(image: Any) -> Any:
    return 1 - image


def test_types_of_features_and_functions_are_found_by_their_path(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"x": [example(s=b"abcd"), example(s=b"ab")]})
    features_map = {"s": {"type": f"{__name__}.Length", "unit": 2}}
    made = [feeder(folder, features_map=features_map, batch_size=2, shuffle=False) for _ in "ab"]
    assert made[0].batch(0, 0)["s"].tolist() == [2, 1]
    assert made[0].digest() == made[1].digest()
    content = [ENCODED["png"](image(0))]
    plain, changed = (
        images(tmp_path, content),
        images(tmp_path, content, post_op=f"{__name__}.negative"),
    )
    np.testing.assert_allclose(changed, 1 - plain)
    with pytest.raises(ValueError, match=r"Path is not a type of feature; take one of .*Decoded"):
        feeder(folder, features_map={"s": {"type": "pathlib.Path"}})


def test_files_are_read_one_at_a_time_where_their_number_is_null(folder: Path) -> None:
    streamed(folder)
    batches = [
        feeder(folder, num_parallel_reads=n, shuffle_buffer_size=1).batch(0, 0)["number"].tolist()
        for n in (None, 1)
    ]
    assert batches[0] == batches[1]


def test_values_of_no_fixed_length_are_padded(tmp_path: Path) -> None:
    records = [
        example(v=[1, 2, 3], s=[b"a"], f=[0.5], at=[2], what=[7.0], r=[1, 2, 3], l=[1, 2]),
        example(v=[4], s=[b"b", b"cd\0"], f=[1.5, 2.5], at=[0], what=[8.0], r=[4], l=[1]),
    ]
    ragged = {"type": "RaggedFeature", "dtype": "int64"}
    parts = [{"type": "RowLengths", "key": "l"}]
    sequence = {"type": "FixedLenSequenceFeature", "shape": [], "allow_missing": True}
    sparse = {"type": "SparseFeature", "index_key": "at", "value_key": "what", "size": 3}
    features = {
        "v": {"type": "VarLenFeature", "dtype": "int64"},
        "s": {"type": "VarLenFeature", "dtype": "string"},
        "f": sequence | {"dtype": "float32"},
        "sparse": sparse | {"dtype": "float32"},
        "nested": ragged | {"value_key": "r", "partitions": parts},
        "r": ragged,
    }
    folder = write(tmp_path / "data", {"x": records})
    batch = feeder(folder, features_map=features, batch_size=2, shuffle=False).batch(0, 0)
    assert batch["v"].tolist() == batch["r"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["s"].tolist() == [[b"a", b""], [b"b", b"cd\0"]]
    assert batch["f"].tolist() == [[0.5, 0], [1.5, 2.5]]
    assert batch["sparse"].tolist() == [[0, 0, 7], [8, 0, 0]]
    assert batch["nested"].tolist() == [[[1, 0], [2, 3]], [[4, 0], [0, 0]]]


def image(seed: int, height: int = 6, width: int = 4) -> Any:
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def bmp(pixels: Any) -> bytes:
    height, width, _ = pixels.shape  # the width is a multiple of four, so that rows need no padding
    body = pixels[::-1, :, ::-1].tobytes()
    header = struct.pack("<IHHI", 54 + len(body), 0, 0, 54)
    return b"BM" + header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6) + body


GIF = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b"
)
ENCODED: dict[str, Callable[[Any], bytes]] = {
    "png": lambda pixels: tf.io.encode_png(pixels).numpy(),
    "jpeg": lambda pixels: tf.io.encode_jpeg(pixels, quality=100).numpy(),
    "bmp": bmp,
}


def images(tmp_path: Path, contents: list[bytes], **options: Any) -> Any:
    folder = tmp_path / "images"
    write(folder, {"x": [example(image=content) for content in contents]})
    features_map = {"image": {"type": "ImageFeature"} | options}
    made = feeder(folder, features_map=features_map, batch_size=len(contents), shuffle=False)
    return made.batch(0, 0)["image"]


@pytest.mark.parametrize("decode_format", ["png", "jpeg", "bmp"])
@pytest.mark.parametrize("as_auto", [True, False])
def test_images_of_each_format(tmp_path: Path, decode_format: str, as_auto: bool) -> None:
    pixels = np.stack([image(0), image(1)])
    contents = [ENCODED[decode_format](one) for one in pixels]
    said = "auto" if as_auto else decode_format
    decoded = images(tmp_path, contents, decode_format=said, enforced_dtype="uint8")
    if decode_format == "jpeg":
        pixels = np.stack([tf.io.decode_jpeg(content).numpy() for content in contents])
    np.testing.assert_array_equal(decoded, pixels)
    grey = images(tmp_path, contents, decode_format=said, channels=1)
    assert grey.shape == (2, 6, 4, 1)
    assert 0 <= grey.min() < grey.max() <= 1


def test_a_gif_gives_its_frames_and_auto_the_first(tmp_path: Path) -> None:
    assert images(tmp_path, [GIF, GIF], decode_format="gif").shape == (2, 1, 1, 1, 3)
    assert images(tmp_path, [GIF, GIF], channels=1).shape == (2, 1, 1, 1)


def test_images_are_scaled_and_resized(tmp_path: Path) -> None:
    pixels = [image(0), image(1, 8, 8)]
    contents = [ENCODED["png"](one) for one in pixels]
    size = {"resize_height": 3, "resize_width": 5}
    plain = images(tmp_path, contents, **size)
    assert (plain.shape, plain.dtype) == ((2, 3, 5, 3), np.float32)
    for i, one in enumerate(pixels):
        expected = tf.image.resize(one / np.float32(255), (3, 5)).numpy()
        np.testing.assert_allclose(plain[i], expected, atol=1e-6)
    scaled = images(tmp_path, contents, standard_scaling=True, **size)
    np.testing.assert_allclose(scaled, plain * 2 - 1, atol=1e-6)
    whole = images(tmp_path, contents, enforced_dtype="uint8", **size)
    np.testing.assert_allclose(whole, plain * 255, atol=0.51)
    assert whole.dtype == np.uint8


@pytest.mark.parametrize(
    "options",
    [
        {"resize_height": 3},
        {"channels": 2},
        {"decode_format": "tiff"},
        {"enforced_dtype": "float31"},
        {"enforced_dtype": "uint8", "standard_scaling": True},
    ],
)
def test_images_of_no_such_kind(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(options)) + "|float31|resize_width"):
        ImageFeature(**options)


def test_what_an_export_needs(tmp_path: Path) -> None:
    contents = [ENCODED["png"](image(seed)) for seed in range(2)]
    records = [example(image=content, label=3) for content in contents]
    folder = write(tmp_path / "data", {"x": records})
    features = {"image": ImageFeature(resize_height=3, resize_width=3)}
    made = feeder(folder, features_map=features, labels_map={"label": INT}, batch_size=2)
    made = made.one_pass()
    serving = made.serving_features()
    assert list(serving.spec) == ["image"]
    serve = tf.function(serving.parse, input_signature=[tf.TensorSpec([None], tf.string)])
    without_labels = [example(image=content) for content in contents]
    np.testing.assert_array_equal(
        serve(tf.constant(without_labels))["image"], made.batch(0, 0)[0]["image"]
    )
    assert set(tf.io.parse_example(without_labels, serving.spec)) == {"image"}


# ------------------------------------------------------------------------------ what is refused


def flip(path: Path, record: int, at: int = 20) -> int:
    """Change a byte of a record; returns its offset. All records have one size."""
    content = bytearray(path.read_bytes())
    size = 16 + struct.unpack_from("<Q", content)[0]
    content[record * size + at] ^= 1
    path.write_bytes(bytes(content))
    return record * size


def test_a_corrupt_record_ends_the_run(folder: Path) -> None:
    offset = flip(folder / "c", 4)
    for made in (feeder(folder, batch_size=25), feeder(streamed(folder), batch_size=25)):
        with pytest.raises(RecordError) as caught:
            made.batch(0, 0)
        assert (caught.value.path, caught.value.offset) == (folder / "c", offset)


def test_a_corrupt_record_is_skipped(folder: Path, caplog: Any) -> None:
    flip(folder / "a", 0)
    flip(folder / "c", 4)
    flip(folder / "c", 5)
    made = feeder(folder, on_corrupt="skip")
    straight = drawn(made, epochs=2)
    sound = [n for n in range(25) if n not in (0, 17, 18)]
    assert sorted(flat(straight)[:22]) == sorted(flat(straight)[22:44]) == sound
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert any(str(folder / "c") in text for text in warnings)
    assert feeder(folder, on_corrupt="skip").batch(1, 3)["number"].tolist() == straight[9]
    assert flat(drawn(made.one_pass())) == sound


def test_a_stream_loses_the_rest_of_a_file(folder: Path) -> None:
    flip(folder / "c", 4)
    made = feeder(streamed(folder), on_corrupt="skip")
    straight = drawn(made, epochs=2)
    assert sorted(flat(straight)[:17]) == list(range(17))
    assert feeder(folder, on_corrupt="skip").batch(1, 3)["number"].tolist() == straight[8]
    assert flat(drawn(made.one_pass())) == list(range(17))


def test_training_needs_metadata_of_these_files(folder: Path) -> None:
    with open(folder / "b", "ab") as file:
        file.write(b"more")
    with pytest.raises(MetadataError, match=r"b has .*bin/tfrecords\.py generate-metadata"):
        feeder(folder)
    write_records(folder / "b", numbers(10, 14))
    assert len(feeder(folder, auto_generate_meta=True)) == 26
    (folder / METADATA).unlink()
    with pytest.raises(MetadataError, match=r"a has no metadata.*generate-metadata"):
        feeder(folder)
    assert not (folder / METADATA).exists()
    streamed(folder)
    made = feeder(folder, auto_generate_meta=True)
    assert (len(made), made.random_access) == (26, True)
    (folder / METADATA).write_text("{")
    with pytest.raises(MetadataError, match="corrupt"):
        feeder(folder, auto_generate_meta=True)
    assert (folder / METADATA).read_text() == "{"


def test_it_is_said_how_records_are_read(folder: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    assert feeder(folder).random_access
    assert (
        "/a and 2 more files: 25 examples, shuffled as a whole, read by their index" in caplog.text
    )
    assert not feeder(streamed(folder)).random_access
    assert "shuffled in a window of 6, read as a stream (no _tfrecord_index.npz)" in caplog.text


def fixed(shape: list[int], dtype: str = "int64") -> dict[str, Any]:
    return {"type": "FixedLenFeature", "shape": shape, "dtype": dtype}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 26}, "batch_size is 26, but there are 25 examples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_examples": 26}, "max_examples is 26; .* 1 to 25, which .* hold"),
        ({"max_examples": 0}, "max_examples is 0"),
        ({"max_examples": 3}, "batch_size is 4, but there are 3"),
        ({"seed": -1}, "seed is -1"),
        ({"on_corrupt": "ignore"}, "on_corrupt"),
        ({"compression": "BZ2"}, "compression"),
        ({"features_map": {}}, "features_map is {}; expected names"),
        ({"features_map": {"number": 3}}, r"features_map\.number is 3"),
        ({"features_map": {"number": {"type": "FixdLenFeature"}}}, "did you mean 'Fixed"),
        ({"features_map": {"number": {"type": "x.y:Z"}}}, "number: 'x.y:Z' cannot be imp"),
        ({"features_map": {"number": {"type": "VarLenFeature"}}}, "VarLenFeature.*dtype"),
        ({"features_map": {"number": fixed([], "int23")}}, "there is no dtype 'int23'"),
        ({"features_map": {"number": fixed([], "int32")}}, "a record holds int64, float32"),
        (
            {"features_map": {"numbr": INT}},
            "/a, record 0 .*has no feature 'numbr', which features_map names; it has number",
        ),
        ({"labels_map": {"label": INT}}, "record 0 .*'label', which labels_map names"),
        (
            {"labels_map": {"label": {"type": "VarLenFeature", "dtype": "int64"}}},
            "labels_map names 'label', which none of the first 25 records .*they have number",
        ),
        (
            {"features_map": {"number": fixed([], "float32")}},
            "has int64 in feature 'number', but features_map says float32",
        ),
        (
            {"features_map": {"number": fixed([2])}},
            r"has 1 values in feature 'number', but features_map says shape \[2\]",
        ),
    ],
)
def test_bad_input_is_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feeder(folder, **options)


def test_a_bad_record_in_the_middle_is_named(tmp_path: Path) -> None:
    bad = {"b": example(other=1), "c": example(number=[1, 2]), "d": b"\xff"}
    for name, record in bad.items():
        folder = write(tmp_path / name, {"x": numbers(0, 3), "y": [*numbers(3, 5), record]})
        with pytest.raises(ValueError, match=r"/y, record 2 \(from 0\), (has|is no)"):
            drawn(feeder(folder, batch_size=3))


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good = ENCODED["png"](image(0))
    with pytest.raises(ValueError, match=r"x, record 1 \(from 0\), cannot be decoded"):
        images(tmp_path, [good, b"no picture"])
    with pytest.raises(ValueError, match=r"do not fit in one batch.*resize_height"):
        images(tmp_path, [good, ENCODED["png"](image(0, 5, 8))])


def test_files_are_those_of_all_patterns(folder: Path) -> None:
    (folder / "labels.txt").write_text("x")
    patterns: list[Any] = [folder / "c", str(folder / "[ab]"), folder / "*"]
    made = TFRecordExamplesFeeder(patterns, NUMBER, batch_size=1)
    assert [path.name for path in made.paths] == ["a", "b", "c"]
    unmatched: list[Any] = ["", str(folder / "z*"), [folder / "a", folder / "z"], []]
    for missing in unmatched:
        with pytest.raises(FileNotFoundError, match=r"no file matches '(.*/z\*?)?'|is empty"):
            TFRecordExamplesFeeder(missing, NUMBER)


def test_the_digest_tells_other_data_and_options(folder: Path, tmp_path: Path) -> None:
    same = shutil.copytree(folder, tmp_path / "elsewhere")
    options: dict[str, Any] = {
        "seed": 1,
        "batch_size": 5,
        "max_examples": 24,
        "shuffle": False,
        "drop_remainder": True,
        "labels_map": NUMBER,
        "on_corrupt": "skip",
        "features_map": {"number": fixed([1])},
    }
    digests = [feeder(folder).digest()]
    digests += [feeder(folder, **{name: value}).digest() for name, value in options.items()]
    assert feeder(same).digest() == digests[0] == feeder(same, prefetch=4).digest()
    write(same, {"b": numbers(11, 14)})
    digests += [feeder(same).digest(), feeder(streamed(folder)).digest()]
    digests += [feeder(folder, num_parallel_reads=2).digest()]
    assert len(set(digests)) == len(digests)
    # The last one has the first batch of the first one.
    sources = [feeder(folder), feeder(folder, seed=1), feeder(folder, on_corrupt="skip")]
    assert len({digest(source, source.one_pass()) for source in sources}) == 3


# ---------------------------------------------------------------------------------------- memory

COLUMNS: dict[str, Any] = {"u": list(range(10)), "v": [i / 2 for i in range(10)]}
KINDS: list[tuple[Any, list[str]]] = [
    (np.arange(10), ["0"]),
    (np.arange(20).reshape(10, 2), ["0", "1"]),
    (np.zeros((10, 2, 2)), ["0"]),
    (list(range(10)), ["0"]),
    (pd.DataFrame(COLUMNS), ["u", "v"]),
    (pd.Series(range(10), name="u"), ["u"]),
    (pd.Series(range(10)), ["0"]),
    (COLUMNS, ["u", "v"]),
    ({"u": np.zeros((10, 3)), "v": pd.Series(range(10))}, ["u", "v"]),
    ([{"u": i, "v": i / 2} for i in range(10)], ["u", "v"]),
]


@pytest.mark.parametrize(("x", "names"), KINDS)
def test_samples_of_each_kind(x: Any, names: list[str]) -> None:
    made = MemorySamplesFeeder(x, np.arange(10), batch_size=4)
    features, labels = made.batch(1, 0)
    assert list(features) == names
    rows = labels["0"]
    whole = MemorySamplesFeeder(x, batch_size=10, shuffle=False).batch(0, 0)
    for name in names:
        assert isinstance(features[name], np.ndarray)
        np.testing.assert_array_equal(features[name], whole[name][rows])
    stream = np.concatenate([made.batch(*divmod(step, 3))[1]["0"] for step in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert made.digest() == MemorySamplesFeeder(x, np.arange(10), batch_size=4).digest()
    assert made.digest() != MemorySamplesFeeder(x, np.arange(1, 11), batch_size=4).digest()


def test_samples_as_arrays() -> None:
    frame = pd.DataFrame(COLUMNS)
    x, y = MemorySamplesFeeder(frame, frame["u"], False, batch_size=4, shuffle=False).batch(0, 1)
    np.testing.assert_array_equal(x, frame.to_numpy()[4:8])
    np.testing.assert_array_equal(y, [4, 5, 6, 7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": np.zeros(4), "y": np.zeros(5)}, r"x\['0'\] has 4 samples and y\['0'\] has 5"),
        ({"x": {"a": [1, 2], "b": [1]}}, r"x\['a'\] has 2 samples and x\['b'\] has 1"),
        ({"x": {"a": [1]}, "feed_as_dict": False}, "x is a dict"),
        ({"x": []}, r"x\['0'\] has no samples"),
        ({"x": {}}, "x has no columns"),
        ({"x": 3}, "no samples"),
        ({"x": [{"a": 1}, {"b": 1}]}, "different keys"),
        (
            {"x": np.zeros(4), "batch_size": 5, "drop_remainder": True},
            "batch_size is 5, but there are 4",
        ),
    ],
)
def test_samples_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemorySamplesFeeder(**{"batch_size": 1} | options)


def test_fewer_samples_in_memory_than_a_batch_has() -> None:
    made = MemorySamplesFeeder(np.arange(4), batch_size=10, shuffle=False, feed_as_dict=False)
    assert made.one_pass().batch(0, 0).tolist() == [0, 1, 2, 3]
    made.until_epochs = 6
    batches = [made.batch(step, 0).tolist() for step in range(made.total_steps(6))]
    assert [len(batch) for batch in batches] == [10, 10, 4], "they cross the ends of passes"
    assert [sample for batch in batches for sample in batch] == [0, 1, 2, 3] * 6


# -------------------------------------------------------------------------------------- training


@pytest.fixture(params=["index", pytest.param("stream", marks=pytest.mark.slow)])
def points(request: Any, tmp_path: Path) -> Callable[[], TFRecordExamplesFeeder]:
    """A function that builds a feeder of 40 points and where they are, in batches of 16."""
    random = np.random.default_rng(0).normal(size=(40, 2))
    records = [example(point=point.tolist(), side=int(point.sum() > 0)) for point in random]
    folder = write(tmp_path / "points", {"a": records[:30], "b": records[30:]})
    if request.param == "stream":
        streamed(folder)
    maps = {
        "features_map": {"point": fixed([2], "float32")},
        "labels_map": {"side": fixed([1])},
    }

    def build() -> TFRecordExamplesFeeder:
        made = feeder(folder, **maps, batch_size=16)
        made.until_epochs = 5
        return made

    return build


def trained(source: TFRecordExamplesFeeder, folder: Path, stop_at: int | None = None) -> None:
    keras.utils.clear_session()  # which counts the names from the start again
    keras.utils.set_random_seed(0)
    point = keras.Input([2], name="point")
    hidden = keras.layers.Dense(4, activation="relu", name="hidden")(point)
    hidden = keras.layers.Dropout(0.2, name="dropout")(hidden)
    side = keras.layers.Dense(1, activation="sigmoid", name="side")(hidden)
    model = keras.Model({"point": point}, {"side": side}, name="points")
    model.compile("adam", {"side": "binary_crossentropy"})
    folder.mkdir(exist_ok=True)
    steps = source.total_steps(5)
    assert steps == 13
    hooks = () if stop_at is None else (StopAt(stop_at, signal.SIGTERM),)
    loop(model, source, None, folder, num_steps=steps, monitor="loss", hooks=hooks)


def test_a_stopped_training_ends_as_if_it_had_not_been(points: Any, tmp_path: Path) -> None:
    trained(points(), tmp_path / "straight")
    for stop_at in (4, 11):
        with pytest.raises(SystemExit):
            trained(points(), tmp_path / "resumed", stop_at)
    trained(points(), tmp_path / "resumed")
    for name in ("model.h5", "history.csv"):
        straight, resumed = (tmp_path / run / name for run in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name
