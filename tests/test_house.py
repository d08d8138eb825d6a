"""The house rules that a machine can check: the order of imports, the size of files, what code may not do, lint and format."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tunesmith"
FOLDERS = [name for name in ("src", "tests", "benchmarks") if (ROOT / name).is_dir()]
FILES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
SOURCES = [path for path in FILES if SOURCE in path.parents]
MAX_LINES = 400  # a longer file holds two ideas
MAX_FUNCTION_LINES = 70  # of its body
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {"torch.load", "torch.save", "os.system", "os.popen", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_KEYWORDS = {"shell", "allow_pickle"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unsafe(code: str) -> list[str]:
    """What a module does that it may not: code from files, a shell, failures that nobody hears of, checks that -O takes out."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append(f"{node.lineno}: from {node.module} import")
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(f"{node.lineno}: {ast.unparse(node.func)}()")
            for keyword in node.keywords:
                if keyword.arg in UNSAFE_KEYWORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                    found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{node.lineno}: bare except")
        elif isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import dump",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "subprocess.run(word, shell=True)",
        "np.load(path, allow_pickle=flag)",
        "eval('1')",
        "yaml.load(text, Loader)",
        "try:\n    f()\nexcept:\n    pass",
        "assert x",
    ],
)
def test_the_check_for_unsafe_code_finds_it(code):
    assert unsafe(code)


def test_the_check_for_unsafe_code_lets_the_rest_pass():
    assert (
        unsafe("model.eval()\nre.compile(x)\nnp.load(path, allow_pickle=False)\nyaml.safe_load(text)\nsafetensors.torch.load_file(p)") == []
    )


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_module_loads_code_from_data_or_hides_a_failure(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_file_is_short_and_opens_by_saying_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module opens with a docstring"


def test_every_function_is_short_and_every_public_one_is_documented():
    long, undocumented = [], []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        long += [f"{named(path)}:{f.lineno} {f.name}" for f in functions if f.end_lineno - f.body[0].lineno >= MAX_FUNCTION_LINES]
        if path.name.startswith("_"):
            continue
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]:
            public = [n for n in owner.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
            undocumented += [f"{named(path)}:{n.lineno} {n.name}" for n in public if not ast.get_docstring(n)]
    assert (long, undocumented) == ([], [])


def test_nothing_is_left_to_do_later():
    words = re.compile(r"\b(" + "TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    assert [f"{named(path)}: {word[0]}" for path in FILES for word in words.finditer(path.read_text(encoding="utf-8"))] == []


def test_only_the_command_line_and_its_display_print():
    printing = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing <= {"cli.py", "progress.py"}


def test_no_module_imports_from_a_stage_that_comes_after_it():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(words):
    command = [sys.executable, "-m", "ruff", words[0], "--no-cache", "--output-format=concise", *words[1:], *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
