"""The unit_tests reward: what passes and what does not, and that code which means harm does none."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe import UnitTestReward
from tunesmith.score import _sandbox
from tunesmith.score.rewards import make_rewards


def cannot_run():
    """Why bubblewrap cannot be used here, empty where it can."""
    program = shutil.which("bwrap")
    if program is None:
        return "bubblewrap is not installed"
    done = subprocess.run([program, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


WHY_NOT = cannot_run()
in_sandbox = pytest.mark.skipif(bool(WHY_NOT), reason=f"no sandbox on this machine: {WHY_NOT}")
DOUBLE = "def double(x):\n    return 2 * x\n"


def score(code, tests, seconds=20.0):
    scores = make_rewards([UnitTestReward(seconds=seconds)])(["q"], [code], {"tests": [tests]})
    assert scores.errors == []
    return scores.total[0]


def inside(code, *, seconds=20.0):
    """Whether the code runs to its end in the sandbox without raising."""
    return score(code, ["pass"], seconds) == 1.0


@in_sandbox
def test_the_score_is_the_share_of_tests_that_pass():
    assert score(DOUBLE, ["assert double(1) == 2", "assert double(2) == 5", "double(nothing)", "assert double('a') == 'aa'"]) == 0.5


@in_sandbox
def test_the_code_is_the_first_python_block_or_the_whole_answer():
    assert score(f"Here it is:\n```python\n{DOUBLE}```\nIt doubles.", ["assert double(1) == 2"]) == 1.0
    assert score(f"Here it is:\n```py\n{DOUBLE}", ["assert double(1) == 2"]) == 1.0
    assert score("Sorry, no.", ["pass"]) == 0.0


@in_sandbox
def test_dataclasses_threads_and_the_standard_library_work_and_main_blocks_do_not_run():
    code = (
        "import dataclasses, threading, math, tempfile\n@dataclasses.dataclass\nclass P:\n    x: int\n"
        "t = threading.Thread(target=lambda: None); t.start(); t.join()\ntempfile.TemporaryFile().write(b'x')\n"
        "if __name__ == '__main__':\n    raise ValueError\n"
    )
    assert score(code, ["assert P(1) == P(1)", "import sys; assert sys.modules[__name__].P is P"]) == 1.0


@in_sandbox
@pytest.mark.parametrize("body", ["while True: pass", "__import__('time').sleep(600)"])
def test_a_test_that_does_not_end_fails_and_those_before_it_count(body):
    assert score(f"def double(x):\n    {body}\n", ["pass", "double(1)", "pass", "pass"], seconds=1.0) == 0.25


@in_sandbox
@pytest.mark.parametrize(
    "ending", ["raise SystemExit(0)", "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)", "import os; os.fork()"]
)
def test_an_answer_that_ends_its_process_early_passes_nothing_it_did_not_pass(ending):
    tests = ["assert double(1) == 3"] * 2
    assert score(f"{DOUBLE}\n{ending}\n", tests) == 0.0
    assert score(DOUBLE, ["assert double(1) == 2", ending, "assert double(1) == 3", "assert double(1) == 3"]) <= 0.5


@in_sandbox
def test_what_an_answer_prints_is_not_taken_for_passed_tests():
    lines = "import os\nfor line in ('started', '0 1', '1 1', 'done'):\n    print(line, flush=True)\n"
    flood = "for fd in range(64):\n    try:\n        os.write(fd, b'x 0 1\\n0 1\\n' * 10)\n    except OSError: pass\n"
    assert score(lines + flood, ["assert False", "assert False"]) == 0.0


@in_sandbox
def test_an_answer_that_prints_keeps_what_it_passed():
    assert score("print('hello', flush=True)\n", ["print('again', flush=True)", "assert False"]) == 0.5


@in_sandbox
def test_a_test_that_exits_fails_alone():
    assert score(DOUBLE, ["assert double(1) == 2", "raise SystemExit(0)", "assert double(1) == 2", "assert False"]) == 0.5


@in_sandbox
def test_a_copy_of_the_process_has_no_say():
    assert score("import os, time\npid = os.fork()\nif pid: time.sleep(0.3)\n", ["assert pid == 0", "assert pid == 0"]) == 0.0
    assert score("import os, time\npid = os.fork()\nif not pid: time.sleep(0.3)\n", ["assert pid == 0; time.sleep(1)"]) == 0.0


@in_sandbox
def test_a_row_without_tests_is_unscorable():
    rewards = make_rewards([UnitTestReward()])
    scores = rewards(["q"] * 4, [DOUBLE] * 4, {"tests": [[], None, "pass", ["pass", 3]]})
    assert scores.reasons == {"reward unit_tests: the row's tests is no list of Python statements": 4}


@in_sandbox
def test_a_sandbox_that_does_not_start_makes_the_answer_unscorable_not_wrong(monkeypatch):
    rewards = make_rewards([UnitTestReward()])
    reward = rewards.functions["unit_tests"]
    monkeypatch.setattr(reward, "sandbox", replace(reward.sandbox, command=(reward.sandbox.command[0], "--no-such-option")))
    scores = rewards(["q"], [DOUBLE], {"tests": [["pass"]]})
    assert scores.unscorable == 1
    assert "the sandbox did not start: bwrap: Unknown option" in scores.errors[0]


@in_sandbox
def test_a_fork_bomb_is_contained_and_nothing_of_it_is_left():
    mark = f"bomb{secrets.token_hex(8)}"
    bomb = (
        "import os, sys, time\nmost = 0\nfor n in range(2000):\n    try:\n        if os.fork() == 0:\n"
        f"            os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])\n"
        "        most = n + 1\n    except OSError:\n        pass\n"
    )
    assert score(bomb, [f"assert 0 < most < {_sandbox.PROCESSES}"]) == 1.0
    endless = f"import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n# {mark}"
    assert score(endless, ["pass"], seconds=1.0) == 0.0
    assert gone(mark)
    assert gone("/driver.py")


@in_sandbox
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        assert not inside(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert not inside("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=2)")


@in_sandbox
def test_home_and_the_rest_of_the_machine_cannot_be_read_or_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("password", encoding="utf-8")
    for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ"), Path.home() / ".bashrc", Path.home() / ".ssh"):
        assert not inside(f"import os\nos.stat({str(path)!r})"), path
    for path in ("/kept", "/usr/kept", "/dev/shm/kept", "/dev/kept", sys.base_prefix + "/kept", str(tmp_path / "kept")):
        assert not inside(f"open({path!r}, 'w')"), path
    assert inside("open('/tmp/note', 'w').write('a')")
    assert not inside("open('/tmp/note')")


@in_sandbox
def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    assert inside("import os\nassert 'API_KEY' not in os.environ and set(os.environ) <= {'PATH', 'PWD', 'PYTHONHASHSEED', 'LC_CTYPE'}")


@in_sandbox
def test_an_answer_cannot_kill_the_process_that_runs_it_nor_any_other():
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        code = (
            f"import os\nfor pid in (os.getppid(), 1, {os.getpid()}, {bystander.pid}):\n"
            "    if pid not in (0, os.getpid()):\n        try:\n            os.kill(pid, 9)\n        except OSError:\n            pass\n"
        )
        score(code, ["pass"], seconds=5.0)
        assert bystander.poll() is None
        assert score(DOUBLE, ["assert double(1) == 2"]) == 1.0
    finally:
        bystander.kill()
        bystander.wait()


@in_sandbox
def test_memory_files_and_rights_are_limited():
    assert not inside(f"x = bytearray({_sandbox.MEMORY_BYTES})")
    assert not inside(f"with open('/tmp/a', 'wb') as file: file.write(bytes({_sandbox.FILE_BYTES + 1}))")
    filled = f"for n in range({_sandbox.TMP_BYTES // 2**20 + 1}):\n    open(f'/tmp/{{n}}', 'wb').write(bytes({2**20}))"
    assert not inside(filled)
    assert not inside("import os\nos.setuid(0)")
    assert not inside("import os\nos.chroot('/tmp')")
    assert inside("import os\nassert os.getuid() != 0")
    assert not inside("import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (r.RLIM_INFINITY, r.RLIM_INFINITY))")


@in_sandbox
def test_the_sandbox_ends_with_the_process_that_made_it():
    mark = f"orphan{secrets.token_hex(8)}"
    sleeper = f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])"
    code = f"from tunesmith.score._sandbox import find_sandbox\nfind_sandbox().run({sleeper!r}, ['pass'], 600.0)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not alive(mark, but=parent.pid):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(mark)


def alive(mark, but=0):
    """The processes whose command line has the mark as a word of its own."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != but:
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found += [int(folder.name)] * (mark in words)
    return found


