"""A place where code that a model wrote can do no harm: bubblewrap, without network, files, rights or much of anything.

Takes an answer's code and its tests; gives which tests pass. Inside there are /usr, this Python's own folder (both read-only) and a
small /tmp, nothing else of the file system; processes, network, users and host name are its own; processor time, memory, processes
and file sizes are limited; everything in it ends with the answer, with this process, or when the time is over. Root makes it with a
user id of its own, since limits on processes do not bind root; anyone else with a user namespace. `find_sandbox` tries what it
promises before it is used.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ..errors import RecipeError

DRIVER = Path(__file__).with_name("_sandbox_child.py")
START_SECONDS = 20.0  # for namespaces and Python, on a busy machine
PROCESSES = 16
MEMORY_BYTES = 512 * 2**20  # of one process, address space
TMP_BYTES = 64 * 2**20
FILE_BYTES = 16 * 2**20
LINE_BYTES = 64  # of one line of the driver's report
FIRST_UID, UIDS = 60000, 4000  # Debian gives them to nobody
SYSTEM_FOLDERS = ("/lib", "/lib64", "/lib32", "/bin")
MEND = "install bubblewrap 0.8 or later (apt-get install bubblewrap) on Linux, where it may make namespaces, or drop the unit_tests reward"


class SandboxFailed(Exception):
    """The sandbox did not come up: nothing is known of the answer."""


@dataclass(frozen=True)
class Sandbox:
    """How a sandbox is made here. command: bubblewrap and its arguments. uid: whom the code runs as; None where bwrap sets it."""

    command: tuple[str, ...]
    uid: int | None

    def run(self, code: str, tests: list[str], seconds: float) -> list[bool]:
        """Which tests pass, in order; those that were not reached when the time was over, or the process died, do not.

        seconds: processor time of a process and wall time of all, from the moment the code is started. Raises SandboxFailed.
        """
        nonce = secrets.token_hex(16)
        job = {"code": code, "tests": tests, "seconds": seconds, "nonce": nonce, "uid": self.uid, "processes": PROCESSES}
        job |= {"memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
        with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as complaints:
            request.write(json.dumps(job).encode())
            request.seek(0)
            process = subprocess.Popen(
                self.command, stdin=request, stdout=subprocess.PIPE, stderr=complaints, env={}, cwd="/", start_new_session=True
            )
            output = cast(IO[bytes], process.stdout)
            try:
                passed = _read_report(output, nonce, len(tests), seconds)
            finally:
                process.kill()  # and with it, by --die-with-parent, all that runs inside
                process.wait()
                output.close()
            if passed is None:
                complaints.seek(0)
                raise SandboxFailed(complaints.read(500).decode(errors="replace").strip() or f"exit status {process.returncode}")
        return passed


def find_sandbox() -> Sandbox:
    """The sandbox of this machine, tried out. Raises RecipeError where bubblewrap is not there or cannot keep code in."""
    program = shutil.which("bwrap")
    if program is None:
        raise RecipeError("the unit_tests reward runs a model's code, and bubblewrap, which keeps it in, is not here", mend=MEND)
    return _tried(program)


@functools.cache
def _tried(program: str) -> Sandbox:
    complaints = []
    for sandbox in _candidates(program):
        try:
            passed = sandbox.run(PROBE, list(PROBE_TESTS), START_SECONDS)
        except (SandboxFailed, OSError) as error:
            complaints.append(str(error))
            continue
        if all(passed):
            return sandbox
        complaints.append(
            "not so inside: " + ", ".join(what for what, holds in zip(PROBE_TESTS.values(), passed, strict=True) if not holds)
        )
    what = "the unit_tests reward runs a model's code, and bubblewrap cannot keep it in here"
    raise RecipeError(f"{what}: {'; '.join(dict.fromkeys(complaints))}", where=program, mend=MEND)


def _candidates(program: str) -> list[Sandbox]:
    uid = FIRST_UID + os.getpid() % UIDS
    common = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    common += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "PYTHONHASHSEED", "0"]
    common += ["--hostname", "sandbox", *_folders()]
    python = [str(_python()), "-s", "-S", "-P", "-B", "/driver.py"]
    by_user = Sandbox((*common, "--unshare-user", "--disable-userns", "--uid", str(uid), "--gid", str(uid), *python), None)
    by_root = Sandbox((*common, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", *python), uid)
    return [by_root, by_user] if os.geteuid() == 0 else [by_user]


def _folders() -> list[str]:
    """bubblewrap's arguments for the file system inside, all of it read-only but /tmp."""
    arguments = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in map(Path, SYSTEM_FOLDERS):
        if folder.is_symlink():
            arguments += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            arguments += ["--ro-bind", str(folder), str(folder)]
    home = Path(sys.base_prefix)
    if not home.is_relative_to("/usr"):
        for parent in list(home.parents)[-2::-1]:  # made with plain rights: the real ones may shut the code's user out
            arguments += ["--dir", str(parent)]
        arguments += ["--ro-bind", str(home), str(home)]
    arguments += ["--ro-bind", str(DRIVER), "/driver.py", "--dev", "/dev", "--remount-ro", "/dev"]
    arguments += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return arguments


def _python() -> Path:
    """This Python without its virtual environment."""
    named = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return named if named.exists() else Path(os.path.realpath(sys.executable))


def _read_report(output: IO[bytes], nonce: str, count: int, seconds: float) -> list[bool] | None:
    """Which tests passed by the driver's own lines; None where it did not start. Reading ends with the first line that is not its own."""
    passed = [False] * count
    started, held, left = False, b"", (count + 2) * LINE_BYTES
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while left > 0 and selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(output.fileno(), left)
            if not part:
                break
            left -= len(part)
            *lines, held = (held + part).split(b"\n")
            for line in lines:
                words: list[Any] = line.decode(errors="replace").split(" ")
                if words == [nonce, "started"] and not started:
                    started, deadline = True, time.monotonic() + seconds
                elif len(words) == 3 and words[0] == nonce and started and words[1].isdecimal() and int(words[1]) < count:
                    passed[int(words[1])] = words[2] == "1"
                else:
                    return passed if started else None
    return passed if started else None


PROBE = f"""
import os, socket, time

def refused(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return True
    return False

def forks():
    for made in range({PROCESSES}):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        except OSError:
            return made
    return {PROCESSES}
"""
PROBE_TESTS = {
    "assert os.getuid() != 0 and refused(os.setuid, 0)": "a user without rights",
    "assert refused(os.chroot, '/')": "no capabilities",
    "assert [name for _, name in socket.if_nameindex()] == ['lo']": "no network",
    "assert not os.path.exists('/etc/passwd') and not os.path.exists('/proc/1')": "no files of the machine",
    "assert refused(os.mkdir, '/kept') and refused(os.mkdir, '/dev/shm/kept')": "nothing to write to but /tmp",
    f"assert forks() < {PROCESSES}": "a limit on processes",
}
