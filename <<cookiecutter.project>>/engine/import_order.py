"""Imports triton before TensorFlow, wherever both are installed: in the other order PyTorch dies.

TensorFlow 2.20 and newer load their LLVM for the whole process to see. A later `import triton`,
which PyTorch's first optimizer does, binds to it, and dies (tensorflow/tensorflow#124205).
"""

import contextlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class TritonFirst(MetaPathFinder):
    """Finds no module itself; imports triton when TensorFlow is looked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Return None: the finders after this one go on."""
        # It takes a tenth of a second. If it is broken, those who use it will say so.
        if name == "tensorflow":
            with contextlib.suppress(Exception):
                import triton  # noqa: F401


if "tensorflow" not in sys.modules:
    sys.meta_path.insert(0, TritonFirst())