def gone(mark):
    """Whether all of them end before a minute is over."""
    for _ in range(600):
        if not alive(mark):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def untried():
    _sandbox._tried.cache_clear()
    yield
    _sandbox._tried.cache_clear()


def test_without_bubblewrap_the_reward_is_refused_before_training(monkeypatch, untried):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match="bubblewrap, which keeps it in, is not here") as refused:
        make_rewards([UnitTestReward()])
    assert "apt-get install bubblewrap" in refused.value.mend


def fake(folder, text):
    program = folder / "bwrap"
    program.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def test_where_bubblewrap_may_make_no_namespace_the_reward_is_refused_with_its_own_words(monkeypatch, untried, tmp_path):
    program = fake(tmp_path, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    monkeypatch.setattr(shutil, "which", lambda name: program)
    with pytest.raises(RecipeError, match="cannot keep it in here: bwrap: No permissions to create new namespace"):
        make_rewards([UnitTestReward()])


def test_a_sandbox_that_does_not_keep_its_promises_is_refused(monkeypatch, untried, tmp_path):
    program = fake(tmp_path, f"exec {sys.executable} -S -P -B {_sandbox.DRIVER}")
    monkeypatch.setattr(shutil, "which", lambda name: program)
    with pytest.raises(RecipeError, match=r"not so inside: .*no files of the machine"):
        make_rewards([UnitTestReward()])


@in_sandbox
@pytest.mark.skipif(
    os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"], reason="for real root only"
)
def test_for_root_a_user_namespace_alone_is_not_enough_since_it_leaves_processes_unlimited():
    by_root, by_user = _sandbox._candidates(shutil.which("bwrap"))
    tests = list(_sandbox.PROBE_TESTS)
    assert all(by_root.run(_sandbox.PROBE, tests, 20.0))
    assert by_user.run(_sandbox.PROBE, tests, 20.0) == [True] * 5 + [False]
