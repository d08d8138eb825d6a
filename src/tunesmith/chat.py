"""Talking to a run's result: one conversation, each answer by the same rendering and stopping as in training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .data.records import Message
from .data.render import encode_prompt, stop_tokens
from .data.template import load_template
from .errors import MissingFile, TemplateError
from .evaluation import open_result
from .generate import LocalGenerator, Sampling
from .models.load import load_model
from .models.methods import CARD
from .pipeline import trained_model_folder
from .recipe import ModelSection, load_recipe
from .train.stage import add_new_tokens


class Chat:
    """A run's tuned model, answering in turn.

    run: the run directory. system: the system message; none means the one that all training rows had.

    >>> tunesmith.Chat("runs/quickstart").ask("the lamp smells of smoke!!")  # doctest: +SKIP
    '{"intent": "defect", "product": "lamp", "urgency": "high", "summary": "Lamp smells of smoke"}'
    """

    def __init__(self, run: str | Path, *, system: str | None = None, max_new_tokens: int | None = None, temperature: float = 0.0):
        path = Path(run)
        if not (path / "recipe.yaml").is_file():
            raise MissingFile("no recipe.yaml: this is no run directory", where=str(path), mend="name a folder such as runs/quickstart")
        recipe = load_recipe(path / "recipe.yaml")
        folder = trained_model_folder(path)
        card = json.loads((folder / CARD).read_text())
        is_adapter = (folder / "adapter_config.json").is_file()
        whole = ModelSection(name=str(folder.resolve()), dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
        loaded = load_model(recipe.model if is_adapter else whole)
        self.template = load_template(loaded.tokenizer, recipe.model)
        if card["template_sha256"] not in (None, self.template.sha256):
            raise TemplateError(
                "this is not the chat template that the model was trained with",
                where="model.chat_template",
                mend="put the template's file back as it was",
            )
        add_new_tokens(loaded, self.template)
        self.tokenizer = loaded.tokenizer
        model = open_result(folder, loaded) if is_adapter else loaded.model
        self.generator = LocalGenerator(model, loaded.tokenizer, stop_ids=stop_tokens(self.template, loaded.tokenizer))
        self.sampling = Sampling(temperature=temperature)
        self.max_new_tokens = max_new_tokens or recipe.evaluate.max_new_tokens or 256
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
