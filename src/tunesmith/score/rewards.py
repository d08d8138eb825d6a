"""Rewards: numbers for sampled answers, from references, patterns, schemas, tests, a user's function or a reward model.

Takes the recipe's rewards (`make_rewards`), then prompts, answers and the rows' columns; gives every answer's weighted sum, with NaN
for an answer that cannot be scored and the reasons counted. What a user or a model wrote never runs in this process: functions,
patterns and schemas are asked in processes that are killed when they take too long, an answer's code runs in bubblewrap.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..errors import RecipeError
from ..recipe import ExactAnswerReward, JSONSchemaReward, ModelReward, PythonReward, RegexReward, Reward, UnitTestReward
from ._reward_child import clean
from ._reward_process import Outcome, RewardProcess, Unscorable
from ._sandbox import SandboxFailed, find_sandbox
from .structured import OutputFields
from .text import exact_match

SECONDS_PER_ANSWER = 5.0  # of a regular expression or a schema on one answer: only catastrophic backtracking takes as long
CODE_BLOCKS = ("```python\n", "```py\n")


class RewardFunction(Protocol):
    """What scores answers: one number each, None where there is none. prompts: the last user text; columns: the row's other keys."""

    name: str
    weight: float

    def __call__(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[float | None]: ...


@dataclass(frozen=True)
class Scores:
    """Scores of N answers.

    total: float64 [N], the weighted sum; NaN where a reward of positive weight has no score. parts: each reward's own scores before
    weighting, float64 [N]. unscorable: how many totals are NaN. reasons: each reason why an answer had no score, and how often.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    unscorable: int
    reasons: dict[str, int]

    @property
    def errors(self) -> list[str]:
        """The distinct reasons, the most frequent first."""
        return [reason for reason, _ in Counter(self.reasons).most_common()]


class RewardSet:
    """Several rewards as one. A context manager; `close` ends the processes that the rewards run in."""

    def __init__(self, functions: Sequence[RewardFunction]):
        self.functions = _renamed(functions)

    def __call__(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> Scores:
        """Scores N answers; every column has N values.

        Raises RecipeError where a reward needs a column that is not there; ValueError where the lengths differ.
        """
        count = len(completions)
        if len(prompts) != count or any(len(values) != count for values in columns.values()):
            raise ValueError("prompts, completions and every column must be of one length")
        self.check_columns(columns)
        total, scorable, parts, reasons = np.zeros(count), np.ones(count, bool), {}, Counter[str]()
        for name, function in self.functions.items():
            outcomes = _outcomes(function, prompts, completions, columns)
            reasons.update(f"reward {name}: {outcome.reason}" for outcome in outcomes if isinstance(outcome, Unscorable))
            parts[name] = np.array([np.nan if isinstance(outcome, Unscorable) else outcome for outcome in outcomes], np.float64)
            if function.weight > 0:
                with np.errstate(over="ignore", invalid="ignore"):
                    total += function.weight * parts[name]
                scorable &= np.isfinite(parts[name])
        if overflown := int((scorable & ~np.isfinite(total)).sum()):
            reasons["the weighted sum is not finite"] = overflown
        total[~np.isfinite(total)] = np.nan
        return Scores(total, parts, int(np.isnan(total).sum()), dict(reasons))

    def check_columns(self, names: Collection[str]) -> None:
        """Raises RecipeError where rows with these columns are not what the rewards need; worth asking before training."""
        for name, function in self.functions.items():
            if not isinstance(function, _Own):
                continue
            missing = [column for column in function.needs if column not in names]
            if missing:
                have = ", ".join(sorted(names)) or "none"
                raise RecipeError(
                    f"reward {name} needs the column {missing[0]}, which the rows do not have (they have: {have})",
                    where="rewards",
                    mend="name the column in the reward's settings, or add it to every row of the data",
                )
            taken = [column for column in function.refuses if column in names]
            if taken:
                what = f"the rows' column {taken[0]} is named as one of the first two arguments of {name}"
                raise RecipeError(what, where="rewards", mend="call the function's first two arguments prompts and completions")

    def close(self) -> None:
        """Ends the rewards' processes."""
        for function in self.functions.values():
            if isinstance(function, _Own):
                function.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def make_rewards(rewards: Sequence[Reward], *, model: Callable[[ModelReward], RewardFunction] | None = None) -> RewardSet:
    """The recipe's rewards, ready to be asked. model: makes the function of a reward model.

    Raises RecipeError for all that can be known before training: no reward, a file or function that is not there or does not take
    (prompts, completions, **columns), a pattern or schema that is none, no bubblewrap for unit tests, no `model` for a reward model.
    """
    if not rewards:
        raise RecipeError("no reward is given", where="rewards", mend="name at least one, e.g. {type: exact_answer}")
    functions: list[RewardFunction] = []
    try:
        for settings in rewards:
            functions.append(_made(settings, model))
    except BaseException:
        RewardSet(functions).close()
        raise
    return RewardSet(functions)


def _made(settings: Reward, model: Callable[[ModelReward], RewardFunction] | None) -> RewardFunction:
    if isinstance(settings, ExactAnswerReward):
        return _ExactAnswer(settings)
    if isinstance(settings, UnitTestReward):
        return _UnitTests(settings)
    if isinstance(settings, ModelReward):
        if model is None:
            raise RecipeError("a reward model cannot be asked here", where="rewards.model", mend="take a reward that a program checks")
        return model(settings)
    return _InProcess(settings)


class _Own(ABC):
    """The base of the rewards of this file: they say why an answer has no score. needs, refuses: columns of the rows."""

    def __init__(self, settings: Any):
        self.name: str = settings.type
        self.weight: float = settings.weight
        self.needs: list[str] = []
        self.refuses: list[str] = []

    @abstractmethod
    def outcomes(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        """Each answer's score, or why it has none."""

    def __call__(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[float | None]:
        found = self.outcomes(prompts, completions, columns)
        return [None if isinstance(outcome, Unscorable) else outcome for outcome in found]

    def close(self) -> None:
        """Ends what the reward started: most start nothing."""
        return


class _ExactAnswer(_Own):
    def __init__(self, settings: ExactAnswerReward):
        super().__init__(settings)
        self.column = settings.column
        self.needs = [settings.column]

    def outcomes(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        return [self._outcome(*pair) for pair in zip(completions, columns[self.column], strict=True)]

    def _outcome(self, completion: str, reference: Any) -> Outcome:
        if isinstance(reference, str):
            return exact_match(completion, reference)
        if isinstance(reference, bool) or not isinstance(reference, int | float):
            return Unscorable(f"the row's {self.column} is neither text nor a number")
        return float(_number(completion) == Decimal(str(reference)))


def _number(text: str) -> Decimal | None:
    """The number that the text is, however it is written: 68, +68 and 68.0 are one. None for text that is no finite number.

    >>> _number(" 68\\n") == _number("68.0"), _number("68 apples")
    (True, None)
    """
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


class _UnitTests(_Own):
    def __init__(self, settings: UnitTestReward):
        super().__init__(settings)
        self.column, self.seconds = settings.column, settings.seconds
        self.needs = [settings.column]
        self.sandbox = find_sandbox()

    def outcomes(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        return [self._outcome(*pair) for pair in zip(completions, columns[self.column], strict=True)]

    def _outcome(self, completion: str, tests: Any) -> Outcome:
        if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) for test in tests):
            return Unscorable(f"the row's {self.column} is no list of Python statements")
        try:
            passed = self.sandbox.run(code_of(completion), list(tests), self.seconds)
        except SandboxFailed as error:
            return Unscorable(f"the sandbox did not start: {error}")
        return sum(passed) / len(passed)


def code_of(completion: str) -> str:
    """The Python code of an answer: its first ```python block, else the whole of it.

    >>> code_of("Here:\\n```python\\nx = 1\\n```\\nDone."), code_of("x = 1")
    ('x = 1\\n', 'x = 1')
    """
    for opening in CODE_BLOCKS:
        _, found, rest = completion.partition(opening)
        if found:
            return rest.partition("```")[0]
    return completion


class _InProcess(_Own):
    """A Python function, a regular expression or a JSON Schema: each in a process of its own."""

    def __init__(self, settings: PythonReward | RegexReward | JSONSchemaReward):
        super().__init__(settings)
        seconds, where = SECONDS_PER_ANSWER, f"rewards.{settings.type}"
        if isinstance(settings, PythonReward):
            file, function = _file_and_function(settings.function)
            job: dict[str, Any] = {"kind": "python", "file": str(file), "function": function}
            self.name, seconds, where = function, settings.seconds, settings.function
        elif isinstance(settings, RegexReward):
            job = {"kind": "regex", "pattern": settings.pattern}
            where = f"rewards.regex.pattern: {settings.pattern}"
        else:
            job = {"kind": "json_schema", "schema": _schema(settings.output_schema), "column": settings.column}
            where = settings.output_schema
        self.process = RewardProcess(job, seconds=seconds, singly=not isinstance(settings, PythonReward), where=where)
        self.needs, self.refuses = list(self.process.required), list(self.process.taken)
        if isinstance(settings, JSONSchemaReward) and settings.column is not None:
            self.needs.append(settings.column)
        self.sent = None if isinstance(settings, PythonReward) else set(self.needs)

    def outcomes(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        sent = columns if self.sent is None else {name: values for name, values in columns.items() if name in self.sent}
        return self.process.score(prompts, completions, sent)

    def close(self) -> None:
        self.process.close()


def _file_and_function(text: str) -> tuple[Path, str]:
    file, colon, function = text.rpartition(":")
    if not colon or not file or not function.isidentifier():
        raise RecipeError("the reward names no function", where=text, mend="write file:function, e.g. rewards.py:polite")
    path = Path(file).absolute()
    if not path.is_file():
        raise RecipeError(f"the reward's file is not there: {path}", where=text, mend="write file:function, e.g. rewards.py:polite")
    return path, function


def _schema(file: str) -> Any:
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"the JSON Schema cannot be read: {error}", where=file, mend="name a UTF-8 file of JSON") from error
    OutputFields.from_schema(schema, where=file)
    return schema


def _renamed(functions: Sequence[RewardFunction]) -> dict[str, RewardFunction]:
    """The functions by name; the second of a name gets a number."""
    named: dict[str, RewardFunction] = {}
    for function in functions:
        name, number = function.name, 1
        while name in named:
            number += 1
            name = f"{function.name}_{number}"
        named[name] = function
    return named


def _outcomes(function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
    if isinstance(function, _Own):
        return function.outcomes(prompts, completions, columns)
    values = function(prompts, completions, columns)
    if len(values) != len(completions):
        return [Unscorable(f"returned {len(values)} scores for {len(completions)} answers")] * len(completions)
    return [Unscorable(found) if isinstance(found := clean(value), str) else found for value in values]
