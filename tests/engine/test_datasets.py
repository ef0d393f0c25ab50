"""Examples, what is built on datasets of them, and batches that are the same for all workers."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machinery import ROOT

from engine.batches import SHUFFLE_STREAM, batch_source, digest, random_generator
from engine.iterators.datasets import (
    ConcatenatedDataset,
    CsvDataset,
    DatasetMixin,
    ExampleBatches,
    ExtraLabelsDataset,
    LabelDataset,
    ProcessedDataset,
    SubDataset,
    example_generator,
    make_examples,
    stack,
)

# Keras is imported where it is needed: worker processes import this file for its datasets.


class Numbers(DatasetMixin):
    """Examples first, first + 1, …, with their parity as a label."""

    def __init__(self, length: int, first: int = 0) -> None:
        self.length = length
        self.first = first
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.length

    def get_example(self, index: int) -> dict[str, Any]:
        self.loaded.append(index)
        return {"number": self.first + index}

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        return {"odd": (self.first + np.arange(self.length)) % 2 == 1}


class Draws(Numbers):
    """Examples that draw from all three generators."""

    def get_example(self, index: int) -> dict[str, Any]:
        return {
            "number": index,
            "text": "x" * (index + 1),
            "draws": [self.prng.random(), random.random(), np.random.random()],
            "later": {"draw": lambda: self.prng.random(dtype=np.float32)},
        }


class Given(DatasetMixin):
    """The given examples."""

    def __init__(self, *examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def get_example(self, index: int) -> Any:
        return self.examples[index]


class Process(Numbers):
    """Examples that say which process they were made in and what it had imported."""

    def get_example(self, index: int) -> dict[str, Any]:
        return {"process": os.getpid(), "tensorflow": "tensorflow" in sys.modules}


class Dying(Numbers):
    """The process that makes an example ends by a signal; once, if a file is there to delete."""

    def __init__(self, file: Path | None) -> None:
        super().__init__(4)
        self.file = file

    def get_example(self, index: int) -> dict[str, Any]:
        if self.file is None or self.file.exists():
            if self.file:
                self.file.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"number": index}


Build = Callable[..., ExampleBatches]


@pytest.fixture
def example_batches() -> Iterator[Build]:
    """Build ExampleBatches, and close them after the test."""
    built: list[ExampleBatches] = []

    def build(dataset: Any, batch_size: int, seed: int = 3, **options: Any) -> ExampleBatches:
        built.append(ExampleBatches(dataset, batch_size, seed, **options))
        return built[-1]

    yield build
    for batches in built:
        batches.close()


def numbers(dataset: DatasetMixin) -> list[int]:
    return [example["number"] for example in dataset]


def same(one: Any, other: Any) -> bool:
    """Return whether examples or batches are equal to the last bit, and so are their dtypes."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(one, other)


def test_an_example_has_its_index_and_leaves_what_the_dataset_keeps_alone() -> None:
    kept = {"number": 7, "inner": {"list": [1]}}
    example = Given({}, kept)[1]
    assert example == {"number": 7, "inner": {"list": [1]}, "index_": 1}
    assert type(example["index_"]) is int
    example["inner"]["list"].append(2)
    assert kept == {"number": 7, "inner": {"list": [1]}}


def test_functions_among_the_values_are_called_when_an_example_is_asked_for() -> None:
    calls: list[str] = []

    def read() -> dict[str, Any]:
        calls.append("read")
        return {"deeper": lambda: 5}

    dataset = Given({"image": read, "views": {"all": [lambda: 1, (lambda: 2,)]}})
    assert not calls
    assert dataset[0] == {"image": {"deeper": 5}, "views": {"all": [1, [2]]}, "index_": 0}
    assert calls == ["read"]


def test_indices_count_from_the_end_and_come_in_slices_and_lists() -> None:
    dataset = Numbers(5, first=10)
    assert dataset[-1] == {"number": 14, "index_": 4}
    assert [example["index_"] for example in dataset[1:4:2]] == [1, 3]
    assert [example["index_"] for example in dataset[[4, -5]]] == [4, 0]
    assert [example["index_"] for example in dataset[np.array([2, 1])]] == [2, 1]
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index {index} of Numbers with 5 examples"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset[1.5]  # type: ignore[index]


