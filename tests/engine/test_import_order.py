"""triton, where it is installed, is imported before TensorFlow; how quickly that is imported."""

from pathlib import Path

import pytest
from machinery import Command

TRITON = "import sys; print('after' if 'tensorflow' in sys.modules else 'before')"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-c", "import engine.libraries"), "before"),
        pytest.param(("-c", "import src, keras"), "before", marks=pytest.mark.slow),
        (("-m", "bin.train", "digits", "--no_such_flag"), ""),
        (("-m", "bin.runs", "list", "nowhere"), ""),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else value,
)
def test_triton_comes_first(
    words: tuple[str, ...], said: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "triton.py").write_text(TRITON)
    done = command(*words, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.strip() == said, done.stderr


def test_no_garbage_is_looked_for_while_tensorflow_is_imported(command: Command) -> None:
    program = (
        "import gc\n"
        "from engine.training import fingerprint\n"
        "before = gc.get_stats()[2]\n"
        "fingerprint.apply({'threads': 1, 'deterministic': False})\n"
        "print(gc.get_stats()[2] == before, gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    )
    done = command("-c", program)
    assert done.stdout.split() == ["True"] * 3, done
