"""The process in which chat templates render: a template comes with a model, so it is not trusted.

Run as a script by template.py, which kills it when a render takes too long; it imports jinja2 and the standard library only.
stdin: batches, each 4 bytes of length (big-endian) and JSON {"template", "variables", "clock", "jobs": [{"messages", "tools",
"add_generation_prompt"}]}. stdout: "R" once ready, then for each job 4 bytes of length and JSON, {"text", "clock_used"} or
{"error": kind, "message"}. The environment is that of transformers' `apply_chat_template` (its jinja2 sandbox, flags, filters and
globals), so that the bytes are the same; only the clock stands still.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT_BYTES = 256 * 2**20  # address space beyond what the process holds when it is ready
ORPHAN_SECONDS = 10.0  # a render that outlives its parent ends here: the parent's own limit is far below
LONGEST_OUTPUT = 32 * 2**20  # characters of one rendered text
LONGEST_MESSAGE = 1000  # characters of an error passed on


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: the body, in a scope of its own as in transformers; the mark is not used."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class Dict:
    """The global `dict`: makes dicts, and has nothing else to get hold of."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """The global `namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


class Clock:
    """`strftime_now` on a clock that stands still, and whether it was asked."""

    def __init__(self) -> None:
        self.now, self.used = datetime(1970, 1, 1), False

    def strftime_now(self, layout: str) -> str:
        self.used = True
        return self.now.strftime(layout)


def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = clock.strftime_now
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Namespace
    return environment


def answer(environment: ImmutableSandboxedEnvironment, clock: Clock, compiled: dict[str, Any], batch: dict, job: dict) -> bytes:
    """One job's reply. Whatever the template raises becomes a named error; nothing it does ends the process but its limits."""
    clock.used = False
    try:
        source = batch["template"]
        if source not in compiled:
            compiled.clear()
            compiled[source] = environment.from_string(source)
        text = compiled[source].render(**batch["variables"], **job, documents=None)
        if len(text) > LONGEST_OUTPUT:
            return failure("memory", f"the rendered text has {len(text)} characters, over {LONGEST_OUTPUT}")
        return json.dumps({"text": text, "clock_used": clock.used}).encode()
    except MemoryError:
        return failure("memory", "out of memory")
    except jinja2.exceptions.SecurityError as error:
        return failure("security", str(error))
    except jinja2.exceptions.TemplateSyntaxError as error:
        return failure("syntax", f"line {error.lineno}: {error.message}")
    except jinja2.exceptions.TemplateError as error:
        return failure("raised", str(error))
    except Exception as error:  # a template can make any type of error; its name goes to the user
        return failure("raised", f"{type(error).__name__}: {error}")


def failure(kind: str, message: str) -> bytes:
    return json.dumps({"error": kind, "message": message[:LONGEST_MESSAGE]}).encode()


def limit_memory() -> None:
    """Caps the address space, forbids files that grow and core dumps. Where /proc is missing the cap counts from 1 GiB."""
    held = 2**30
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            held = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        pass
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_LIMIT_BYTES, held + MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    clock = Clock()
    environment, compiled = make_environment(clock), {}
    limit_memory()
    replies.write(b"R")
    replies.flush()
    while len(head := requests.read(4)) == 4:
        batch = json.loads(requests.read(struct.unpack(">I", head)[0]))
        clock.now = datetime.fromisoformat(batch["clock"])
        for job in batch["jobs"]:
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)
            reply = answer(environment, clock, compiled, batch, job)
            signal.setitimer(signal.ITIMER_REAL, 0)
            replies.write(struct.pack(">I", len(reply)) + reply)
            replies.flush()


if __name__ == "__main__":
    main()
