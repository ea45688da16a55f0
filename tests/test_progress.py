"""What a person sees while it works: bars on a terminal, plain lines elsewhere, nothing if so asked."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import flags

import losa
from losa import progress
from losa.progress import Progress, heeding_interrupts
from losa.units import duration, number, size

Settings = dict[str, Any]


EAGER = """
import sys
from losa import cli, progress
made = progress._screen
def screen():
    found = made()
    update = found.update
    found.update = lambda *task, **fields: update(*task, **fields, refresh=True)
    return found
progress._screen = screen
sys.exit(cli.main(sys.argv[1:]))
"""


def on_a_terminal(*command: object) -> tuple[str, str]:
    """What a command of losa shows there on standard error, and says on standard output; it must end well.

    The screen is drawn at every change: ten times a second, as otherwise, may miss what does not take long.
    """
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    arguments = [sys.executable, "-c", EAGER, *map(str, command)]
    worker = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how a pseudo-terminal ends
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert worker.stdout is not None
    out = worker.stdout.read()
    worker.stdout.close()
    assert worker.wait() == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()), out


def test_a_terminal_shows_step_block_loss_and_time(llama: Path, tmp_path: Path, settings: Settings) -> None:
    longer = settings | {"train_samples": 200, "calibration_samples": 40}
    shown, out = on_a_terminal("compress", llama, "--output", tmp_path / "out", *flags(longer))
    assert re.search(r"step 2/2: pruning .* block \d/3 .*error \d\.\d{3}", shown)
    assert re.search(r"step 2/2: recovery .* update \d+/30 +loss \d+\.\d{3} .*left", shown)
    assert re.search(r"dense model .* block \d/3", shown)
    assert re.search(r"step 2/2: perplexity .* batch \d/\d", shown) and not re.search(r"step \d: ", shown)
    for phase in ("reading", "loading", "samples", "saving"):
        assert phase in shown, phase
    assert "step 1/2: sparsity 0.4" in shown  # what stays
    for row in ("dense", "pruned, step 2", "recovered"):
        assert row in out
    assert re.search(r"of memory at its peak; losa report .* shows what happened", out) and "\x1b" not in out


def test_evaluating_and_inspecting_show_where_they_are(llama: Path, settings: Settings) -> None:
    shown, out = on_a_terminal("evaluate", llama, "--data", settings["eval_data"], "--tokens", 20_000)
    assert re.search(r"perplexity .* batch \d+/5", shown) and "perplexity" in out
    shown, _ = on_a_terminal("inspect", llama)
    assert re.search(r"reading .* block \d/3", shown)
    assert on_a_terminal("evaluate", llama, "--data", settings["eval_data"], "--tokens", 2000, "--quiet")[0] == ""
    assert on_a_terminal("inspect", llama, "--json")[0] == ""


def test_without_a_terminal_what_takes_long_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Progress()
    list(told.track(range(4), "quick", "block"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    for item in told.track(range(3), "step 1/2: recovery", "update", done=1):
        told.note(f"loss {item}.5")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ s left", "? left", line) for line in lines] == [
        "step 1/2: recovery, update 2/4, loss 0.5, ? left",
        "step 1/2: recovery, update 3/4, loss 1.5, ? left",
    ]
    list(Progress(quiet=True).track(range(3), "quiet", "block"))
    assert capsys.readouterr().err == ""


def test_an_error_leaves_a_clean_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar is gone before the error is said, although the loop's frame lives on in the traceback."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = Progress()
    with pytest.raises(losa.LosaError), told.working("outer"):
        try:
            for _ in told.track(range(3), "inner", "block"):
                told.say("a line [with] {marks}")
                raise losa.LosaError("no")
        finally:
            told.stop()
            assert told._screen is None
    assert "a line [with] {marks}" in capsys.readouterr().err
    list(told.track(range(2), "again", "block"))
    assert told._screen is None


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 3599, 3600, 7384)] == [
        "0.0 s",
        "9.9 s",
        "10 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "2 h 3 min",
    ]
    assert [size(b) for b in (0, 999, 1000, 999_499, 999_600, 8_925_584, 12e9, 999.9e9, 1.5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "999 kB",
        "1 MB",
        "8.93 MB",
        "12 GB",
        "1 TB",
        "1.5 TB",
    ]
    assert [number(v) for v in (None, 10.012, 9999.4, 123456.0)] == ["-", "10.01", "9999.40", "1.23e+05"]


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C as it is in a terminal: tests in a background job of a shell find it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_still_ends_the_work(heeded: None) -> None:
    """An exception in a destructor is only printed; what is being gone through then ends at its next item, and no later work."""
    gone_through = []

    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), heeding_interrupts():
        for item in Progress(quiet=True).track([0, 1, 2], "work"):
            gone_through.append(item)
            Interrupted()
    assert gone_through == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(Progress(quiet=True).track([0, 1], "other work")) == [0, 1]


def test_an_interrupt_that_is_to_be_ignored_is(heeded: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heeding_interrupts():
        for _ in Progress(quiet=True).track([0, 1], "work"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
