"""Each verb of the command line does what its help says, for people, for pipes and for machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest

from tests.cli_tools import call, environment, row, write_project, write_rows
from tunesmith.cli import app
from tunesmith.recipe import load_recipe

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
VERBS = [["run"], ["train"], ["evaluate"], ["plan"], ["chat"], ["init"], ["report"], ["schema"], ["data", "check"]]


@pytest.fixture(scope="module")
def project(tiny_folder, tmp_path_factory):
    """A folder with a recipe, and the finished run of `tunesmith run RECIPE --json --gate` in a process of its own."""
    folder = tmp_path_factory.mktemp("project")
    recipe = write_project(folder, tiny_folder)
    command = [sys.executable, "-m", "tunesmith.cli", "run", str(recipe), "--json", "--gate"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    return folder, recipe, done


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_the_help_of_every_verb_has_an_example(verb):
    done = call(*verb, "--help")
    assert done.status == 0
    assert f"Example: tunesmith {' '.join(verb)} " in done.out


def test_every_verb_is_in_the_list_above():
    def names(group):
        return {[*prefix, command.name or command.callback.__name__.replace("_", " ")][-1] for prefix, command in group}

    commands = names([([], command) for command in app.registered_commands])
    groups = {group.name: names([([], command) for command in group.typer_instance.registered_commands]) for group in app.registered_groups}
    assert [[*sorted(commands)], groups] == [sorted(verb[0] for verb in VERBS if len(verb) == 1), {"data": {"check"}}]


def test_json_is_one_object_on_standard_output_and_lines_on_standard_error(project):
    folder, _, done = project
    result = json.loads(done.stdout)
    assert result["path"] == str(folder / "runs" / "tiny")
    assert result["verdict"] == result["evaluation"]["verdict"]
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["step"] for event in events if "loss" in event] == [1, 2]
    assert {"plan", "phase", "evaluating", "stage_finished"} <= {event.get("event") for event in events}


def test_a_gate_that_is_not_passed_exits_5_after_the_result_is_printed(project):
    _, _, done = project
    assert json.loads(done.stdout)["verdict"] == "FAIL", "two updates of a random model beat nothing"
    last = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, last["event"], last["exit_status"]) == (5, "error", 5)


def test_warnings_of_libraries_do_not_reach_the_user(project):
    _, _, done = project
    assert "Warning" not in done.stderr
    assert '"event": "log"' not in done.stderr


def test_a_piped_run_prints_plain_lines(project, tmp_path):
    _, recipe, _ = project
    done = call("run", recipe, "--out", tmp_path / "run", "--set", "stages.0.method=full")
    assert done.status == 0
    assert not CONTROL.search(done.out + done.err)
    assert re.search(r"^sft step 2/2  loss \d+\.\d+  lr \S+  \S+ tok/s  \S+ GB$", done.err, re.MULTILINE)
    assert re.search(r"^rows: 24 in = 22 trained \+ 2 held out \+ dropped: none; .* trained on$", done.err, re.MULTILINE)
    assert done.out.startswith("verdict: FAIL\n  FAIL: ")
    assert f"\nrun: {tmp_path / 'run'}\nreport: {tmp_path / 'run' / 'report.html'}\n" in done.out


def test_resume_on_an_empty_directory_starts_and_a_run_without_it_is_refused(project, tmp_path):
    _, recipe, _ = project
    (tmp_path / "run").mkdir()
    assert call("train", recipe, "--out", tmp_path / "run", "--resume").status == 0
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    refused = call("train", recipe, "--out", tmp_path / "run")
    assert refused.status == 2
    assert str(tmp_path / "run") in refused.err
    assert "--resume" in refused.err
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_evaluate_judges_what_train_left(project, tmp_path):
    _, recipe, _ = project
    assert call("train", recipe, "--out", tmp_path / "run", "--set", "evaluate.candidates=[zero_shot, tuned]").status == 0
    assert not (tmp_path / "run" / "evaluation.json").exists()
    gate = "evaluate.gates=[{metric: exact_match, better_than: zero_shot}]"
    done = call("evaluate", recipe, "--out", tmp_path / "run", "--set", "evaluate.candidates=[zero_shot, tuned]", "--set", gate, "--json")
    assert done.status == 0
    candidates = json.loads(done.out)["evaluation"]["tasks"]["task"]["candidates"]
    assert list(candidates) == ["zero_shot", "tuned"]


def test_plan_says_what_would_happen_and_leaves_nothing(project, monkeypatch):
    folder, recipe, _ = project
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = call("plan", recipe, "--set", "name=other")
    assert done.status == 0
    assert sorted(folder.rglob("*")) == before
    assert not CONTROL.search(done.out)
    assert "⟦defect[<|im_end|>]⟧" in done.out, "the mask can be read without colours"
    assert "name: other" in done.out
    assert re.search(r"^plan: about .*, .* GB of memory, bound by ", done.out, re.MULTILINE)


def test_plan_in_json_gives_the_example_with_its_mask(project):
    _, recipe, _ = project
    plan = json.loads(call("plan", recipe, "--json").out)
    example = plan["example"]
    assert [example["text"][start:end] for start, end in example["supervised"]] == ["defect[<|im_end|>]"]
    assert plan["ledger"]["rows_in"] == 24
    assert plan["plan"]["peak_memory_bytes"] > 0


def test_chat_answers_each_line_of_a_pipe(project):
    folder, _, _ = project
    done = call("chat", folder / "runs" / "tiny", "--max-new-tokens", 3, stdin="hello\n\n/reset\nhello\nagain\n")
    assert done.status == 0
    lines = done.out.splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1], "after /reset the conversation begins anew"
    as_json = call("chat", folder / "runs" / "tiny", "--max-new-tokens", 3, "--json", stdin="hello\n")
    assert json.loads(as_json.out) == {"user": "hello", "assistant": lines[0]}


def test_chat_with_a_folder_that_is_no_run_exits_2(tmp_path):
    done = call("chat", tmp_path)
    assert done.status == 2
    assert str(tmp_path) in done.err


def test_report_writes_the_page_again(project):
    folder, _, _ = project
    page = folder / "runs" / "tiny" / "report.html"
    before = page.read_bytes()
    page.unlink()
    done = call("report", folder / "runs" / "tiny")
    assert (done.status, done.out) == (0, f"{page}\n")
    assert page.read_bytes() == before
    assert call("report", folder / "nowhere").status == 2


def test_schema_prints_the_schema():
    from tunesmith.recipe import json_schema

    assert json.loads(call("schema").out) == json_schema()


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(project, tmp_path):
    folder, _, _ = project
    done = call("init", folder / "train.jsonl", "--out", tmp_path / "new", "--json")
    assert done.status == 0
    (path,) = json.loads(done.out)["written"]
    recipe = load_recipe(path)
    assert recipe.data.train == str((folder / "train.jsonl").resolve())
    assert recipe.data.test == str((folder / "test.jsonl").resolve())
    assert recipe.task.labels == "auto"
    refused = call("init", folder / "train.jsonl", "--out", tmp_path / "new")
    assert refused.status == 2
    assert "--force" in refused.err
    assert call("init", folder / "train.jsonl", "--out", tmp_path / "new", "--force").status == 0


def test_data_check_tells_what_is_wrong_with_a_file(tmp_path):
    rows = [*map(row, range(10)), row(0), '{"messages": 3}']
    train, test = write_rows(tmp_path / "train.jsonl", rows), write_rows(tmp_path / "test.jsonl", [row(1), row(50)])
    done = call("data", "check", train, "--test", test)
    assert done.status == 0
    assert f"{train}:12: " in done.out
    assert "dropped, duplicate: 1" in done.out
    result = json.loads(call("data", "check", train, "--test", test, "--json").out)
    assert result["rows_in"] == 12
    assert [bad["line"] for bad in result["rejected"]] == [12]
    assert "test_overlap" in {finding["check"] for finding in result["findings"]}


def test_what_data_hold_cannot_steer_the_terminal(tmp_path):
    rows = [*map(row, range(10)), '{"messages": "\\u001b[2J\\u0007"}', '{"\x1b]0;title\x07": 1}']
    done = call("data", "check", write_rows(tmp_path / "train.jsonl", rows))
    assert not CONTROL.search(done.out + done.err)


@pytest.mark.parametrize("words", [["fly"], ["run"], ["run", "a.yaml", "--fast"], ["chat", "x", "--temperature", "-1"]])
def test_a_usage_error_exits_2(words):
    done = call(*words)
    assert done.status == 2
    assert "Usage: " in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_training_exits_130(number, monkeypatch, tmp_path):
    import tunesmith.inspection

    def stopped(*_):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(tunesmith.inspection, "check_data_file", stopped)
    before = signal.getsignal(number)
    done = call("data", "check", tmp_path)
    assert done.status == 130
    assert done.err.startswith(f"error: stopped by {number.name}")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_nobody_foresaw_is_one_message_with_status_1_and_on_demand_a_traceback(flags, monkeypatch, tmp_path):
    import tunesmith.inspection

    def broken(*_):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(tunesmith.inspection, "check_data_file", broken)
    done = call("data", "check", tmp_path, *flags)
    assert (done.status, done.out) == (1, "")
    if flags:
        (line,) = map(json.loads, done.err.splitlines())
        assert (line["event"], line["kind"], line["exit_status"]) == ("error", "ZeroDivisionError", 1)
        assert "TUNESMITH_TRACEBACK=1" in line["mend"]
    else:
        assert done.err == (
            "error: ZeroDivisionError: by nothing\n  mend: this is a bug; run with TUNESMITH_TRACEBACK=1 for the traceback\n"
        )
    monkeypatch.setenv("TUNESMITH_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        call("data", "check", tmp_path, *flags)


def test_json_holds_warnings_log_lines_and_errors_as_lines_too(monkeypatch, tmp_path):
    import logging

    import tunesmith.inspection
    from tunesmith.errors import DataRefused

    def noisy(*_):
        warnings.warn("watch out", UserWarning, stacklevel=1)
        logging.getLogger("transformers.some").warning("look %s", "here")
        raise DataRefused("bad", where="there", mend="so")

    monkeypatch.setattr(tunesmith.inspection, "check_data_file", noisy)
    done = call("data", "check", tmp_path, "--json")
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert (done.status, done.out) == (3, "")
    assert [line["event"] for line in lines] == ["warning", "log", "error"]
    assert [lines[0]["text"], lines[1]["text"]] == ["watch out", "look here"]
    assert lines[2] == {"event": "error", "kind": "DataRefused", "what": "bad", "where": "there", "mend": "so", "exit_status": 3}
