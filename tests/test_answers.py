"""Answers are data, whatever is in them; those of which no project can be made are refused."""

from __future__ import annotations

import html
import json
import tomllib
from pathlib import Path

import pytest
from conftest import TEMPLATE_FOLDER, Baker, files_below
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parent.parent / TEMPLATE_FOLDER

HOSTILE = [
    "\"double\" and 'single' quotes",
    "a backslash \\ two \\\\ and a last one \\",
    '""" and \'\'\' and \\""" and "',
    "<< 7*7 >> <% if %> <# {{ 7*7 }} {% raw %} ${{ x }}",
    "<< cookiecutter.update({'project': '../x'}) >>",
    "__import__('os').system('touch pwned')",
    "$(touch pwned) `touch pwned` ; touch pwned",
    "<script>alert(1)</script> & &amp; [a](b) *c* _d_ # e | f ~g~",
    "emoji 🎉 👩‍🔬, Größe, 数据, שלום עולם, \u200fمرحبا",  # noqa: RUF001
    "#% if true",
    "- key: value # comment",
    "2. a second point",
    "\\u0041 \\x41 \\n %s {0}",
    "line one\nline two\r\n\tline three\u2028line four",
]


def prose_of(project: Path) -> str:
    """Return README.md as HTML."""
    return MarkdownIt().render((project / "README.md").read_text())


@pytest.mark.parametrize(
    "text", [*HOSTILE[:4], *(pytest.param(text, marks=pytest.mark.slow) for text in HOSTILE[4:])]
)
def test_any_text_is_data(bake: Baker, tmp_path: Path, text: str) -> None:
    expected = " ".join(text.split())
    if "\n" in text:  # cannot be typed, but arrives this way
        baked = bake(project="hostile", description=text, author=text)
    else:
        baked = bake(typed=f"hostile\n{text}\n{text}\n\n\n\n\n\n\n")
    project = baked.project
    assert project.name == "hostile"

    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert settings["description"] == expected
    assert settings["authors"] == [{"name": expected}]
    citation = YAML(typ="safe").load((project / "CITATION.cff").read_text())
    assert citation["abstract"] == expected
    assert citation["authors"] == [{"name": expected}]
    assert f"Copyright (c) {expected}\n" in (project / "LICENSE").read_text()
    prose = prose_of(project)
    assert expected in html.unescape(prose)
    assert "<script>" not in prose

    assert list(tmp_path.rglob("pwned")) == []
    assert (project / ".git").is_dir(), "the first commit was made"
    assert set(files_below(project)) == set(files_below(bake().project))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["<< 7*7 >> <% if %> <# a < b", "#% if <true>", "1 < 2 # %"])
def test_what_was_typed_survives_another_rendering(
    bake: Baker, environment: dict[str, str], text: str
) -> None:
    # cruft renders saved answers anew with each update.
    first = bake(typed=f"again\n{text}\n{text}\n\n\n\n\n\n\n").project
    saved = next(Path(environment["HOME"], ".cookiecutter_replay").glob("*.json"))
    answers = json.loads(saved.read_text())["cookiecutter"]
    kept = {name: str(value) for name, value in answers.items() if not name.startswith("_")}
    assert files_below(bake(**kept).project) == files_below(first)


@pytest.mark.parametrize(
    ("name", "folder", "distribution"),
    [
        ("my-research", "my-research", "my-research"),
        ("My Great Project!", "My-Great-Project", "my-great-project"),
        ("  A   b\tc ", "A-b-c", "a-b-c"),
        ("snake_case_2", "snake_case_2", "snake-case-2"),
        ("v1.2", "v1.2", "v1-2"),
        ("-_.x._-", "x", "x"),
        ("--help", "help", "help"),
        ("Étude des réseaux", "Etude-des-reseaux", "etude-des-reseaux"),
        ("数据", "Shu-Ju", "shu-ju"),
        ("a'''b\"\"\"c", "a-b-c", "a-b-c"),
        ("x" * 64, "x" * 64, "x" * 64),
        ("$(touch pwned)", "touch-pwned", "touch-pwned"),
    ],
)
def test_folder_and_package_are_named_after_the_project(
    bake: Baker, name: str, folder: str, distribution: str
) -> None:
    project = bake(project=name).project
    assert project.name == folder
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert settings["name"] == distribution


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"project": ""}, "The project's name is empty: choose one such as my-research."),
        ({"project": " \n "}, "The project's name is empty"),
        ({"project": "../x"}, "The project's name '../x' is a path: choose"),
        ({"project": "/tmp/x"}, "is a path"),
        ({"project": "a/b"}, "is a path"),
        ({"project": "a\\b"}, "is a path"),
        ({"project": ".."}, "is a path"),
        ({"project": "!!!"}, "The project's name '!!!' has no letter to name a folder after"),
        ({"project": "2024"}, "has no letter"),
        ({"project": "🎉"}, "has no letter"),
        ({"project": "<script>/"}, "is a path"),
        ({"project": "x" * 65}, "has 65 characters: choose at most 64"),
        ({"project": "x" * 5000}, "has 5000 characters"),
        (
            {"project": "Keras"},
            "is that of a package which it needs: choose another, such as keras",
        ),
        ({"project": "src"}, "is that of a folder inside it: choose another, such as src-research"),
        ({"project": "a\x07b"}, "The project's name holds the character '\\x07': leave it out"),
        ({"description": "a\x1b[31mb"}, "The description holds the character '\\x1b'"),
        ({"author": "a\x7fb"}, "The author holds the character '\\x7f'"),
        ({"author": "a\udcffb"}, "The author holds the character '\\udcff'"),
        ({"email": "nobody"}, "'nobody' is not of the form name@example.org: choose one"),
        ({"email": 'a"@example.org'}, "is not of the form name@example.org"),
        ({"email": "a@b c"}, "is not of the form name@example.org"),
        # cookiecutter's own check; the hook has one for answers that come from a file.
        ({"license": "nonsense"}, "nonsense"),
        ({"python_version": "nonsense"}, "nonsense"),
        ({"accelerator": "nonsense"}, "nonsense"),
        ({"git_init": "nonsense"}, "nonsense"),
    ],
)
def test_refusals(bake: Baker, answers: dict[str, str], sentence: str) -> None:
    baked = bake(fails=True, **answers)
    assert sentence in baked.said
    assert list(baked.output.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(bake: Baker) -> None:
    baked = bake()
    (baked.project / "LICENSE").write_text("mine")
    before = files_below(baked.project)
    again = bake(options=("--output-dir", str(baked.output)), fails=True)
    assert "already exists" in again.said
    assert files_below(baked.project) == before


def test_no_project_can_have_the_name_of_a_dependency(bake: Baker) -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    wanted = settings["project"]["dependencies"] + settings["dependency-groups"]["dev"]
    names = {Requirement(line).name for line in wanted}
    hook = (PROJECT.parent / "hooks" / "pre_gen_project.py").read_text()
    for name in names:
        assert f'"{name.replace(".", "-")}"' in hook
    folders = {path.name for path in PROJECT.iterdir() if path.is_dir() and path.name[0] != "."}
    for folder in folders - {"__pycache__"}:
        assert f'"{folder}"' in hook
