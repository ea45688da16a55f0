"""Building the native library: once, whole or not at all, and what happens where that cannot be."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FUZZ, LONG

from losa.sparse import native

SMALL = {"common": (), "portable": ()}  # the sources that are built where speed of building counts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; the least of the library, without optimisation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCES", SMALL)
    monkeypatch.setattr(native, "FLAGS", ("-std=c++17", "-O0", "-fPIC"))
    return tmp_path / "cache" / "losa" / "kernels"


def fake(folder: Path, script: str) -> str:
    """A compiler that runs this shell script; `real` in it is the real one."""
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "no-compiler-found")
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\nreal='{real}'\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_where_there_is_a_compiler_the_sources_compile() -> None:
    """Elsewhere tests skip what cannot be built, which must not hide a mistake."""
    try:
        native.compiler()
    except native.Unavailable as error:
        pytest.skip(str(error))
    native.library()


def test_built_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", fake(tmp_path, f'echo "$@" >> {log}; exec $real "$@"'))
    path = native.build()
    assert path.parent == cache and hasattr(ctypes.CDLL(str(path)), "losa_multiply_portable")
    assert {file.name for file in cache.iterdir()} == {path.name, "lock"}
    calls = log.read_text().splitlines()
    assert sum("-c" in call.split() for call in calls) == len(SMALL)
    assert native.build() == path
    assert log.read_text().splitlines()[len(calls) :] == ["--version"]


def test_another_source_flag_or_compiler_is_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {native.build()}
    monkeypatch.setattr(native, "FLAGS", ("-std=c++17", "-O0", "-fPIC", "-DOTHER"))
    built.add(native.build())
    monkeypatch.setenv("CXX", fake(tmp_path, 'exec $real "$@"'))
    built.add(native.build())
    copied = tmp_path / "csrc"
    copied.mkdir()
    for file in native.CSRC.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "losa.h").write_text((copied / "losa.h").read_text() + "// changed\n")
    monkeypatch.setattr(native, "CSRC", copied)
    built.add(native.build())
    assert len(built) == 4


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(native.Unavailable, match=r"there is no C\+\+ compiler: install"):
        native.build()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(native.Unavailable, match="CXX names 'no-such-compiler', which is no command"):
        native.build()


def test_a_compiler_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'case "$*" in *--version*) ;; *) echo "x.cpp:1: error: no room" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", fake(tmp_path, script))
    with pytest.raises(native.Unavailable, match=r"does not compile common\.cpp: x\.cpp:1: error: no room"):
        native.build()
    assert {file.name for file in cache.iterdir()} == {"lock"}
    monkeypatch.setenv("CXX", fake(tmp_path, "exit 1"))
    with pytest.raises(native.Unavailable, match="does not run"):
        native.build()
    monkeypatch.setenv("CXX", fake(tmp_path, 'case "$*" in *-shared*) exit 1;; *) exec $real "$@";; esac'))
    with pytest.raises(native.Unavailable, match="does not link"):
        native.build()


def test_an_old_compiler_leaves_a_kernel_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "SOURCES", SMALL | {"avx2": ("-mnew",)})
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    script = 'case "$*" in *-mnew*) echo "error: unrecognized option -mnew" >&2; exit 1;; esac; exec $real "$@"'
    monkeypatch.setenv("CXX", fake(tmp_path, script))
    library = ctypes.CDLL(str(native.build()))
    assert hasattr(library, "losa_multiply_portable") and not hasattr(library, "losa_multiply_avx2")
    assert "kernel avx2 is left out" in caplog.text and "-mnew" in caplog.text
    caplog.clear()
    assert native.build().parent == cache
    assert "kernel avx2 is left out" in caplog.text and "-mnew" in caplog.text  # said by every process, built by one


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("kill -9 $$", "killed by signal 9"),
        ('echo "c++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1', "terminated program cc1plus"),
        ('echo "fatal error: error writing to x.s: No space left on device" >&2; exit 1', "No space left on device"),
    ],
)
def test_a_compiler_that_fails_once(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
    said: str,
) -> None:
    """The next process has all kernels."""
    sources = tmp_path / "csrc"
    shutil.copytree(native.CSRC, sources)
    (sources / "another.cpp").write_text('extern "C" int losa_another() { return 1; }')
    monkeypatch.setattr(native, "CSRC", sources)
    monkeypatch.setattr(native, "SOURCES", SMALL | {"another": ()})
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    broken = tmp_path / "broken"
    broken.touch()
    script = f'case "$*" in *another.cpp*) if [ -e {broken} ]; then {trouble}; fi;; esac; exec $real "$@"'
    monkeypatch.setenv("CXX", fake(tmp_path, script))
    path = native.build()
    library = ctypes.CDLL(str(path))
    assert hasattr(library, "losa_multiply_portable") and not hasattr(library, "losa_another")
    assert path.parent != cache and {file.name for file in cache.iterdir()} == {"lock"}
    assert "kernel another is left out" in caplog.text and said in caplog.text and "tried again" in caplog.text
    broken.unlink()
    caplog.clear()
    path = native.build()
    assert path.parent == cache and hasattr(ctypes.CDLL(str(path)), "losa_another") and not caplog.records


def test_another_processor_gets_the_portable_kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert set(native.sources()) == set(native.NEEDED)
    monkeypatch.setattr(native.platform, "machine", lambda: "AMD64")
    assert set(native.sources()) == set(native.SOURCES)


def test_several_processes_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = fake(tmp_path, f'echo "$@" >> {log}; exec $real "$@"')
    code = (
        "from losa.sparse import native; native.SOURCES = {'common': (), 'portable': ()}; "
        "native.FLAGS = ('-std=c++17', '-O0', '-fPIC'); print(native.library()._name)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": compiler}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=LONG)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(printed) == 1 and Path(printed.pop()).exists()
    assert sum("-shared" in line for line in log.read_text().splitlines()) == 1


def test_a_cache_that_cannot_be_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "losa.sparse")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = native.build()
    assert path.exists() and not path.is_relative_to(tmp_path / "file")
    assert "cannot be written" in caplog.text


def test_random_products_and_steps_under_sanitizers(tmp_path: Path) -> None:
    """`make fuzz` in short, of what needs no particular processor."""
    try:
        command = native.compiler()
    except native.Unavailable as error:
        pytest.skip(str(error))
    command += [
        "-std=c++17",
        "-O0",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    (tmp_path / "nothing.cpp").write_text("int main() { return 0; }")
    probe = tmp_path / "nothing"
    for step in ([*command, f"{probe}.cpp", "-o", str(probe)], [str(probe)]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{command[0]} has no sanitizers here: {done.stderr.strip().splitlines()[-1:]}")
    here = Path(__file__).parent
    sources = [str(native.CSRC / f"{name}.cpp") for name in ("common", "avx512", "avx512_bf16")]
    emulated = ["-DLOSA_FUZZ_EMULATED", "-I", str(here / "emulated")]
    fuzz = str(tmp_path / "fuzz")
    subprocess.run([*command, *emulated, str(here / "fuzz_kernels.cpp"), *sources, "-o", fuzz, "-ldl"], check=True)
    for seed in range(20 * FUZZ):
        done = subprocess.run([fuzz, "0", str(seed)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_error_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def build() -> Path:
        tried.append(1)
        raise native.Unavailable("no")

    native._library.cache_clear()
    native.library.cache_clear()
    monkeypatch.setattr(native, "build", build)
    try:
        for _ in range(3):
            with pytest.raises(native.Unavailable, match="no"):
                native.library()
        assert len(tried) == 1
    finally:
        native._library.cache_clear()
        native.library.cache_clear()
