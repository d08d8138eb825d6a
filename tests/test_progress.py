"""What people see: a bar with an ETA on a terminal, lines in a pipe; nothing that data hold steers the terminal."""

from __future__ import annotations

import io
import json

from rich.console import Console
from rich.text import Text

from tunesmith.progress import Display, as_json_text, cost_words, duration, event_words, example_text, example_words, visible
from tunesmith.report._words import cost


def step(number, total=3):
    numbers = {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 1234.5, "peak_memory_bytes": 1.5e9}
    return {"stage": "sft", "step": number, "total_steps": total, **numbers}


def shown(events, *, terminal):
    display = Display()
    display.console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    for event in events:
        display(event)
    display.close()
    return display.console.file.getvalue()


def test_a_terminal_shows_a_bar_with_eta_speed_and_memory():
    text = shown([step(1), step(2), {"event": "stage_finished"}], terminal=True)
    for word in ("sft", "2/3", "ETA", "loss 2.5000", "1,234 tok/s", "1.50 GB"):
        assert word in text


def test_while_a_stage_samples_the_line_shows_reward_kl_and_length_beside_the_loss():
    sampled = {**step(1), "reward": 0.3125, "kl": 1.234, "length": 7.94}
    assert "loss 2.5000  reward 0.312  kl 1.23  length 7.9  lr" in shown([sampled], terminal=False)
    assert "reward" not in shown([step(1)], terminal=False)


def test_a_stop_by_a_rule_and_a_held_out_reward_are_said_in_words():
    stop = {"event": "stopped", "stage": "ppo", "step": 7, "rule": "max_kl", "value": 12.25, "limit": 10.0}
    assert shown([stop], terminal=False) == "ppo stopped after step 7: max_kl is 12.25, its limit 10\n"
    held = {"event": "evaluated", "stage": "ppo", "step": 7, "eval_loss": -0.5, "eval_reward": 0.5}
    assert shown([held], terminal=False) == "  step 7: held-out reward 0.5000\n"


def test_a_pipe_gets_the_first_and_the_last_step_and_not_each():
    lines = shown([step(number, total=50) for number in range(1, 51)], terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["sft step 1/50", "sft step 50/50"]


def test_long_lines_are_not_broken_in_a_pipe():
    text = shown([{"event": "evaluating", "what": "word " * 100}], terminal=False)
    assert text.count("\n") == 1


def test_events_that_only_the_log_needs_are_not_shown():
    assert shown([{"event": "checkpoint", "step": 1}, {"event": "phase_part", "name": "x"}], terminal=False) == ""


def test_control_characters_are_written_out():
    assert visible("a\x1b[2Jb\r\u202ec\td\n") == "a\\x1b[2Jb\\r\\u202ec\td\n"
    assert shown([{"event": "evaluating", "what": "\x1b]0;t\x07"}], terminal=False) == "  \\x1b]0;t\\x07\n"


def example():
    text = Text()
    for part, style in (
        ("user: hi\x1b[2J ", "dim"),
        ("good", "rgb(0,255,0)"),
        ("<end>", "rgb(0,255,0)"),
        (" user ", "dim"),
        ("bye", "rgb(0,95,0)"),
    ):
        text.append(part, style=style)
    return text


def test_the_mask_of_an_example_can_be_read_in_a_pipe():
    assert example_words(example()) == "user: hi\\x1b[2J ⟦good<end>⟧ user ⟦bye⟧"


def test_an_example_on_a_terminal_keeps_its_colours_and_loses_its_control_characters():
    text = example_text(example())
    assert text.plain == "user: hi\ufffd[2J good<end> user bye"
    assert text.spans == example().spans


def test_json_has_no_numbers_that_json_does_not_know():
    text = as_json_text({"a": float("nan"), "b": [float("inf")], "example": example()})
    value = json.loads(text, parse_constant=lambda name: 1 / 0)
    assert (value["a"], value["b"]) == ("NaN", ["Infinity"])
    spans = value["example"]["supervised"]
    assert [value["example"]["text"][start:end] for start, end in spans] == ["good<end>", "bye"]


def test_durations_are_in_the_unit_a_person_would_use():
    assert (duration(3.21), duration(89), duration(120)) == ("3.2 s", "89.0 s", "2.0 minutes")
    assert (duration(3 * 3600), duration(12e9)) == ("3.0 hours", "138888.9 days")


def test_a_step_that_teaches_nothing_and_a_note_are_said():
    assert "step 3: nothing to learn from" in event_words({"event": "nothing_learned", "step": 3, "stage": "grpo"})
    assert event_words({"event": "stopping", "stage": "sft", "signal": "SIGINT"}).startswith("SIGINT: stopping")
    assert event_words({"event": "note", "note": "gold.py:checks raised"}) == "note: gold.py:checks raised"


def test_a_cost_that_would_be_rounded_to_nought_is_less_than_a_hundredth():
    assert [cost_words(cost) for cost in (0, 0.0004, 0.0099, 0.01, 1234.5)] == [
        "0.00",
        "less than 0.01",
        "less than 0.01",
        "0.01",
        "1,234.50",
    ]
    assert [cost(value) for value in (None, 0.0004, 0.01)] == ["NOT MEASURED", "less than 0.01", "0.01"]
