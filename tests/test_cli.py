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

from tests.cli_tools import CONTROL, call, environment, row, write_project, write_rows
from tests.fresh import in_new_process
from tunesmith.cli import app
from tunesmith.recipe import load_recipe

VERBS = [["run"], ["train"], ["evaluate"], ["plan"], ["chat"], ["export"], ["init"], ["launch"], ["report"], ["schema"], ["data", "check"]]


@pytest.fixture(scope="module")
def project(tiny_folder, tmp_path_factory):
    """A folder with a recipe, and the finished run of `tunesmith run RECIPE --json --gate` in a process of its own."""
    folder = tmp_path_factory.mktemp("project")
    recipe = write_project(folder, tiny_folder)
    code = "import os, sys\nos.chdir(sys.argv.pop())\nfrom tunesmith.cli import main\nmain()"
    return folder, recipe, in_new_process(code, "run", recipe, "--json", "--gate", folder)


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
    gated = call("evaluate", recipe, "--out", tmp_path / "run", "--set", "evaluate.candidates=[zero_shot, tuned]", "--set", gate, "--gate")
    assert gated.status == 5, "two updates of a random model beat nothing"
    assert gated.out.startswith("verdict: FAIL\n")


def test_evaluate_refuses_a_folder_that_holds_no_trained_run_and_creates_nothing(project, tmp_path):
    _, recipe, _ = project
    done = call("evaluate", recipe, "--out", tmp_path / "none")
    assert (done.status, done.out) == (2, "")
    assert "train it first: tunesmith train" in done.err
    assert str(tmp_path / "none") in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["data.test=null", "evaluate.gates=[]"], ["evaluate.gates states no gate", "there is no data.test"]),
        (["data.test=null"], ["NOT MEASURED, neither PASS nor FAIL: there is no data.test"]),
        (["evaluate.gates=[]"], ["NOT MEASURED, neither PASS nor FAIL: evaluate.gates states no gate"]),
        (["evaluate.candidates=[zero_shot, tuned]"], ["NOT MEASURED, neither PASS nor FAIL: few_shot is not in evaluate.candidates"]),
        (
            ["evaluate.gates=[{metric: perplexity, task: general, better_than: zero_shot}, {metric: exact_match, better_than: few_shot}]"],
            ["the verdict cannot be PASS: evaluate.general names no file"],
        ),
        (["evaluate.confidence=0.99"], ["6 items are too few to show anything at 99%"]),
        ([], []),
    ],
)
def test_the_plan_says_what_stands_in_the_way_of_a_verdict(project, sets, words):
    _, recipe, _ = project
    flags = [word for value in sets for word in ("--set", value)]
    warned = json.loads(call("plan", recipe, *flags, "--json").out)["warnings"]
    assert len(warned) == len(words)
    for warning, word in zip(warned, words, strict=True):
        assert word in warning
    assert re.findall(r"^warning: (.*)$", call("plan", recipe, *flags).out, re.MULTILINE) == warned


@pytest.mark.parametrize("sets", [["data.test=null", "evaluate.gates=[]"], ["evaluate.confidence=0.99"], []])
def test_a_run_says_beforehand_what_the_plan_says_and_a_verdict_is_missing_where_that_was_said(project, sets, tmp_path):
    _, recipe, _ = project
    flags = [word for value in sets for word in ("--set", value)]
    warned = json.loads(call("plan", recipe, *flags, "--json").out)["warnings"]
    done = call("run", recipe, *flags, "--out", tmp_path / "run")
    assert re.findall(r"^warning: (.*)$", done.err.partition("train sft …")[0], re.MULTILINE) == warned
    assert json.loads(call("run", recipe, *flags, "--out", tmp_path / "run", "--resume", "--json").out)["warnings"] == warned
    assert done.out.startswith("verdict: NOT MEASURED\n") == any("neither PASS nor FAIL" in warning for warning in warned)


