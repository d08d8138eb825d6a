"""Where a stage's answers come from: the policy's own module, or a vLLM server that is given each new version of its adapter.

Of several processes each samples its share here; a server is asked by the first alone. All of them get all the answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from peft import PeftModel

from ..errors import RecipeError, RolloutFailed
from ..generate import LocalGenerator, ServerGenerator
from ..generate.protocol import Generation, Sampling
from ..models.load import LoadedModel
from ..models.methods import save_result
from ..models.policy import Policy
from ..models.virtual import learns_tokens
from ..recipe import Stage
from ..rundir import RunDirectory, atomic_folder, remove_folder
from .devices import mine, of_first, together

ROLLOUT_BATCH = 64  # answers sampled together


class LocalSampler:
    """The policy's own module; its fast way of generating is compared with the plain one once, at the first call. note: is told what is
    left out of it, and why."""

    def __init__(self, policy: Policy, loaded: LoadedModel, stop_ids: Sequence[int], note: Callable[[str], None]):
        self.note, self.noted = note, 0
        self.generator = LocalGenerator(policy.model, loaded.tokenizer, batch_size=ROLLOUT_BATCH, stop_ids=stop_ids)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int], iteration: int | str
    ) -> list[Generation]:
        """One answer a prompt, with its log-probabilities."""
        own, drawn = mine(prompts), mine(seeds)
        made = self.generator.generate(own, max_new_tokens=max_new_tokens, sampling=sampling, seeds=drawn, logprobs=True)
        for text in self.generator.notes[self.noted :]:
            self.note(text)
        self.noted = len(self.generator.notes)
        return [Generation(**one) for one in together([asdict(one) for one in made])]

    def close(self) -> None:
        """Nothing to give back."""


class ServerSampler:
    """A server that serves the base. Each iteration's adapter is written out and loaded under a name that is never used again.

    The name holds the time besides the iteration, since a resumed run samples an iteration anew.
    """

    def __init__(self, stage: Stage, policy: Policy, loaded: LoadedModel, stop_ids: Sequence[int], run: RunDirectory):
        if not isinstance(policy.model, PeftModel) or learns_tokens(policy.model):
            trained = "learned tokens" if isinstance(policy.model, PeftModel) else "the whole model"
            raise RecipeError(
                f"a server is given adapters within the model's layers, and this stage trains {trained}",
                where=f"stages.{stage.name}.rollout.server",
                mend="use method lora, or sample here",
            )
        self.policy, self.loaded, self.folder = policy, loaded, run.file(f"stages/{stage.name}/served")
        if self.folder.exists():
            remove_folder(self.folder)  # what a part of the run before this one left
        name = stage.rollout.server_model or loaded.identity.name
        self.generator = ServerGenerator(stage.rollout.server, name, loaded.tokenizer, stop_ids=stop_ids)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int], iteration: int | str
    ) -> list[Generation]:
        """One answer a prompt by the adapter as it is now, with its log-probabilities."""

        def asked() -> list[dict[str, Any]]:
            self._publish(f"policy-{iteration}-{time.time_ns():x}".replace(" ", "-"))
            made = self.generator.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, logprobs=True)
            return [asdict(one) for one in made]

        return [Generation(**one) for one in of_first(asked)]

    def close(self) -> None:
        """Takes the last adapter off the server and the disk."""
        if self.generator.adapter is not None:
            with suppress(RolloutFailed):  # a server that is gone holds nothing; what ended the stage is said elsewhere
                self.generator.unload_adapter(self.generator.adapter)
        if self.folder.exists():
            remove_folder(self.folder)

    def _publish(self, name: str) -> None:
        with atomic_folder(self.folder / name) as temporary:
            save_result(self.policy.model, self.loaded, temporary, {})
        before = self.generator.adapter
        self.generator.load_adapter(self.folder / name, name)
        if before is not None:
            self.generator.unload_adapter(before)
            remove_folder(self.folder / before)
