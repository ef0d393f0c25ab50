"""Write the exact requirements again, of the generated project and of the template itself.

Run by `make lock`. The project's file is a template, because the two accelerators need different
wheels of TensorFlow, and a project without some rooms needs less: each is resolved in a project
generated for it, by that project's own `make lock`, and lines that not all have are put under a
condition.
"""

import re
import subprocess
import tempfile
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "<<cookiecutter.project>>"


def lock_project(folder: str, **answers: str) -> list[str]:
    """Return the lines of requirements.txt of a project generated in `folder` with answers."""
    name = "-".join([*answers.values(), "project"])
    words = [f"{key}={value}" for key, value in answers.items()]
    command = ["cookiecutter", str(ROOT), "--no-input", "--default-config", "-o", folder]
    command += [f"project={name}", "git_init=false", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["make", "lock"], check=True, cwd=Path(folder, name))
    return Path(folder, name, "requirements.txt").read_text().splitlines()


def merge(cpu: list[str], cuda: list[str], core: list[str]) -> str:
    """Return a template of the lists of requirements, in alphabetical order of the packages.

    `core` is that of a project for the processor without the rooms that can be left out.
    """

    def order(line: str) -> tuple[bool, str, str]:
        return (not line.startswith("#"), re.split("[= ]", line)[0], line)

    def condition(line: str) -> str:
        if line not in cuda:
            return "accelerator == 'cpu'"
        if line not in cpu:
            return "accelerator == 'cuda'"
        return "" if line in core else "rooms == 'all'"

    text = ""
    for asked, group in groupby(sorted({*cpu, *cuda}, key=order), condition):
        same = "".join(f"{line}\n" for line in group)
        text += f"#% if cookiecutter.{asked}\n{same}#% endif\n" if asked else same
    return text


def main() -> None:
    """Write both files."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, cuda = [lock_project(folder, accelerator=each) for each in ("cpu", "cuda")]
        core = lock_project(folder, rooms="core")
        (TEMPLATE / "requirements.txt").write_text(merge(cpu, cuda, core))

        # The tests run generated projects as well, with the same versions.
        options = "--quiet --universal --python-version 3.11 --no-header --no-annotate"
        options += " --no-emit-index-url --no-emit-find-links"
        requirements = Path(folder) / "cpu-project" / "requirements.txt"
        command = ["uv", "pip", "compile", *options.split(), "pyproject.toml", str(requirements)]
        own = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    heading = "# Exact versions for Python 3.11 to 3.13 on Linux and macOS, written by make lock.\n"
    (ROOT / "requirements.txt").write_text(heading + own)


if __name__ == "__main__":
    main()
