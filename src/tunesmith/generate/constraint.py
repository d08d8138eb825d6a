"""Decoding under a grammar: only tokens that keep the answer inside a JSON schema, or inside a list of labels, may be chosen.

Takes a schema or labels and the tokenizer, gives a `Constraint` whose matchers mask logits in place. The grammars are xgrammar's
(Dong et al. 2024, arXiv:2411.15100); each is compiled once a process, under a hash of the grammar and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import xgrammar

from ..errors import ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_compilers: dict[str, xgrammar.GrammarCompiler] = {}
_compiled: dict[tuple[str, str], GrammarConstraint] = {}


class GrammarConstraint:
    """A compiled grammar over one tokenizer. Safe to share: the state of a row is in its matcher.

    control_characters: whether tokens with characters below U+0020 may be chosen where the grammar allows them.
    """

    def __init__(self, compiled: xgrammar.CompiledGrammar, *, control_characters: bool):
        self._compiled = compiled
        self.vocab_size = compiled.tokenizer_info.vocab_size
        self.stop_ids = frozenset(compiled.tokenizer_info.stop_token_ids)
        self._usable: torch.Tensor | None = None if control_characters else _without_control_characters(compiled.tokenizer_info)

    def matcher(self) -> GrammarMatcher:
        """A fresh state, one for each row."""
        return GrammarMatcher(self._compiled, self.vocab_size, self.stop_ids, self._usable)


class GrammarMatcher:
    """One row's place in the grammar. usable: a bit mask over the tokens that may ever be chosen, or None for all."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int, stop_ids: frozenset[int], usable: torch.Tensor | None):
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._vocab_size, self._stop_ids, self._usable = vocab_size, stop_ids, usable
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._fill()

    def _fill(self) -> None:
        """Brings the bit mask of the tokens that may come next up to date."""
        self._matcher.fill_next_token_bitmask(self._bitmask)
        if self._usable is not None:
            self._bitmask &= self._usable

    def mask_(self, logits_V: torch.Tensor) -> None:
        """Sets every logit that the grammar forbids, and those beyond the tokenizer's vocabulary, to minus infinity.

        logits [V], a contiguous float32 row on any device, V >= the tokenizer's vocabulary; changed in place.
        """
        bitmask = self._bitmask.to(logits_V.device)
        xgrammar.apply_token_bitmask_inplace(logits_V[None], bitmask, vocab_size=self._vocab_size)
        logits_V[self._vocab_size :] = -torch.inf

    def accept(self, token: int) -> bool:
        """Moves on by the chosen token; true when the answer is complete: only a stop token may follow, or one was chosen."""
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"token {token} is outside the grammar; the logits it was chosen from were not masked")
        if self._matcher.is_terminated():
            return True
        self._fill()
        if not self._matcher.is_completed():
            return False
        allowed = ((self._bitmask[0][:, None] >> torch.arange(32)) & 1).flatten().nonzero().flatten()
        return self._stop_ids.issuperset(allowed.tolist())


def _without_control_characters(info: xgrammar.TokenizerInfo) -> torch.Tensor:
    """The bit mask of the tokens without a character below U+0020: JSON strings may not hold one, xgrammar's grammar of a string with a
    length limit lets them pass.
    """
    usable = torch.tensor([not any(byte < 0x20 for byte in token) for token in info.decoded_vocab])
    bits = torch.nn.functional.pad(usable.long(), (0, -len(usable) % 32)).view(1, -1, 32) << torch.arange(32)
    return bits.sum(dim=-1).to(torch.int32)


def json_schema_constraint(schema: dict, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int] = ()) -> GrammarConstraint:
    """Answers that are JSON under the schema, on one line, with json.dumps's default separators and no other white space.

    Properties come in the schema's order, and none that the schema does not name. stop_ids: tokens that may end the answer beside the
    tokenizer's own end token. Raises RecipeError where the schema has no grammar.

    >>> constraint = json_schema_constraint({"type": "object", "properties": {"n": {"type": "integer"}}}, tokenizer)  # doctest: +SKIP
    """
    text = json.dumps(schema)
    return _constraint(
        text,
        tokenizer,
        stop_ids,
        lambda compiler: compiler.compile_json_schema(text, any_whitespace=False, strict_mode=True),
        control_characters=False,
    )


def choice_constraint(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int] = ()) -> GrammarConstraint:
    """Answers that are exactly one of the labels; stop_ids as above. Raises RecipeError where there is no label, or an empty one.

    >>> constraint = choice_constraint(["refund", "card_lost"], tokenizer)  # doctest: +SKIP
    """
    if not labels or not all(labels):
        raise RecipeError("a choice needs at least one label, and no empty one", where="labels", mend="name the labels to choose from")
    grammar = "root ::= " + " | ".join(json.dumps(label, ensure_ascii=False) for label in dict.fromkeys(labels))
    return _constraint(grammar, tokenizer, stop_ids, lambda compiler: compiler.compile_grammar(grammar), control_characters=True)


def _constraint(
    grammar: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    compile_with: Callable[[xgrammar.GrammarCompiler], xgrammar.CompiledGrammar],
    *,
    control_characters: bool,
) -> GrammarConstraint:
    """Looks the grammar up under its hash and that of the tokenizer with the stop tokens, or compiles it."""
    if tokenizer.eos_token_id is None and not stop_ids:
        raise ModelError("the tokenizer has no end token, so an answer under a constraint could not end", mend="set its eos_token")
    stops = sorted({*stop_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    tokenizer_hash = _tokenizer_hash(tokenizer, stops)
    key = (hashlib.sha256(grammar.encode()).hexdigest(), tokenizer_hash)
    if key not in _compiled:
        if tokenizer_hash not in _compilers:
            vocab_size = max(tokenizer.get_vocab().values()) + 1
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
            _compilers[tokenizer_hash] = xgrammar.GrammarCompiler(info, max_threads=1)
        try:
            _compiled[key] = GrammarConstraint(compile_with(_compilers[tokenizer_hash]), control_characters=control_characters)
        except RuntimeError as error:  # xgrammar's own errors derive from it
            raise RecipeError(
                f"no grammar can be made of it: {error}", where=grammar[:200], mend="use type, enum, properties, required and items"
            ) from error
    return _compiled[key]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> str:
    """sha256 over the tokenizer's whole definition and the stop tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{stop_ids}:{definition}".encode()).hexdigest()
