"""Chat templates: the bytes are transformers' own, and a hostile template ends in a named error."""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from transformers.utils import chat_template_utils

from tunesmith.data import template as template_module
from tunesmith.data.template import CHILD, FIXED_CLOCK, NAMED_TEMPLATES, ChatTemplate, RenderJob, load_template
from tunesmith.errors import MissingFile, ModelError, TemplateError

STOCK = sorted((Path(importlib.util.find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))
CHATML = ChatTemplate(NAMED_TEMPLATES["chatml"].text, {}, "chatml")
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & later.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Où?"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Málaga <1>", "days": 2}}}
CONVERSATIONS = {
    "turns": ([{"role": "user", "content": "  q <1> é "}, {"role": "assistant", "content": "a\n"}, {"role": "user", "content": "q"}], None),
    "system": ([{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "hi"}], None),
    "reasoning": ([*HELLO, {"role": "assistant", "content": "hi", "reasoning_content": "greet", "tool_calls": None}], None),
    "parts": (
        [{"role": role, "content": [{"type": "text", "text": "a <part>"}]} for role in ("user", "assistant", "user", "assistant")],
        None,
    ),
    "tools": (
        [
            *HELLO,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "get_weather"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        [TOOL],
    ),
}


def section(chat_template=None):
    return SimpleNamespace(chat_template=chat_template)


@pytest.fixture
def standing_clock(monkeypatch):
    class Standing(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat(FIXED_CLOCK)

    monkeypatch.setattr(chat_template_utils, "datetime", Standing)


@pytest.mark.parametrize("path", [None, *STOCK], ids=lambda path: path.stem if path else "smollm2")
def test_the_bytes_are_those_of_transformers(path, smollm2_tokenizer, standing_clock):
    text = path.read_text(encoding="utf-8") if path else smollm2_tokenizer.chat_template
    ours = ChatTemplate(text, dict(smollm2_tokenizer.special_tokens_map), "stock")
    rendered = 0
    for messages, tools in CONVERSATIONS.values():
        for generation_prompt in (False, True):
            try:
                reference = smollm2_tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=generation_prompt
                )
            except (jinja2.TemplateError, TypeError):
                with pytest.raises(TemplateError):
                    ours.render(messages, tools, generation_prompt)
                continue
            assert ours.render(messages, tools, generation_prompt) == reference
            rendered += 1
    assert rendered >= 2


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "ranges in a comprehension": "{{ range(99999) | map('string') | map('center', 99999) | join | length }}",
    "a power of powers": "{% set n = 9 ** (9 ** 9) %}{{ n }}",
    "an endless macro loop": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% call m() %}x{% endcall %}{% endcall %}",
    "text times a number": "{{ 'a' * 10 ** 10 }}",
    "a list times a number": "{{ ([0] * 10 ** 9) | length }}",
    "doubling in a loop": "{% set n = namespace(t='abcdefgh') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a range beyond the sandbox": "{{ range(10 ** 9) | list }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "the classes of text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the classes by attr": "{{ (''|attr('__class__')).mro() }}",
    "the globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "the globals of cycler": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "the globals of joiner": "{{ joiner.__init__.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "the globals of our own function": "{{ raise_exception.__globals__['os'].environ }}",
    "the clock's object": "{{ strftime_now.__self__.now.__class__.mro() }}",
    "a format string that reaches": "{{ '{0.__class__.__mro__}'.format('') }}",
    "the template's own frame": "{{ self.__init__.__globals__.sys.exit(0) }}",
    "a namespace with a dunder": "{% set n = namespace(__class__=1) %}",
    "changing what is given": "{{ messages.append(1) }}",
    "no template at all": "{% if %}",
    "a file to include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_in_a_named_error_and_the_next_one_renders(payload):
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(payload, {}, "hostile").render(HELLO)
    assert "hostile" in caught.value.where
    assert caught.value.mend
    assert CHATML.render(HELLO) == "<|im_start|>user\nhello<|im_end|>\n"


def test_the_error_says_whether_time_memory_the_sandbox_or_the_template_ended_it():
    for name, words in (("nested ranges", "longer than 1 s"), ("text times a number", "256 MB"), ("the globals of lipsum", "sandbox")):
        with pytest.raises(TemplateError, match=words):
            ChatTemplate(HOSTILE[name], {}, "hostile").render(HELLO)
    with pytest.raises(TemplateError, match="it raised: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, "strict").render(HELLO)


def test_one_bad_row_leaves_the_others_and_is_named_by_its_number():
    picky = ChatTemplate("{% if messages[0].content == 'bad' %}{{ 'a' * 10 ** 10 }}{% endif %}{{ messages[0].content }}", {}, "picky")
    rows = [RenderJob([{"role": "user", "content": text}]) for text in ("one", "bad", "three")]
    first, second, third = picky.render_many(rows)
    assert (first, third) == ("one", "three")
    assert isinstance(second, TemplateError)
    assert "row 1" in second.where


def test_a_row_that_is_ended_leaves_the_others_and_three_end_the_call(monkeypatch):
    monkeypatch.setattr(template_module, "SECONDS_PER_RENDER", 0.3)
    endless = HOSTILE["nested ranges"]
    picky = ChatTemplate("{% if messages[0].content == 'bad' %}" + endless + "{% endif %}{{ messages[0].content }}", {}, "picky")
    rows = [RenderJob([{"role": "user", "content": text}]) for text in ("one", "bad", "three", "bad", "five")]
    results = picky.render_many(rows)
    assert [result for result in results if isinstance(result, str)] == ["one", "three", "five"]
    with pytest.raises(TemplateError, match="row 4"):
        picky.render_many([*rows[:4], rows[1], *rows])


def test_a_row_that_is_no_json_is_refused_by_itself():
    results = CHATML.render_many([RenderJob([{"role": "user", "content": object()}]), RenderJob(HELLO)])
    assert isinstance(results[0], TemplateError)
    assert results[1].startswith("<|im_start|>user\nhello")


def test_text_of_any_kind_comes_back_unchanged():
    odd = "\0 \ud800 \u2028 \r\n 😀 <b>&amp;\x85"
    assert odd in CHATML.render([{"role": "user", "content": odd}])


def test_many_rows_share_one_child_and_a_forked_process_gets_its_own():
    texts = CHATML.render_many([RenderJob([{"role": "user", "content": str(number)}]) for number in range(1000)])
    assert [text.split("\n")[1] for text in texts] == [f"{number}<|im_end|>" for number in range(1000)]
    child = template_module._child.running.process.pid
    CHATML.render(HELLO)
    assert template_module._child.running.process.pid == child
    reading, writing = os.pipe()
    template_module._child.lock.acquire()  # as when another thread renders at that moment
    if (pid := os.fork()) == 0:
        signal.alarm(20)  # a lock that nobody will open must end the test
        fine = CHATML.render(HELLO).startswith("<|im_start|>") and template_module._child.running.process.pid != child
        template_module._child.stop()
        os.write(writing, b"1" if fine else b"0")
        os._exit(0)
    template_module._child.lock.release()
    os.close(writing)
    os.waitpid(pid, 0)
    assert os.read(reading, 1) == b"1"
    assert CHATML.render(HELLO).startswith("<|im_start|>")
    assert template_module._child.running.process.pid == child


def test_a_child_that_died_while_idle_costs_no_row():
    CHATML.render(HELLO)
    template_module._child.running.process.kill()
    template_module._child.running.process.wait()
    assert CHATML.render(HELLO).startswith("<|im_start|>")


def test_an_interrupt_in_the_middle_does_not_mix_up_the_next_replies(monkeypatch):
    real, calls = template_module._receive, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    CHATML.render(HELLO)
    monkeypatch.setattr(template_module, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CHATML.render_many([RenderJob([{"role": "user", "content": str(number)}]) for number in range(5)])
    monkeypatch.undo()
    assert CHATML.render(HELLO) == "<|im_start|>user\nhello<|im_end|>\n"


def test_the_child_is_out_of_reach_of_the_terminal_s_interrupt():
    CHATML.render(HELLO)
    assert os.getpgid(template_module._child.running.process.pid) != os.getpgid(0)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_the_child_sees_no_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    template_module._child.stop()
    CHATML.render(HELLO)
    assert b"hf_canary" not in Path(f"/proc/{template_module._child.running.process.pid}/environ").read_bytes()


def test_the_child_imports_neither_torch_nor_transformers():
    code = f"import runpy, sys; runpy.run_path({str(CHILD)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jinja2" in loaded
    assert not {"torch", "transformers", "numpy", "tunesmith"} & set(loaded)


def test_two_days_give_the_same_bytes_and_the_use_of_the_clock_is_noted():
    dated = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M') }}", {}, "dated")
    assert not dated.clock_used
    assert dated.render(HELLO) == "01 Jan 2025 00:00"  # FIXED_CLOCK, on whatever day this runs
    assert dated.clock_used
    CHATML.render(HELLO)
    assert not CHATML.clock_used
    other = ChatTemplate(dated.text, {}, "dated", clock="2031-02-03T04:05:06")
    assert other.render(HELLO) == "03 Feb 2031 04:05"
    assert other.sha256 != dated.sha256


def test_the_hash_covers_all_that_decides_the_bytes():
    base = ChatTemplate("a", {"bos_token": "<s>"}, "one")
    assert base.sha256 == ChatTemplate("a", {"bos_token": "<s>"}, "another name").sha256
    for other in (
        ChatTemplate("b", {"bos_token": "<s>"}, "one"),
        ChatTemplate("a", {}, "one"),
        ChatTemplate("a", base.special_tokens, "", "c"),
    ):
        assert other.sha256 != base.sha256


def tokenizer_with(chat_template, added=()):
    return SimpleNamespace(
        chat_template=chat_template, special_tokens_map={"eos_token": "</s>"}, get_added_vocab=lambda: dict.fromkeys(added, 0)
    )


def test_of_several_templates_the_default_is_taken_and_tool_use_for_rows_with_tools():
    ours = load_template(tokenizer_with({"default": "plain{{ eos_token }}", "tool_use": "tools", "rag": "rag"}), section())
    assert ours.render(HELLO) == "plain</s>"
    assert ours.render(HELLO, tools=[TOOL]) == "tools"
    with pytest.raises(ModelError, match="none is named default"):
        load_template(tokenizer_with({"rag": "rag"}), section())


def test_a_model_without_a_template_needs_a_named_one_whose_new_tokens_are_told():
    with pytest.raises(ModelError) as caught:
        load_template(tokenizer_with(None), section())
    assert "chatml" in caught.value.mend
    assert load_template(tokenizer_with(None), section("chatml")).new_tokens == ("<|im_start|>", "<|im_end|>")
    assert load_template(tokenizer_with(None, ["<|im_end|>"]), section("chatml")).new_tokens == ("<|im_start|>",)
    assert load_template(tokenizer_with("own"), section("chatml")).text == NAMED_TEMPLATES["chatml"].text


def test_a_template_file_is_read_and_its_control_tokens_are_told(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}é", encoding="utf-8")
    ours = load_template(tokenizer_with(None), section(str(path)))
    assert ours.render(HELLO) == "<|user|>hello<|stop|>é"
    assert ours.new_tokens == ("<|stop|>",)
    with pytest.raises(MissingFile, match="cannot be read"):
        load_template(tokenizer_with(None), section(str(tmp_path / "absent.jinja")))


def test_the_child_limits_its_memory_to_256_megabytes_beyond_its_start():
    assert runpy.run_path(str(CHILD))["MEMORY_LIMIT_BYTES"] == 256 * 2**20
    small, large = "{{ ('a' * 20000000) | length }}", "{{ ('a' * 300000000) | length }}"
    assert ChatTemplate(small, {}, "small").render(HELLO) == "20000000"
    with pytest.raises(TemplateError, match="256 MB"):
        ChatTemplate(large, {}, "large").render(HELLO)
