"""TFRecord files: what is read is what was written, or an error says where it is not."""

import gzip
import importlib.util
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

import google_crc32c
import numpy as np
import pytest
from machinery import ROOT, Command, example

from engine.records import features, reading
from engine.records import files as tfrecords
from engine.records.files import (
    FRAME,
    INDEX,
    METADATA,
    MetadataError,
    RecordError,
    compression_of,
    file_info,
    generate,
    read_all,
    read_index,
    read_metadata,
    write_records,
)
from engine.records.images import (
    PictureError,
    number_of_shards,
    pictures_of,
    split_and_shuffle,
    write_pictures,
)
from engine.records.reading import Indexed

TOY = ROOT / "data" / "toy"
RECORDS = [
    b"",
    b"a",
    *(bytes([number]) * (10 * number) for number in range(2, 9)),
    os.urandom(5000),
]
SCRIPT = "bin/tfrecords.py"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of ten records, without metadata, in a folder of its own."""
    folder = tmp_path / "records"
    folder.mkdir()
    write_records(folder / "a", RECORDS)
    return folder / "a"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The command's module, for commands that would import TensorFlow in each process."""
    spec = importlib.util.spec_from_file_location("tfrecords_script", ROOT / SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run the command as `command` does, but in this process, which takes no time."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(ROOT)

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["tfrecords.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    with mock.patch.dict(os.environ):
        yield call
    signal.signal(signal.SIGTERM, handler)


def data_of(path: Path, compression: str = "") -> list[bytes]:
    return [data for _, data in read_all(path, compression)]


def entries_in(folder: Path) -> dict:
    return json.loads((folder / METADATA).read_text())["files"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_what_was_written_is_read(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert write_records(path, iter(RECORDS), compression) == len(RECORDS)
    assert compression_of(path) == compression
    read = list(read_all(path, compression))
    assert [data for _, data in read] == RECORDS
    lengths = [len(data) + FRAME for data in RECORDS]
    assert [offset for offset, _ in read] == [sum(lengths[:n]) for n in range(len(RECORDS))]
    first = path.read_bytes()
    write_records(path, RECORDS, compression)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_an_unknown_compression_is_an_error(path: Path) -> None:
    for work in (
        lambda: list(read_all(path, "LZ4")),
        lambda: generate([path], compression="gzip"),
        lambda: write_records(path, [], "zip"),
    ):
        with pytest.raises(ValueError, match="GZIP or empty"):
            work()


def test_a_file_without_records(tmp_path: Path) -> None:
    for compression in ("", "GZIP"):
        path = tmp_path / f"none{compression}"
        assert write_records(path, [], compression) == 0
        assert data_of(path, compression) == []
        path.write_bytes(b"")
        assert data_of(path, compression) == []
    result = generate([path])
    assert result.made == [path]
    assert file_info(path, deep=True).total_records == 0
    offsets = read_index(path)
    assert offsets is not None
    assert offsets.tolist() == [0]


def test_a_failing_writer_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_records(path, (b"new" * (1 // left) for left in (1, 0)))
    assert files_in(path.parent) == {"a": before}


def test_threads_share_files_more_than_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_OPEN", 2)
    paths = [tmp_path / str(number) for number in range(6)]
    contents = [[os.urandom(2000) for _ in range(50)] for _ in paths]
    for path, content in zip(paths, contents, strict=True):
        write_records(path, content)
    generate(paths)
    open_before = len(os.listdir("/dev/fd"))
    files = [Indexed(paths, [offsets_of(path) for path in paths], [50] * 6)]

    def read(seed: int) -> bool:
        places = random.Random(seed)
        chosen = [(places.randrange(6), places.randrange(50)) for _ in range(500)]
        return all(
            files[0].read_one(file * 50 + record) == (contents[file][record], file, record)
            for file, record in chosen
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))
    assert len(os.listdir("/dev/fd")) - open_before <= 2
    files.clear()
    assert len(os.listdir("/dev/fd")) == open_before


def indexed(path: Path, offsets: np.ndarray) -> Indexed:
    return Indexed([path], [offsets], [len(offsets) - 1])


def offsets_of(path: Path) -> np.ndarray:
    offsets = read_index(path)
    assert offsets is not None
    return offsets


# ---------------------------------------------------------------------------------------- damage

THIRD = sum(len(data) + FRAME for data in RECORDS[:3])  # where the fourth record begins


@pytest.mark.parametrize("byte", [0, 3, 7, 8, 11, 12, 20, 41, 42, 45])
def test_a_flipped_bit_is_found(byte: int, path: Path) -> None:
    """The record has 12 bytes of header, 30 of data and 4 of CRC."""
    generate([path])
    offsets = offsets_of(path)
    content = bytearray(path.read_bytes())
    content[THIRD + byte] ^= 1 << byte % 8
    path.write_bytes(content)
    read = []
    with pytest.raises(RecordError) as caught:
        for _, data in read_all(path):
            read.append(data)
    assert read == RECORDS[:3]
    assert (caught.value.path, caught.value.offset) == (path, THIRD)
    assert str(path) in str(caught.value)
    assert str(THIRD) in str(caught.value)

    file = indexed(path, offsets)
    with pytest.raises(RecordError) as caught:
        file.read_one(3)
    assert (caught.value.path, caught.value.offset) == (path, THIRD)
    for number in {*range(len(RECORDS))} - {3}:
        assert file.read_one(number)[0] == RECORDS[number]


@pytest.mark.parametrize("kept", [1, 8, 11, 12, 13, 30, 42, 45])
def test_a_torn_record_is_found(kept: int, path: Path) -> None:
    generate([path])
    offsets = offsets_of(path)
    os.truncate(path, THIRD + kept)
    with pytest.raises(RecordError, match="is truncated") as caught:
        data_of(path)
    assert caught.value.offset == THIRD
    with pytest.raises(RecordError, match="is truncated") as caught:
        indexed(path, offsets).read_one(3)
    assert caught.value.offset == THIRD
    assert read_index(path) is None
    assert "is truncated" in generate([path]).problems[path]


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_a_huge_length_takes_no_memory(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_records(path, [b"x" * 100], compression="")
    length = struct.pack("<Q", 2**32)
    huge = length + struct.pack("<I", tfrecords.masked(google_crc32c.value(length))) + b"x" * 100
    content = path.read_bytes() + huge
    if compression:
        content = gzip.compress(content)
    path.write_bytes(content)
    if not compression:
        os.truncate(path, 200_000_000)  # nor is what is there read at its word
    tracemalloc.start()
    with pytest.raises(RecordError, match="is truncated") as caught:
        data_of(path, compression)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.offset == 116
    assert peak < 50e6


def test_damage_of_compressed_files_is_found(tmp_path: Path) -> None:
    compression = "GZIP"
    path = tmp_path / "a"
    write_records(path, RECORDS, compression)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    damaged = [content[: len(content) // 2], content[:-1], content[:-4], bytes(flipped)]
    for bad in [*damaged, content + b"more"]:
        path.write_bytes(bad)
        with pytest.raises(RecordError, match="byte"):
            data_of(path, compression)
        assert list(generate([path]).problems) == [path]


def test_an_error_is_the_same_from_another_process() -> None:
    error: RecordError = pickle.loads(pickle.dumps(RecordError(Path("a"), 7, "is truncated")))
    assert (error.path, error.offset, error.reason) == (Path("a"), 7, "is truncated")
    assert str(error) == "a: the record at byte 7 is truncated"


# -------------------------------------------------------------------------- metadata in the library


def test_metadata_and_index_are_what_deephub_has_and_more(path: Path) -> None:
    write_records(path.with_name("b.gz"), RECORDS[:4], "GZIP")
    result = generate([path, path.with_name("b.gz")])
    assert (len(result.made), len(result.kept), result.problems) == (2, 0, {})
    content = json.loads((path.parent / METADATA).read_text())
    assert content["version"] == 1
    assert list(content["files"]) == ["a", "b.gz"]
    assert content["files"]["a"].keys() == {"total_records", "file_size", "md5_hash"}
    assert file_info(path, deep=True).total_records == 10
    assert file_info(path.with_name("b.gz"), deep=True).total_records == 4
    with np.load(path.parent / INDEX) as index:
        assert index.files == ["a"]
        assert index["a"].shape == (11,)
    assert read_index(path.with_name("b.gz")) is None


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for order in ("abc", "cab"):
        folder = tmp_path / order
        folder.mkdir()
        for name in order:
            write_records(folder / name, RECORDS[: ord(name) - 90])
            generate([folder / name])
        contents.append(files_in(folder))
        with zipfile.ZipFile(folder / INDEX) as index:
            assert {member.date_time for member in index.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert contents[0] == contents[1]


def test_metadata_of_deephub_stays_as_it_is(tmp_path: Path) -> None:
    entries = {name: vars(info) for name, info in read_metadata(TOY).items()}
    (tmp_path / METADATA).write_text(json.dumps({"version": 1, "files": entries}))
    before = (tmp_path / METADATA).read_bytes()
    for name in entries:
        shutil.copy(TOY / name, tmp_path)
    paths = [tmp_path / name for name in entries]
    assert [file_info(path, deep=True).total_records for path in paths] == [10, 10]
    assert generate(paths).kept == paths
    assert (tmp_path / METADATA).read_bytes() == before
    assert offsets_of(paths[0]).tolist() == [35 * number for number in range(11)]


def test_valid_entries_are_kept_changed_ones_refreshed_others_left_alone(path: Path) -> None:
    other, folder = path.with_name("b"), path.parent
    write_records(other, RECORDS[:5])
    generate([path, other])
    entries = entries_in(folder)
    # An entry that is right in size and MD5 is not counted again.
    entries["a"]["total_records"] = 11
    entries["gone"] = {"total_records": 3, "file_size": 100, "md5_hash": "0" * 32}
    (folder / METADATA).write_text(json.dumps({"version": 1, "files": entries}))
    (folder / INDEX).unlink()
    write_records(path.with_name("c.gz"), RECORDS[:1], "GZIP")
    assert generate([path.with_name("c.gz")]).made == [path.with_name("c.gz")]
    assert entries_in(folder) == entries | {"c.gz": entries_in(folder)["c.gz"]}

    write_records(other, RECORDS[:6])
    assert generate([other]).made == [other]
    assert entries_in(folder)["b"]["total_records"] == 6
    assert entries_in(folder)["gone"] == entries["gone"]
    assert entries_in(folder)["a"]["total_records"] == 11
    assert len(offsets_of(other)) == 7
    assert generate([other]).kept == [other]
    assert generate([other], force=True).made == [other]


def test_a_valid_compressed_file_is_not_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = path.with_name("b.gz")
    write_records(packed, RECORDS, "GZIP")
    generate([path, packed])
    monkeypatch.setattr(tfrecords, "_scan", None)
    assert generate([path, packed]).kept == [path, packed]
    with pytest.raises(TypeError):
        generate([path], force=True)


def test_a_same_size_edit_passes_the_shallow_look_only(path: Path) -> None:
    generate([path])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert file_info(path).total_records == 10
    with pytest.raises(MetadataError, match=r"other bytes .*generate-metadata"):
        file_info(path, deep=True)
    # Other records of the same size together: the entry and the index are made anew.
    write_records(path, [b"", b"", path.read_bytes()[: -3 * FRAME]])
    assert path.stat().st_size == len(content)
    assert generate([path]).made == [path]
    assert len(offsets_of(path)) == 4
    assert file_info(path, deep=True).total_records == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"version": 1}',
        b'{"version": 1, "files": []}',
        b'{"version": 1, "files": {"a": 3}}',
        b'{"version": 1, "files": {"a": {"total_records": 10}}}',
        b'{"version": 1, "files": {"a": {"total_records": "x", "file_size": 1, "md5_hash": ""}}}',
        b'{"version": 1, "files": {"a": {"total_records": -1, "file_size": 1, "md5_hash": ""}}}',
        b'{"version": 1, "files": {"a": {"total_records": 1, "file_size": 1, "md5_hash": 2}}}',
        b'{"version": 2, "files": {}}',
        b"[" * 100_000,
    ],
)
def test_corrupt_metadata_is_named_and_never_overwritten(content: bytes, path: Path) -> None:
    (path.parent / METADATA).write_bytes(content)
    before = files_in(path.parent)
    works = (
        lambda: file_info(path),
        lambda: generate([path]),
        lambda: generate([path], force=True),
    )
    for work in works:
        with pytest.raises(MetadataError, match=f"{path.parent / METADATA} (is corrupt|has ver)"):
            work()
    assert read_index(path) is None
    assert files_in(path.parent) == before


def test_a_failing_rename_or_write_leaves_the_old_metadata(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate([path])
    before = files_in(path.parent)
    write_records(path, RECORDS[:3])
    before["a"] = path.read_bytes()
    for name in ("replace", "fsync"):
        with monkeypatch.context() as context:

            def fail(*_: object) -> None:
                raise OSError("the disk is full")

            context.setattr(os, name, fail)
            with pytest.raises(OSError, match="the disk is full"):
                generate([path])
        assert files_in(path.parent) == before
    assert generate([path]).made == [path]
    assert file_info(path, deep=True).total_records == 3


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_leaves_the_old_metadata_or_the_new(rename: int, path: Path) -> None:
    generate([path])
    before = files_in(path.parent)
    write_records(path, RECORDS[:3])
    program = (
        "import os, sys; from pathlib import Path; from engine.records import files\n"
        "left = [int(sys.argv[2])]; replace = os.replace\n"
        "def last(*names):\n"
        "    left[0] -= 1\n"
        "    replace(*names) if left[0] else os.kill(os.getpid(), 9)\n"
        "os.replace = last\n"
        "files.generate([Path(sys.argv[1])])\n"
    )
    command = [sys.executable, "-c", program, str(path), str(rename)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert (path.parent / METADATA).read_bytes() == before[METADATA]
    assert read_index(path) is None
    assert generate([path]).made == [path]
    assert file_info(path, deep=True).total_records == 3
    assert len(offsets_of(path)) == 4
    assert set(files_in(path.parent)) == {"a", METADATA, INDEX}


def test_what_was_done_before_an_interrupt_is_written_and_what_others_add_stays(path: Path) -> None:
    other = path.with_name("b")
    write_records(other, RECORDS[:2])

    def progress(paths: Iterable[Path]) -> Iterator[Path]:
        yield from paths
        generate([other])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate([path], progress=progress)
    assert set(entries_in(path.parent)) == {"a", "b"}
    assert (len(offsets_of(path)), len(offsets_of(other))) == (11, 3)


def test_an_index_that_does_not_fit_is_not_used(path: Path) -> None:
    assert read_index(path) is None
    generate([path])
    index = (path.parent / INDEX).read_bytes()
    offsets = offsets_of(path)
    for content in (b"", index[:50], index[:-30], index.replace(b"\x10", b"\x11"), b"x" * 1000):
        (path.parent / INDEX).write_bytes(content)
        assert read_index(path) is None
    for wrong in (
        offsets[:-1],
        offsets + 1,
        offsets.astype(np.float64),
        offsets[:, None],
        offsets[[0, -1]],
        np.sort(np.append(offsets, 10)),
        offsets[:0],
    ):
        np.savez(path.parent / INDEX, a=wrong)
        assert read_index(path) is None, wrong
    np.savez(path.parent / INDEX, a=np.array([{}], dtype=object))
    assert read_index(path) is None
    # Without metadata to compare with, too, no record can be shorter than its frame.
    metadata = (path.parent / METADATA).rename(path.parent / "aside")
    np.savez(path.parent / INDEX, a=np.sort(np.append(offsets, 10)))
    assert read_index(path) is None
    metadata.rename(path.parent / METADATA)
    assert generate([path]).kept == [path]
    assert (path.parent / INDEX).read_bytes() == index
    with open(path, "ab") as file:
        file.write(b"x")
    assert read_index(path) is None


def test_offsets_of_another_file_are_an_error_not_other_data(path: Path) -> None:
    generate([path])
    offsets = offsets_of(path).copy()
    offsets[3] += 2
    for number in (2, 3):
        with pytest.raises(RecordError):
            indexed(path, offsets).read_one(number)
    with pytest.raises(RecordError, match="unlike what the index says"):
        indexed(path, offsets[[0, 2]]).read_one(0)


# ------------------------------------------------------------------------------------ the commands


def test_the_toy_data_are_deephubs(command: Command) -> None:
    info = read_metadata(TOY)
    train, validation = info["train-00000-of-00001"], info["validation-00000-of-00001"]
    assert train.md5_hash == "3c8c216b7293fdef623b04e01bb5878a"
    assert validation.md5_hash == "fdebe01f545d90f127a15ea2f28d3d1d"
    for name in info:
        plain = data_of(TOY / name)
        assert plain == data_of(TOY / "compressed_toy" / f"{name}.gz", "GZIP")
        assert read_index(TOY / name) is not None
    done = command(SCRIPT, "validate", "--deep", "data/toy/*", "data/toy/compressed_toy/*")
    assert (done.returncode, done.stdout) == (0, "4 files, 0 of them bad\n")
    assert command(SCRIPT, "total-examples", "data/toy/*").stdout == "20\n"


def test_generate_skips_what_are_no_records(command: Command, main: Command, path: Path) -> None:
    folder = path.parent
    write_records(folder / "b.gz", RECORDS[:4], "GZIP")
    write_records(folder / "c.gz", RECORDS[:2], "GZIP")
    for name in (".hidden", "README.md", "labels.txt"):
        (folder / name).write_text("x")
    (folder / "below").mkdir()
    first = command(SCRIPT, "generate-metadata", f"{folder}/*")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == "3 files matched\n3 made, 0 kept, 0 skipped\n"
    made = files_in(folder)
    # The shell may expand the pattern, too.
    again = command(SCRIPT, "generate-metadata", *folder.iterdir())
    assert again.stdout == "3 files matched\n0 made, 3 kept, 0 skipped\n"
    assert again.returncode == 0
    assert "3 made" in main("generate-metadata", "--force", f"{folder}/*").stdout
    assert files_in(folder) == made
    total = main("total-examples", *folder.iterdir())
    assert (total.returncode, total.stdout) == (0, "16\n")

    (folder / "notes.txt").write_text("These are no records.\n")
    (folder / "torn").write_bytes(path.read_bytes()[:-1])
    (folder / "archive.gz").write_bytes(gzip.compress(b"neither are these, in spite of it"))
    skipped = main("generate-metadata", f"{folder}/*")
    assert skipped.returncode == 1
    assert "6 files matched" in skipped.stdout
    names = ("archive.gz", "notes.txt", "torn")
    for name, line in zip(names, skipped.stderr.splitlines(), strict=True):
        assert f"skipped: {folder / name}: the record at byte" in line
    assert set(entries_in(folder)) == {"a", "b.gz", "c.gz"}


def test_generate_takes_the_compression_that_it_is_told(main: Command, path: Path) -> None:
    wrong = main("generate-metadata", path, "--compression=GZIP")
    assert wrong.returncode == 1
    assert "cannot be unpacked" in wrong.stderr
    write_records(path, RECORDS, "GZIP")
    assert main("generate-metadata", path, "--compression", "GZIP").returncode == 0
    assert entries_in(path.parent)["a"]["total_records"] == 10


@pytest.mark.parametrize(
    "arguments",
    [["generate-metadata"], ["generate-metadata", "--force"], ["validate"], ["total-examples"]],
)
def test_corrupt_or_missing_metadata_is_one_sentence(
    arguments: list[str], main: Command, path: Path
) -> None:
    pattern, metadata = f"{path.parent}/*", path.parent / METADATA
    if arguments[0] != "generate-metadata":
        done = main(*arguments, pattern)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"python bin/tfrecords.py generate-metadata '{pattern}'" in done.stderr
    metadata.write_text('{"version": 1, "files"')
    before = files_in(path.parent)
    done = main(*arguments, pattern)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(metadata) in done.stderr
    assert files_in(path.parent) == before


def test_validate_names_each_bad_file_and_why(main: Command, path: Path) -> None:
    folder = path.parent
    for name in ("edited", "longer", "gone"):
        shutil.copy(path, folder / name)
    generate([path, *(folder / name for name in ("edited", "longer", "gone"))])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    (folder / "edited").write_bytes(content)
    (folder / "longer").write_bytes(content + b"x")
    (folder / "gone").unlink()
    (folder / "new").write_bytes(content)
    shallow = main("validate", f"{folder}/*")
    assert (shallow.returncode, shallow.stdout) == (1, "5 files, 3 of them bad\n")
    reasons = [
        ("gone", f"there is no file {folder / 'gone'}, which"),
        ("longer", "bytes, but"),
        ("new", "is not in"),
    ]
    for (name, reason), line in zip(reasons, shallow.stderr.splitlines(), strict=True):
        assert reason in line
        wanted = f"{folder}/*" if name == "gone" else folder / name
        assert f"python bin/tfrecords.py generate-metadata {shlex.quote(str(wanted))}" in line
    with pytest.raises(MetadataError, match=r"there is no file .*other$"):
        file_info(folder / "other")
    deep = main("validate", "--deep", f"{folder}/[ae]*")
    assert (deep.returncode, deep.stdout) == (1, "2 files, 1 of them bad\n")
    assert f"bad: {folder / 'edited'} has the size" in deep.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is needed"),
        (["generate"], "generate-metadata"),
        (["validate"], "PATTERN"),
        (["validate", "--dep", "x"], "--dep"),
        (["total-examples", "no/such/*"], "no file matches no/such/*"),
        (["generate-metadata", "data/toy"], "'data/toy/*'"),
        (["generate-metadata", "data/toy/README.md"], "no file matches data/toy/README.md"),
        (["generate-metadata", "x", "--compression=LZ4"], "invalid choice: 'LZ4'"),
        (["inspect", "nothing"], "there is no file nothing"),
        (["inspect", f"data/toy/{METADATA}"], "holds no records"),
        (["from-images", "nothing", "{new}"], "there is no folder nothing"),
        (["from-images", "data", "data/toy"], "data/toy already exists"),
        (["from-images", "data/toy/compressed_toy", "{new}"], "has no subfolder"),
        (["from-images", "data", "data/new"], "lies in data"),
        (["from-images", "data", "{new}", "--split=1"], "below 1"),
        (["from-images", "data", "{new}", "--split=much"], "split: much was given"),
        (["from-images", "data", "{new}", "--shards=-1"], "expected 1 to"),
        (["from-images", "data", "{new}", "--shards=1000"], "--shards=1000"),
        (["from-images", "{empty}", "{new}"], "has no subfolder"),
        (["from-images", "{no_picture}", "{new}"], "holds no picture"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str], message: str, main: Command, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("new", "empty", "no_picture")}
    places["empty"].mkdir()
    (places["no_picture"] / "label").mkdir(parents=True)
    (places["no_picture"] / "label" / ".hidden").write_text("x")
    done = main(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not places["new"].exists()
    assert not (ROOT / "data" / "new").exists()


# ---------------------------------------------------------------------------- --- Examples


def test_inspect_shows_names_types_and_numbers(main: Command, tmp_path: Path) -> None:
    path = tmp_path / "a"
    records = [example(number=[n], weights=[0.5] * 3, name=[b"x", b"y"]) for n in range(2)]
    write_records(path, records, "GZIP")
    table = [line.split() for line in main("inspect", path).stdout.splitlines()]
    assert table == [
        ["feature", "type", "values"],
        ["name", "string", "2"],
        ["number", "int64", "1"],
        ["weights", "float32", "3"],
    ]
    write_records(path, [b"\xff\xff\xff"])
    done = main("inspect", path)
    assert done.returncode == 1
    assert f"{path}: the record at byte 0 is not a tf.train.Example" in done.stderr


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_tensorflow_reads_what_we_write_and_we_what_it_writes(
    compression: str, tmp_path: Path
) -> None:
    import tensorflow as tf

    write_records(tmp_path / "ours", RECORDS, compression)
    read = tf.data.TFRecordDataset(str(tmp_path / "ours"), compression_type=compression)
    assert [record.numpy() for record in read] == RECORDS
    options = tf.io.TFRecordOptions(compression_type=compression)
    with tf.io.TFRecordWriter(str(tmp_path / "theirs"), options) as writer:
        for record in RECORDS:
            writer.write(record)
    assert compression_of(tmp_path / "theirs") == compression
    assert data_of(tmp_path / "theirs", compression) == RECORDS


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures each of ants and bees; one has colours, the other has none."""
    import tensorflow as tf

    folder = tmp_path / "pictures"
    for label, channels in (("bees", 1), ("ants", 3)):
        (folder / label / "below").mkdir(parents=True)
        for number in range(6):
            pixels = np.full((5 + number, 8, channels), 40 * number, np.uint8)
            is_png = number % 2
            encoded = (tf.io.encode_png if is_png else tf.io.encode_jpeg)(pixels).numpy()
            place = f"below/{number}.png" if is_png else f"{number}.picture"
            (folder / label / place).write_bytes(encoded)
    return folder


def examples_in(folder: Path, split: str) -> list[dict]:
    """The features of each record, with those of one value as that value."""
    examples = []
    for path in sorted(folder.glob(f"{split}-*")):
        for data in data_of(path):
            held = features.held_in(data)
            examples.append({name: values[0] for name, (_, values) in held.items()})
    return examples


def test_from_images_by_the_command_line(
    command: Command, main: Command, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "LICENSE.txt").write_text("x")
    out = tmp_path / "deep" / "out"
    done = command(SCRIPT, "from-images", pictures, out, "--shards=2", "--split=0.25")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "LICENSE.txt" in done.stderr
    names = {"train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"}
    assert set(files_in(out)) == {*names, "labels.txt", METADATA, INDEX}
    assert list(out.parent.iterdir()) == [out]
    assert (out / "labels.txt").read_text() == "ants\nbees\n"
    assert all(file_info(out / name, deep=True).total_records for name in names)
    assert all(read_index(out / name) is not None for name in names)

    train, validation = examples_in(out, "train"), examples_in(out, "validation")
    both = {entry["image/filename"].decode(): entry for entry in train + validation}
    assert len(both) == len(train) + len(validation) == 12
    assert len(validation) == 3
    for name, entry in both.items():
        number = int(Path(name).stem)
        assert entry["image/encoded"] == (pictures / name).read_bytes()
        assert entry["image/format"] == (b"png" if number % 2 else b"jpeg")
        assert (entry["image/height"], entry["image/width"]) == (5 + number, 8)
        is_bee = name.startswith("bees/")
        assert entry["image/label"] == is_bee
        assert entry["image/label_name"] == (b"bees" if is_bee else b"ants")
        assert entry["image/channels"] == (1 if is_bee else 3)


def write(folder: Path, out: Path) -> None:
    pictures, labels = pictures_of(folder)
    splits = split_and_shuffle(pictures, 0.3)
    shards = {name: number_of_shards(split) for name, split in splits.items()}
    write_pictures(out, splits, labels, shards)


def test_order_and_split_are_functions_of_the_names(pictures: Path, tmp_path: Path) -> None:
    for out in "ab":
        write(pictures, tmp_path / out)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    train, validation = (
        [entry["image/filename"] for entry in examples_in(tmp_path / "a", split)]
        for split in ("train", "validation")
    )
    assert len(validation) == round(0.3 * 12)
    # Nothing is sorted by label, as the folders are.
    assert train != sorted(train)
    assert {name.split(b"/")[0] for name in validation} == {b"ants", b"bees"}


def test_a_large_folder_has_several_shards(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, labels = pictures_of(pictures)
    size = sum(picture.path.stat().st_size for picture in found)
    monkeypatch.setattr("engine.records.images.SHARD_SIZE", size // 5 + 1)
    assert number_of_shards(found) == 5
    write_pictures(tmp_path / "out", {"train": found}, labels, {"train": 5})
    counts = [info.total_records for info in read_metadata(tmp_path / "out").values()]
    assert sum(counts) == 12
    assert set(counts) == {2, 3}


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\xff\xd8\xffno", b"GIF89a", b"BM", "cut jpeg", "cut png"]
)
def test_an_unreadable_picture_stops_and_leaves_nothing(
    content: bytes | str, pictures: Path, tmp_path: Path
) -> None:
    if isinstance(content, str):
        whole = pictures / "ants" / ("4.picture" if "jpeg" in content else "below/5.png")
        content = whole.read_bytes()[:-20]
    bad = pictures / "bees" / "bad"
    bad.write_bytes(content)
    with pytest.raises(PictureError, match=str(bad)):
        write(pictures, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pictures"]
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    (tmp_path / ".out.partial").mkdir()  # left by a process that was killed
    (tmp_path / ".out.partial" / "x").write_text("x")
    bad.unlink()
    write(pictures, tmp_path / "out")
    totals = [info.total_records for info in read_metadata(tmp_path / "out").values()]
    assert sum(totals) == 12
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "pictures"]
