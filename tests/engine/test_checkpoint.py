"""What is committed comes back bit for bit; what is damaged is named and set aside."""

import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from engine.checkpoints import checkpoint, is_done
from engine.checkpoints.checkpoint import Checkpoint
from engine.runs import results
from src.experiment import build


class TwoLayers(keras.Model):
    """A subclassed model, which Keras cannot write as HDF5."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(5, activation="relu")
        self.dropout = keras.layers.Dropout(0.5)
        self.classifier = keras.layers.Dense(10, activation="softmax")

    def call(self, inputs: Any, training: bool = False) -> Any:
        flat = keras.ops.reshape(inputs, (-1, 64))
        return self.classifier(self.dropout(self.hidden(flat), training=training))


def subclassed() -> keras.Model:
    model = TwoLayers()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.test_on_batch(np.zeros((1, 8, 8, 1)), np.zeros(1))  # makes the weights
    return model


def state(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 0,
        "global_step": 3 * epoch,
        "best_epoch": 0,
        "history": [{"epoch": number, "loss": 0.1} for number in range(epoch)],
    }


def everything(model: keras.Model) -> list[bytes]:
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable).tobytes() for variable in variables]


def step(model: keras.Model) -> None:
    generator = np.random.default_rng(0)
    model.train_on_batch(generator.random((4, 8, 8, 1)), np.arange(4))


def commit(folder: Path, model: keras.Model, values: dict[str, Any], is_best: bool = False) -> None:
    writer = Checkpoint(folder, model)
    writer.prepare()
    writer.commit(writer.snapshot(values), is_best)
    try:
        writer.wait()
    finally:
        writer.close()


def restore(folder: Path, model: keras.Model) -> dict[str, Any] | None:
    reader = Checkpoint(folder, model)
    reader.prepare()
    found = reader.read()
    if found is not None:
        reader.restore()
    reader.close()
    return found


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_everything_comes_back(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    def make() -> keras.Model:
        return subclassed() if kind == "subclassed" else build(config).with_work().model

    trained, fresh = make(), make()
    step(trained)
    step(trained)
    commit(tmp_path, trained, state(1))
    expected = everything(trained)
    fresh.optimizer.build(fresh.trainable_variables)
    assert everything(fresh) != expected
    assert restore(tmp_path, fresh) == state(1)
    assert everything(fresh) == expected
    # The next step is the same too: random generators and the optimizer's moments are back.
    step(trained)
    step(fresh)
    assert everything(fresh) == everything(trained)


def test_keras_opens_the_commit(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config).model
    step(model)
    commit(tmp_path, model, state(1))
    loaded = keras.models.load_model(tmp_path / "model.h5")
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_snapshot_is_not_changed_by_what_comes_after(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = build(config).model
    step(model)
    writer = Checkpoint(tmp_path, model)
    writer.prepare()
    taken, expected = writer.snapshot(state(1)), everything(model)
    step(model)
    assert everything(model) != expected
    writer.commit(taken)
    writer.close()
    restore(tmp_path, model)
    assert everything(model) == expected


def test_a_snapshot_of_an_embedding_is_not_changed_either(tmp_path: Path) -> None:
    """Its rows are updated in place, one by one."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Embedding(50, 3)])
    model.compile("adam", "mse")
    words, targets = np.array([[1, 2], [3, 1]]), np.ones((2, 2, 3))
    model.train_on_batch(words, targets)
    writer = Checkpoint(tmp_path, model)
    writer.prepare()
    for _ in range(3):
        expected = everything(model)
        taken = writer.snapshot(state(1))
        model.train_on_batch(words, targets)
        assert everything(model) != expected
        writer.commit(taken)
        writer.wait()
        restore(tmp_path, model)
        assert everything(model) == expected
        model.train_on_batch(words, targets)
    writer.close()


