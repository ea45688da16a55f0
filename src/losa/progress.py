"""What a person sees while it works: a bar with the time left on a terminal, a plain line a step elsewhere, or nothing."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Writes to standard error, so that results on standard output stay clean. `quiet` says nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, line: str) -> None:
        """One line, for good."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def track(self, items: Sequence[T], what: str, done: int = 0) -> Iterator[T]:
        """`items` one by one; on a terminal with a bar that counts from `done` and goes away at the end."""
        if self.quiet or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(what, total=done + len(items), completed=done)
            for item in items:
                yield item
                bars.advance(bar)
