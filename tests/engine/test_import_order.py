"""triton, where it is installed, is imported before TensorFlow, and not where neither is needed."""

from pathlib import Path

import pytest
from machinery import Command

TRITON = "import sys; print('after' if 'tensorflow' in sys.modules else 'before')"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-c", "import engine.sweeps.trial"), "before"),
        pytest.param(
            ("-c", "import engine.runs.resume_check, engine.hooks.base"),
            "before",
            marks=pytest.mark.slow,
        ),
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
