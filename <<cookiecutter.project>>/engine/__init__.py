"""The machinery: one room for each subject; see README.md."""

import ast
import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from vegab import UsageError


class BeforeImport(MetaPathFinder):
    """Finds no module, but is asked like every finder, and so can act before an import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Import triton before TensorFlow; raise UsageError for a room that was left out."""
        if name == "tensorflow":
            # TensorFlow loads its LLVM for the whole process to see. A later `import triton`, which
            # PyTorch's optimizers do, binds to it, and dies (tensorflow/tensorflow#124205).
            with contextlib.suppress(Exception):  # if it is broken, those who use it will say so
                import triton  # noqa: F401
        room = name.replace(".", "/")
        may_be_absent = room in ("engine/iterators", "engine/records", "engine/sweeps")
        if may_be_absent and not Path(__file__).parents[1].joinpath(room).is_dir():
            hint = f"copy {room} from a project generated with rooms=all"
            raise UsageError(f"this project was generated without {room}, which this needs; {hint}")


sys.meta_path.insert(0, BeforeImport())


def lazy(room: str, file: str) -> Callable[[str], Any]:
    """Return a `__getattr__` that imports a room's public names when they are asked for first; its
    `file`, the `__init__.py`, imports them for type checkers."""

    @functools.cache
    def homes() -> dict[str, str]:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return {alias.name: node.module for node in imports if node.module for alias in node.names}

    def get(name: str) -> Any:
        if name not in homes():
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        if homes()[name] == room:
            return importlib.import_module(f"{room}.{name}")
        return getattr(importlib.import_module(homes()[name]), name)

    # For whoever asks what is there: a message that says "did you mean".
    vars(sys.modules[room])["__dir__"] = lambda: sorted(homes())
    return get
