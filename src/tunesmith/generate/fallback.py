"""Generation and scoring by transformers' own means, for models whose attention or cache the engine does not know.

Takes rows (rows.py) or prompts and answers, as the engine does; prompts are padded on the left. The model's generation_config is put
aside for the while, so that none of its settings apply; tokens are still chosen in rows.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .engine import batches
from .protocol import Sampling
from .rows import Row, choose_next, refuse_nan


class _Choose(LogitsProcessor):
    """Chooses each row's next token in rows.py and leaves no other possible."""

    def __init__(self, rows: list[Row], sampling: Sampling, stop_ids: frozenset[int]):
        self.rows, self.sampling, self.stop_ids = rows, sampling, stop_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens_B = choose_next(scores, self.rows, self.sampling, self.stop_ids)
        chosen_BV = torch.full_like(scores, -torch.inf)
        chosen_BV[torch.arange(len(tokens_B)), tokens_B] = 0.0
        return chosen_BV


class _Ended(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.tensor([row.finish_reason is not None for row in self.rows], device=input_ids.device)


class Fallback:
    """The slow way, on a transformers model or a PEFT model of any kind."""

    def __init__(self, model: torch.nn.Module, batch_size: int):
        self.model, self.batch_size = model, batch_size
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def generate(self, rows: list[Row], sampling: Sampling, stop_ids: frozenset[int]) -> None:
        """Moves every row to its end."""
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            for row in rows:
                self._generate_uncached(row, sampling, stop_ids)
            return
        with _own_generation_config(self.model, max(row.limit for row in rows)) as config:
            for batch in batches([len(row.prompt) + row.limit for row in rows], self.batch_size):
                together = [rows[i] for i in batch]
                last = max(len(row.prompt) for row in together) + max(row.limit for row in together)
                for part in [together] if last <= self.context else [[row] for row in together]:  # rows that have ended go on to the end
                    self._generate_batch(part, config, sampling, stop_ids)

    def _generate_batch(self, rows: list[Row], config: GenerationConfig, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        longest = max(len(row.prompt) for row in rows)
        ids_BT = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows], device=self.model.device)
        mask_BT = torch.tensor([[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=self.model.device)
        self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choose(rows, sampling, stop_ids)]),
            stopping_criteria=StoppingCriteriaList([_Ended(rows)]),
        )

    def _generate_uncached(self, row: Row, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        """One row by a full forward a token: under learned prompts PEFT 0.21's cached generate strays from its own forward (seen)."""
        while row.finish_reason is None:
            ids_1T = torch.tensor([row.prompt + row.token_ids], device=self.model.device)
            logits_1V = self.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[:, -1].float()
            choose_next(logits_1V, [row], sampling, stop_ids)

    def logprobs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of every answer token, each pair alone, float32 [len(answer)]."""
        scores = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if not len(answer):
                scores.append(np.empty(0, np.float32))
                continue
            ids_1T = torch.tensor([[*prompt, *answer[:-1]]], dtype=torch.long, device=self.model.device)
            logits_AV = self.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0, -len(answer) :].float()
            targets_A1 = torch.tensor([list(answer)], device=logits_AV.device).T
            scores.append(refuse_nan(logits_AV.log_softmax(dim=-1).gather(-1, targets_A1).squeeze(-1)).cpu().numpy())
        return scores


@contextmanager
def _own_generation_config(model: torch.nn.Module, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """A generation config without any of the model's own settings, in the model's place for the while: generate fills gaps from there."""
    holders = [m for m in model.modules() if isinstance(m.__dict__.get("generation_config"), GenerationConfig)]
    before = [(holder, holder.generation_config) for holder in holders]
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig(pad_token_id=0)
        yield config
    finally:
        for holder, theirs in before:
            holder.generation_config = theirs
