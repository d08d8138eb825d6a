"""The public API: names are loaded when first used, and each does what the verb of its name does."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tunesmith
from tests.cli_tools import environment, row, write_project, write_rows
from tunesmith.errors import GateFailed, OutputInUse, RecipeError, TunesmithError
from tunesmith.recipe import Recipe
from tunesmith.recipe._base import Section, sections_of

ROOT = Path(__file__).parents[1]
METRIC = {"value", "low", "high", "n"}
READ: set[tuple[str, str]] = set()
ONLY_SOMETIMES = {  # settings that a run need not read, and when it does
    ("DataSection", "too_long"): "a row is over the limit",
    ("DataSection", "test_overlap"): "a test row is also a training row",
    ("Stage", "num_train_epochs"): "max_steps is not given",
    ("TrackingSection", "project"): "a tracker is named",
    ("ModelSection", "revision"): "the model is not a folder",
    ("FullMethod", "type"): "never: the class says it",
    ("RolloutSection", "server_model"): "a server is named",
    ("UnitTestReward", "type"): "never: the class says it",
    ("UnitTestReward", "column"): "tests run in bubblewrap: tests/score",
    ("UnitTestReward", "seconds"): "tests run in bubblewrap: tests/score",
    ("UnitTestReward", "weight"): "tests run in bubblewrap: tests/score",
    ("ModelReward", "type"): "never: the class says it",
    ("LoraMethod", "type"): "never: the class says it",
    ("LaunchSection", "strategy"): "several processes run: tests/distributed",
    ("LaunchSection", "accelerator"): "a cluster's file is printed: tests/distributed",
    ("LaunchSection", "hours"): "a cluster's file is printed: tests/distributed",
    ("BottleneckMethod", "non_linearity"): "never by its name: PEFT's config takes it as it is",
}


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """(the result of `tunesmith.run` with a dict, the events it reported)."""
    folder = tmp_path_factory.mktemp("api")
    path = write_project(folder, tiny_folder)
    recipe = yaml.safe_load(path.read_text())
    write_rows(folder / "general.jsonl", map(row, range(200, 206)))
    recipe["data"] = {key: str(folder / name) for key, name in recipe["data"].items()}
    recipe["evaluate"] |= {"general": str(folder / "general.jsonl"), "candidates": ["zero_shot", "few_shot", "classical", "tuned"]}
    recipe["evaluate"]["gates"].append({"task": "general", "metric": "perplexity", "not_worse_than": "zero_shot", "margin": 0.05})
    events = []
    with recorded_reads() as reads:
        result = tunesmith.run(recipe, sets=["seed=3"], out=folder / "run", report=events.append)
    READ.update(reads)
    return result, events


@contextlib.contextmanager
def recorded_reads():
    """The (section, setting) pairs that code outside recipe/ and pydantic reads meanwhile."""
    reads = set()

    def get(self, name):
        if name in type(self).__pydantic_fields__:
            reader = sys._getframe(1).f_code.co_filename
            if "recipe" not in Path(reader).parent.name and "pydantic" not in reader:
                reads.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    Section.__getattribute__ = get
    try:
        yield reads
    finally:
        del Section.__getattribute__


def read(result, name):
    return json.loads((result.path / name).read_text(encoding="utf-8"))


def test_importing_tunesmith_imports_neither_torch_nor_transformers():
    code = "import sys, tunesmith; tunesmith.load_recipe; tunesmith.TunesmithError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300, check=True)
    assert not {"torch", "transformers", "numpy", "peft", "typer", "rich"} & set(done.stdout.split())


def test_every_public_name_is_there_and_known_to_type_checkers():
    tree = ast.parse((ROOT / "src" / "tunesmith" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    known = {alias.name for node in checked.body for alias in node.names}
    assert known == set(tunesmith.__all__)
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name).__doc__, name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="tunesmith has no retrain"):
        tunesmith.retrain  # noqa: B018


def test_every_verb_of_the_command_line_is_a_function_of_the_api():
    homes = {"chat": "Chat", "report": "write_report", "schema": "json_schema", "check": "check_data_file"}
    for verb in ("run", "train", "evaluate", "plan", "chat", "init", "report", "schema", "check"):
        assert callable(getattr(tunesmith, homes.get(verb, verb)))


def test_verbs_stay_verbs_when_the_subpackages_of_the_same_names_are_imported():
    import tunesmith.evaluate.run
    import tunesmith.train.loop

    assert callable(tunesmith.train)
    assert callable(tunesmith.evaluate)


def test_a_run_gives_what_its_directory_holds(finished):
    result, events = finished
    assert isinstance(result, tunesmith.RunResult)
    assert result.evaluation == read(result, "evaluation.json")
    assert result.verdict == result.evaluation["verdict"]
    assert result.ledger == read(result, "data/ledger.json")
    assert result.plan == read(result, "plan.json")
    assert result.report == result.path / "report.html"
    assert [event["step"] for event in events if "loss" in event] == [1, 2]


@pytest.fixture(scope="module")
def learned(tiny_folder, tmp_path_factory):
    """One step of a stage of every objective, with every reward but tests in a sandbox; what was read of the recipe is kept."""
    folder = tmp_path_factory.mktemp("objectives")
    pairs = [{"prompt": f"word {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "sft.jsonl", map(row, range(12)))
    write_rows(
        folder / "ratings.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": f"say {i}", "answer": "a"} for i in range(12)])
    (folder / "schema.json").write_text(json.dumps({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}))
    (folder / "rewards.py").write_text(
        "def letters(prompts, completions, **columns):\n    return [float(len(set(c))) for c in completions]\n"
        "def checks(prompt, answer):\n    return {'long': float(len(answer) > 3)}\n"
    )
    letters = {"type": "python", "function": str(folder / "rewards.py:letters")}
    rewards = [
        letters,
        {"type": "regex", "pattern": "a"},
        {"type": "exact_answer"},
        {"type": "json_schema", "output_schema": str(folder / "schema.json")},
        {"type": "model", "model": "reward"},
    ]
    by_rows = {
        "pairs": ["reward", "dpo", "simpo", "orpo", "cpo", "ranking"],
        "ratings": ["kto"],
        "prompts": ["ppo", "grpo", "rloo", "online_dpo", "best_of_n"],
    }
    kinds = {"ppo": {"reward_model": "reward", "target_kl": 6.0}, "grpo": {"rewards": rewards, "kl_coef": 0.1}, "dpo": {"loss": "ipo"}}
    stages = []
    for rows, objectives in by_rows.items():
        for kind in objectives:
            own = kinds.get(kind) or ({"rewards": [letters]} if rows == "prompts" else {})
            stage = {
                "name": kind,
                "objective": {"type": kind, **own},
                "learning_rate": 1e-3,
                "max_steps": 1,
                "method": {"type": "lora", "r": 2},
            }
            stage["data"] = {"train": str(folder / f"{rows}.jsonl")}
            if rows == "prompts":
                stage["rollout"] = {"prompts_per_step": 2, "max_new_tokens": 4}
            stages.append(stage)
    stages[1]["objective"] = {"type": "dpo", "loss": "robust", "label_smoothing": 0.1}
    recipe = {
        "name": "objectives",
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "task": {"gold_reward": str(folder / "rewards.py:checks")},
        "data": {"train": str(folder / "sft.jsonl")},
        "stages": stages,
    }
    with recorded_reads() as reads:
        result = tunesmith.train(recipe, out=folder / "run")
    READ.update(reads)
    return result


@pytest.fixture(scope="module")
def tuned(tiny_folder, tmp_path_factory):
    """One step of a stage of every method; what was read of the recipe is kept."""
    folder = tmp_path_factory.mktemp("methods")
    write_rows(folder / "sft.jsonl", map(row, range(12)))
    methods = [
        {"type": "partial", "last_layers": 1, "modules": ["embed_tokens"]},
        {"type": "ia3"},
        {"type": "bottleneck"},
        {"type": "prefix", "prefix_projection": True},
        {"type": "prompt"},
        {"type": "p_tuning"},
    ]
    stages = [{"name": method["type"], "objective": "sft", "learning_rate": 1e-3, "max_steps": 1, "method": method} for method in methods]
    model = {"name": str(tiny_folder), "dtype": "float32", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    recipe = {"name": "methods", "model": model, "data": {"train": str(folder / "sft.jsonl")}, "stages": stages}
    with recorded_reads() as reads:
        result = tunesmith.train(recipe, out=folder / "run")
    READ.update(reads)
    return result


def test_every_objective_trains_a_step_and_leaves_its_result(learned):
    finished = [json.loads(line) for line in (learned.path / "events.jsonl").read_text().splitlines() if '"stage_finished"' in line]
    assert len(finished) == 12
    for event in finished:
        assert event["step"] == 1
        assert (learned.path / "stages" / event["stage"] / "model" / "tunesmith.json").is_file()


def test_a_run_reads_every_setting(finished, learned, tuned):
    assert finished
    assert tuned
    assert learned
    sections = all_sections(Recipe)
    settings = {(section.__name__, name) for section in sections for name in section.model_fields}
    assert settings - READ - ONLY_SOMETIMES.keys() == set(), "settings that a run does not look at"
    assert ONLY_SOMETIMES.keys() <= settings


def all_sections(section):
    inner = {found for field in section.model_fields.values() for found in sections_of(field.annotation)}
    return {section}.union(*map(all_sections, inner))


@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "manifest.json",
        "data/ledger.json",
        "data/quarantine.jsonl",
        "data/health.json",
        "plan.json",
        "events.jsonl",
        "stages/sft/checkpoints/step-1/manifest.json",
        "stages/sft/checkpoints/step-2/manifest.json",
        "stages/sft/model/adapter_model.safetensors",
        "stages/sft/model/adapter_config.json",
        "stages/sft/model/tokenizer.json",
        "stages/sft/model/chat_template.jinja",
        "model/adapter_model.safetensors",
        "evaluation.json",
        "samples/task.zero_shot.jsonl",
        "samples/task.few_shot.jsonl",
        "samples/task.classical.jsonl",
        "samples/task.tuned.jsonl",
        "report.html",
        "README.md",
    ],
)
def test_the_run_directory_holds_every_file_of_the_contract(finished, name):
    assert (finished[0].path / name).is_file()


def test_the_ledger_balances(finished):
    ledger = read(finished[0], "data/ledger.json")
    assert ledger.keys() == {"rows_in", "rows_trained", "rows_held_out", "rows_dropped", "tokens"}
    assert ledger["tokens"].keys() == {"total", "supervised", "truncated"}
    assert ledger["rows_in"] == 24 == ledger["rows_trained"] + ledger["rows_held_out"] + sum(ledger["rows_dropped"].values())


def test_findings_have_the_shape_that_scripts_rely_on(finished):
    findings = read(finished[0], "data/health.json")["findings"]
    assert {finding["check"] for finding in findings} >= {"length_quantiles", "trainable_tokens"}
    for finding in findings:
        assert finding.keys() == {"check", "row_ids", "related_ids", "evidence", "mend"}


def test_the_plan_says_what_was_predicted_and_what_was_measured(finished):
    plan = read(finished[0], "plan.json")
    for part in ("predicted", "measured"):
        assert plan[part].keys() >= {"peak_memory_bytes", "seconds", "tokens", "bound_by"}
        assert plan[part]["peak_memory_bytes"] > 0
    assert plan["measured"]["tokens"] == sum(event["tokens"] for event in finished[1] if "loss" in event)


def test_the_evaluation_has_the_shape_that_scripts_rely_on(finished):
    result = read(finished[0], "evaluation.json")
    assert result["tasks"].keys() == {"task", "general"}
    for task in result["tasks"].values():
        assert task["n"] == 6
        assert task["hash"]
    assert list(result["tasks"]["task"]["candidates"]) == ["zero_shot", "few_shot", "classical", "tuned"]
    for candidate in result["tasks"]["task"]["candidates"].values():
        assert candidate["metrics"]["exact_match"].keys() >= METRIC
    for comparison in result["comparisons"]:
        assert comparison.keys() >= {"task", "metric", "candidate", "baseline", "difference", "low", "high", "minimum_detectable"}
    assert [gate.keys() >= {"name", "result", "reason"} for gate in result["gates"]] == [True, True]
    assert result["recommendation"].keys() >= {"candidate", "reason"}
    assert result["verdict"] in ("PASS", "FAIL", "NOT MEASURED")


def test_the_log_has_a_line_for_each_step(finished):
    events = [json.loads(line) for line in (finished[0].path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if "loss" in event]
    assert [(event["stage"], event["step"]) for event in steps] == [("sft", 1), ("sft", 2)]
    for event in steps:
        assert event.keys() >= {"time", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"}
        assert math.isfinite(event["loss"])
    assert all("time" in event for event in events)


def test_the_saved_recipe_is_complete_and_repeats_the_run(finished, tmp_path):
    result, _ = finished
    saved = tunesmith.load_recipe(result.path / "recipe.yaml")
    assert saved.seed == 3
    (stage,) = saved.stages
    derived = (stage.method.lora_alpha, stage.method.target_modules, stage.warmup_steps, stage.eval_steps, saved.data.max_length)
    assert None not in derived
    again = tunesmith.train(result.path / "recipe.yaml", out=tmp_path / "again")
    adapter = "model/adapter_model.safetensors"
    assert (again.path / adapter).read_bytes() == (result.path / adapter).read_bytes()
    assert (again.verdict, again.evaluation) == (None, None)


def test_an_existing_run_is_refused_and_a_resumed_one_scores_nothing_twice(finished):
    result, _ = finished
    with pytest.raises(OutputInUse):
        tunesmith.run(result.path / "recipe.yaml")
    events = []
    again = tunesmith.run(result.path / "recipe.yaml", resume=True, report=events.append)
    assert again.evaluation == result.evaluation
    assert not [event for event in events if "loss" in event], "nothing is trained twice"


def test_a_gate_raises_after_everything_is_written(finished):
    result, _ = finished
    with pytest.raises(GateFailed) as raised:
        tunesmith.run(result.path / "recipe.yaml", resume=True, gate=True)
    assert raised.value.exit_status == 5
    assert result.verdict in raised.value.what


def test_plan_leaves_nothing_and_gives_what_the_verb_prints(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = tunesmith.plan(finished[0].path / "recipe.yaml", out=tmp_path / "planned")
    assert plan.keys() == {"plan", "ledger", "findings", "notes", "recipe", "example", "warnings"}
    assert plan["ledger"] == finished[0].ledger
    assert yaml.safe_load(plan["recipe"])["output"]["dir"] == str(tmp_path / "planned"), "where the run would lie"
    assert list(tmp_path.iterdir()) == []


def test_chat_answers_and_remembers(finished):
    talk = tunesmith.Chat(finished[0].path, max_new_tokens=2)
    first = talk.ask("where is my parcel")
    assert isinstance(first, str)
    assert [message.role for message in talk.messages] == ["user", "assistant"]
    talk.reset()
    assert talk.messages == []
    assert talk.ask("where is my parcel") == first


def test_a_report_can_be_written_again(finished):
    assert tunesmith.write_report(finished[0].path) == finished[0].report


def test_an_error_is_a_tunesmith_error_with_what_where_and_mend():
    with pytest.raises(TunesmithError) as raised:
        tunesmith.run({"name": "x"})
    assert isinstance(raised.value, RecipeError)
    assert raised.value.where
    assert raised.value.mend


def test_init_writes_what_the_verb_writes_and_overwrites_only_by_force(tmp_path):
    file = tmp_path / "shop.csv"
    file.write_text("prompt,completion\n" + "".join(f"question {number},answer {number}\n" for number in range(12)))
    (path,) = tunesmith.init(file, out=tmp_path / "new")
    assert path == tmp_path / "new" / "shop.yaml"
    assert tunesmith.load_recipe(path).data.train == str(file)
    with pytest.raises(tunesmith.errors.OutputInUse, match=r"shop\.yaml is there already"):
        tunesmith.init(file, out=tmp_path / "new")
    assert tunesmith.init(file, out=tmp_path / "new", force=True) == [path]
    with pytest.raises(RecipeError, match="these are the training rows"):
        tunesmith.init(file, file, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
