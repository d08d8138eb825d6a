"""Where answers come from in a whole stage: the policy itself, or a server that is given every version of its adapter and keeps none."""

from __future__ import annotations

import pytest
from tests.generate.stub_server import StubServer, serving
from tests.toys import loaded, make_prompts, make_stage, tiny_model, train_stage

from tunesmith.errors import RecipeError, RolloutFailed
from tunesmith.rundir import read_events
from tunesmith.train import samplers

PROMPTS, HELD_OUT = make_prompts(4), make_prompts(2, seed=1)
LORA = {"type": "lora", "r": 4}
REWARD = "def summed(prompts, completions, **columns):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"


@pytest.fixture
def rewards(tmp_path) -> list[dict]:
    """A reward that differs from text to text."""
    file = tmp_path / "rewards.py"
    file.write_text(REWARD)
    return [{"type": "python", "function": f"{file}:summed"}]


def run(tmp_path, objective, *, start=None, held_out=HELD_OUT, **settings):
    """A stage of three iterations; gives its events."""
    rollout = {"prompts_per_step": 2, "max_new_tokens": 5} | settings.pop("rollout", {})
    given = {"name": "learn", "method": LORA, "max_steps": 3, "eval_steps": 2, "warmup_steps": 0, "rollout": rollout, "rows": len(PROMPTS)}
    stage = make_stage(objective=objective, **given | settings)
    train_stage(loaded(tiny_model("llama")), stage, tmp_path / "run", PROMPTS, validation=held_out, start=start)
    return list(read_events(tmp_path / "run"))


def bodies(stub: StubServer, route: str) -> list[dict]:
    return [body for path, _, body in stub.requests if path == f"/v1/{route}"]


def test_a_stage_over_a_server_samples_each_iteration_from_its_own_adapter_and_leaves_none(tmp_path, rewards):
    with serving(StubServer()) as stub:
        objective = {"type": "grpo", "num_generations": 3, "rewards": rewards}
        events = run(tmp_path, objective, rollout={"server": stub.url, "server_model": "base"})
        assert stub.adapters == {}
    loads, unloads = ([body["lora_name"] for body in bodies(stub, f"{way}_lora_adapter")] for way in ("load", "unload"))
    assert len(set(loads)) == len(loads) == 5  # of three iterations and two evaluations
    assert unloads == loads
    assert all(" " not in name for name in loads)
    asked = [body["model"] for body in bodies(stub, "completions")]
    assert list(dict.fromkeys(asked)) == loads
    assert [asked.count(name) for name in loads] == [6, 6, 2, 6, 2]
    lines = [event for event in events if "mismatch" in event]
    assert len(lines) == 3
    assert all(event["mismatch"] < 1e-3 for event in lines), "the server sampled from another policy than the one that trains"
    assert not (tmp_path / "run" / "stages" / "learn" / "served").exists()
    assert [event["step"] for event in events if event.get("event") == "evaluated"] == [2, 3]


def test_a_stage_that_fails_leaves_no_adapter_on_the_server(tmp_path):
    with serving(StubServer()) as stub:
        objective = {"type": "grpo", "num_generations": 3, "rewards": [{"type": "regex", "pattern": "x"}]}
        with pytest.raises(RolloutFailed, match="sampler and trainer differ"):
            run(tmp_path, objective, rollout={"server": stub.url, "server_model": "base", "max_mismatch": 1e-12})
        assert stub.adapters == {}
        assert len(bodies(stub, "load_lora_adapter")) == 1
    assert not (tmp_path / "run" / "stages" / "learn" / "served").exists()


def test_what_a_killed_run_left_to_be_served_is_removed_before_anything_is_served(tmp_path, rewards):
    left, beside = tmp_path / "run" / "stages" / "learn" / "served" / "policy-0-1", []
    left.mkdir(parents=True)

    class Looking(StubServer):
        def _load(self, body):
            beside.extend(folder.name == body["lora_name"] for folder in left.parent.iterdir())
            return super()._load(body)

    with serving(Looking()) as stub:
        objective = {"type": "grpo", "num_generations": 3, "rewards": rewards}
        run(tmp_path, objective, rollout={"server": stub.url, "server_model": "base"}, held_out=None, max_steps=1)
    assert beside == [True]


def test_a_server_that_goes_away_is_named_and_does_not_hide_why_the_stage_ended(tmp_path, monkeypatch):
    stub = StubServer()
    with serving(stub):
        plain = samplers.ServerGenerator.generate

        def cut(self, *args, **settings):
            stub.failures = [(404, {}, "gone")] * 99
            return plain(self, *args, **settings)

        monkeypatch.setattr(samplers.ServerGenerator, "generate", cut)
        objective = {"type": "grpo", "num_generations": 3, "rewards": [{"type": "regex", "pattern": "x"}]}
        with pytest.raises(RolloutFailed) as raised:
            run(tmp_path, objective, rollout={"server": stub.url, "server_model": "base"})
    assert stub.url in raised.value.where
    assert "completions" in raised.value.where


def test_a_server_is_refused_where_there_is_no_adapter_to_give_it(tmp_path, rewards):
    objective = {"type": "grpo", "num_generations": 3, "rewards": rewards}
    with pytest.raises(RecipeError, match="this stage trains the whole model"):
        run(tmp_path, objective, method={"type": "full"}, rollout={"server": "http://127.0.0.1:9"})


@pytest.mark.parametrize("again", [False, True], ids=["from the base", "from an adapter"])
def test_best_of_n_with_dropout_in_its_adapter_starts_and_learns(tmp_path, rewards, again):
    objective, start = {"type": "best_of_n", "num_generations": 3, "rewards": rewards}, None
    method = LORA | {"lora_dropout": 0.5}
    if again:
        first = tmp_path / "first"
        first.mkdir()
        run(first, objective, method=method, held_out=None)
        start = first / "run" / "stages" / "learn" / "model"
    events = run(tmp_path, objective, method=method, start=start)
    lines = [event for event in events if "loss" in event]
    assert len(lines) == 3
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["kl"] != pytest.approx(0, abs=1e-4)
    assert all(line["mismatch"] < 1e-3 for line in lines)
