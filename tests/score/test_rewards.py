"""Rewards: every way in which a user's function, a pattern, a schema or a reference can fail costs its own answers and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe import ExactAnswerReward, JSONSchemaReward, ModelReward, PythonReward, RegexReward
from tunesmith.score import _reward_process, rewards
from tunesmith.score.rewards import make_rewards


def ask(reward_set, completions, **columns):
    return reward_set(["q"] * len(completions), completions, columns)


@pytest.fixture
def python(tmp_path):
    """Makes a Python reward from the body of its function, or from a whole file."""
    made = []

    def make(body="", *, file=None, seconds=30.0, name="reward"):
        path = tmp_path / f"rewards{len(made)}.py"
        path.write_text(file or f"import time, os, sys\ndef reward(prompts, completions, **columns):\n    {body}\n", encoding="utf-8")
        made.append(make_rewards([PythonReward(function=f"{path}:{name}", seconds=seconds)]))
        return made[-1]

    yield make
    for reward_set in made:
        reward_set.close()


def equal(found, wanted):
    return np.array_equal(found, np.array(wanted, np.float64), equal_nan=True)


NAN = float("nan")


def test_a_python_function_gets_prompts_answers_and_columns_and_its_numbers_are_the_scores(python):
    body = (
        "return [len(p) + len(c) + a + len(m[0]['content']) for p, c, a, m in zip(prompts, completions, columns['a'], columns['messages'])]"
    )
    scores = ask(python(body), ["x", "xyz"], a=[10, 20], messages=[[{"role": "user", "content": "four"}]] * 2)
    assert equal(scores.total, [16.0, 28.0])
    assert scores.total.dtype == np.float64
    assert (scores.unscorable, scores.errors) == (0, [])


def test_none_nan_inf_and_what_is_no_number_make_their_own_answer_unscorable_and_are_counted(python):
    scores = ask(python("return [None, float('nan'), float('-inf'), 'good', 10**400, True, 2]"), list("abcdefg"))
    assert equal(scores.total, [NAN, NAN, NAN, NAN, NAN, 1.0, 2.0])
    assert scores.unscorable == 5
    assert scores.reasons == {
        "reward reward: returned None": 1,
        "reward reward: returned nan": 1,
        "reward reward: returned -inf": 1,
        "reward reward: returned a str instead of a number": 1,
        "reward reward: returned inf": 1,
    }


def test_numpy_scores_are_numbers(python):
    file = "import numpy\ndef reward(prompts, completions, **columns):\n    return numpy.array([0.5, numpy.nan], numpy.float32)\n"
    assert equal(ask(python(file=file), ["a", "b"]).total, [0.5, NAN])


def test_an_answer_on_which_the_function_raises_does_not_take_its_siblings_with_it(python):
    scores = ask(python("return [1 / len(c) for c in completions]"), ["a", "", "bb"])
    assert equal(scores.total, [1.0, NAN, 0.5])
    assert scores.reasons == {"reward reward: raised ZeroDivisionError: division by zero": 1}


def test_a_function_that_always_raises_leaves_every_answer_unscorable_with_one_message(python):
    scores = ask(python("raise ValueError('no idea')"), ["a", "b", "c"])
    assert scores.reasons == {"reward reward: raised ValueError: no idea": 3}


def test_a_function_that_exits_is_one_that_raises(python):
    assert ask(python("sys.exit(0)"), ["a"]).errors == ["reward reward: raised SystemExit: 0"]


def test_an_answer_that_kills_the_process_does_not_take_its_siblings_with_it(python):
    scores = ask(python("return [os.kill(os.getpid(), 9) if c == 'bad' else 1.0 for c in completions]"), ["a", "bad", "c"])
    assert equal(scores.total, [1.0, NAN, 1.0])
    assert scores.errors == ["reward reward: its process ended (exit status -9)"]


def test_a_process_that_dies_again_and_again_is_given_up_for_the_call(python, tmp_path):
    body = f"open({str(tmp_path / 'calls')!r}, 'a').write('x'); os._exit(1)"
    scores = ask(python(body), list("abcdefgh"))
    assert scores.unscorable == 8
    assert (tmp_path / "calls").read_text() == "x" * (1 + _reward_process.PATIENCE)


def test_a_call_that_hangs_is_ended_unscorable_as_a_whole_and_the_next_one_is_answered(python):
    reward_set = python("time.sleep(600 if 'hang' in completions else 0); return [1.0] * len(completions)", seconds=2.0)
    scores = ask(reward_set, ["a", "hang", "b"])
    assert equal(scores.total, [NAN, NAN, NAN])
    assert scores.reasons == {"reward reward: took longer than 2 s and was ended": 3}
    assert equal(ask(reward_set, ["a", "b"]).total, [1.0, 1.0])


def test_what_a_hanging_function_started_ends_with_it(python, tmp_path):
    pid = tmp_path / "pid"
    started = f"p = __import__('subprocess').Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    ask(python(started, seconds=5.0), ["a"])
    assert ended(int(pid.read_text()))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return [1.0]", "returned 1 scores for 2 answers"),
        ("return [1.0] * 3", "returned 3 scores for 2 answers"),
        ("return 1.0", "returned a float instead of a list"),
        ("return None", "returned a NoneType instead of a list"),
        ("return 'ab'", "returned a str instead of a list"),
        ("return {0: 1.0, 1: 1.0}", "returned a dict instead of a list"),
    ],
)
def test_a_wrong_count_or_no_list_is_unscorable_as_a_whole(python, body, reason):
    scores = ask(python(body), ["a", "b"])
    assert equal(scores.total, [NAN, NAN])
    assert scores.reasons == {f"reward reward: {reason}": 2}


def test_what_the_function_prints_or_reads_does_not_touch_the_protocol(python):
    body = (
        "print('x' * 9); os.write(1, b'\\0\\0\\0\\1'); sys.stdout.flush(); os.system('echo shell'); n = len(sys.stdin.read()); return [n]"
    )
    scores = ask(python(body), ["a"])
    assert equal(scores.total, [0.0])


def test_a_call_larger_than_the_pipe_goes_through(python):
    assert equal(ask(python("return [len(c) for c in completions]"), ["x" * 3_000_000]).total, [3e6])


def test_a_process_that_no_longer_reads_is_ended_too(python):
    stop = "__import__('threading').Timer(0.2, os.kill, (os.getpid(), 19)).start(); return [os.getpid()]"
    reward_set = python(stop, seconds=2.0)
    pid = int(ask(reward_set, ["a"]).total[0])
    while state(pid) != "T":
        time.sleep(0.02)
    assert ask(reward_set, ["x" * 3_000_000]).errors == ["reward reward: took longer than 2 s and was ended"]


def test_the_function_runs_in_another_process_and_the_same_inputs_give_the_same_scores_in_the_next_one(python):
    reward_set = python("return [os.getpid(), hash('spam') % 10**6]")
    first = ask(reward_set, ["a", "b"]).total
    reward_set.close()
    second = ask(reward_set, ["a", "b"]).total
    assert (os.getpid() != first[0] != second[0], first[1] == second[1]) == (True, True)


def test_the_file_may_import_its_neighbours_and_does_not_see_ours(python, tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n", encoding="utf-8")
    function = "def reward(prompts, completions, **columns):\n    return [VALUE] * len(completions)\n"
    assert equal(ask(python(file=f"from neighbour import VALUE\n{function}"), ["a"]).total, [7.0])
    with pytest.raises(RecipeError, match="No module named 'structured'"):
        python(file=f"import structured\n{function}")


def test_the_with_statement_ends_the_process(python):
    with python("return [os.getpid()]") as reward_set:
        pid = int(ask(reward_set, ["a"]).total[0])
    assert ended(pid)


def test_the_process_ends_with_its_parent_also_in_the_middle_of_an_endless_call(tmp_path):
    (tmp_path / "endless.py").write_text(
        f"import os\ndef reward(prompts, completions, **columns):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    while True: pass\n",
        encoding="utf-8",
    )
    code = (
        "from tunesmith.recipe import PythonReward\nfrom tunesmith.score.rewards import make_rewards\n"
        f"make_rewards([PythonReward(function={str(tmp_path / 'endless.py') + ':reward'!r}, seconds=600.0)])(['q'], ['a'], {{}})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ended(int((tmp_path / "pid").read_text()))


def state(pid):
    """The process's state as /proc names it; Z where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def ended(pid):
    """Whether the process is gone, or dead and waiting for init, before a minute is over."""
    for _ in range(600):
        if state(pid) == "Z":
            return True
        time.sleep(0.1)
    return False


