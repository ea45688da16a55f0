"""What a person sees while it works: bars with the time left on a terminal, plain lines elsewhere, or nothing."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from losa.units import duration

T = TypeVar("T")
PLAIN_SECONDS = 60.0  # without a terminal, what takes long says how far it is this often

_interrupted = False  # Ctrl-C was pressed while `heeding_interrupts`


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Within it, Ctrl-C ends what `track` goes through also where Python only prints it (in destructors, in callbacks).

    Not where another thread has to see to it, or where whoever started the program wants it ignored (a shell, of its
    background jobs).
    """
    global _interrupted
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return

    def interrupt(_number: int, _frame: Any) -> None:
        global _interrupted
        _interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted = False  # it has ended this work, and is not about what comes after it


class Progress:
    """Writes to standard error, so that results on standard output stay clean. `quiet` says nothing at all.

    What is under way nests (a phase, and the blocks it goes through); the innermost is shown. `stop` takes everything
    off the screen, whatever ended the work.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._screen: Any = None  # rich's, while something is shown on a terminal
        self._tasks: list[Any] = []  # rich's, the innermost last
        self._note = ""

    def say(self, line: str) -> None:
        """One line, for good."""
        if self._screen is not None:
            self._screen.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What to say of the present item, such as its loss; until the next note."""
        self._note = text
        if self._tasks:
            self._screen.update(self._tasks[-1], note=text)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Something whose end is not known: on a terminal, its name and a sign of life."""
        with self._shown(what, None, 0, ""):
            yield

    def track(self, items: Sequence[T], what: str, unit: str = "", done: int = 0) -> Iterator[T]:
        """`items` (each a `unit`) one by one, of which `done` came before; how far it is, and how long it will take."""
        total, began = done + len(items), time.monotonic()
        said = began
        with self._shown(what, total, done, unit) as advance:
            for count, item in enumerate(items, done + 1):
                yield item
                if _interrupted:
                    raise KeyboardInterrupt
                advance()
                now = time.monotonic()
                if not self.quiet and self._screen is None and now - said >= PLAIN_SECONDS and count < total:
                    left = (now - began) / (count - done) * (total - count)
                    note = f", {self._note}" if self._note else ""
                    self.say(f"{what}, {unit} {count}/{total}{note}, {duration(left)} left")
                    said = now

    @contextmanager
    def _shown(self, what: str, total: int | None, done: int, unit: str) -> Iterator[Any]:
        """On a terminal, a bar in the place of the one outside it. Yields what to call after each item."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda: None
            return
        if self._screen is None:
            self._screen = _screen()
            self._screen.start()
        for outer in self._screen.tasks:
            if outer.id in self._tasks[-1:] and outer.description.endswith(
                f": {what}"
            ):  # the same, which knows its step
                what = outer.description
        for shown in self._tasks:
            self._screen.update(shown, visible=False)
        unit = f"{unit} {{}}/{total}" if total is not None else ""
        task = self._screen.add_task(what, total=total, completed=done, count=unit.format(done), note="")
        self._tasks.append(task)

        def advance() -> None:
            nonlocal done
            done += 1
            if self._screen is not None:
                self._screen.update(task, advance=1, count=unit.format(done))

        try:
            yield advance
        finally:
            self._note = ""
            if task in self._tasks:  # not if `stop` came first
                self._tasks.remove(task)
                self._screen.remove_task(task)
                if self._tasks:
                    self._screen.update(self._tasks[-1], visible=True)
                else:
                    self.stop()

    def stop(self) -> None:
        """Take the bars away."""
        if self._screen is not None:
            for task in self._tasks:
                self._screen.remove_task(task)
            self._screen.stop()
        self._screen, self._tasks = None, []


def _screen() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class Time(TimeRemainingColumn):
        """What is left, where that is known; else what has passed."""

        def render(self, task: Any) -> Any:
            if task.total is None:
                return TimeElapsedColumn().render(task)
            return super().render(task) + " left"

    def text(field: str) -> Any:  # a brace or bracket in it is no markup
        return TextColumn(field, markup=False)

    columns = (
        text("{task.description}"),
        BarColumn(bar_width=24),
        text("{task.fields[count]}"),
        text("{task.fields[note]}"),
        Time(compact=True),
    )
    return Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
