"""Each kind of bad input ends in a quarantined row or in a named error: what is wrong, where, what to do, and the exit status."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_tools import call, environment, row, write_project, write_rows
from tests.faults.harness import FailingStorage, installed
from tunesmith.rundir import RunDirectory


@pytest.fixture
def recipe(tiny_folder, tmp_path, monkeypatch):
    """A project's recipe; its folder is the current one."""
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path, tiny_folder)


def refused(*words, status, tells) -> str:
    """Calls, checks the status and that the error says all of `tells` and how to mend it, on standard error, and no more than that."""
    done = call(*words)
    assert done.status == status, done.err
    assert done.out == ""
    start = done.err.index("error: ")
    message = done.err[start:]
    for word in tells:
        assert str(word) in message
    assert "\n  mend: " in message
    assert "Traceback" not in done.err
    return message


def nothing_is_left(folder: Path) -> bool:
    return not (folder / "runs").exists()


def test_a_missing_recipe_is_named(tmp_path):
    refused("run", tmp_path / "none.yaml", status=2, tells=[tmp_path / "none.yaml", "tunesmith init"])


@pytest.mark.parametrize("key", ["data.train", "data.test", "data.validation", "evaluate.general", "task.output_schema"])
def test_a_missing_data_file_is_named(recipe, key):
    extra = ["--set", "task.labels=null"] if key == "task.output_schema" else []
    refused("train", recipe, "--set", f"{key}=gone.jsonl", *extra, status=2, tells=[recipe.parent / "gone.jsonl"])
    assert nothing_is_left(recipe.parent)


def test_an_empty_file_is_refused(recipe):
    (recipe.parent / "train.jsonl").write_bytes(b"")
    refused("train", recipe, status=3, tells=[recipe.parent / "train.jsonl", "empty"])


def test_a_file_that_is_no_text_is_refused(recipe):
    (recipe.parent / "train.jsonl").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40)
    refused("train", recipe, status=3, tells=[recipe.parent / "train.jsonl"])


def test_a_row_of_10_mb_is_quarantined_and_the_rest_is_trained(recipe):
    huge = json.dumps({"messages": [{"role": "user", "content": "a" * 10_000_000}, {"role": "assistant", "content": "defect"}]})
    write_rows(recipe.parent / "train.jsonl", [*map(row, range(12)), huge, *map(row, range(12, 24))])
    assert call("train", recipe, "--out", "run").status == 0
    ledger = json.loads(Path("run/data/ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_dropped"]) == (25, {"quarantined": 1})
    assert ledger["rows_trained"] + ledger["rows_held_out"] == 24
    (bad,) = [json.loads(line) for line in Path("run/data/quarantine.jsonl").read_text().splitlines()]
    assert (bad["path"], bad["line"]) == (str(recipe.parent / "train.jsonl"), 13)
    assert bad["reason"]
    assert len(json.dumps(bad)) < 20_000, "the quarantine does not repeat ten megabytes"


def test_a_line_that_is_no_utf8_is_quarantined(recipe):
    data = (recipe.parent / "train.jsonl").read_bytes()
    (recipe.parent / "train.jsonl").write_bytes(data + '{"messages": "caf\xe9"}\n'.encode("latin-1"))
    assert call("train", recipe, "--out", "run").status == 0
    (bad,) = [json.loads(line) for line in Path("run/data/quarantine.jsonl").read_text().splitlines()]
    assert bad["line"] == 25


def test_a_file_in_latin_1_is_refused_with_the_way_to_utf8(recipe):
    for header in ("text,label", "t\xe9xt,label"):
        lines = [header, *(f"le caf\xe9 {number} est froid,d\xe9faut" for number in range(8))]
        Path("rows.csv").write_bytes("\n".join(lines).encode("latin-1"))
        for verb in (["data", "check"], ["init"]):
            refused(*verb, "rows.csv", status=3, tells=["rows.csv", "not UTF-8", "iconv -f WINDOWS-1252 -t UTF-8"])