def test_an_index_error_in_get_example_does_not_end_a_loop_over_the_dataset() -> None:
    class Broken(Numbers):
        def get_example(self, index: int) -> dict[str, Any]:
            return {"number": [0, 1][index]}

    with pytest.raises(IndexError):
        list(Broken(3))


def test_labels_are_appended_where_that_is_asked_for() -> None:
    dataset = Numbers(3)
    assert "labels_" not in dataset[1]
    dataset.append_labels = True
    assert dataset[1]["labels_"] == {"odd": True}
    assert dataset[2]["labels_"] == {"odd": False}
    assert Given({}).labels == {}
    labels: Any = {"odd": [0, 1, 0], "deep": {"er": np.array([5, 6, 7])}}
    dataset.labels = labels
    batch = stack(make_examples(dataset, [2, 1], seed=0, epoch=0))
    assert batch["index_"].tolist() == [2, 1]
    assert batch["labels_"]["odd"].tolist() == [0, 1]
    assert batch["labels_"]["deep"]["er"].tolist() == [7, 6]


def test_a_dataset_with_data_inherits_from_it() -> None:
    class View(DatasetMixin):
        def __init__(self, data: Any) -> None:
            self.data = data

    view = View(Numbers(3, first=4))
    assert len(view) == 3
    assert view[1] == {"number": 5, "index_": 1}
    assert view.labels["odd"].tolist() == [False, True, False]

    class Listed(list[Any]):  # is no DatasetMixin
        labels: Any = {"odd": np.array([True])}  # noqa: RUF012

    assert View(Listed([{"number": 1}])).labels["odd"].tolist() == [True]
    Listed.labels = np.array([True])  # as torchvision has them
    assert View(Listed([{"number": 1}])).labels == {}


def test_what_a_dataset_lacks_is_named() -> None:
    class Nothing(DatasetMixin):
        pass

    with pytest.raises(TypeError, match="Nothing has neither __len__"):
        len(Nothing())
    with pytest.raises(TypeError, match="Nothing has neither get_example"):
        Nothing().get_example(0)
    with pytest.raises(TypeError, match="Given gave a tuple as an example; expected a dict"):
        Given((1, 2))[0]


def test_datasets_are_added_and_multiplied() -> None:
    two, three = Numbers(2), Numbers(3, first=7)
    added = two + three
    assert numbers(added) == [0, 1, 7, 8, 9]
    assert [example["index_"] for example in added] == [0, 1, 2, 3, 4]
    assert added.labels["odd"].tolist() == [False, True, True, False, True]
    assert numbers(3 * two) == numbers(two * 3) == [0, 1, 0, 1, 0, 1]
    assert (3 * two).labels["odd"].tolist() == [False, True] * 3
    assert numbers(2 * (two + three) + two) == [0, 1, 7, 8, 9] * 2 + [0, 1]


def test_a_subset_has_the_examples_and_labels_of_its_indices() -> None:
    subset = SubDataset(SubDataset(Numbers(10), [9, 3, 4, 3]), np.array([2, 0, 0]))
    assert numbers(subset) == [4, 9, 9]
    assert [example["index_"] for example in subset] == [0, 1, 2]
    assert subset.labels["odd"].tolist() == [False, True, True]
    assert len(SubDataset(Numbers(3), [])) == 0
    for outside in (3, -1):
        with pytest.raises(IndexError, match=f"subindex {outside} of a dataset with 3 examples"):
            SubDataset(Numbers(3), [0, outside])
    with pytest.raises(TypeError):
        SubDataset(Numbers(3), [0.5])  # type: ignore[list-item]


def test_concatenated_datasets_keep_the_labels_that_all_have() -> None:
    labeled = Numbers(2)
    labeled.labels = {"odd": np.array([False, True]), "name": np.array(["a", "b"])}
    assert set((labeled + Numbers(1)).labels) == {"odd"}
    assert (labeled + labeled).labels["name"].tolist() == ["a", "b", "a", "b"]


def test_balanced_datasets_are_as_long_as_the_longest() -> None:
    balanced = ConcatenatedDataset(Numbers(2), Numbers(5, first=10), balanced=True)
    assert numbers(balanced) == [0, 1, 0, 1, 0, 10, 11, 12, 13, 14]
    assert balanced.labels["odd"].tolist() == [number % 2 == 1 for number in numbers(balanced)]
    with pytest.raises(ValueError, match="an empty dataset cannot be repeated"):
        ConcatenatedDataset(Numbers(0), Numbers(2), balanced=True)
    with pytest.raises(ValueError, match="no datasets"):
        ConcatenatedDataset()


