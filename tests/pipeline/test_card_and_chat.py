"""The model card, which names no path of this machine, and the conversation with a run's result."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import yaml
from tests.pipeline.helpers import conversations, read_json, recipe, stage, write_rows

import tunesmith
from tunesmith.errors import MissingFile, ModelError, RecipeError, TemplateError
from tunesmith.rundir import verify_folder

METHODS = {"lora": {"type": "lora", "r": 4}, "full": {"type": "full"}}


@pytest.fixture(scope="module", params=METHODS)
def made(request, tiny, tmp_path_factory):
    """(method, a finished run of it)."""
    folder = tmp_path_factory.mktemp("card")
    rows = [{"messages": [{"role": "system", "content": "Name a colour."}, *row["messages"]]} for row in conversations(20)]
    given = recipe(folder, tiny, name="colours", stages=[stage(method=METHODS[request.param])], task={"description": "Name a colour."})
    write_rows(folder / "train.jsonl", rows)
    return request.param, tunesmith.run(given, out=folder / "run")


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_cards_front_matter_names_the_base_the_metrics_and_the_results(made):
    method, result = made
    text = (result.path / "README.md").read_text()
    assert (result.path / "model" / "README.md").read_text() == text
    front = front_matter(text)
    assert front["base_model"] == "tiny-llama"
    assert front["library_name"] == ("peft" if method == "lora" else "transformers")
    assert front["datasets"] == ["train.jsonl"]
    (entry,) = front["model-index"]
    metrics = {one["type"]: one["value"] for one in entry["results"][0]["metrics"]}
    tuned = result.evaluation["tasks"]["task"]["candidates"]["tuned"]["metrics"]
    assert metrics == {name: pytest.approx(tuned[name]["value"], abs=1e-4) for name in ("exact_match", "perplexity")}
    assert f"Verdict: **{result.verdict}**" in text
    assert read_json(result.path / "manifest.json")["model"]["sha256"] in text


def test_no_path_of_this_machine_is_in_what_people_publish(made):
    _, result = made
    for file in (result.path / "model").iterdir():
        if file.suffix in (".json", ".md", ".jinja", ".txt"):
            text = file.read_text()
            if file.name == "adapter_config.json":  # agreed: it names the folder that the base was converted to, so that PEFT finds it
                assert json.loads(text).pop("base_model_name_or_path").endswith("tiny-llama")
                continue
            for place in (result.path.parent, Path.home(), Path(__file__).parent.parent.parent):
                assert str(place) not in text, file.name
            assert "/tmp" not in text, file.name
    assert "/tmp" not in (result.path / "README.md").read_text()


def test_the_models_folder_is_whole_with_its_card(made):
    _, result = made
    verify_folder((result.path / "model").resolve())


def test_chat_begins_with_the_training_rows_system_message_and_goes_on_until_reset(made):
    _, result = made
    chat = tunesmith.Chat(result.path, max_new_tokens=3)
    first = chat.ask("what is it?")
    assert [(message.role, message.content) for message in chat.messages] == [
        ("system", "Name a colour."),
        ("user", "what is it?"),
        ("assistant", first),
    ]
    chat.ask("and now?")
    assert len(chat.messages) == 5
    chat.reset()
    assert len(chat.messages) == 1
    assert chat.ask("what is it?") == first
    other = tunesmith.Chat(result.path, system="Be brief.", max_new_tokens=3)
    assert other.messages[0].content == "Be brief."


@pytest.mark.parametrize("method", [*METHODS.values(), {"type": "prefix", "num_virtual_tokens": 3}], ids=[*METHODS, "prefix"])
def test_no_warning_of_one_library_about_another_reaches_a_caller_from_python(tiny, method, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = tunesmith.run(recipe(tmp_path, tiny, stages=[stage(method=method, gradient_checkpointing=True)]), out=tmp_path / "run")
        tunesmith.Chat(run.path, max_new_tokens=2).ask("what is it?")
    assert [str(one.message) for one in caught if issubclass(one.category, FutureWarning | DeprecationWarning)] == []


def test_an_answer_that_cannot_be_given_leaves_the_conversation_as_it_was(made):
    _, result = made
    chat = tunesmith.Chat(result.path, max_new_tokens=3)
    with pytest.raises(ModelError):
        chat.ask("x" * 600)  # over the model's context of 512
    assert len(chat.messages) == 1
    assert chat.ask("what is it?") is not None


def test_chat_refuses_a_folder_without_a_run_a_run_without_a_result_and_another_template(made, tiny, tmp_path):
    with pytest.raises(MissingFile, match="no run directory"):
        tunesmith.Chat(tmp_path)
    untrained = recipe(tmp_path, tiny, evaluate={"candidates": ["zero_shot"], "gates": []})
    run = tunesmith.evaluate(untrained, out=tmp_path / "run").path
    with pytest.raises(ModelError, match="no tuned model"):
        tunesmith.Chat(run)
    template = tmp_path / "mine.jinja"
    text = "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>\n{% endfor %}"
    template.write_text(text + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    given = recipe(tmp_path, tiny)
    given["model"]["chat_template"] = str(template)
    own = tunesmith.train(given, out=tmp_path / "own").path
    assert tunesmith.Chat(own, max_new_tokens=2).ask("hello") is not None
    template.write_text(template.read_text().replace(": ", "- "))
    with pytest.raises(TemplateError, match="not the chat template"):
        tunesmith.Chat(own)


def test_a_reward_model_is_no_partner_for_a_chat_and_its_card_says_what_it_is(tiny, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"word {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)])
    given = recipe(tmp_path, tiny, name="judge", stages=[stage(name="reward", objective="reward", max_steps=1)], evaluate={})
    given["data"] = {"train": str(tmp_path / "pairs.jsonl")}
    run = tunesmith.train(given, out=tmp_path / "run").path
    with pytest.raises(RecipeError, match="it scores answers and writes none"):
        tunesmith.Chat(run)
    text = (run / "README.md").read_text()
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert "heads.safetensors" in text
    assert "Verdict: **NOT MEASURED**. It was trained and not evaluated" in text