def test_plan_and_run_say_how_many_rows_are_quarantined_and_where_they_are_listed(project, tmp_path):
    _, recipe, _ = project
    rows = write_rows(tmp_path / "some.jsonl", [*map(row, range(24)), '{"messages": 3}', "{"])
    words = [recipe, "--set", f"data.train={rows}", "--out", tmp_path / "run"]
    file = tmp_path / "run" / "data" / "quarantine.jsonl"
    assert f"note: 2 rows are quarantined and not used, listed by a run in {file}; first: {rows}:25: " in call("run", *words).err
    assert len(file.read_text().splitlines()) == 2
    planned = f"note: 2 rows are quarantined and not used, listed by a run in runs/tiny/data/quarantine.jsonl; first: {rows}:25: "
    assert planned in call("plan", *words[:3]).out


def test_a_test_label_that_no_training_row_has_is_said_beforehand(project, tmp_path):
    _, recipe, _ = project
    odd = [row(number) for number in range(100, 106)]
    odd[2]["messages"][1]["content"] = "complaint"
    done = call("plan", recipe, "--set", f"data.test={write_rows(tmp_path / 'odd.jsonl', odd)}")
    assert "warning: 1 of 6 test items have a label that no training row has ('complaint'): wrong for every candidate" in done.out


def test_a_run_that_recommends_nothing_says_so_in_words(project, tmp_path):
    _, recipe, _ = project
    done = call("run", recipe, "--set", "data.test=null", "--out", tmp_path / "run")
    assert "None" not in done.out
    assert "\nno recommendation: no candidate has exact_match on a test set.\n" in done.out


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


def test_the_plan_of_several_processes_says_that_its_memory_is_each_ones(project):
    _, recipe, _ = project
    done = call("plan", recipe, "--set", "launch.nproc_per_node=2")
    assert re.search(r"^plan: about .*, .* GB of memory in each of 2 processes, bound by ", done.out, re.MULTILINE)


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
    told = " ".join(call("chat", "--help").out.split())
    assert "It is one conversation: each question is asked with all before it and their answers. A line /reset begins a new one." in told
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


def test_report_refuses_a_folder_that_is_no_run_and_writes_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    done = call("report", tmp_path)
    assert (done.status, done.out) == (2, "")
    assert f"{tmp_path}: this is no run directory" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert call("--version") == (0, f"tunesmith {version('tunesmith')}\n", "")
    for module in ("tunesmith", "tunesmith.cli"):
        named = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert named.stdout == f"tunesmith {version('tunesmith')}\n"


@pytest.mark.parametrize("wanted, given", [(None, "passive"), ("active", "active")])
def test_threads_that_wait_for_each_other_sleep_from_before_torch_is_read(wanted, given):
    said = "import os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    code = f"from tunesmith import cli\ndef verb(): {said}\ncli.app = verb\ncli.main()"
    around = {name: value for name, value in environment().items() if name != "OMP_WAIT_POLICY"}
    around |= {"OMP_WAIT_POLICY": wanted} if wanted else {}
    done = subprocess.run([sys.executable, "-c", code], env=around, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [given, "False"]


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
    again = call("init", folder / "train.jsonl", "--out", tmp_path / "new", "--force")
    assert again.status == 0
    assert again.out.startswith("It holds ")  # as its second line says
    named = call("init", folder / "train.jsonl", "--out", tmp_path / "new" / "mine.yaml")
    assert named.status == 2
    assert f"mend: --out {tmp_path / 'new'}\n" in named.err
    assert not (tmp_path / "new" / "mine.yaml").exists()


@pytest.mark.parametrize("words", [["fly"], ["run"], ["run", "a.yaml", "--fast"], ["chat", "x", "--temperature", "-1"]])
def test_a_usage_error_exits_2(words):
    done = call(*words)
    assert done.status == 2
    assert "Usage: " in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_training_exits_130(number, monkeypatch, tmp_path):
    import tunesmith.inspection

    def stopped(*_, **__):
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

    def broken(*_, **__):
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

    def noisy(*_, **__):
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