def test_a_txt_file_is_refused_with_what_to_make_of_it(recipe):
    Path("book.txt").write_text("It was a dark and stormy night.\n")
    for verb in (["data", "check"], ["init"]):
        refused(*verb, "book.txt", status=3, tells=["the suffix .txt", '{"text": "..."}', ".jsonl"])


def test_a_csv_without_a_header_is_refused_with_what_to_put_above_it(recipe):
    Path("rows.csv").write_text("the lamp is broken,defect\nwhere is it,delivery\nit smells,defect\nthe cup is cracked,defect\n")
    refused("init", "rows.csv", status=3, tells=["rows.csv:1", "no header", "'the lamp is broken', 'defect'", "text,label"])
    refused("data", "check", "rows.csv", status=3, tells=["put a header above it, such as text,label"])
    assert not Path("rows.yaml").exists()


def test_an_unknown_key_is_refused_before_anything_heavy_is_imported(recipe):
    recipe.write_text(recipe.read_text().replace("learning_rate", "learning_rat"))
    code = "import sys\nfrom tunesmith.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(recipe)], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {recipe}:{line_of(recipe, 'learning_rat:')}: unknown key `stages.0.learning_rat`",
        "  mend: did you mean `learning_rate`?",
    ]
    assert not {"torch", "transformers", "numpy", "peft", "pyarrow", "sklearn"} & set(done.stdout.split())


def line_of(path: Path, word: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if word in line)


def test_a_wrong_type_is_refused(recipe):
    refused(
        "run", recipe, "--set", "stages.0.learning_rate=fast", status=2, tells=["--set stages.0.learning_rate", "valid number", '"fast"']
    )
    refused("plan", recipe, "--set", "seed=1.5", status=2, tells=["--set seed", "valid integer"])


def test_a_wrong_value_is_told_in_words_of_ours(recipe):
    for word, tells in {
        "seed=1.5": "`seed` must be a valid integer (got 1.5)",
        "model=tiny": "`model` must be a valid dictionary, with settings written as `key: value`",
        "stages=[]": "`stages` must not be empty",
        "stages.0.gradient_checkpointing=1": "`stages.0.gradient_checkpointing` must be true or false",
        "data.format=mesages": "did you mean `messages`?",
        "evaluate.gates=[{metric: perplexity}]": "`evaluate.gates.0`: give exactly one of",
        "data.validation=2": "`data.validation` must be less than 1",
    }.items():
        message = refused("run", recipe, "--set", word, status=2, tells=[tells])
        for raw in ("nput should", "alue error", "instance of", "extract fields", "after validation"):
            assert raw not in message