def test_two_commits_of_one_state_are_equal_and_the_model_is_untouched(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = build(config).model
    step(model)
    before = everything(model)
    commit(tmp_path, model, state(1))
    commit(tmp_path, model, state(1))
    files = [tmp_path / name for name in ("model.h5", "model_previous.h5")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert everything(model) == before
    model.save(tmp_path / "after.keras")
    again = keras.models.load_model(tmp_path / "after.keras")
    assert type(again.optimizer) is type(model.optimizer)


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_commit_is_set_aside(
    damage: str, config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(config).model
    step(model)
    commit(tmp_path, model, state(1))
    good = everything(model)
    step(model)
    commit(tmp_path, model, state(2))
    path = tmp_path / "model.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flipped": bytes(content), "cut": bytes(content[:5000]), "emptied": b""}
    path.write_bytes(damaged[damage])
    restored = restore(tmp_path, model)
    assert restored is not None
    assert restored["epoch"] == 1
    assert everything(model) == good
    assert "model.h5" in caplog.text
    assert (tmp_path / "model.h5.damaged").exists()
    assert results.load_position(tmp_path)["epoch"] == 1


def test_nothing_good_left_is_an_error_not_a_new_start(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = build(config).model
    commit(tmp_path, model, state(1))
    (tmp_path / "model.h5").write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoint.DamagedCheckpointError, match="no checkpoint in"):
        restore(tmp_path, model)


def test_the_commit_of_another_model_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    commit(tmp_path, build(config).model, state(1))
    with pytest.raises(ValueError, match="another model"):
        restore(tmp_path, build(config | {"n_layers": 2}).model)
    with pytest.raises(ValueError, match="another model"):
        restore(tmp_path, build(config | {"n_filters": 5}).model)


def test_views_that_were_lost_or_edited_come_back(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config).model
    commit(tmp_path, model, state(2))
    before = {name: (tmp_path / name).read_bytes() for name in ("history.csv", "loop_state.pkl")}
    (tmp_path / "history.csv").write_text("epoch,loss\n0,99\n")
    (tmp_path / "loop_state.pkl").unlink()
    restore(tmp_path, model)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_failed_commit_leaves_the_one_before(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(config).model
    commit(tmp_path, model, state(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        commit(tmp_path, model, state(2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loop_state_holds_plain_values_and_is_never_executed(
    config: dict[str, Any], tmp_path: Path
) -> None:
    commit(tmp_path, build(config).model, state(1))
    assert pickle.loads((tmp_path / "loop_state.pkl").read_bytes())["global_step"] == 3

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "loop_state.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(pickle.UnpicklingError, match="plain values"):
        results.load_position(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_what_a_harmed_best_commit_was_is_made_anew_or_named(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(config).model
    commit(tmp_path, model, state(1), is_best=True)
    best = (tmp_path / "model_best.h5").read_bytes()
    step(model)
    commit(tmp_path, model, state(2))
    (tmp_path / "model_best.h5").unlink()
    restore(tmp_path, model)
    assert (tmp_path / "model_best.h5").read_bytes() == best
    assert "made again from model_previous.h5" in caplog.text
    step(model)
    commit(tmp_path, model, state(3))
    (tmp_path / "model_best.h5").write_bytes(best[:-9])
    restore(tmp_path, model)
    assert not (tmp_path / "model_best.h5").exists()
    assert "is corrupt and cannot be made again: the weights of epoch 1" in caplog.text


@pytest.mark.parametrize("loss", ["mse", "MAE", "kld"])
def test_a_loss_by_its_short_name_is_read_back_by_keras(loss: str, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("adam", loss, metrics=["mae"])
    model.train_on_batch(np.ones((4, 3)), np.full((4, 2), 0.5))
    commit(tmp_path, model, state(1))
    loaded = keras.models.load_model(tmp_path / "model.h5")
    ones = np.ones((4, 3), np.float32)
    assert loaded.evaluate(ones, np.full((4, 2), 0.5), verbose=0) == pytest.approx(
        model.evaluate(ones, np.full((4, 2), 0.5), verbose=0)
    )


def test_arrays_in_a_state_come_back_as_arrays(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config).model
    values = state(1) | {"callbacks": {"0 X": {"best": np.float32(0.1), "kept": [np.arange(3)]}}}
    commit(tmp_path, model, values)
    restored = restore(tmp_path, model)
    assert restored is not None
    found = restored["callbacks"]["0 X"]
    assert type(found["best"]) is np.float32 and found["best"] == np.float32(0.1)
    assert found["kept"][0].tolist() == [0, 1, 2]
    assert found["kept"][0].dtype == np.arange(3).dtype
    assert results.load_position(tmp_path)["epoch"] == 1


def test_a_long_history_with_gaps_comes_back(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config).model
    rows: list[dict[str, Any]] = [
        {"epoch": epoch, "loss": 1 / (epoch + 1)} | ({"val": float("nan")} if epoch % 2 else {})
        for epoch in range(600)
    ]
    commit(tmp_path, model, state(1) | {"history": rows})
    restored = restore(tmp_path, model)
    assert restored is not None
    assert repr(restored["history"]) == repr(rows)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,val" and lines[1] == "1,1.0," and lines[2] == "2,0.5,nan"
    assert len(lines) == 601


@pytest.mark.parametrize(
    ("state", "num_epochs", "num_steps", "done"),
    [
        ({"epoch": 2, "global_step": 20}, 2, None, True),
        ({"epoch": 2, "global_step": 20}, 3, None, False),
        ({"epoch": 2, "global_step": 20}, None, None, False),  # the config does not say
        ({"epoch": 2, "global_step": 20, "stop_reason": "patience"}, 3, None, True),
        ({"epoch": 2, "global_step": 20}, 2, 25, False),
        ({"epoch": 2, "global_step": 25, "step": 5, "is_cut": True}, 9, 25, True),
        ({"epoch": 2, "global_step": 25, "step": 5}, 9, 25, False),  # the epoch has yet to be ended
    ],
)
def test_one_rule_says_whether_a_run_is_done(
    state: dict[str, Any], num_epochs: int | None, num_steps: int | None, done: bool
) -> None:
    state = {"step": 0, "is_cut": False, "stop_reason": None} | state
    assert is_done(state, num_epochs, num_steps) is done
