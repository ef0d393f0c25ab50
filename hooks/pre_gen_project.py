"""Refuse answers of which no working project could be made, before anything is written."""

from __future__ import annotations

import json
import re
import sys

# The answers arrive as JSON in a raw string. The filter escapes every quote and backslash in them
# and all that is not ASCII, so that no answer can end the string: whatever was typed is data.
ANSWERS = r"""<< cookiecutter | tojson >>"""

LICENSES = ("MIT", "BSD-3-Clause", "Apache-2.0", "proprietary")
PYTHON_VERSIONS = ("3.11", "3.12", "3.13")
ACCELERATORS = ("cpu", "cuda")
ROOMS = ("all", "core")
LONGEST_NAME = 64

# What the project needs, or has a folder for: a package of the same name would be in its way.
PACKAGES = (
    *("argcomplete", "argh", "google-crc32c", "h5py", "ipykernel", "keras", "matplotlib", "mypy"),
    "nbclient",
    *("numpy", "optuna", "pandas", "pre-commit", "pytest", "pytest-xdist", "ray", "ruamel-yaml"),
    *("ruff", "submitit", "tensorboard", "tensorflow", "tensorflow-cpu", "torch", "tqdm"),
)
FOLDERS = (
    "bin",
    "configs",
    "data",
    "docs",
    "engine",
    "etc",
    "notebooks",
    "results",
    "src",
    "tests",
    "vegab",
)

# All that TOML and YAML can hold in a quoted string (white space was made into blanks before).
UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
EMAIL = re.compile(r"""[^\s@<>()\[\],;:\\"']+@[^\s@<>()\[\],;:\\"']+""")


def refusal_of_name(name: str, folder: str, distribution: str) -> str | None:
    """Return why no project can have this name, or None. `folder` is what was made of it."""
    such_as = "choose one such as my-research."
    if not name:
        return f"The project's name is empty: {such_as}"
    if "/" in name or "\\" in name or not name.strip("."):
        return f"The project's name {name!r} is a path: {such_as}"
    if not re.search("[A-Za-z]", folder):
        return f"The project's name {name!r} has no letter to name a folder after: {such_as}"
    if len(name) > LONGEST_NAME:
        return f"The project's name has {len(name)} characters: choose at most {LONGEST_NAME}."
    if distribution in PACKAGES:
        return (
            f"The project's name {name!r} is that of a package which it needs: "
            f"choose another, such as {distribution}-research."
        )
    if distribution in FOLDERS:
        return (
            f"The project's name {name!r} is that of a folder inside it: "
            f"choose another, such as {distribution}-research."
        )
    return None


def refusal(answers: dict) -> str | None:
    """Return the first reason to refuse the answers as one sentence, or None if there is none."""
    texts = {
        "project's name": answers["__name"],
        "description": answers["__description"],
        "author": answers["__author"],
        "e-mail address": answers["__email"],
    }
    for question, text in texts.items():
        found = UNPRINTABLE.search(text)
        if found:
            return f"The {question} holds the character {found.group()!a}: leave it out."
    reason = refusal_of_name(answers["__name"], answers["__folder"], answers["__distribution"])
    if reason:
        return reason
    email = answers["__email"]
    if email and not EMAIL.fullmatch(email):
        return (
            f"The e-mail address {email!r} is not of the form name@example.org: "
            "choose one that is, or leave it empty."
        )
    choices = {
        "license": LICENSES,
        "python_version": PYTHON_VERSIONS,
        "accelerator": ACCELERATORS,
        "rooms": ROOMS,
        "git_init": (True, False),
    }
    for question, possible in choices.items():
        if answers[question] not in possible:
            listed = ", ".join(map(str, possible))
            return f"The answer to {question} is {answers[question]!r}: choose one of {listed}."
    return None


def main() -> None:
    """Exit with one sentence if the project cannot be generated."""
    if ANSWERS[:1] != "{":  # not rendered
        sys.exit("This template needs cookiecutter 2.6 or newer: pip install -U cookiecutter")
    reason = refusal(json.loads(ANSWERS))
    if reason:
        print(reason, file=sys.stderr)  # which writes what it cannot encode as \u...
        sys.exit(2)


if __name__ == "__main__":
    main()
