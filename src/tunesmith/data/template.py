"""Chat templates: the model's own, or a named one for a base model, rendered where they can do no harm.

Takes a tokenizer (for its `chat_template` and named special tokens) and the recipe's model section; gives a `ChatTemplate`, whose
`render` returns byte for byte what transformers' `apply_chat_template(tokenize=False)` does, but for the clock: `strftime_now`
answers from a fixed one, so that training, evaluation and serving render the same text on any day. Rendering happens in a child
process (_template_child.py) that is killed after a second, may not grow by more than 256 MB, and is started once and kept.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ..errors import MissingFile, ModelError, TemplateError
from ..recipe import ModelSection
from .records import REASONING_KEYS

SECONDS_PER_RENDER = 1.0
START_SECONDS = 60.0  # for the child to import jinja2, on a busy machine
PATIENCE = 3  # renders of one call that may be killed before the template is given up
JOBS_PER_BATCH = 64
BYTES_PER_BATCH = 2 * 2**20
KILLED = ("time", "died")  # errors that cost the child
FIXED_CLOCK = "2025-01-01T00:00:00"
CHILD = Path(__file__).with_name("_template_child.py")
CHILD_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "VIRTUAL_ENV")  # nothing that may hold a secret
MARKER = re.compile(r"<\|[A-Za-z0-9_.-]{1,40}\|>|<(?:start|end)_of_turn>")  # what a template file writes as a token of its own


class NamedTemplate(NamedTuple):
    """A template for base models, and the tokens it writes."""

    text: str
    tokens: tuple[str, ...]


NAMED_TEMPLATES = {
    "chatml": NamedTemplate(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    )
}


class RenderJob(NamedTuple):
    """What one render gets. messages: dicts with role, content …, as transformers takes them; tools: JSON schemas, or None."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    add_generation_prompt: bool = False