GOOD = "def reward(prompts, completions, **columns):\n    return [0.0] * len(completions)\n"


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        (GOOD, "polite", "it has no function polite; it has reward"),
        ("reward = 3\n", "reward", "it has no function reward"),
        ("def reward(prompts, completions):\n    return []\n", "reward", "cannot take (prompts, completions, **columns)"),
        ("def reward(prompts, **columns):\n    return []\n", "reward", "cannot take (prompts, completions, **columns)"),
        ("def reward(prompts, completions, answer, /, **columns):\n    return []\n", "reward", "cannot take"),
        ("async def reward(prompts, completions, **columns):\n    return []\n", "reward", "async"),
        ("def reward(:\n", "reward", "SyntaxError"),
        ("import no_such_module_anywhere\n", "reward", "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "reward", "SystemExit: 3"),
        ("import os\nos._exit(3)\n", "reward", "ended while it was loaded (exit status 3)"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_training(python, file, name, message):
    with pytest.raises(RecipeError) as refused:
        python(file=file, name=name)
    assert (message in refused.value.what, bool(refused.value.mend)) == (True, True)


def test_a_file_that_hangs_while_it_is_imported_is_refused(python, monkeypatch):
    monkeypatch.setattr(_reward_process, "START_SECONDS", 1.0)
    with pytest.raises(RecipeError, match="longer than 1 s to load"):
        python(file="import time\ntime.sleep(600)\n")


@pytest.mark.parametrize("function", ["nowhere.py:reward", "nowhere.py", ":reward", "nowhere.py:two words"])
def test_a_file_that_is_not_there_or_a_setting_without_a_function_is_refused(function):
    with pytest.raises(RecipeError, match=r"file is not there|names no function"):
        make_rewards([PythonReward(function=function)])


def test_a_column_that_a_reward_needs_is_asked_for_by_name(python):
    named = python(file="def reward(prompts, completions, answer, *, key, extra=1, **columns):\n    return [answer[0] + key[0]]\n")
    named.check_columns(["answer", "key"])
    assert equal(ask(named, ["a"], answer=[1], key=[2]).total, [3.0])
    with pytest.raises(RecipeError, match="needs the column key"):
        named.check_columns(["answer"])
    with pytest.raises(RecipeError, match="needs the column answer, which the rows do not have \\(they have: reply\\)"):
        ask(make_rewards([ExactAnswerReward()]), ["68"], reply=["68"])


def test_a_column_with_the_name_of_the_functions_own_argument_is_refused(python):
    own = python(file="def reward(questions, answers, **columns):\n    return [0.0]\n")
    with pytest.raises(RecipeError, match="column answers is named as one of the first two arguments"):
        own.check_columns(["answers"])


def test_an_exact_answer_is_the_text_without_surrounding_space_or_the_same_number():
    exact = make_rewards([ExactAnswerReward(column="truth")])
    texts = ask(exact, [" 68\n", "69", "68 apples", "Refund", ""], truth=["68", "68", "68", "refund", ""])
    assert equal(texts.total, [1.0, 0.0, 0.0, 0.0, 1.0])
    numbers = ask(exact, [" 68\n", "68.0", "sixty-eight", "0.1", "snan", "1e999999999999999999"], truth=[68, 68, 68, 0.1, 68, 68])
    assert equal(numbers.total, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    missing = ask(exact, ["True", "None"], truth=[True, None])
    assert missing.reasons == {"reward exact_answer: the row's truth is neither text nor a number": 2}


def test_a_regular_expression_is_searched_for_anywhere():
    with make_rewards([RegexReward(pattern=r"\bsorry\b")]) as regex:
        assert equal(ask(regex, ["I am sorry.", "sorrysome", "\ud800 sorry"]).total, [1.0, 0.0, 1.0])


def test_a_pattern_that_backtracks_without_end_costs_one_answer(monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS_PER_ANSWER", 2.0)
    with make_rewards([RegexReward(pattern=r"^(a+)+$")]) as regex:
        scores = ask(regex, ["aaa", "a" * 60 + "b", "b"])
    assert equal(scores.total, [1.0, NAN, 0.0])
    assert scores.errors == ["reward regex: took longer than 2 s and was ended"]


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="unterminated"):
        make_rewards([RegexReward(pattern="(")])


@pytest.fixture
def schema(tmp_path):
    def write(**properties):
        path = tmp_path / "schema.json"
        path.write_text(json.dumps({"type": "object", "properties": properties, "required": list(properties)}), encoding="utf-8")
        return str(path)

    return write


def test_json_that_the_schema_allows_scores_one(schema):
    with make_rewards([JSONSchemaReward(output_schema=schema(kind={"enum": ["a", "b"]}))]) as valid:
        scores = ask(valid, ['{"kind": "a"}', '{"kind": "c"}', 'x {"kind": "a"}', '{"kind": NaN}', '{"kind": "a", "kind": "b"}'])
    assert equal(scores.total, [1.0, 0.0, 0.0, 0.0, 0.0])


def test_with_a_reference_json_scores_the_share_of_its_fields_that_are_equal(schema):
    file = schema(kind={"enum": ["a", "b"]}, count={"type": "number"})
    with make_rewards([JSONSchemaReward(output_schema=file, column="truth")]) as share:
        truth = [{"kind": "a", "count": 1}, '{"kind": "b", "count": 1}', {"kind": "a", "count": 1}, "no JSON", None]
        scores = ask(share, ['{"kind": "a", "count": 1.0}'] * 2 + ['{"kind": "a"}'] + ['{"kind": "a", "count": 1}'] * 2, truth=truth)
    assert equal(scores.total, [1.0, 0.5, 0.0, NAN, NAN])


def test_a_schemas_pattern_that_backtracks_without_end_costs_one_answer(schema, monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS_PER_ANSWER", 2.0)
    with make_rewards([JSONSchemaReward(output_schema=schema(word={"type": "string", "pattern": "^(a+)+$"}))]) as slow:
        scores = ask(slow, ['{"word": "aa"}', json.dumps({"word": "a" * 60 + "b"}), '{"word": "b"}'])
    assert equal(scores.total, [1.0, NAN, 0.0])


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"type": "object", "properties": {"a": {"type": 3}}}'])
def test_a_schema_that_is_missing_or_none_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "schema.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        make_rewards([JSONSchemaReward(output_schema=str(tmp_path / "schema.json"))])


class Model:
    """Stands for a reward model."""

    name = "model"

    def __init__(self, values, weight=1.0):
        self.values, self.weight = values, weight

    def __call__(self, prompts, completions, columns):
        return self.values


def test_rewards_add_up_by_weight_and_an_answer_without_one_of_them_has_no_total():
    settings = [ExactAnswerReward(weight=2.0), ModelReward(model="anywhere", weight=0.5)]
    both = make_rewards(settings, model=lambda reward: Model([0.5, NAN, None], reward.weight))
    scores = ask(both, ["1", "1", "1"], answer=["1", "1", "2"])
    assert equal(scores.total, [2.25, NAN, NAN])
    assert scores.unscorable == 2
    assert scores.reasons == {"reward model: returned nan": 1, "reward model: returned None": 1}
    assert equal(scores.parts["exact_answer"], [1.0, 1.0, 0.0])
    assert equal(scores.parts["model"], [0.5, NAN, NAN])


def test_a_reward_of_weight_zero_is_shown_and_takes_no_answer_away():
    settings = [ExactAnswerReward(), ModelReward(model="anywhere", weight=0.0)]
    scores = ask(make_rewards(settings, model=lambda reward: Model([NAN], 0.0)), ["1"], answer=["1"])
    assert equal(scores.total, [1.0])
    assert equal(scores.parts["model"], [NAN])


def test_a_sum_that_is_not_finite_is_unscorable():
    scores = ask(make_rewards([ModelReward(model="anywhere")], model=lambda reward: Model([1e308], 10.0)), ["1"])
    assert scores.unscorable == 1
    assert scores.errors == ["the weighted sum is not finite"]


def test_a_model_that_gives_a_wrong_count_is_unscorable():
    scores = ask(make_rewards([ModelReward(model="anywhere")], model=lambda reward: Model([1.0])), ["1", "2"])
    assert scores.reasons == {"reward model: returned 1 scores for 2 answers": 2}


def test_two_rewards_of_one_name_keep_their_own_parts():
    with make_rewards([RegexReward(pattern="a"), RegexReward(pattern="b", weight=3.0)]) as two:
        scores = ask(two, ["b"])
    assert {name: list(values) for name, values in scores.parts.items()} == {"regex": [0.0], "regex_2": [1.0]}
    assert equal(scores.total, [3.0])


def test_lengths_that_differ_are_the_callers_error():
    with pytest.raises(ValueError, match="one length"):
        make_rewards([ExactAnswerReward()])(["q"], ["a"], {"answer": ["a", "b"]})


def test_no_reward_or_a_reward_model_that_nobody_can_make_is_refused():
    with pytest.raises(RecipeError, match="no reward is given"):
        make_rewards([])
    with pytest.raises(RecipeError, match="reward model cannot be asked here"):
        make_rewards([ModelReward(model="anywhere")])


def test_rewards_that_were_made_end_when_a_later_one_is_refused(tmp_path):
    (tmp_path / "first.py").write_text(f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{GOOD}", encoding="utf-8")
    with pytest.raises(RecipeError):
        make_rewards([PythonReward(function=f"{tmp_path / 'first.py'}:reward"), RegexReward(pattern="(")])
    assert ended(int((tmp_path / "pid").read_text()))
