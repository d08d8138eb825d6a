"""Writes pairs.jsonl beside this file: what recipes/quickstart-rlhf.yaml learns its reward from.

Takes the recipe's first stage, trains it, samples answers to the messages of prompts.jsonl, and makes preference pairs of answers whose
gold rewards differ; one label in ten is flipped, as people's are. Gives rows {prompt, chosen, rejected} of messages, in some minutes.
Run it:  python recipes/replies/make_pairs.py
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gold import gold  # beside this file

HERE = Path(__file__).parent
SEED = 0
ANSWERS = 4  # sampled for each message, at temperature 1
PAIRS_PER_PROMPT = 2  # at most
FLIPPED = 0.1
LONGEST = 40  # tokens, as in the recipe's rollouts


def make_pairs(asked: Sequence[str], answered: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Preference rows from several answers to each message: disjoint pairs of different gold, of whose labels exactly a tenth are wrong."""
    draw = random.Random(SEED)
    ordered = [(message, *pair) for message, answers in zip(asked, answered, strict=True) for pair in _pairs(message, answers, draw)]
    wrong = set(draw.sample(range(len(ordered)), round(FLIPPED * len(ordered))))
    rows = []
    for number, (message, better, worse) in enumerate(ordered):
        chosen, rejected = (worse, better) if number in wrong else (better, worse)
        rows.append(
            {"prompt": [_said("user", message)], "chosen": [_said("assistant", chosen)], "rejected": [_said("assistant", rejected)]}
        )
    return rows


def _pairs(message: str, answers: Sequence[str], draw: random.Random) -> Iterator[tuple[str, str]]:
    left = sorted({answer.strip() for answer in answers} - {""})
    draw.shuffle(left)
    for _ in range(PAIRS_PER_PROMPT):
        found = [(a, b) for a in left for b in left if gold(message, a) > gold(message, b)]
        if not found:
            return
        pair = draw.choice(found)
        left = [answer for answer in left if answer not in pair]
        yield pair


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def sample_answers(asked: Sequence[str], run: Path) -> list[list[str]]:
    """Trains the recipe's first stage into the folder `run`, and samples answers to every message."""
    import tunesmith
    from tunesmith.chat import Chat
    from tunesmith.data.records import Message
    from tunesmith.data.render import encode_prompts
    from tunesmith.generate import Sampling

    recipe = tunesmith.load_recipe(HERE.parent / "quickstart-rlhf.yaml").model_dump()
    first = {
        "stages": recipe["stages"][:1],
        "data": {"train": recipe["data"]["train"]},
        "task": {"description": recipe["task"]["description"]},
    }
    tunesmith.train({"name": "replies", "seed": recipe["seed"], "model": recipe["model"], **first}, out=run)
    chat = Chat(run)
    conversations = [[*chat.messages, Message("user", message)] for message in asked]
    prompts = [ids.tolist() for ids in encode_prompts(conversations, chat.template, chat.tokenizer) for _ in range(ANSWERS)]
    sampled = chat.generator.generate(prompts, max_new_tokens=LONGEST, sampling=Sampling(temperature=1.0, seed=SEED))
    return [[one.text for one in sampled[at : at + ANSWERS]] for at in range(0, len(sampled), ANSWERS)]


def main() -> None:
    """Reads prompts.jsonl, writes pairs.jsonl."""
    lines = (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["prompt"][-1]["content"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        answered = sample_answers(asked, Path(folder) / "sft")
    rows = make_pairs(asked, answered)
    (HERE / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
