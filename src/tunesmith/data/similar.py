"""Which texts are the same, or nearly: normalisation, word 3-grams, and pairs found by MinHash.

MinHash with banded locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3) proposes
pairs; each is then checked by the exact Jaccard similarity, so a proposal can be missed (with probability under
MISS_RATE at the threshold) but none is false.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

NUM_PERM = 128  # hash functions of a signature
MISS_RATE = 1e-3  # of pairs exactly at the threshold
BOILERPLATE_SHARE = 0.1  # of texts; a 3-gram that more of them hold is a form's wording, not a text's own
BOILERPLATE_LEAST = 10  # texts; and never fewer than this
_SEED = 42
_APOSTROPHES = dict.fromkeys(map(ord, "'’‘`´ʼ"))
_KEPT_SIGNS = frozenset("*/\\%@#&")  # punctuation by category, but with a meaning of its own
_EDGES = "\"'’‘“”«»‹›„‚`´()[]{}<>.,;:!?…¡¿。、，！？：；"
# Scripts that put no space between words: each character counts as a word.
_SPACELESS = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def squeeze(text: str) -> str:
    """The text with every run of whitespace as one space, and none at the ends."""
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """The words of a text without case, whitespace and punctuation.

    In a word with a digit, signs stay (3.50 is not 350, 12-5 is not 12/5) but for those at its edges; elsewhere
    apostrophes vanish (didn't, didnt) and other punctuation separates (e-mail, e mail).
    """
    found: list[str] = []
    for word in unicodedata.normalize("NFKC", text).casefold().split():
        if any(sign.isdigit() for sign in word):
            found.append(word.strip(_EDGES))
        elif word.isalnum() and word.isascii():
            found.append(word)
        else:
            found.extend(_SPACELESS.sub(r" \1 ", word.translate(_APOSTROPHES).translate(_BLANKED)).split())
    return [word for word in found if word]


def normalise(text: str) -> str:
    """The words of a text, joined by single spaces: equal for texts that differ in case, whitespace and punctuation only."""
    return " ".join(words(text))


class _Blanked(dict[int, int | str]):
    """A translation table that turns punctuation into a space; each character is looked up once."""

    def __missing__(self, code: int) -> int | str:
        sign = chr(code)
        self[code] = " " if unicodedata.category(sign).startswith("P") and sign not in _KEPT_SIGNS else code
        return self[code]


_BLANKED = _Blanked()


def shingles(text: str) -> frozenset[str]:
    """The text's word 3-grams; a shorter text is one."""
    found = words(text)
    if not found:
        return frozenset()
    return frozenset(" ".join(found[index : index + 3]) for index in range(max(1, len(found) - 2)))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared over all: 1 for equal sets, 0 for disjoint ones."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared) if shared else 0.0


def near_pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """(earlier, later, similarity) of texts whose similarity reaches the threshold.

    Of texts with equal 3-grams, the later ones are paired with the first only, and only the first with others. 3-grams
    that more than BOILERPLATE_SHARE of the texts hold do not count, so a repeated instruction makes no two texts alike.
    """
    sets = _own([shingles(text) for text in texts])
    pairs: list[tuple[int, int, float]] = []
    first: dict[frozenset[str], int] = {}
    for index, one in enumerate(sets):
        if one and first.setdefault(one, index) != index:
            pairs.append((first[one], index, 1.0))
    places = sorted(first.values())
    for later, earlier in _candidates([sets[i] for i in places], [sets[i] for i in places], threshold):
        if earlier < later:
            similarity = jaccard(sets[places[earlier]], sets[places[later]])
            if similarity >= threshold:
                pairs.append((places[earlier], places[later], similarity))
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def nearest(texts: Sequence[str], among: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """For each text that is near one of `among`: {its index: (index in `among` of the nearest, similarity)}."""
    sets = _own([shingles(text) for text in [*texts, *among]])
    left, right = sets[: len(texts)], sets[len(texts) :]
    found: dict[int, tuple[int, float]] = {}
    for index, other in _candidates(left, right, threshold):
        similarity = jaccard(left[index], right[other])
        if similarity >= threshold and similarity > found.get(index, (-1, 0.0))[1]:
            found[index] = (other, similarity)
    return found


def _own(sets: list[frozenset[str]]) -> list[frozenset[str]]:
    """The sets without the 3-grams that too many of them hold."""
    counts = Counter(gram for one in sets for gram in one)
    limit = max(BOILERPLATE_LEAST, BOILERPLATE_SHARE * len(sets))
    common = {gram for gram, count in counts.items() if count > limit}
    return [one - common if not common.isdisjoint(one) else one for one in sets]


def _candidates(asking: Sequence[frozenset[str]], indexed: Sequence[frozenset[str]], threshold: float) -> Iterator[tuple[int, int]]:
    """(index in `asking`, index in `indexed`) of pairs that share a band; empty sets have none."""
    import rensa

    lsh = rensa.RMinHashLSH(threshold, NUM_PERM, _bands(threshold))
    for index, one in enumerate(indexed):
        if one:
            lsh.insert(index, _signature(one))
    for index, one in enumerate(asking):
        if one:
            for other in sorted(lsh.query(_signature(one))):
                yield index, other


def _signature(one: Iterable[str]):
    import rensa

    signature = rensa.RMinHash(NUM_PERM, _SEED)
    signature.update(sorted(one))
    return signature


def _bands(threshold: float) -> int:
    """The fewest bands that miss at most MISS_RATE of the pairs at the threshold."""
    for bands in (4, 8, 16, 32, 64):
        if (1 - threshold ** (NUM_PERM // bands)) ** bands <= MISS_RATE:
            return bands
    return NUM_PERM
