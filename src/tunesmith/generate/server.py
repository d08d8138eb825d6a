"""A `Generator` over an OpenAI-compatible vLLM server, whose adapters are changed while it runs.

Takes the server's address, prompts as token ids; gives generations, with each token's log-probability. Routes: /v1/completions,
/v1/load_lora_adapter and /v1/unload_lora_adapter, the last two of which a server has only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
and --enable-lora. Tested against those routes on a loopback server, and against vLLM 0.32 on a CPU (tests/generate/test_vllm.py, which
needs one that runs); not against vLLM on a GPU. On a CPU, vLLM 0.32 gives requests for the base model the adapter's answers where both
are in one batch: a server there should have one client.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import ModelError, RolloutFailed
from ._http import Client, ServerRefused
from .protocol import GREEDY, Constraint, Generation, Sampling
from .sampling import row_seeds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora"
# The log-probabilities of a token under two temperatures that count as equal: what bf16 and another batch may change, in nats.
SAME_LOGPROB = 0.3
# The highest temperature that vLLM takes, and how many of a token's likeliest ones it is asked for to see the temperature in them.
FLAT_TEMPERATURE = 2.0
SEEN_LOGPROBS = 5

Answer = TypeVar("Answer")


class ServerGenerator:
    """Generates and scores with the model, or the adapter, that a vLLM server holds.

    url: the server's address, with or without /v1; it need not be on this machine. model: the name under which it serves the base model.
    The tokenizer must be the server's own. stop_ids: tokens that end an answer beside the tokenizer's end token. timeout: seconds that
    one request may take. retries: how often a request is sent again that the server puts off (429, 503). concurrency: requests in flight;
    the server batches them. The environment's OPENAI_API_KEY is sent as the bearer token. adapter: the name of the adapter in use, or None.

    Raises RolloutFailed, here and in every method, where the server cannot be reached, refuses, or answers something else.

    >>> ServerGenerator("http://localhost:8000", "base", tokenizer).generate([prompt_ids], max_new_tokens=8)[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int] | None = None,
        timeout: float = 600.0,
        retries: int = 6,
        concurrency: int = 64,
    ):
        self.model, self.tokenizer, self.concurrency = model, tokenizer, concurrency
        self.stop_ids = frozenset([*(stop_ids or []), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
        self.adapter: str | None = None
        self._client = Client(url, token=os.environ.get("OPENAI_API_KEY"), timeout=timeout, retries=retries)
        self._used: set[str] = set()
        self._processed: bool | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        constraint: Constraint | None = None,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> list[Generation]:
        """One generation a prompt (token ids), in the asked order; see `Generator`.

        A seed decides a row's stream on one server, not on another kind of generator. Raises ModelError for a constraint, and
        RolloutFailed where log-probabilities are asked for at a temperature, top-p or top-k of which the server gives other ones.
        """
        if constraint is not None:
            raise ModelError("a server's answers cannot be held to a constraint", where=self._client.url, mend="generate in this process")
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
        if logprobs and len(prompts):
            self._require_own_logprobs(prompts[0], sampling)
        request = self._request(max_new_tokens, sampling) | ({"logprobs": 1} if logprobs else {})
        requests = []
        for prompt, seed in zip(prompts, row_seeds(prompts, sampling.seed) if seeds is None else seeds, strict=True):
            own = {"seed": int(seed)} if sampling.temperature > 0 else {}
            requests.append(request | own | {"prompt": [int(token) for token in prompt]})
        return self._together(self._generation, requests)

    def logprobs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Natural log-probability of every answer token given its prompt and the answer before it: float32 [len(answer)] a pair.

        A vLLM 0.32 on a CPU that has --enable-lora breaks down over several prompts at once: give a concurrency of 1 there.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts, {len(answers)} answers")
        return self._together(self._scores, list(zip(prompts, answers, strict=True)))

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Has the server load an adapter folder, which it must see under the same path; generations come from it from then on.

        name: new for every version of the weights (`policy-12`). The server's cache of prompts goes by the name, so a name that was used
        before by this generator, or that the server holds, is refused; what another client loaded and unloaded cannot be seen.
        """
        if name in self._used or name == self.model:
            raise self._reused(name)
        try:
            self._adapter_route("load_lora_adapter", {"lora_name": name, "lora_path": str(Path(folder).resolve())}, name)
        except ServerRefused as error:
            raise self._reused(name) if "already been loaded" in error.message else error from error
        self._used.add(name)
        self.adapter = name

    def unload_adapter(self, name: str) -> None:
        """Has the server drop an adapter; its name stays used. Where it was the one in use, generations come from the base model again."""
        self._adapter_route("unload_lora_adapter", {"lora_name": name}, name)
        if self.adapter == name:
            self.adapter = None

    def _adapter_route(self, route: str, request: dict[str, Any], name: str) -> None:
        """Posts to a route of adapters; says so where the server has no such route: a refusal about an adapter names it."""
        try:
            self._client.post(route, request)
        except ServerRefused as error:
            if error.status in (404, 405) and name not in error.message:
                raise RolloutFailed("the server has no route to change adapters", where=self._client.address(route), mend=START) from error
            raise

    def _reused(self, name: str) -> RolloutFailed:
        return RolloutFailed(
            f"the adapter name {name!r} was used before, and the server would answer from what it kept under it",
            where=self._client.url,
            mend="give every version a name of its own, or restart the server",
        )

    def _request(self, max_new_tokens: int, sampling: Sampling) -> dict[str, Any]:
        """What every request of a call has in common. All settings are named, since the server fills gaps from the model's own ones."""
        sampled = sampling.temperature > 0
        return {
            "model": self.adapter or self.model,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampled else 1.0,
            "top_k": sampling.top_k if sampled else 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self.stop_ids),
            "return_token_ids": True,
        }

    def _together(self, ask: Callable[[Any], Answer], requests: Sequence[Any]) -> list[Answer]:
        """All answers in order, some requests at a time; the first failure ends the call."""
        with ThreadPoolExecutor(max(1, min(self.concurrency, len(requests)))) as pool:
            futures = [pool.submit(ask, request) for request in requests]
            try:
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _choice(self, request: dict[str, Any]) -> dict[str, Any]:
        """The one choice of an answer to /v1/completions."""
        answer = self._client.post("completions", request)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._odd("its answer does not hold one choice")
        return choices[0]

    def _generation(self, request: dict[str, Any]) -> Generation:
        """One request as a generation."""
        choice = self._choice(request)
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not _all(ids, int):
            raise self._odd("its answer holds no token_ids", mend="use a vLLM that knows return_token_ids (0.10.2 or later)")
        if reason not in ("stop", "length") or not ids:
            raise self._odd(f"an answer ended with {reason!r} after {len(ids)} tokens")
        logprobs = None
        if "logprobs" in request:
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
            if not _all(logprobs, float) or len(logprobs) != len(ids):
                raise self._odd("its answer does not hold one log-probability a token")
        said = ids[:-1] if reason == "stop" else ids
        text = self.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(ids, text, reason, logprobs)

    def _scores(self, pair: tuple[Sequence[int], Sequence[int]]) -> np.ndarray:
        """The log-probabilities of one answer: those of a prompt that holds it, echoed."""
        prompt, answer = ([int(token) for token in part] for part in pair)
        if not answer:
            return np.empty(0, np.float32)
        request = self._request(0, GREEDY) | {"prompt": prompt + answer, "echo": True, "logprobs": 1}
        logprobs = (self._choice(request).get("logprobs") or {}).get("token_logprobs") or []
        scores = logprobs[len(prompt) : len(prompt) + len(answer)]
        if len(scores) != len(answer) or not _all(scores, float):
            raise self._odd("it does not give the log-probabilities of a prompt")
        return np.array(scores, dtype=np.float32)

    def _require_own_logprobs(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Refuses settings under which the server's log-probabilities are not those of softmax(logits / temperature).

        vLLM gives them of the logits as they are (the default), or, with --logprobs-mode processed_logprobs, after temperature, top-k and
        top-p. Which one is seen by asking: at a high temperature those of the likeliest tokens only stay where they are raw. One token's
        alone would not do: a sure token's is near 0 under any temperature.
        """
        truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
        if sampling.temperature in (0, 1) and not truncated:
            return
        if self._processed is None:
            ask = {"prompt": [int(token) for token in prompt], "logprobs": SEEN_LOGPROBS}
            greedy = self._top_logprobs(self._request(1, GREEDY) | ask)
            flat = self._top_logprobs(self._request(1, Sampling(temperature=FLAT_TEMPERATURE)) | ask)
            self._processed = max(abs(greedy[token] - flat[token]) for token in greedy.keys() & flat.keys()) > SAME_LOGPROB
        if self._processed and truncated:
            mend = "sample with top_p 1 and top_k 0"
            raise self._odd("its log-probabilities are those after top-p and top-k", mend=mend)
        if not self._processed and sampling.temperature not in (0, 1):
            mend = "start it with --logprobs-mode processed_logprobs, or sample at temperature 1"
            raise self._odd(f"its log-probabilities are those before the temperature of {sampling.temperature}", mend=mend)

    def _top_logprobs(self, request: dict[str, Any]) -> dict[str, float]:
        """The log-probabilities that the server gives for the likeliest first tokens, by their text."""
        top = (self._choice(request).get("logprobs") or {}).get("top_logprobs")
        if not isinstance(top, list) or not top or not isinstance(top[0], dict) or not top[0]:
            raise self._odd("it gives no log-probabilities")
        return top[0]

    def _odd(self, what: str, mend: str | None = None) -> RolloutFailed:
        return RolloutFailed(f"the server cannot be sampled from: {what}", where=self._client.url, mend=mend)


def _all(values: object, kind: type) -> bool:
    """Whether it is a list of integers (kind int), or of numbers (kind float)."""
    kinds = (int,) if kind is int else (int, float)
    return isinstance(values, list) and all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
