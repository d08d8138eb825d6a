"""The documentation says what is there: settings, links, verbs, options, names and tests that it mentions exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import typer.main

import tunesmith
from tunesmith.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "llms.txt", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```[^\n]*\n(.*?)^```|`([^`\n]+)`", re.DOTALL | re.MULTILINE)
VERB = re.compile(r"(?:^|[\s/])tunesmith ((?:[a-z]+)(?: [a-z]+)?)(?![:\w])([^#\n]*)", re.MULTILINE)
NAME = re.compile(r"\btunesmith\.([A-Za-z_]\w*)(?!\w*\.\w*json)")
TEST = re.compile(r"tests/[\w/]+\.py|\btest(?:_[a-z0-9]+){3,}\b(?!\.py)")
FILES_OF_OURS = {"json"}  # tunesmith.json lies beside a result's weights


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> str:
    return "\n".join(block or inline for block, inline in CODE.findall(path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """The ids of a page's headings, as the site makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages_to_look_at():
    names = {page_id(path) for path in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "llms.txt", "docs/index.md", "docs/recipe.md", "docs/trust.md"} <= names


def test_the_page_of_settings_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_reference.py"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_link_leads_somewhere(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.is_file(), link
        if path.parent.name == "docs":
            assert target.resolve().is_relative_to(ROOT / "docs"), f"{link} leaves the site"
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_verb_and_option_that_is_named_exists(path):
    verbs = typer.main.get_command(app).commands
    for words, rest in VERB.findall(code(path)):
        first, *more = words.split()
        assert first in verbs, f"tunesmith {words}"
        command = verbs[first]
        if hasattr(command, "commands"):
            assert more, f"tunesmith {words}: which one?"
            assert more[0] in command.commands, f"tunesmith {words}"
            command = command.commands[more[0]]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in options, f"tunesmith {words} has no {option}"


def test_every_verb_is_named():
    words = code(ROOT / "docs" / "index.md")
    for name, command in typer.main.get_command(app).commands.items():
        for verb in [f"{name} {inner}" for inner in getattr(command, "commands", {})] or [name]:
            assert f"tunesmith {verb}" in words


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_python_name_that_is_named_exists(path):
    for name in NAME.findall(code(path)):
        module = ROOT / "src" / "tunesmith" / name
        assert name in FILES_OF_OURS or name in tunesmith.__all__ or module.with_suffix(".py").is_file() or module.is_dir(), (
            f"tunesmith.{name}"
        )


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_test_that_is_named_exists(path):
    where = None
    for named in TEST.findall(path.read_text(encoding="utf-8")):
        if named.endswith(".py"):
            where = ROOT / named
            assert where.is_file(), named
        else:
            assert where, f"{named}: of which file?"
            names = {node.name for node in ast.walk(ast.parse(where.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}
            assert named in names, f"{where.relative_to(ROOT)} has no {named}"


def test_every_part_of_the_code_is_on_the_map():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "src" / "tunesmith").iterdir()):
        if not path.name.startswith("_"):
            assert f"      {path.name}{'/' if path.is_dir() else ''} " in readme, path.name
    assert "src/tunesmith/train/loop.py" in readme