@dataclass
class ChatTemplate:
    """A template and the variables it is rendered with.

    text, tool_text: the Jinja source, and the one used where a row brings tools (models with several templates), else None.
    special_tokens: the tokenizer's named special tokens (bos_token …). name: for errors. new_tokens: tokens the template writes
    that the tokenizer does not have; they must be added and trained. clock: the time `strftime_now` gives; clock_used: whether a
    render asked for it so far. sha256: of everything that decides the bytes.
    """

    text: str
    special_tokens: dict[str, str]
    name: str
    tool_text: str | None = None
    new_tokens: tuple[str, ...] = ()
    clock: str = FIXED_CLOCK
    clock_used: bool = field(default=False, compare=False)

    @property
    def sha256(self) -> str:
        """Hash of all that decides what is rendered."""
        parts = [self.text, self.tool_text, sorted(self.special_tokens.items()), self.clock]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text. Raises TemplateError where the template raises, runs too long or eats memory."""
        (result,) = self.render_many([RenderJob(messages, tools, add_generation_prompt)])
        if isinstance(result, TemplateError):
            raise result
        return result

    def render_many(self, jobs: Sequence[RenderJob], *, patience: int = PATIENCE) -> list[str | TemplateError]:
        """Each job's text or its error, in order: one exchange with the child for 64 jobs (some 50 µs a job).

        Raises TemplateError after `patience` renders that had to be killed: such a template is not tried on the rest.
        """
        results: dict[int, str | TemplateError] = {}
        by_text: dict[str, list[int]] = {}
        for index, job in enumerate(jobs):
            by_text.setdefault(self.text if self.tool_text is None or job.tools is None else self.tool_text, []).append(index)
        for text, indices in by_text.items():
            replies = _child.render(text, self.special_tokens, self.clock, [_payload(jobs[i]) for i in indices], patience)
            for index, reply in zip(indices, replies, strict=False):
                results[index] = self._result(index, reply)
            if len(replies) < len(indices) or sum(reply.get("error") in KILLED for reply in replies) >= patience:
                raise self._error(indices[len(replies) - 1], replies[-1])
        return [results[index] for index in range(len(jobs))]

    def _result(self, index: int, reply: dict[str, Any]) -> str | TemplateError:
        if "text" in reply:
            self.clock_used |= reply["clock_used"]
            return str(reply["text"])
        return self._error(index, reply)

    def _error(self, index: int, reply: dict[str, Any]) -> TemplateError:
        what, mend = _EXPLAIN[reply["error"]]
        return TemplateError(what.format(message=reply["message"]), where=f"chat template {self.name}, row {index}", mend=mend)


_REPLACE = "use a template you trust: model.chat_template takes a named one ({}) or a .jinja file".format(", ".join(NAMED_TEMPLATES))
_EXPLAIN = {
    "raised": ("it raised: {message}", "change the row to what the template takes (roles, their order, tools), or leave it out"),
    "syntax": ("it is no valid Jinja template: {message}", _REPLACE),
    "security": ("it tried to reach outside the sandbox: {message}", _REPLACE),
    "memory": (f"it needs more than its {256} MB of memory: {{message}}", _REPLACE),
    "time": (f"it took longer than {SECONDS_PER_RENDER:g} s for one row and was ended: {{message}}", _REPLACE),
    "died": ("its process ended, most likely over its 256 MB of memory: {message}", _REPLACE),
    "data": ("the row cannot be written as JSON: {message}", "messages and tools hold text, numbers, lists and objects only"),
}


def load_template(tokenizer: Any, section: ModelSection) -> ChatTemplate:
    """The template to train and to ask with: the one the recipe names, else the model's own.

    `section.chat_template` is a key of NAMED_TEMPLATES or a .jinja file. A tokenizer may hold several templates: "default" is
    taken, and "tool_use" for rows with tools, as transformers does. Raises ModelError where there is none, MissingFile where the
    named file is not there.
    """
    special = dict(tokenizer.special_tokens_map)
    if section.chat_template is not None:
        name = Path(section.chat_template).name
        if name in NAMED_TEMPLATES and not Path(section.chat_template).is_file():
            text, tokens = NAMED_TEMPLATES[name]
        else:
            name, text = section.chat_template, _read(section.chat_template)
            tokens = tuple(dict.fromkeys(MARKER.findall(text)))
        known = tokenizer.get_added_vocab()
        return ChatTemplate(text, special, name, new_tokens=tuple(token for token in tokens if token not in known))
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ModelError(
                f"the model has several chat templates ({', '.join(sorted(own))}) and none is named default",
                where="chat_template",
                mend="save the one you want as a .jinja file and name it in model.chat_template",
            )
        return ChatTemplate(own["default"], special, "default", tool_text=own.get("tool_use"))
    if not own:
        raise ModelError(
            "the model has no chat template, so conversations cannot be written for it",
            where="model.chat_template",
            mend=f"set model.chat_template to a named template ({', '.join(NAMED_TEMPLATES)}) or to a .jinja file",
        )
    return ChatTemplate(own, special, "of the model")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFile(
            f"the chat template cannot be read: {error}",
            where=path,
            mend=f"model.chat_template is one of {', '.join(NAMED_TEMPLATES)} or a UTF-8 .jinja file",
        ) from error


def _payload(job: RenderJob) -> bytes | dict[str, Any]:
    """The job as JSON, or the reply where it cannot be written. Keys set to None are left out and reasoning gets its other names,
    as transformers does."""
    messages = []
    for message in job.messages:
        given = {key: value for key, value in message.items() if value is not None}
        reasoning = next((given[key] for key in REASONING_KEYS if key in given), None)
        if reasoning is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        messages.append(given)
    try:
        whole = {"messages": messages, "tools": job.tools, "add_generation_prompt": job.add_generation_prompt}
        return json.dumps(whole).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": "data", "message": str(error)}


class _TooLong(Exception):
    """No reply within the limit."""


class _Gone(Exception):
    """The child closed its end."""


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: IO[bytes]


class _Child:
    """The one rendering process of this process, started when it is first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: _Running | None = None

    def forget(self) -> None:
        """Leaves the child to the process that this one was forked from."""
        self.lock, self.running = threading.Lock(), None

    def render(
        self, template: str, variables: dict[str, str], clock: str, jobs: Sequence[bytes | dict[str, Any]], patience: int
    ) -> list[dict[str, Any]]:
        """A reply for each job, in order, up to the one with which the patience ends; jobs that are replies already are passed on."""
        replies: list[dict[str, Any]] = []
        head = json.dumps({"template": template, "variables": variables, "clock": clock}).encode()[:-1] + b', "jobs": ['
        with self.lock:
            while len(replies) < len(jobs) and sum(reply.get("error") in KILLED for reply in replies) < patience:
                job = jobs[len(replies)]
                if isinstance(job, dict):
                    replies.append(job)
                else:
                    batch = _first_batch(jobs[len(replies) :])
                    replies.extend(self._exchange(head + b", ".join(batch) + b"]}", len(batch)))
        return replies

    def _exchange(self, body: bytes, count: int) -> Iterator[dict[str, Any]]:
        """Replies until all are there or one is over the limit (then its error, and the child is gone)."""
        running = self._start()
        try:
            running.requests.write(struct.pack(">I", len(body)) + body)
            running.requests.flush()
            for _ in range(count):
                deadline = time.monotonic() + SECONDS_PER_RENDER
                (length,) = struct.unpack(">I", _receive(running, 4, deadline))
                yield json.loads(_receive(running, length, deadline + SECONDS_PER_RENDER))
        except _TooLong:
            self.stop()
            yield {"error": "time", "message": "an endless loop, or a very large one"}
        except (_Gone, BrokenPipeError):
            yield {"error": "died", "message": f"exit status {self.stop()}"}
        except BaseException:  # an interrupt, say: what the child still writes must not be taken for the next call's replies
            self.stop()
            raise

    def _start(self) -> _Running:
        if self.running is not None and self.running.process.poll() is None:
            return self.running
        environment = {key: os.environ[key] for key in CHILD_ENVIRONMENT if key in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,  # Ctrl-C at the terminal is for us; the child would die of it and cost a row
        )
        self.running = _Running(process, cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout))
        try:
            _receive(self.running, 1, time.monotonic() + START_SECONDS)
        except (_TooLong, _Gone) as error:
            raise TemplateError(
                f"the process that renders chat templates did not start (exit status {self.stop()})",
                where=str(CHILD),
                mend=f"check that `{sys.executable} -c 'import jinja2'` works",
            ) from error
        return self.running

    def stop(self) -> int | None:
        """Ends the child; its exit status, None where there was none."""
        running, self.running = self.running, None
        if running is None:
            return None
        running.process.kill()
        status = running.process.wait()
        for stream in (running.requests, running.replies):
            with contextlib.suppress(BrokenPipeError):  # what was not sent to a dead child
                stream.close()
        return status


def _receive(running: _Running, count: int, deadline: float) -> bytes:
    """Exactly so many bytes; raises _TooLong at the deadline (time.monotonic), _Gone where the child closed its end."""
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(running.replies, selectors.EVENT_READ)
        while count:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise _TooLong
            part = os.read(running.replies.fileno(), min(count, 2**20))
            if not part:
                raise _Gone
            parts.append(part)
            count -= len(part)
    return b"".join(parts)


def _first_batch(jobs: Sequence[bytes | dict[str, Any]]) -> list[bytes]:
    """The jobs at the head of the list that go together."""
    batch: list[bytes] = []
    size = 0
    for job in jobs[:JOBS_PER_BATCH]:
        if isinstance(job, dict) or (batch and size + len(job) > BYTES_PER_BATCH):
            break
        size += len(job)
        batch.append(job)
    return batch


_child = _Child()
atexit.register(_child.stop)
os.register_at_fork(after_in_child=_child.forget)
