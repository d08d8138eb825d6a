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
    compiler = _compiler()
    command = [*compiler, *FLAGS, *(WIDEST if platform.machine() in ("x86_64", "AMD64") else ())]
    kept = _folder() / f"loops-{_key(command)}.so"
    try:
        if not kept.is_file():
            _compile(command, kept)
        return ctypes.CDLL(str(kept))
    except OSError as error:
        raise NotBuilt(f"the loops' library cannot be kept or loaded: {error}") from error


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for name in (named[:1] or ("cc", "gcc", "clang")) if (path := shutil.which(name))), None)
    if found is None:
        raise NotBuilt(f"no C compiler: {named[0] if named else 'cc, gcc or clang'} is not installed")
    return [found, *named[1:]]


def _compile(command: list[str], kept: Path) -> None:
    """Compiles beside the place where it is kept, so that no other process loads half of it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / "loops.so"
        try:
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(made), "-lm"], capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NotBuilt(f"{command[0]} did not end within {LIMIT} s") from error
        if done.returncode:
            raise NotBuilt(f"{command[0]} does not compile the loops: {(done.stderr.strip().splitlines() or ['it says nothing'])[0]}")
        made.replace(kept)


def _folder() -> Path:
    """Where libraries are kept: the cache folder, or this process's own place where that cannot be written."""
    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="tunesmith-kernels-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="tunesmith-kernels-"))


def _key(command: list[str]) -> str:
    """Of what the library depends on: the source, the command, the compiler and the processor."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=LIMIT, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        processor = platform.processor()
    return hashlib.sha256("\n".join([SOURCE.read_text(), *command, version, processor]).encode()).hexdigest()[:16]