@pytest.mark.parametrize(("offline", "tells"), [("1", "unset HF_HUB_OFFLINE once"), ("", "check the name and the network")])
def test_a_hub_model_that_cannot_be_fetched_says_what_to_name_in_its_place(recipe, offline, tells, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def nothing(*_, **__):
        raise LocalEntryNotFoundError("cannot be found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    refused("plan", recipe, "--set", "model.name=foo/bar", status=2, tells=["model.name: foo/bar", tells, ".gguf", "smollm2-135m-instruct"])


def test_a_model_folder_without_a_tokenizer_is_refused(recipe, tiny_folder):
    bare = recipe.parent / "bare"
    shutil.copytree(tiny_folder, bare)
    for path in bare.glob("*token*"):
        path.unlink()
    refused("train", recipe, "--set", "model.name=./bare", status=2, tells=[bare, "tokenizer"])


@pytest.mark.parametrize("name", ["./nowhere", "nosuchmodel", "/no/such/folder", "gone.gguf"])
def test_a_model_that_is_not_there_is_refused(recipe, name):
    refused("train", recipe, "--set", f"model.name={name}", status=2, tells=[name.removeprefix("./")])


def test_a_template_that_raises_is_refused(recipe, tiny_folder):
    broken = recipe.parent / "broken"
    shutil.copytree(tiny_folder, broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('only for wizards') }}")
    refused("train", recipe, "--set", "model.name=./broken", status=2, tells=["only for wizards"])


def test_a_target_module_that_matches_nothing_is_refused_with_the_nearest_name(recipe):
    message = refused(
        "train", recipe, "--set", "stages.0.method.target_modules=[q_proj, k_porj]", status=2, tells=["k_porj", "target_modules"]
    )
    assert "nearest names: " in message
    assert "k_proj" in message


def test_a_test_set_that_holds_training_rows_is_refused_and_on_demand_the_rows_are_dropped(recipe):
    write_rows(recipe.parent / "test.jsonl", [row(3), *map(row, range(100, 106))])
    refused(
        "train", recipe, "--out", "refused", status=3, tells=["1 of 24 training rows are also test rows", "train.jsonl:4", "test_overlap"]
    )
    assert not Path("refused/data/ledger.json").exists(), "a refused run's rows went nowhere"
    checks = [found["check"] for found in json.loads(Path("refused/data/health.json").read_text())["findings"]]
    assert checks[-1] == "test_overlap", "a refusal leaves what it is about"
    assert call("train", recipe, "--out", "dropped", "--set", "data.test_overlap=drop").status == 0
    assert json.loads(Path("dropped/data/ledger.json").read_text())["rows_dropped"] == {"test_overlap": 1}


@pytest.mark.parametrize("content", ["thesis.docx", "other/thesis.docx"])
def test_an_output_folder_that_holds_something_else_is_refused_and_not_touched(recipe, content):
    (recipe.parent / "mine" / content).parent.mkdir(parents=True)
    (recipe.parent / "mine" / content).write_text("years of work")
    for flag in ([], ["--resume"]):
        refused("train", recipe, "--out", "mine", *flag, status=2, tells=[recipe.parent / "mine", "--out"])
    assert [path.name for path in (recipe.parent / "mine").rglob("*") if path.is_file()] == ["thesis.docx"]


def test_a_second_process_on_the_same_folder_is_refused(recipe):
    with RunDirectory.open(recipe.parent / "run", resume=False):
        for flag in ([], ["--resume"]):
            refused("train", recipe, "--out", "run", *flag, status=2, tells=[recipe.parent / "run"])
        assert f"(pid {os.getpid()})" in refused("train", recipe, "--out", "run", "--resume", status=2, tells=["is writing"])
        code = "import sys\nfrom tunesmith.cli import main\ntry:\n    main()\n"
        code += "finally:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))"
        words = [sys.executable, "-c", code, "train", str(recipe), "--out", "run", "--resume"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stdout) == (2, "[]\n")
        assert f"(pid {os.getpid()}) is writing" in done.stderr


def test_a_full_disk_is_named_with_status_1_and_the_run_can_go_on(recipe):
    double = FailingStorage(errno.ENOSPC, operation="write", at_call=15)
    with installed(double):
        message = refused("train", recipe, "--out", "run", status=1, tells=[recipe.parent / "run"])
    assert double.at_call <= 0, "the fault was met"
    assert "space" in message
    assert call("train", recipe, "--out", "run", "--resume").status == 0


def test_a_folder_that_cannot_be_made_is_named_with_status_1(recipe):
    with installed(FailingStorage(errno.EROFS, operation="mkdir")):
        refused("train", recipe, "--out", "run", status=1, tells=[recipe.parent / "run", "Read-only"])


def test_init_on_a_file_that_is_not_there_or_no_data_is_refused(recipe):
    refused("init", "gone.csv", status=2, tells=["gone.csv"])
    (recipe.parent / "empty.csv").touch()
    refused("init", "empty.csv", status=3, tells=["empty.csv"])
    refused("data", "check", "gone.csv", status=2, tells=["gone.csv"])
