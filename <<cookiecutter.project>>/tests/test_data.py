"""Shapes, value ranges, splits, and that a batch is a function of seed, epoch and step only."""

from typing import Any

import numpy as np

from src.data import Dataset, flip, get_digits, shift


def images_of(digits: Dataset) -> tuple[list[bytes], list[bytes]]:
    """Return the images to train and to validate on."""
    batches = [digits.train.batch(0, step) for step in range(digits.train.steps_per_epoch)]
    train = [image.tobytes() for features, _ in batches for image in features]
    assert digits.valid is not None
    return train, [image.tobytes() for image in digits.valid[0]]


def test_digits_have_the_shapes_and_ranges_that_are_promised(config: dict[str, Any]) -> None:
    digits = get_digits(config)
    features, labels = digits.train.batch(epoch=0, step=0)
    assert features.shape == (32, 8, 8, 1)
    assert features.dtype == np.float32
    assert labels.shape == (32,)
    assert digits.valid is not None
    for features, labels in (digits.train.batch(0, 0), digits.valid, digits.load_test()):
        assert features.min() == 0
        assert features.max() == 1
        assert set(labels.tolist()) == set(range(10))


def test_no_test_or_validation_image_is_trained_on(config: dict[str, Any]) -> None:
    digits = get_digits(config | {"augmented": False})
    train, valid = images_of(digits)
    test = [image.tobytes() for image in digits.load_test()[0]]
    assert [len({*train}), len(valid), len(test)] == [1260, 180, 357]
    assert not {*train} & {*valid, *test}


def test_folds_validate_once_on_all_that_is_not_for_the_test(config: dict[str, Any]) -> None:
    folds = config | {"augmented": False, "num_folds": 5}
    validated = []
    for fold in range(5):
        digits = get_digits(folds | {"fold": fold})
        assert digits.valid is not None
        assert set(digits.valid[1].tolist()) == set(range(10))
        train, valid = images_of(digits)
        assert not {*train} & {*valid}
        assert len(train) + len(valid) == 1440
        validated += valid
    assert len(validated) == len({*validated}) == 1440
    assert not {*validated} & {image.tobytes() for image in get_digits(config).load_test()[0]}


def test_a_batch_is_the_same_whatever_was_asked_before(config: dict[str, Any]) -> None:
    straight, jumping = get_digits(config).train, get_digits(config).train
    for step in range(5):
        straight.batch(0, step)
    expected = straight.batch(1, 7)
    jumping.batch(9, 3)
    for one, other in zip(expected, jumping.batch(1, 7), strict=True):
        assert one.tobytes() == other.tobytes()
    other_seed = get_digits(config | {"seed": 1}).train.batch(1, 7)
    assert expected[0].tobytes() != other_seed[0].tobytes()


def test_shift_and_flip_do_what_they_say() -> None:
    image = np.zeros((1, 3, 3, 1), dtype=np.float32)
    image[0, 1, 1] = 1
    corner = shift(image, np.zeros((1, 4)), most=1)
    assert corner[0, 2, 2, 0] == 1
    assert corner.sum() == 1
    assert shift(image, np.full((1, 4), 0.5), most=1).tobytes() == image.tobytes()
    left = np.zeros((2, 1, 2, 1))
    left[:, 0, 0] = 1
    mirrored = flip(left, np.array([[0, 0, 0.1, 0], [0, 0, 0.9, 0]]))
    assert mirrored[:, 0, :, 0].tolist() == [[0, 1], [1, 0]]
