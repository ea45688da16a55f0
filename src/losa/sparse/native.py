"""The library of native kernels (csrc/): built with the system's compiler at first use, cached, loaded once a process."""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from losa.errors import LosaError

CSRC = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
SOURCES: dict[str, tuple[str, ...]] = {  # each with the instructions that it may use
    "common": (),
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512vbmi2", "-mavx512vnni", "-mavx512bf16"),
}
NEEDED = ("common", "portable")  # a compiler too old for one of the others makes a library without it
# what gcc, clang and the assembler say of an option or an instruction that they do not know
OLD = re.compile(
    "unrecognized|unknown (argument|option|type name|target)|unsupported option|not declared|undeclared|"
    "not name a type|no such instruction|target specific option|target feature",
)
log = logging.getLogger("losa.sparse")


class Unavailable(LosaError):
    """There is no native library, and why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built if it has not been. Raises Unavailable, every time the same without trying again."""
    found = _library()
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def _library() -> ctypes.CDLL | Unavailable:
    try:
        return ctypes.CDLL(str(build()))
    except Unavailable as error:
        return error
    except OSError as error:
        return Unavailable(f"the native kernels do not load: {error}")


def sources() -> dict[str, tuple[str, ...]]:
    """Those of SOURCES that concern this machine's family of processors."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {name: flags for name, flags in SOURCES.items() if x86 or name in NEEDED}


def compiler() -> list[str]:
    """The command that compiles C++: $CXX, or the first of the usual ones. Raises Unavailable."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]):
            return named
        raise Unavailable(f"CXX names {named[0]!r}, which is no command")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise Unavailable("there is no C++ compiler: install g++ or clang++, or let CXX name one")


def build() -> Path:
    """The library's file, in the user's cache under a name made of sources, flags and compiler. Raises Unavailable.

    Several processes may ask at once: one builds, the others wait; a build that is killed leaves nothing behind that is
    taken for a library. Where the cache cannot be written, the library is built for this process alone.
    """
    command = compiler()
    try:
        version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the C++ compiler {' '.join(command)} does not run: {error}") from None
    described = [platform.machine(), *command, version, *FLAGS, repr(sources())]
    digest = hashlib.sha256("\0".join(described).encode())
    for file in sorted(CSRC.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = _folder()
    path = folder / f"{digest.hexdigest()[:32]}.so"
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # no locks on this file system: whoever is last replaces the same file
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path = _compile(command, path)
    if (reasons := _reasons(path)).exists():
        log.warning("%s", reasons.read_text())
    return path


def _reasons(path: Path) -> Path:
    """Beside a library that lacks kernels: which, and why."""
    return path.with_suffix(".txt")


def _folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "losa" / "kernels"
    except RuntimeError as error:  # a user without a home
        log.info("%s: the kernels are built for this process alone", error)
        return _passing_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.info("%s cannot be written (%s): the kernels are built for this process alone", folder, error)
        folder = _passing_folder()
    return folder


def _passing_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="losa-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(command: Sequence[str], path: Path) -> Path:
    """Build the library at `path`; elsewhere, for this process alone, if it lacks a kernel that may compile another time."""
    log.info("building the native kernels with %s, once", command[0])
    old: list[str] = []  # what this compiler never makes, and what it may another time
    passing: list[str] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:

        def compiled(item: tuple[str, tuple[str, ...]]) -> Path | None:
            name, flags = item
            made = Path(scratch) / f"{name}.o"
            done = _run([*command, *FLAGS, *flags, "-c", str(CSRC / f"{name}.cpp"), "-o", str(made)])
            if not done:
                return made
            if name in NEEDED:
                raise Unavailable(f"{command[0]} does not compile {name}.cpp: {done}")
            line = f"kernel {name} is left out, since {command[0]} does not compile it: {done}"
            (old if OLD.search(done) else passing).append(line)
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(made) for made in pool.map(compiled, sources().items()) if made is not None]
        linked = Path(scratch) / path.name
        if done := _run([*command, "-shared", "-pthread", *objects, "-o", str(linked), "-ldl"]):
            raise Unavailable(f"{command[0]} does not link the kernels: {done}")
        if passing:
            path = _passing_folder() / path.name
        _reasons(path).unlink(missing_ok=True)  # of a build that was killed
        if lacking := old + [f"{line}; it is tried again when losa next starts" for line in passing]:
            _reasons(path).write_text("; ".join(lacking))
        shutil.move(linked, path)
    return path


def _run(command: list[str]) -> str:
    """Empty if it went well, or its first complaint."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    complaints = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()[-1:]
    return "" if done.returncode == 0 else (complaints or [f"exit code {done.returncode}"])[0].strip()
