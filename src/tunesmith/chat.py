"""Talking to a run's result: one conversation, each answer by the same rendering and stopping as in training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .data.records import Message
from .data.render import encode_prompt, stop_tokens
from .data.template import load_template
from .errors import MissingFile, ModelError, RecipeError, TemplateError
from .generate import LocalGenerator, Sampling
from .models.load import load_model
from .models.opening import open_result
from .models.result import is_adapter, read_card, require_unaltered
from .recipe import ModelSection, load_recipe
from .train.stage import add_new_tokens


class Chat:
    """A run's tuned model in one conversation: each question is asked with all before it and their answers, until `reset`.

    run: the run directory. system: the system message; none means the one that all training rows had. max_new_tokens: the longest answer;
    none means the evaluation's. trust_remote_code: whether code that the model brings may run, whatever the run's recipe says. Raises
    CheckpointError where the result is not what was saved, RecipeError where it is a reward model.

    >>> tunesmith.Chat("runs/quickstart").ask("the lamp smells of smoke!!")  # doctest: +SKIP
    '{"intent": "defect", "product": "lamp", "urgency": "high", "summary": "Lamp smells of smoke"}'
    """

    def __init__(
        self,
        run: str | Path,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        trust_remote_code: bool = False,
    ):
        path = Path(run)
        if not (path / "recipe.yaml").is_file():
            raise MissingFile("no recipe.yaml: this is no run directory", where=str(path), mend="name a folder such as runs/quickstart")
        recipe = load_recipe(path / "recipe.yaml")
        folder = trained_model_folder(path)
        require_unaltered(folder)
        card = read_card(folder)
        if card.get("objective") == "reward":
            raise RecipeError(
                "this is a reward model: it scores answers and writes none",
                where=str(folder),
                mend="chat with a run whose last stage writes; `tunesmith evaluate` measures a reward model on pairs",
            )
        base = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
        whole = ModelSection(name=str(folder.resolve()), dtype=recipe.model.dtype, trust_remote_code=trust_remote_code)
        loaded = load_model(base if is_adapter(folder) else whole)
        self.template = load_template(loaded.tokenizer, recipe.model)
        if card.get("template_sha256") not in (None, self.template.sha256):
            raise TemplateError(
                "this is not the chat template that the model was trained with",
                where="model.chat_template",
                mend="put the template's file back as it was",
            )
        add_new_tokens(loaded, self.template)
        self.tokenizer = loaded.tokenizer
        model = open_result(folder, loaded, trust_remote_code=trust_remote_code) if is_adapter(folder) else loaded.model
        self.generator = LocalGenerator(model, loaded.tokenizer, stop_ids=stop_tokens(self.template, loaded.tokenizer))
        self.sampling = Sampling(temperature=temperature)
        self.max_new_tokens = max_new_tokens or recipe.evaluate.max_new_tokens
        self._system = system if system is not None else card.get("system")
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages = [Message("system", self._system)] if self._system else []

    def ask(self, text: str) -> str:
        """Adds the user's turn and the model's answer to the conversation; gives the answer."""
        asked = [*self.messages, Message("user", text)]
        answer = self.answer(asked)
        self.messages = [*asked, Message("assistant", answer)]
        return answer

    def answer(self, messages: Sequence[Message]) -> str:
        """The model's answer to any conversation."""
        prompt = encode_prompt(messages, self.template, self.tokenizer)
        (generation,) = self.generator.generate([prompt.tolist()], max_new_tokens=self.max_new_tokens, sampling=self.sampling)
        return generation.text


def trained_model_folder(run_path: Path) -> Path:
    """The folder of a run's tuned model. Raises ModelError where the run trained nothing."""
    folder = run_path / "model"
    if not folder.exists():
        raise ModelError(
            "the run holds no tuned model",
            where=str(run_path),
            mend="train it first: tunesmith run RECIPE, with --resume if it was broken off",
        )
    return folder
