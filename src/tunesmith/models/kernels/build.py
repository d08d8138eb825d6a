"""The loops' library: `loops.c`, compiled for this processor by the system's C compiler, once, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..load import cache_folder

SOURCE = Path(__file__).with_name("loops.c")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
WIDEST = ("-mprefer-vector-width=512",)  # on x86, where compilers else take half a register
LIMIT = 120  # seconds for a compilation, which takes two


class NotBuilt(Exception):
    """There is no library; the text says why."""


def load() -> ctypes.CDLL:
    """The library. Raises NotBuilt."""
    try:
        compiler = _compiler()
        command = [*compiler, *FLAGS, *(WIDEST if platform.machine() in ("x86_64", "AMD64") else ())]
        kept = cache_folder() / "kernels" / f"loops-{_key(command)}.so"
        if _is_whole(kept):
            return ctypes.CDLL(str(kept))
        if _is_ours(kept.parent):
            _compile(command, kept)
            return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(prefix="tunesmith-kernels-") as folder:  # loaded, it is needed no more
            _compile(command, Path(folder) / kept.name)
            return ctypes.CDLL(str(Path(folder) / kept.name))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"the loops cannot be compiled, kept or loaded: {error}") from error


def _is_whole(kept: Path) -> bool:
    """Whether a library is there, as it was written, by this user: a damaged one would end the process, another's could do anything."""
    said = kept.with_suffix(".sha256")
    if not (kept.is_file() and said.is_file() and _is_private(kept) and _is_private(kept.parent) and _runs_code(kept.parent)):
        return False
    return said.read_text() == hashlib.sha256(kept.read_bytes()).hexdigest()


def _is_private(path: Path) -> bool:
    """Whether nobody but this user and root may have written it."""
    about = path.stat()
    return about.st_uid in (os.getuid(), 0) and not about.st_mode & 0o022


def _runs_code(folder: Path) -> bool:
    """Whether a library may be loaded from a folder: of a file system mounted noexec none may."""
    return not os.statvfs(folder).f_flag & os.ST_NOEXEC


def _is_ours(folder: Path) -> bool:
    """Whether libraries can be kept in a folder, which is made where it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _is_private(folder) and _runs_code(folder) and os.access(folder, os.W_OK)
    except OSError:
        return False


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for name in (named[:1] or ("cc", "gcc", "clang")) if (path := shutil.which(name))), None)
    if found is None:
        raise NotBuilt(f"no C compiler: {named[0] if named else 'cc, gcc or clang'} is not installed")
    return [found, *named[1:]]


def _compile(command: list[str], kept: Path) -> None:
    """Compiles beside the place where it is kept, so that no other process loads half of it, and keeps its hash."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / "loops.so"
        done = subprocess.run([*command, str(SOURCE), "-o", str(made), "-lm"], capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode:
            text = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise NotBuilt(f"{command[0]} does not compile the loops: {text[0]}")
        if not made.is_file():
            raise NotBuilt(f"{command[0]} made no library")
        ctypes.CDLL(str(made))  # or it is not kept
        digest = made.with_suffix(".sha256")
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        made.chmod(0o700)
        made.replace(kept)
        digest.replace(kept.with_suffix(".sha256"))


def _key(command: list[str]) -> str:
    """Of what the library depends on: the source, the command, the compiler and the processor."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=LIMIT, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        processor = platform.processor()
    return hashlib.sha256("\n".join([SOURCE.read_text(), *command, version, processor]).encode()).hexdigest()[:16]
