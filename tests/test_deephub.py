"""Coming from Deephub: its variant trains as it stands, and each row of the table is tested."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from conftest import run

pytestmark = pytest.mark.slow

# As Deephub's guide has it, with its feeders in two files.
VARIANT = """\
model:
  type: 'toy:DebugToyModel'
  num_classes: 100
  learning_rate: 0.001
  hidden_neurons: 50
train:
  epochs: 10
  save_checkpoint_steps: 100
#      save_checkpoint_secs: 1
  validation_secs: 3600
  save_summary_steps: 1
extend:
  - ../feeders/feeder_toy_train.yaml
  - ../feeders/feeder_toy_eval.yaml
"""
FEEDER = """\
train:
    {name}:
      type: 'TFRecordExamplesFeeder'
      batch_size: 10
      shuffle: False
      file_patterns: ['']
      labels_map:
        number:
          type: FixedLenFeature
          shape: [1]
          dtype: int64
      features_map:
        number:
          type: FixedLenFeature
          shape: [1]
          dtype: int64
"""
PATTERNS = (
    *("-p", "train.train_feeder.file_patterns", "data/toy/train-*"),
    *("-p", "train.eval_feeder.file_patterns", "data/toy/validation-*"),
)


@pytest.fixture(scope="module")
def own(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the seed's variant in a folder of its own, and a run of it."""
    copy = tmp_path_factory.mktemp("deephub") / "own"
    shutil.copytree(project, copy, symlinks=True)
    (copy / "mine" / "variants").mkdir(parents=True)
    (copy / "mine" / "feeders").mkdir()
    (copy / "mine" / "variants" / "toy.yaml").write_text(VARIANT)
    for name, file in (("train_feeder", "train"), ("eval_feeder", "eval")):
        path = copy / "mine" / "feeders" / f"feeder_toy_{file}.yaml"
        path.write_text(FEEDER.format(name=name))
    words = ("mine/variants/toy.yaml", "-p", "model.model_dir", "results/toy", *PATTERNS)
    run(sys.executable, "bin/train.py", *words, cwd=copy)
    return copy


def bin(own: Path, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = forked.run([f"bin/{script}.py", *words], own, os.environ)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def train(own: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return bin(own, "train", *words, code=code)


def resolved(own: Path, *words: str) -> str:
    """The config that a command would train, as YAML."""
    return train(own, "mine/variants/toy.yaml", "results/dry", *words, "--dry_run").stdout


def test_the_seed_s_variant_trains_as_it_stands(own: Path) -> None:
    folder = own / "results" / "toy"
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    said = train(own, "mine/variants/toy.yaml", "results/toy", *PATTERNS).stdout
    assert "is already finished" in said


def test_values_are_typed_raw_or_deleted(own: Path) -> None:
    assert "learning_rate: 0.01\n" in resolved(own, "-p", "model.learning_rate", "1e-2")
    assert 'note: "12"\n' in resolved(own, "-P", "model.note", "12")
    words = (
        "mine/variants/toy.yaml",
        "results/dry",
        "-p",
        "model.note",
        "__import__('os').getcwd()",
    )
    assert "is not computed" in train(own, *words, code=2).stderr
    less = resolved(own, "--delete", "model.hidden_neurons")
    assert "  hidden_neurons:" not in less and "num_classes: 100" in less
    assert "copy: 50\n" in resolved(own, "-p", "model.copy", "${model.hidden_neurons}")


def test_levels_and_devices(own: Path) -> None:
    words = ("mine/variants/toy.yaml", "results/loud", *PATTERNS, "-p", "train.epochs", "1")
    train(own, *words, "-l", "LOUD", code=2)
    train(own, *words, "--gpus=first", code=2)
    train(own, *words, "--gpus=-1", code=2)
    said = train(own, *words, "-l", "WARNING", "--gpus=none").stdout
    assert "epoch 1/1" not in said


# Rows whose tests are those of the machinery.
BY_FILE = {
    "-g 0, -g -1": "test_variants.py::test_gpus_are_chosen_by_number",
    "--warm-start-checkpoint, --warm-start-vars": (
        "test_variants.py::test_a_warm_start_takes_the_weights_that_match"
    ),
    "warm_start_check_point, warm_start_variables_regex": (
        "test_variants.py::test_a_variant_names_its_warm_start"
    ),
    "yes, no, on, off": (
        "test_config.py::test_words_are_values_in_a_variant_and_in_all_that_it_extends"
    ),
    "type: 'toy:DebugToyModel', module_path with class_type": (
        "test_variants.py::test_classes_are_found_in_either_spelling"
    ),
    "exporters": "test_variants.py::test_early_stopping_counts_steps_and_the_best_is_exported",
    "a list of scopes to fine-tune": "test_variants.py::test_fine_tuning_trains_only_what_matches",
    "TFRecordExamplesFeeder, MemorySamplesFeeder, ImageFeature": "test_feeders.py::",
    "epochs, save_checkpoint_steps, save_checkpoint_secs, save_summary_steps, validation_secs, "
    "early_stopping_…": (
        "test_variants.py::test_epochs_are_absolute_and_an_interruption_changes_no_bit"
    ),
    "experiment_params.yaml": "test_variants.py::test_the_toy_trains_as_the_seed_types_it",
    "metrics.csv": (
        "test_variants.py::test_the_last_figures_of_each_split_are_there_after_a_resume"
    ),
    "deep utils generate-metadata, validate, total-examples": "test_tfrecords.py::",
    "__del__": "test_config.py::test_a_file_can_delete_what_it_extends",
}
HERE: dict[str, Callable[..., None]] = {
    "deep trainer train toy -p model.model_dir PATH": test_the_seed_s_variant_trains_as_it_stands,
    "-p KEY VALUE, -P KEY TEXT": test_values_are_typed_raw_or_deleted,
    "-d DIR": test_the_seed_s_variant_trains_as_it_stands,
    "-l DEBUG": test_levels_and_devices,
    "extend": test_the_seed_s_variant_trains_as_it_stands,
    "$(a.b)": test_values_are_typed_raw_or_deleted,
}


def test_every_row_of_the_table_has_a_test(project: Path) -> None:
    page = (project / "docs" / "records.md").read_text()
    section = page.split("## Coming from Deephub")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    assert rows[0].strip() == "Deephub"
    assert {row.replace("`", "").strip() for row in rows[2:]} == {*HERE, *BY_FILE}
    for place in BY_FILE.values():
        file, _, name = place.partition("::")
        (path,) = Path(__file__).parent.glob(f"*/{file}")
        assert f"def {name or 'test_'}" in path.read_text()
