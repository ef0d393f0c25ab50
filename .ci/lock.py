"""Write the exact requirements anew, of the generated project and of the template itself.

Run by `make lock`. The project's file is a template, for the two accelerators need different
wheels of TensorFlow: each is resolved in a project generated for it, by that project's own
`make lock`, and lines that only one of them has are put under a condition.
"""

import re
import subprocess
import tempfile
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "<<cookiecutter.project>>"


def lock_project(accelerator: str, folder: str) -> list[str]:
    """Return the lines of requirements.txt of a project generated for `accelerator` in `folder`."""
    answers = [f"project={accelerator}-project", f"accelerator={accelerator}", "git_init=false"]
    command = ["cookiecutter", str(ROOT), "--no-input", "--default-config", "-o", folder, *answers]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    project = Path(folder) / f"{accelerator}-project"
    subprocess.run(["make", "lock"], check=True, cwd=project)
    return (project / "requirements.txt").read_text().splitlines()


def merge(cpu: list[str], cuda: list[str]) -> str:
    """Return a template of both lists of requirements, in alphabetical order of the packages."""

    def order(line: str) -> tuple[bool, str, str]:
        return (not line.startswith("#"), re.split("[= ]", line)[0], line)

    text = ""
    lines = sorted({*cpu, *cuda}, key=order)
    for (in_cpu, in_cuda), group in groupby(lines, lambda line: (line in cpu, line in cuda)):
        same = "".join(f"{line}\n" for line in group)
        if in_cpu and in_cuda:
            text += same
        else:
            accelerator = "cpu" if in_cpu else "cuda"
            text += f"#% if cookiecutter.accelerator == '{accelerator}'\n{same}#% endif\n"
    return text


def main() -> None:
    """Write both files."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, cuda = lock_project("cpu", folder), lock_project("cuda", folder)
        (TEMPLATE / "requirements.txt").write_text(merge(cpu, cuda))

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
