"""Text to token ids with the place of each token, and control tokens kept for the template.

An `Encoder` holds a copy of a fast tokenizer's backend that adds nothing (no BOS, no padding, no truncation) and reports exact
offsets. A text is tokenised as a whole; where a token must not span a point, or a string of the user's must not become a control
token, the text is split there and the pieces are tokenised each for itself, as a continuation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..errors import ModelError, TemplateError

ROUNDS = 8  # of splitting: each breaks every control token in sight, and breaking one can lay bare another inside it

REMEMBERED = 10_000  # short texts whose answer is kept


class Encoded(NamedTuple):
    """ids int32[T]; starts, ends int64[T]: the characters each token covers (bytes of one character share its place)."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class _Piece(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


class Rule(NamedTuple):
    """Which ids (control: bool[V]) must not come from which spans (start, end in characters) of a text."""

    control: np.ndarray
    spans: Sequence[tuple[int, int]]

    def holds(self, place: tuple[int, int]) -> bool:
        return any(place[0] < end and place[1] > start for start, end in self.spans)


class Encoder:
    """Tokenises for one tokenizer. special: the strings of its special tokens, by id; special_mask: bool[V], True at their ids."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say which characters a token covers",
                where="tokenizer",
                mend="use a model folder with a tokenizer.json (a fast tokenizer)",
            )
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None  # it would add tokens and trim offsets
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = False
        added = self.backend.get_added_tokens_decoder()
        self.added = {number: token.content for number, token in added.items() if token.content.strip()}
        self.special = {number: text for number, text in self.added.items() if added[number].special}
        self.length = len(tokenizer)
        self.special_mask = self.mask(self.special)
        self.eos = tokenizer.eos_token
        self.eos_id = tokenizer.eos_token_id
        self.unk_id = tokenizer.unk_token_id
        self.before_text = _before_text(tokenizer)
        self.layouts: dict[str, Any] = {}
        self._found: dict[str, str | None] = {}
        self._tails: dict[str, list[int]] = {}
        anchor = self.backend.encode("\n", add_special_tokens=False).ids
        self.anchor = anchor if self.backend.encode("\na", add_special_tokens=False).ids != [*anchor, *self._plain("a").ids] else None

    def mask(self, numbers: Iterable[int]) -> np.ndarray:
        """bool[V]: True at these ids."""
        flags = np.zeros(max([self.backend.get_vocab_size(with_added_tokens=True), *(number + 1 for number in self.added)]), dtype=bool)
        flags[list(numbers)] = True
        return flags

    def first_special(self, text: str) -> tuple[int, int] | None:
        """Start and end of the first special token's string in a text; the longest where several start there."""
        found = [(at, -len(token)) for token in self.special.values() if (at := text.find(token)) >= 0]
        return (min(found)[0], min(found)[0] - min(found)[1]) if found else None

    def last_special(self, text: str) -> str | None:
        """The last special token's string that ends in a text."""
        found = [(at + len(token), len(token), token) for token in self.special.values() if (at := text.rfind(token)) >= 0]
        return max(found)[2] if found else None

    def not_inside_special(self, text: str, point: int) -> int:
        """The point, or the beginning of the special token's string that it would cut."""
        for token in self.special.values():
            at = text.find(token, max(0, point - len(token) + 1))
            if 0 <= at < point < at + len(token):
                return at
        return point

    def holds_special(self, text: str) -> str | None:
        """A special token's string that the text holds, or None; remembered, as rows repeat their tools."""
        if len(self._found) > REMEMBERED:
            self._found.clear()
        if text not in self._found:
            self._found[text] = next((token for token in self.special.values() if token in text), None)
        return self._found[text]

    def encode_all(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text as a whole."""
        return [_encoded(one.ids, one.offsets) for one in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_split(self, text: str, points: Sequence[int]) -> Encoded:
        """The text in pieces that end at the points (characters): no token spans a point."""
        edges = sorted({0, len(text), *points})
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for begin, end in pairwise(edges):
            piece, at = self._piece(text[begin:end], begin)
            ids += piece.ids
            offsets += [(first + at, last + at) for first, last in piece.offsets]
        return _encoded(ids, offsets)

    def encode_tail(self, text: str) -> list[int]:
        """The ids of a text; remembered, as the ends of prompts repeat."""
        if len(self._tails) > REMEMBERED:
            self._tails.clear()
        if text not in self._tails:
            self._tails[text] = self._plain(text).ids
        return self._tails[text]

    def _plain(self, text: str) -> Any:
        return self.backend.encode(text, add_special_tokens=False)

    def _piece(self, piece: str, at: int) -> tuple[Any, int]:
        """A piece from place `at` of a text, tokenised, and what its offsets lack. Tokenizers that put a space before what they get
        see a newline first, which is taken out again."""
        if at == 0 or self.anchor is None:
            return self._plain(piece), at
        skip = len(self.anchor)
        whole = self._plain("\n" + piece)
        if whole.ids[:skip] != self.anchor:
            raise TemplateError(
                f"the tokenizer joins a newline with {piece[:20]!r}, so the text cannot be split before it",
                mend="take the control token's text, or the space around it, out of the row",
            )
        return _Piece(whole.ids[skip:], whole.offsets[skip:]), at - 1

    def protect(self, text: str, encoded: Encoded, rules: Sequence[Rule], points: Sequence[int] = ()) -> Encoded:
        """The same text, tokenised so that no control token comes from the row's own spans.

        points: where `encoded` is split already. Raises TemplateError where a control token cannot be kept out.
        """
        cuts = set(points)
        for _ in range(ROUNDS):
            forged = [(place, rule) for rule in rules for place in self._control_places(text, encoded, rule.control) if rule.holds(place)]
            if not forged:
                return encoded
            cuts.update(_cut(text, place, rule) for place, rule in forged)
            encoded = self.encode_split(text, sorted(cuts))
        start, end = forged[0][0]
        raise TemplateError(f"the tokenizer makes a control token of plain text: {text[start:end]!r}", mend="take that text out of the row")

    def _control_places(self, text: str, encoded: Encoded, control: np.ndarray) -> list[tuple[int, int]]:
        places = []
        for index in np.flatnonzero(control[encoded.ids]):
            start, end = int(encoded.starts[index]), int(encoded.ends[index])
            number = int(encoded.ids[index])
            if number != self.unk_id or self.special.get(number, "") in text[start:end]:  # unknown characters give the unknown token
                places.append((start, end))
        return places


def _before_text(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer itself puts before plain text: its BOS, or nothing."""
    whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return next((tuple(whole[:at]) for at in range(len(whole)) if whole[at : at + len(plain)] == plain), ())


def _encoded(ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return Encoded(np.array(ids, dtype=np.int32), places[:, 0], places[:, 1])


def _cut(text: str, place: tuple[int, int], rule: Rule) -> int:
    """A point that breaks the control token at this place: after its first character that is no space."""
    found = text[slice(*place)]
    first = place[0] + len(found) - len(found.lstrip())
    last = first + len(found.strip())
    if last - first < 2 or not any(start <= first and last <= end for start, end in rule.spans):
        raise TemplateError(
            f"the control token {found.strip()!r} is made of the row's text and the template's", mend="take that text out of the row"
        )
    return first + 1


_encoders: weakref.WeakKeyDictionary[Any, Encoder] = weakref.WeakKeyDictionary()


def encoder_for(tokenizer: Any) -> Encoder:
    """The tokenizer's encoder, made once; made anew when tokens were added since."""
    encoder = _encoders.get(tokenizer)
    if encoder is None or encoder.length != len(tokenizer) or encoder.eos != tokenizer.eos_token:
        encoder = _encoders[tokenizer] = Encoder(tokenizer)
    return encoder
