"""Trackers by name: what they get, that they count on through all stages, and what is refused when they cannot be had."""

from __future__ import annotations

import json
import sqlite3
import sys
import types
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.pipeline.helpers import recipe, stage

import tunesmith
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.rundir import read_events
from tunesmith.train import trackers

TWO_STAGES = [stage("one"), stage("two", start_from="one")]


def tracked(tmp_path, tiny, name, **more):
    return recipe(tmp_path, tiny, stages=TWO_STAGES, tracking={"report_to": [name], "project": "shop"} | more)


def test_tensorboard_files_read_back_as_the_runs_own_numbers(tiny, tmp_path):
    run = tunesmith.train(tracked(tmp_path, tiny, "tensorboard"), out=tmp_path / "run").path
    events = [event for event in read_events(run) if "loss" in event]
    reader = EventAccumulator(str(run / "tensorboard" / "shop"))
    reader.Reload()
    for name, before in (("one", 0), ("two", 3)):
        logged = [(scalar.step, scalar.value) for scalar in reader.Scalars(f"{name}/loss")]
        own = [(before + event["step"], pytest.approx(event["loss"], rel=1e-5)) for event in events if event["stage"] == name]
        assert logged == own
        assert [scalar.step for scalar in reader.Scalars(f"{name}/eval_loss")] == [before + 3]
    assert len(reader.Scalars("one/learning_rate")) == 3


def test_trackio_gets_the_runs_own_numbers_and_leaves_standard_output_alone(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # its folder is read where it is imported, which another test may have done
    pytest.importorskip("trackio", reason="trackio is an extra")
    run = tunesmith.train(tracked(tmp_path, tiny, "trackio"), out=tmp_path / "run").path
    with sqlite3.connect(tmp_path / "trackio" / "shop.db") as base:
        rows = [(step, json.loads(metrics)) for step, metrics in base.execute("select step, metrics from metrics order by id")]
    losses = [(step, values.get("one/loss", values.get("two/loss"))) for step, values in rows if {"one/loss", "two/loss"} & values.keys()]
    assert losses == list(enumerate((event["loss"] for event in read_events(run) if "loss" in event), start=1))
    assert capsys.readouterr().out == ""


def test_wandb_without_a_network_writes_its_offline_run_into_the_run_directory(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tunesmith.train(tracked(tmp_path, tiny, "wandb"), out=tmp_path / "run").path
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"two/loss" in file.read_bytes()
    assert capsys.readouterr().out == ""


class FakeWandb(types.ModuleType):
    """What accelerate's tracker calls of wandb, so that what it gets can be looked at: it takes no step that is behind the last."""

    def __init__(self):
        super().__init__("wandb")
        self.logged, self.settings, self.finished = [], {}, 0
        self.config = SimpleNamespace(update=lambda values, **how: self.settings.update(values))

    def init(self, **given):
        self.given = given
        return self

    def log(self, values, step=None, **how):
        if not self.logged or step >= self.logged[-1][0]:
            self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: True)
    return fake


def test_wandb_gets_every_stages_numbers_at_steps_that_only_grow(tiny, fake_wandb, tmp_path):
    run = tunesmith.train(tracked(tmp_path, tiny, "wandb"), out=tmp_path / "run").path
    logged = fake_wandb.logged
    losses = [(step, values.get("one/loss", values.get("two/loss"))) for step, values in logged if {"one/loss", "two/loss"} & values.keys()]
    assert losses == list(enumerate((event["loss"] for event in read_events(run) if "loss" in event), start=1))
    assert fake_wandb.given == {"project": "shop", "name": "small", "dir": str(run)}
    assert fake_wandb.settings["seed"] == 0
    assert fake_wandb.settings["model.dtype"] == "float32"
    assert fake_wandb.finished == 1


def test_a_tracker_is_closed_when_the_run_fails(tiny, fake_wandb, tmp_path):
    def report(event):
        if event.get("step") == 2:
            raise TunesmithError("enough")

    with pytest.raises(TunesmithError, match="enough"):
        tunesmith.train(tracked(tmp_path, tiny, "wandb"), out=tmp_path / "run", report=report)
    assert fake_wandb.finished == 1


def test_a_tracker_that_fails_on_the_way_is_named_once_and_the_training_goes_on(tiny, fake_wandb, tmp_path):
    asked = []

    def log(values, step=None, **how):
        asked.append(step)
        raise ConnectionError("the server is gone")

    def finish():
        raise ConnectionError("still gone")

    fake_wandb.log, fake_wandb.finish = log, finish
    with pytest.warns(UserWarning, match="the tracker wandb") as warned:
        run = tunesmith.train(tracked(tmp_path, tiny, "wandb"), out=tmp_path / "run").path
    told = [str(warning.message) for warning in warned if "the tracker" in str(warning.message)]
    assert told == [
        "the tracker wandb failed and gets no more numbers: the server is gone",
        "the tracker wandb could not be closed: still gone",
    ]
    assert len(asked) == 1
    assert (run / "stages" / "two" / "model").is_dir()


def test_a_tracker_that_does_not_start_is_a_named_error(tiny, fake_wandb, tmp_path):
    def init(**given):
        raise PermissionError("no key")

    fake_wandb.init = init
    with pytest.raises(TunesmithError, match="the tracker wandb did not start: no key"):
        tunesmith.train(tracked(tmp_path, tiny, "wandb"), out=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_model_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(f"accelerate.utils.is_{name}_available", lambda: False)
    with pytest.raises(RecipeError, match=f"the tracker {name} is not installed") as caught:
        tunesmith.train(tracked(tmp_path, tmp_path / "no-model", name), out=tmp_path / "run")
    assert caught.value.mend == f"pip install {name}"
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_by_the_recipe(tiny, tmp_path):
    with pytest.raises(RecipeError, match="comet"):
        tunesmith.train(tracked(tmp_path, tiny, "comet"), out=tmp_path / "run")


def test_only_numbers_go_to_trackers():
    assert [trackers._is_number(value) for value in (1, 1.5, True, "1", None)] == [True, True, False, False, False]
