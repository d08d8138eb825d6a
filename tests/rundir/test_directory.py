"""The run directory: who may open it, what its log and its checkpoints promise, and that nothing leads out of it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tunesmith.errors import CheckpointError, OutputInUse, RecipeError, StorageFailed
from tunesmith.rundir import RunDirectory, read_events, write_text


def save(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        with run.checkpoint("sft", step) as folder:
            (folder / "w").write_bytes(bytes([step % 256]))


def steps(run: RunDirectory) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in run.checkpoints("sft")]


def damage(run: RunDirectory, step: int) -> None:
    (run.path / "stages" / "sft" / "checkpoints" / f"step-{step}" / "w").write_bytes(b"!")


@pytest.fixture
def run(tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        yield run


@pytest.mark.parametrize("resume", [False, True])
def test_a_missing_folder_is_made(resume, tmp_path):
    with RunDirectory.open(tmp_path / "deep" / "run", resume=resume) as run:
        assert run.path == tmp_path / "deep" / "run"
        assert run.path.is_dir()
        assert not run.resumed


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_is_taken(resume, tmp_path):
    with RunDirectory.open(tmp_path, resume=resume) as run:
        assert not run.resumed


def test_a_folder_in_which_nothing_was_written_yet_is_still_empty(tmp_path):
    RunDirectory.open(tmp_path, resume=False).close()
    with RunDirectory.open(tmp_path, resume=False) as run:
        assert not run.resumed


def test_a_path_relative_to_the_current_folder_stays_where_it_was_when_that_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunDirectory.open(Path("runs/x"), resume=False) as run:
        monkeypatch.chdir("/")
        run.log({"step": 1})
    assert (tmp_path / "runs" / "x" / "events.jsonl").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "manifest.json", "events.jsonl", "plan.json", "stages/sft/model/config.json"])
def test_a_run_is_refused_without_resume_and_taken_with_it(name, tmp_path):
    write_text(tmp_path / name, "")
    with pytest.raises(OutputInUse, match="holds a run already") as refused:
        RunDirectory.open(tmp_path, resume=False)
    assert refused.value.exit_status == 2
    assert "--resume" in refused.value.mend
    assert "--out" in refused.value.mend
    with RunDirectory.open(tmp_path, resume=True) as run:
        assert run.resumed


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_whose_run_ended_before_its_first_step_is_taken_as_new_and_keeps_no_log(resume, tmp_path):
    with RunDirectory.open(tmp_path, resume=False) as run:
        run.log({"event": "phase", "name": "data", "note": 'no "step" yet'})
        for name in ("data/ledger.json", "recipe.yaml", "manifest.json", "plan.json"):
            write_text(run.file(name), "")
    with RunDirectory.open(tmp_path, resume=resume) as run:
        assert not run.resumed
        assert run.events() == []
        assert run.file("data/ledger.json").exists()


@pytest.mark.parametrize("made", ["a step", "stages/sft/reference/key.json", "evaluation/unit.json", "notes.txt"])
def test_a_folder_with_a_step_in_its_log_or_with_more_than_a_preparation_leaves_holds_a_run(made, tmp_path):
    with RunDirectory.open(tmp_path, resume=False) as run:
        run.log({"stage": "sft", "step": 1} if made == "a step" else {"event": "phase"})
        if made != "a step":
            write_text(run.file(made), "")
    with pytest.raises(OutputInUse, match="holds a run already"):
        RunDirectory.open(tmp_path, resume=False)
    with RunDirectory.open(tmp_path, resume=True) as run:
        assert run.resumed
        assert len(run.events()) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_things_is_refused_and_not_touched(resume, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputInUse, match=r"thesis\.tex") as refused:
        RunDirectory.open(tmp_path, resume=resume)
    assert "--out" in refused.value.mend
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_refused_folder_can_be_opened_again_by_the_same_process(tmp_path):
    write_text(tmp_path / "recipe.yaml", "")
    with pytest.raises(OutputInUse):
        RunDirectory.open(tmp_path, resume=False)
    RunDirectory.open(tmp_path, resume=True).close()


@pytest.mark.parametrize("place", ["file", "file/run", "dangling"])
def test_a_path_that_is_no_folder_or_leads_through_a_file_is_refused(place, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputInUse, match="not a folder"):
        RunDirectory.open(tmp_path / place, resume=False)


def test_a_second_opening_is_refused_and_names_the_holder_even_without_resume(run):
    run.log({"step": 1})
    for resume in (True, False):
        with pytest.raises(OutputInUse, match=rf"another process \(pid {os.getpid()}\)"):
            RunDirectory.open(run.path, resume=resume)


def test_a_holder_on_another_host_is_named_with_its_host(run):
    (run.path / ".lock").write_text("7 elsewhere\n")
    with pytest.raises(OutputInUse, match="pid 7 on elsewhere"):
        RunDirectory.open(run.path, resume=True)


def test_a_dead_pid_in_the_note_of_a_held_lock_is_not_named(run):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    (run.path / ".lock").write_text(f"{pid} {socket.gethostname()}\n")
    with pytest.raises(OutputInUse, match="another process is writing"):
        RunDirectory.open(run.path, resume=True)


@pytest.mark.parametrize("note", ["", "1", "nonsense", "999999999 elsewhere\n", "\0\0\0"])
def test_a_lock_that_nobody_holds_stops_nobody_whatever_it_says(note, tmp_path):
    (tmp_path / ".lock").write_text(note)
    with RunDirectory.open(tmp_path, resume=False):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageFailed, match="symbolic links"):
        RunDirectory.open(tmp_path / "run", resume=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_closing_twice_is_closing_once(tmp_path):
    with RunDirectory.open(tmp_path, resume=False) as run:
        run.close()
    run.close()


@pytest.mark.parametrize("rel", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b", "..", "samples/../../../x"])
def test_a_path_that_leaves_the_run_directory_is_refused(rel, run):
    with pytest.raises(RecipeError, match="not a path inside"):
        run.file(rel)


@pytest.mark.parametrize("rel", ["link", "link/new", "link/deep/new", "loop/x", "file_link"])
def test_a_link_that_leads_out_of_the_run_directory_is_refused(rel, run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "secret").write_text("x")
    (run.path / "link").symlink_to(tmp_path / "outside")
    (run.path / "file_link").symlink_to(tmp_path / "secret")
    (run.path / "loop").symlink_to(run.path / "loop")
    with pytest.raises(RecipeError, match="link leads out"):
        run.file(rel)


def test_a_link_within_the_run_directory_and_a_link_to_it_are_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    with RunDirectory.open(tmp_path / "latest", resume=False) as run:
        (tmp_path / "real" / "a").mkdir()
        (tmp_path / "real" / "b").symlink_to("a")
        assert run.file("b/c") == tmp_path / "latest" / "b" / "c"


def test_nothing_is_written_through_links_at_the_places_of_the_runs_own_files(tmp_path):
    outside = tmp_path / "outside"
    (outside / "checkpoints").mkdir(parents=True)
    (outside / "log").write_text("mine\n")
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        (run.path / "events.jsonl").symlink_to(outside / "log")
        (run.path / "stages").mkdir()
        (run.path / "stages" / "sft").symlink_to(outside)
        for work in (
            lambda: run.log({"step": 1}),
            lambda: run.rewind("sft", 0),
            lambda: save(run, 1),
            lambda: run.checkpoints("sft"),
            lambda: run.prune_checkpoints("sft", keep=1, best=None),
        ):
            with pytest.raises(RecipeError, match="link leads out"):
                work()
    assert (outside / "log").read_text() == "mine\n"
    assert os.listdir(outside / "checkpoints") == []


@pytest.mark.parametrize("stage", ["../sft", "a/b", "", ".", "..", "a.b", "sft\n", "-x", "a b"])
def test_a_stage_name_that_is_no_name_is_refused(stage, run):
    for work in (lambda: run.checkpoints(stage), lambda: run.newest_valid_checkpoint(stage), lambda: run.checkpoint(stage, 1).__enter__()):
        with pytest.raises(RecipeError, match="not a stage's name"):
            work()


def test_an_event_is_one_line_with_its_time_first_and_can_be_read_while_the_run_goes_on(run):
    run.log({"stage": "sft", "step": 1, "loss": float("nan"), "text": "a\nb é"})
    line = (run.path / "events.jsonl").read_text()
    assert line.count("\n") == 1
    event = json.loads(line, parse_constant=pytest.fail)
    assert list(event) == ["time", "stage", "step", "loss", "text"]
    assert event["time"] > 1e9
    assert (event["loss"], event["text"]) == ("NaN", "a\nb é")
    assert read_events(run.path) == run.events() == [event]


def test_no_log_gives_no_events(run, tmp_path):
    assert run.events() == []
    assert read_events(tmp_path / "nothing") == []


@pytest.mark.parametrize("torn", [b'{"time": 1, "st', b"\0\0\0\0", b'{"step": 2', b"\xff\xfe", b"7", b"{\n", b"\0\0\n\n"])
def test_a_torn_last_line_is_left_out_and_gone_once_the_run_goes_on(torn, tmp_path):
    with RunDirectory.open(tmp_path, resume=False) as run:
        run.log({"step": 1})
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(torn)
    assert [event["step"] for event in read_events(tmp_path)] == [1]
    with RunDirectory.open(tmp_path, resume=True) as run:
        run.log({"step": 2})
        assert [event["step"] for event in run.events()] == [1, 2]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    write_text(tmp_path / "events.jsonl", '{"step": 1}')
    with RunDirectory.open(tmp_path, resume=True) as run:
        run.log({"step": 2})
        assert [event["step"] for event in run.events()] == [1, 2]


def test_a_damaged_line_that_is_not_the_last_is_named(tmp_path):
    write_text(tmp_path / "events.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError) as damaged:
        read_events(tmp_path)
    assert damaged.value.where == f"{tmp_path / 'events.jsonl'}:2"
    with pytest.raises(CheckpointError):
        RunDirectory.open(tmp_path, resume=True)


def test_rewinding_drops_the_stages_later_lines_and_no_others(run):
    for event in (
        {"stage": "sft", "step": 1, "loss": 3},
        {"stage": "sft", "step": 2, "loss": 2},
        {"stage": "dpo", "step": 3, "loss": 1},
        {"stage": "sft", "event": "started"},
        {"event": "plan", "step": 9},
        {"stage": "sft", "step": 3, "loss": 1},
    ):
        run.log(event)
    run.rewind("sft", 2)
    run.log({"stage": "sft", "step": 3, "loss": 0.5})
    events = [{key: value for key, value in event.items() if key != "time"} for event in run.events()]
    assert events == [
        {"stage": "sft", "step": 1, "loss": 3},
        {"stage": "sft", "step": 2, "loss": 2},
        {"stage": "dpo", "step": 3, "loss": 1},
        {"stage": "sft", "event": "started"},
        {"event": "plan", "step": 9},
        {"event": "resumed", "stage": "sft", "step": 2},
        {"stage": "sft", "step": 3, "loss": 0.5},
    ]


def test_rewinding_leaves_the_kept_lines_as_they_are_to_the_byte(run):
    write_text(run.path / "events.jsonl", '{"stage":"sft",  "step":1}\n')
    run.rewind("sft", 1)
    assert (run.path / "events.jsonl").read_text().startswith('{"stage":"sft",  "step":1}\n{"time"')


def test_checkpoints_are_ordered_by_the_number_of_their_step(run):
    assert run.checkpoints("sft") == []
    assert run.newest_valid_checkpoint("sft") == (None, [])
    save(run, 9, 100, 20)
    for other in ("step-", "step-007", "step-x", "best", "step-1.old", "step-²"):
        (run.path / "stages" / "sft" / "checkpoints" / other).mkdir()
    (run.path / "stages" / "sft" / "checkpoints" / "step-500").write_text("a file")
    (run.path / "stages" / "sft" / "checkpoints" / "step-600").symlink_to("step-100")
    assert steps(run) == [100, 20, 9]


def test_the_newest_valid_checkpoint_comes_with_the_reasons_against_the_newer_ones(run):
    save(run, 1, 2, 3)
    damage(run, 3)
    (run.checkpoints("sft")[1] / "w").unlink()
    newest, refused = run.newest_valid_checkpoint("sft")
    assert newest.name == "step-1"
    assert [(path.name, reason) for path, reason in refused] == [
        ("step-3", "the file w was altered: its sha256 is not the one recorded"),
        ("step-2", "the file w is missing"),
    ]


def test_a_checkpoint_damaged_after_it_was_read_is_found_by_the_next_process(run):
    save(run, 1)
    assert run.newest_valid_checkpoint("sft")[0] is not None
    damage(run, 1)
    run.close()
    with RunDirectory.open(run.path, resume=True) as again:
        assert again.newest_valid_checkpoint("sft")[0] is None


def test_a_checkpoint_written_again_is_verified_again(run):
    save(run, 1)
    assert run.newest_valid_checkpoint("sft")[0] is not None
    save(run, 1)
    damage(run, 1)
    assert run.newest_valid_checkpoint("sft")[0] is None


def test_pruning_keeps_the_newest_and_the_best(run):
    save(run, 1, 2, 3, 4, 5)
    run.prune_checkpoints("sft", keep=2, best=run.path / "stages" / "sft" / "checkpoints" / "step-2")
    assert steps(run) == [5, 4, 2]
    run.prune_checkpoints("sft", keep=2, best=None)
    assert steps(run) == [5, 4]


def test_pruning_counts_valid_checkpoints_only_and_never_removes_the_last_one(run):
    save(run, 1, 2, 3)
    damage(run, 3)
    run.prune_checkpoints("sft", keep=1, best=None)
    assert steps(run) == [2]
    damage(run, 2)
    run.close()
    with RunDirectory.open(run.path, resume=True) as again:
        again.prune_checkpoints("sft", keep=1, best=None)
        assert steps(again) == [2]


def test_pruning_to_nothing_is_refused(run):
    save(run, 1)
    with pytest.raises(ValueError, match="at least one"):
        run.prune_checkpoints("sft", keep=0, best=None)
    assert steps(run) == [1]


def test_a_step_below_zero_is_refused(run):
    with pytest.raises(ValueError, match="counts from 0"), run.checkpoint("sft", -1):
        pass