def test_rows_of_a_csv_file_are_examples_and_its_columns_labels(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("name;size;weight\nada;3;0.5\nbob;4;1.5\n")
    dataset = CsvDataset({"csv_path": path, "csv_arguments": {"sep": ";"}})
    assert dataset[1] == {"name": "bob", "size": 4, "weight": 1.5, "index_": 1}
    kinds = {key: values.dtype.kind for key, values in dataset.labels.items()}
    assert kinds == {"name": "U", "size": "i", "weight": "f"}
    assert stack(dataset[:])["name"].tolist() == ["ada", "bob"]
    path.write_text("name\n")
    assert len(CsvDataset({"csv_path": path})) == 0
    with pytest.raises(ValueError, match="csv_path"):
        CsvDataset({})
    with pytest.raises(OSError, match="missing"):
        CsvDataset({"csv_path": tmp_path / "missing.csv"})


def test_labels_as_examples_load_no_example() -> None:
    data = Numbers(3)
    assert LabelDataset(data)[1] == {"odd": True, "index_": 1}
    assert len(LabelDataset(data)) == 3
    assert not data.loaded


def test_extra_labels_are_computed_once() -> None:
    calls: list[int] = []

    def label(data: DatasetMixin, index: int) -> dict[str, Any]:
        calls.append(index)
        return {"square": data[index]["number"] ** 2, "box": (index, 0)}

    dataset = ExtraLabelsDataset(Numbers(3, first=1), label)
    assert dataset[2]["number"] == 3
    assert set(dataset.labels) == {"odd", "square", "box"}
    assert dataset[1]["labels_"]["square"] == 4
    assert dataset[2]["labels_"]["box"].tolist() == [2, 0]
    assert calls == [0, 1, 2]
    assert set(dataset.data.labels) == {"odd"}
    assert list(ExtraLabelsDataset(Numbers(0), label).labels) == ["odd"]


def test_processed_examples_are_merged_or_replaced() -> None:
    def double(number: int) -> dict[str, int]:
        return {"double": 2 * number}

    data = Numbers(3)
    assert ProcessedDataset(data, double)[2] == {"number": 2, "double": 4, "index_": 2}
    assert ProcessedDataset(data, double, update=False)[2] == {"double": 4, "index_": 2}
    assert ProcessedDataset(data, double).labels["odd"].tolist() == [False, True, False]
    at = ProcessedDataset(data, lambda number, index_: {"at": index_}, update=False)
    assert at[1] == {"at": 1, "index_": 1}


def test_nested_examples_stack_under_the_same_keys() -> None:
    arrays = [np.full((2, 3), i, np.float32) for i in range(4)]
    examples = [{"a": {"b": [array, {"c": i}]}, "t": (True, 0.5)} for i, array in enumerate(arrays)]
    batch = stack(examples)
    first, second = batch["a"]["b"]
    assert (first.shape, first.dtype) == ((4, 2, 3), np.float32)
    assert first[:, 0, 0].tolist() == second["c"].tolist() == [0, 1, 2, 3]
    assert second["c"].dtype == np.int64
    assert [array.dtype for array in batch["t"]] == [np.bool_, np.float64]
    assert stack([{"x": np.uint8(3)}])["x"].dtype == np.uint8
    names = stack([{"name": "a"}, {"name": "längste"}])["name"]
    assert (names.dtype, names.tolist()) == ("<U7", ["a", "längste"])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples to stack"),
        (
            [{"a": [{"x": np.zeros(2)}]}, {"a": [{"x": np.zeros((2, 1))}]}],
            r"'a/0/x' has the shapes \(2,\) and \(2, 1\)",
        ),
        ([{"a": {"x": 1}}, {"a": {"x": 1, "y": 2}}], "'a/y' is in some"),
        ([{"a": {"x": 1, "y": 2}}, {"a": {"x": 1}}], "'a/y' is in some"),
        ([{"a": [1]}, {"a": [1, 2]}], "'a/1' is in some"),
        ([{"a": [1]}, {"a": np.ones(1)}], "'a/0' is in some"),
        ([{"a": 1}, {"a": None}], "'a' is a NoneType in one"),
        ([{"a": "x"}, {"a": 1.0}], "'a' is text in some"),
    ],
)
def test_what_does_not_stack_is_named(examples: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack(examples)


def test_randomness_is_a_function_of_seed_epoch_and_index() -> None:
    dataset = Draws(4)
    one = make_examples(dataset, [2, 0], seed=1, epoch=5)
    assert same(one, make_examples(dataset, [2, 0], seed=1, epoch=5))
    assert same(one[::-1], make_examples(dataset, [0, 2], seed=1, epoch=5))
    draws = [
        draw
        for seed, epoch, index in ((1, 5, 2), (1, 5, 0), (1, 4, 2), (2, 5, 2))
        for example in make_examples(dataset, [index], seed, epoch)
        for draw in (*example["draws"], float(example["later"]["draw"]))
    ]
    assert len(set(draws)) == 16


def test_global_generators_are_left_as_they_were() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    make_examples(Draws(1), [0], seed=0, epoch=0)
    with pytest.raises(RuntimeError):
        make_examples(Draws(1), [1], seed=0, epoch=0)
    assert (random.random(), np.random.random()) == expected


def test_nested_datasets_draw_from_one_generator() -> None:
    class Outer(DatasetMixin):
        def __init__(self) -> None:
            self.data = ProcessedDataset(SubDataset(Draws(9), range(8)), self.process)

        def process(self, **example: Any) -> dict[str, Any]:
            return {"second": self.prng.random()}

        def get_example(self, index: int) -> dict[str, Any]:
            return self.data[0] | {"third": self.prng.random()}

    (example,) = make_examples(Outer(), [6], seed=1, epoch=2)
    generator = example_generator(1, 2, 6)
    generator.integers(2**32, size=1)  # the seeds of the global generators
    generator.integers(2**32, size=1)
    assert example["draws"][0] == generator.random()
    assert example["later"]["draw"] == generator.random(dtype=np.float32)
    assert (example["second"], example["third"]) == (generator.random(), generator.random())


def test_outside_of_a_batch_an_example_draws_as_in_seed_and_epoch_0() -> None:
    dataset = Draws(4)
    assert dataset[3]["draws"][0] == example_generator(0, 0, 3).random()
    assert dataset[3]["draws"][0] == dataset[3]["draws"][0] != dataset[2]["draws"][0]
    assert dataset.prng.random() == dataset.prng.random()


def test_the_generator_takes_what_a_random_state_takes() -> None:
    def draw() -> list[Any]:
        prng = Draws(1).prng
        numbers = [prng.randint(5, 9), prng.rand(), prng.randn(2).tolist(), prng.random_sample()]
        return [*numbers, prng.choice(4), prng.permutation(3).tolist(), prng.uniform()]

    assert draw() == draw()  # what it draws goes by its position, too
    assert draw()[0] in range(5, 9)
    names = [name for name in dir(np.random.RandomState) if not name.startswith("_")]
    assert not [name for name in names if not hasattr(Draws(1).prng, name)]
    assert Draws(1).prng.random() == np.random.Generator(Draws(1).prng.bit_generator).random()


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_example_once(example_batches: Build, shuffle: bool) -> None:
    batches = example_batches(Numbers(10), 4, shuffle=shuffle)
    epochs = [[batches.batch(epoch, step)["number"] for step in range(3)] for epoch in range(2)]
    assert batches.steps_per_epoch == 3
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert (orders[0] != orders[1]) == shuffle
    if shuffle:
        assert orders[1] == random_generator(3, 1, SHUFFLE_STREAM).permutation(10).tolist()
    else:
        assert orders[1] == list(range(10))
    for step in (3, -1):
        with pytest.raises(IndexError, match=f"step {step} of an epoch with 3 steps"):
            batches.batch(0, step)


def test_a_batch_does_not_depend_on_what_was_asked_for_before_nor_on_the_workers(
    example_batches: Build,
) -> None:
    positions = [(0, 0), (0, 1), (0, 3), (2, 2), (3, 0), (3, 1), (0, 1), (3, 3)]
    here = example_batches(Draws(10), 3)
    expected = [here.batch(*position) for position in positions]
    assert same(example_batches(Draws(10), 3).batch(3, 1), expected[5])
    assert not same(expected[0], expected[4])
    workers = example_batches(Draws(10), 3, num_workers=2)
    assert same([workers.batch(*position) for position in positions], expected)
    assert same(workers.batch(3, 0), expected[4])
    workers.close()  # with the batch that comes next under way
    assert same(workers.batch(3, 1), expected[5])


def test_workers_make_the_examples_and_do_not_import_tensorflow(example_batches: Build) -> None:
    batch = example_batches(Process(4), 4, num_workers=2).batch(0, 0)
    assert os.getpid() not in batch["process"]
    assert not batch["tensorflow"].any()


def test_max_batches_ends_an_epoch(example_batches: Build) -> None:
    batches = example_batches(Numbers(10), 3, max_batches=2)
    assert batches.steps_per_epoch == 2
    with pytest.raises(IndexError):
        batches.batch(0, 2)
    assert example_batches(Numbers(10), 3, max_batches=9).steps_per_epoch == 4


def test_the_training_loop_takes_the_batches_as_they_are(example_batches: Build) -> None:
    batches = example_batches(Draws(5), 2)
    assert batch_source(batches) is batches
    assert digest(batches, None) == digest(example_batches(Draws(5), 2), None)
    assert digest(batches, None) != digest(example_batches(Draws(5), 2, seed=4), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        ({"max_batches": 0}, "max_batches is 0; it must be at least 1"),
        ({"dataset": Numbers(0)}, "Numbers has no examples; expected at least one"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"dataset": Numbers(2), "batch_size": 2, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        ExampleBatches(**arguments)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_example_that_cannot_be_made_is_named(example_batches: Build, num_workers: int) -> None:
    dataset = ProcessedDataset(Numbers(2) + Given({"number": 2}, {"number": 3}), _lookup)
    batches = example_batches(dataset, 2, shuffle=False, num_workers=num_workers)
    assert batches.batch(0, 0)["found"].tolist() == [10, 11]
    with pytest.raises(RuntimeError, match=r"^example 3 of ProcessedDataset: KeyError: 3$"):
        batches.batch(0, 1)
    assert batches.batch(0, 0)["found"].tolist() == [10, 11]


def _lookup(number: int) -> dict[str, int]:
    return {"found": {0: 10, 1: 11, 2: 12}[number]}


@pytest.mark.parametrize("name", ["ProcessedDataset", "Notebook"])
def test_a_dataset_that_cannot_go_to_a_worker_is_refused(
    example_batches: Build, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a class of a notebook: it is there in this process alone.
    notebook = type("Notebook", (Numbers,), {"__module__": __name__})
    monkeypatch.setitem(globals(), "Notebook", notebook)
    of_lambda = ProcessedDataset(Numbers(2), lambda number: {})
    dataset = notebook(2) if name == "Notebook" else of_lambda
    with pytest.raises(ValueError, match=rf"{name} .* n_data_processes to 0$"):
        example_batches(dataset, 2, num_workers=1).batch(0, 0)


def test_a_worker_that_dies_is_replaced(example_batches: Build, tmp_path: Path) -> None:
    file = tmp_path / "dies"
    file.touch()
    batches = example_batches(Dying(file), 4, shuffle=False, num_workers=1)
    assert batches.batch(0, 0)["number"].tolist() == [0, 1, 2, 3]
    assert not file.exists()


def test_workers_that_die_again_are_an_error(example_batches: Build) -> None:
    message = "a worker process of Dying died twice: it died by SIG"
    with pytest.raises(RuntimeError, match=message):
        example_batches(Dying(None), 4, num_workers=1).batch(0, 0)


def test_workers_outlive_ctrl_c_but_not_a_process_that_is_killed() -> None:
    program = """
import sys
from engine.iterators.datasets import ExampleBatches
from test_datasets import Process

batches = ExampleBatches(Process(4), 4, 0, num_workers=1)
for epoch, _ in enumerate(sys.stdin):
    print(batches.batch(epoch, 0)["process"][0], flush=True)
"""
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        workers = []
        for _ in range(2):
            print(file=process.stdin, flush=True)
            workers.append(int(process.stdout.readline()))
            # A terminal and a batch scheduler send these to the workers too.
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(workers[0], number)
        assert workers[0] == workers[1] != process.pid
        process.kill()
        # The worker has the same stdout, which ends with the last process that could write to it.
        process.communicate(timeout=1800)
