"""A recipe is read strictly: what is wrong is named by its key, its place and the mend, and paths start where they were written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recipe.helpers import TEXT, refused, values

from tunesmith.errors import MissingFile
from tunesmith.recipe import FullMethod, LoraMethod, Recipe, SFTObjective, dump_recipe, load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "near"),
    [
        ("    learning_rate: 2e-4", "    learning_rat: 2e-4", 10, "stages.0.learning_rat", "learning_rate"),
        ("    method: lora", "    metod: lora", 13, "stages.1.metod", "method"),
        ("  test:", "  tset:", 6, "data.tset", "test"),
        ("model:", "modle:", 2, "modle", "model"),
        ("{type: sft}", "{type: sft, train_onn: last}", 12, "stages.1.objective.train_onn", "train_on"),
        ("    method: lora", "    method: {type: lora, lora_alhpa: 3}", 13, "stages.1.method.lora_alhpa", "lora_alpha"),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_key(write, old, new, line, key, near):
    path = write(TEXT.replace(old, new, 1))
    error = refused(path)
    assert error.exit_status == 2
    assert error.what == f"unknown key `{key}`"
    assert error.where == f"{path}:{line}"
    assert error.mend == f"did you mean `{near}`?"


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("learning_rate=1", "stages.0.learning_rate"),
        ("r=8", "stages.0.method.r"),
        ("stages.1.r=8", "stages.1.method.r"),
        ("nproc_per_node=2", "launch.nproc_per_node"),
    ],
)
def test_a_key_that_stands_deeper_is_refused_with_the_place_where_it_stands(write, word, place):
    assert refused(write(TEXT), [word]).mend == f"did you mean `{place}`?"


def test_an_unknown_key_that_is_near_to_none_is_refused_with_all_known_ones(write):
    error = refused(write(TEXT.replace("data:", "data:\n  zzz: 1")))
    assert "unknown key `data.zzz`" in error.what
    assert error.mend.startswith("known keys here: train, test, validation")


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("learning_rate: 2e-4", "learning_rate: fast", 10, ["stages.0.learning_rate", "valid number", '"fast"']),
        ("learning_rate: 2e-4", "learning_rate: -1", 10, ["stages.0.learning_rate", "greater than 0", "-1"]),
        ("learning_rate: 2e-4", "learning_rate: .inf", 10, ["stages.0.learning_rate", "finite"]),
        ("learning_rate: 2e-4", "learning_rate: yes", 10, ["stages.0.learning_rate", '"yes"']),
        ("name: mine", "name: 3", 1, ["name", "valid string"]),
        ("name: mine", "name: ../mine", 1, ["name", "pattern"]),
        ("    method: lora", "    method: lor", 13, ["stages.1.method", "unknown type `lor`"]),
        ("    method: lora", "    method: {r: 3}", 13, ["stages.1.method.type", "not given"]),
        ("    method: lora", "    method: {type: lora, r: 1.5}", 13, ["stages.1.method.r", "valid integer", "1.5"]),
        ("name: more", "name: sft", 11, ["stages.1.name: stage names must differ", "sft"]),
        ("    objective: {type: sft}\n", "", 11, ["stages.1.objective", "not given"]),
        ("  name: smollm2-135m-instruct", "  - smollm2-135m-instruct", 2, ["model", "valid dictionary"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_what_the_setting_means(write, old, new, line, words):
    path = write(TEXT.replace(old, new, 1))
    error = refused(path)
    assert error.where in (f"{path}:{line}", str(path))
    for word in words:
        assert word in error.what


@pytest.mark.parametrize(
    ("word", "what", "mend"),
    [
        ("stages.0.gradient_checkpointing=maybe", "must be true or false, or 'selective'", "gradient_checkpointing means: Recompute"),
        ("stages.0.gradient_checkpointing=selectiv", "or 'selective'", "did you mean `selective`?"),
        ("stages.0.optim=adamw", "'adamw_torch_fused'", "did you mean `adamw_torch_fused`?"),
        ("stages.0.optim=adam8bit", "'adamw_8bit'", "did you mean `adamw_8bit`?"),
        ("stages.0.method={type: qlora}", "unknown type `qlora`", "write method: lora, with `model.quantization: nf4`"),
        ("stages.0.method=dora", "unknown type `dora`", "write method: {type: lora, use_dora: true}"),
        ("stages.0.method=houlsby", "unknown type `houlsby`", "write method: {type: bottleneck, architecture: houlsby}"),
        ("stages.1.method.target_modules=q_proj", "must be a valid list, or 'all-linear'", "write [q_proj]; target_modules means"),
        ("stages.1.method.target_modules=all_linear", "must be a valid list", "did you mean `all-linear`?"),
        ("evaluate.few_shot_k=2", "must be a valid list", "write [2];"),
        ("model=gpt2", "must be a valid dictionary", "write {name: gpt2};"),
        ("task.metrics=[accuracy]", "'exact_match'", "did you mean `exact_match`?"),
        ("task.metrics=[F1]", "'macro_f1'", "did you mean `macro_f1`?"),
        ("stages.0.learning_rate=0", "must be greater than 0", "leave it out to have it derived;"),
        ("stages.0.warmup_steps=-1", "must be greater than or equal to 0", "leave it out to have it derived;"),
        ("task.labels=[]", "`task.labels` must not be empty", "labels means: For classification"),
        ("task.labels=[a, b, a]", "must name each label once, and 'a' is there 2 times", "labels means: For classification"),
        ("stages=[dpo]", "must be a valid dictionary", "stages means"),
        ("stages=sft", "must be a valid list", "stages means"),
    ],
)
def test_what_a_wrong_value_should_have_been_is_said(write, word, what, mend):
    error = refused(write(TEXT), [word])
    assert what in error.what
    assert error.mend.startswith(mend)


def test_a_gates_candidate_that_is_none_is_refused_on_its_line_with_the_nearest(write):
    path = write(TEXT + "evaluate:\n  gates:\n  - metric: exact_match\n    better_than: few_shots\n")
    error = refused(path)
    assert error.where == f"{path}:19"
    assert error.what == "evaluate.gates.0.better_than: no candidate or stage is called few_shots; did you mean `few_shot`?"
    assert "the baseline to beat" in error.mend.lower()


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("    method: lora", "    method:\n      type: lora\n      init_lora_weights: orthogonal\n      r: 63", 16, "stages.1.method.r"),
        ("    learning_rate: 2e-4", "    optim: adafactor\n    adam_beta1: 0.8", 11, "stages.0.adam_beta1"),
        (
            "    objective: sft",
            "    objective: {type: ppo, rewards: [{type: exact_answer}]}\n    rollout:\n      temperature: 1.0\n      top_p: 0.5",
            12,
            "stages.0.rollout.top_p, rollout.top_k",
        ),
    ],
)
def test_a_sections_own_check_is_told_with_the_line_of_the_key_that_it_names(write, old, new, line, key):
    path = write(TEXT.replace(old, new, 1))
    error = refused(path)
    assert (error.where, error.what.split(":")[0]) == (f"{path}:{line}", key)
    assert error.mend.startswith(key.split(",")[0].split(".")[-1] + " means: ")


def test_the_mend_of_a_wrong_value_says_what_the_setting_means(write):
    assert "Peak learning rate" in refused(write(TEXT.replace("2e-4", "fast"))).mend


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("stages.0.learning_rat=1", ["unknown key `stages.0.learning_rat`", "did you mean `learning_rate`?"]),
        ("stages.0.learning_rate=fast", ["stages.0.learning_rate", "valid number"]),
        ("stages.7.learning_rate=1", ["`stages` has 2 entries"]),
        ("stages.last.learning_rate=1", ["`stages` has 2 entries"]),
        ("name.first=1", ["name", "valid string"]),
        ("model.new.deep=1", ["unknown key `model.new`"]),
        ("seed.0.1=1", ["`seed`", "valid integer"]),
        ("stages.0.learning_rate=[1", ["not readable as YAML"]),
        ("stages.0.learning_rate=!!python/name:os.system", ["tag"]),
    ],
)
def test_a_wrong_override_is_named_as_the_place_and_not_a_line_of_the_file(write, word, words):
    error = refused(write(TEXT), [word])
    assert error.where.startswith(f"--set {word.partition('=')[0]}")
    for text in words:
        assert text in f"{error.what} {error.mend}"


@pytest.mark.parametrize("word", ["stages.0.learning_rate", "=3", ""])
def test_an_override_without_a_key_or_a_value_sign_is_refused(word):
    assert refused(values(), [word]).where == f"--set {word}"


def test_an_error_of_the_file_still_names_the_line_when_something_else_is_overridden(write):
    path = write(TEXT.replace("1e-5", "slow"))
    assert refused(path, ["stages.0.learning_rate=1e-3"]).where == f"{path}:15"


def test_an_override_mends_what_is_wrong_in_the_file(write):
    assert load_recipe(write(TEXT.replace("1e-5", "slow")), ["stages.1.learning_rate=1e-5"]).stages[1].learning_rate == 1e-5


def test_overrides_reach_every_depth_and_are_read_as_yaml(write):
    words = [
        "seed=7",
        "stages.0.learning_rate=2e-3",
        "stages.1.method.r=4",
        "stages.0.method=full",
        "evaluate.few_shot_k=[1, 2]",
        "evaluate.max_new_tokens=9",
        "data.max_length=null",
        "task.description=on",
    ]
    recipe = load_recipe(write(TEXT), words)
    assert (recipe.seed, recipe.stages[0].learning_rate) == (7, 2e-3)
    assert recipe.stages[1].method == LoraMethod(r=4), "a bare name keeps its type when one of its settings is given"
    assert recipe.stages[0].method == FullMethod()
    assert (recipe.evaluate.few_shot_k, recipe.evaluate.max_new_tokens) == ([1, 2], 9)
    assert (recipe.data.max_length, recipe.task.description) == (None, "on")


def test_of_two_overrides_of_one_key_the_later_wins():
    assert load_recipe(values(), ["seed=1", "seed=2"]).seed == 2


def test_a_bare_name_stands_for_its_defaults():
    recipe = load_recipe(values())
    assert recipe.stages[0].objective == SFTObjective()
    assert recipe.stages[1].method == LoraMethod()
    assert recipe.stages[0].method is None


def test_paths_start_at_the_recipe_in_a_file_and_at_the_current_folder_on_the_command_line(write, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "owner").mkdir()
    (here / "owner" / "rows").touch()
    path = write(TEXT.replace("start_from: sft", "start_from: owner/rows"))
    recipe = load_recipe(path, ["data.validation=val.jsonl", "stages.1.data={train: ./own}"], out="there")
    assert recipe.data.train == str(tmp_path / "recipes" / "rows.jsonl")
    assert recipe.data.test == str(tmp_path / "held" / "out.jsonl")
    assert recipe.data.validation == str(here / "val.jsonl")
    assert recipe.stages[1].data.train == str(here / "own")
    assert recipe.output.dir == str(here / "there")
    assert recipe.stages[1].start_from == "owner/rows", "it does not exist beside the recipe: a hub name"
    assert load_recipe(path, ["stages.1.start_from=owner/rows"]).stages[1].start_from == str(here / "owner" / "rows")


def test_a_name_that_is_no_path_stays_a_name(write):
    recipe = load_recipe(write(TEXT), ["data.train=owner/rows@abc:train", "data.validation=0.2"])
    assert (recipe.model.name, recipe.data.train, recipe.data.validation) == ("smollm2-135m-instruct", "owner/rows@abc:train", 0.2)
    assert recipe.stages[1].start_from == "sft"


def test_a_tilde_is_the_home_folder(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(write(TEXT.replace("rows.jsonl", "~/rows.jsonl"))).data.train == str(tmp_path / "rows.jsonl")


def test_a_folder_with_the_models_name_beside_the_recipe_is_that_folder(write, tmp_path):
    path = write(TEXT)
    (tmp_path / "recipes" / "smollm2-135m-instruct").mkdir()
    assert load_recipe(path).model.name == str(tmp_path / "recipes" / "smollm2-135m-instruct")


def test_a_name_longer_than_any_path_is_no_crash(write):
    assert load_recipe(write(TEXT), ["model.name=" + "x" * 5000]).model.name == "x" * 5000


def test_a_dict_a_recipe_and_a_file_give_the_same(write, tmp_path, monkeypatch):
    path = write(TEXT)
    monkeypatch.chdir(path.parent)
    from_file = load_recipe(path)
    assert load_recipe(values()) == from_file
    assert load_recipe(from_file) == from_file
    assert load_recipe(str(path)) == from_file


def test_a_given_dict_is_not_changed():
    given_values = values()
    load_recipe(given_values, ["stages.0.learning_rate=1", "seed=3"], out="x")
    assert given_values == values()


@pytest.mark.parametrize("given_values", [{("a", "b"): 1}, {1: {2}}, "loop"])
def test_a_dict_that_holds_no_plain_values_is_refused(given_values):
    if given_values == "loop":
        given_values = {}
        given_values["name"] = given_values
    refused(given_values)


def test_a_dumped_recipe_loads_as_the_same_recipe(write):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", ["task.labels=['on', '1e5', '2026-01-01']"])
    assert load_recipe(write(dump_recipe(recipe))) == recipe


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.text() | st.from_regex(r"[-+]?[0-9.]+(e[0-9]+)?|0[xo][0-9]+|y|on|~|null|1:30|=|<<", fullmatch=True),
        min_size=1,
        max_size=3,
        unique=True,
    )
)
def test_any_text_survives_being_dumped_and_loaded(tmp_path_factory, words):
    recipe = load_recipe(values(task={"labels": words, "description": "".join(words)}))
    path = tmp_path_factory.mktemp("dumped") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path).task == recipe.task


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_number_survives_being_dumped_and_loaded(tmp_path_factory, number):
    recipe = load_recipe(values(), [f"stages.0.learning_rate={number!r}"])
    path = tmp_path_factory.mktemp("dumped") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path).stages[0].learning_rate == number


@pytest.mark.parametrize("source", ["missing.yaml", "."])
def test_a_recipe_that_cannot_be_read_says_so_with_status_2(tmp_path, source):
    error = refused(tmp_path / source, kind=MissingFile)
    assert error.exit_status == 2
    assert str(tmp_path) in error.where


def test_loading_a_recipe_imports_neither_torch_nor_transformers(write):
    code = "import sys; from tunesmith.recipe import load_recipe; load_recipe(sys.argv[1]); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(TEXT))], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert not {"torch", "transformers", "numpy", "peft"} & set(done.stdout.split())


def test_a_recipe_does_not_change_afterwards():
    recipe = load_recipe(values())
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    assert "`seed`" in refused(values(seed=seed)).what
    assert load_recipe(values(seed=2**63 - 1)).seed == 2**63 - 1


@pytest.mark.parametrize("setting", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}])
def test_a_choice_by_validation_loss_without_validation_rows_is_refused(setting):
    none, some = {"train": "rows.jsonl", "validation": 0}, {"train": "rows.jsonl", "validation": 0.1}
    stage = {"name": "sft", "objective": "sft", "learning_rate": 1e-4, **setting}
    assert f"stages.0.{next(iter(setting))}: it needs validation rows" in refused(values(data=none, stages=[stage])).what
    assert "needs validation rows" in refused(values(data=some, stages=[stage | {"data": none}])).what
    load_recipe(values(data=some, stages=[stage]))
    load_recipe(values(data=none, stages=[stage | {"data": some}]))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "folder", "weights.gguf"])
def test_a_revision_of_a_model_that_has_none_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    refused_recipe = refused(values(model={"name": name, "revision": "v1.0"}))
    assert "model.revision" in refused_recipe.what
    assert load_recipe(values(model={"name": "owner/name", "revision": "v1.0"})).model.revision == "v1.0"


@pytest.mark.parametrize("name", ["zero_shot", "tuned", "shorter", "base"])
def test_a_stage_that_bears_the_name_of_a_candidate_is_refused(name):
    given = values()
    given["stages"][0]["name"], given["stages"][1]["start_from"] = name, name
    assert f"stages.0.name: {name} is the name of a candidate" in str(refused(given))


REWARD = {"name": "reward", "objective": "reward", "learning_rate": 1.0e-4}
SCORED = {"name": "grpo", "learning_rate": 1.0e-4, "objective": {"type": "grpo", "rewards": [{"type": "model", "model": "reward"}]}}
PPO = {"name": "ppo", "learning_rate": 1.0e-4, "objective": {"type": "ppo", "reward_model": ["elsewhere/model", "reward"]}}


@pytest.mark.parametrize(("stage", "key"), [(SCORED, "rewards.0.model"), (PPO, "reward_model.1")], ids=["rewards", "reward_model"])
def test_a_reward_model_that_is_a_stage_is_an_earlier_one_of_objective_reward(stage, key):
    load_recipe(values(stages=[REWARD, stage]))
    late = refused(values(stages=[stage, REWARD]))
    assert f"stages.0.objective.{key}: stage reward comes no earlier than {stage['name']}; put it before" in str(late)
    other = refused(values(stages=[{**REWARD, "objective": "sft"}, stage]))
    assert f"stages.1.objective.{key}: stage reward is of objective sft and scores nothing" in str(other)
    alone = {"name": "reward", "learning_rate": 1.0e-4, "objective": {"type": "ppo", "reward_model": "reward"}}
    assert "comes no earlier than reward" in str(refused(values(stages=[alone])))


def test_ipo_with_flipped_labels_is_refused_and_the_other_losses_take_them():
    def given(loss):
        objective = {"type": "dpo", "loss": loss, "label_smoothing": 0.1}
        return values(stages=[{"name": "dpo", "objective": objective, "learning_rate": 1.0e-4}])

    assert "label_smoothing: ipo has no flipped labels" in str(refused(given("ipo")))
    for loss in ("sigmoid", "robust"):
        assert load_recipe(given(loss)).stages[0].objective.label_smoothing == 0.1
