"""What the results of zero-shot cells are asked, and what they answer."""

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from losa import model
from losa.errors import LosaError
from losa.progress import Progress
from losa.recipe import Recipe
from losa.tasks import harness, local


class Questions:
    """Tasks of the model `source`: the paper's seven, of the built-in model its own, unless `tasks` (NAME,NAME) are others.

    task_data: rows of tasks by name, as `harness.expand` takes them. limit: so many questions of each (0: all).
    Raises LosaError for a task there is not, rows that are not there, and a limit below 0.
    """

    def __init__(
        self, source: str, tasks: str = "", task_data: Mapping[str, str] | None = None, limit: int = 0
    ) -> None:
        names = [name for name in tasks.split(",") if name]
        if tasks and not names:
            raise LosaError(f"--tasks {tasks}: names no task")
        if limit < 0:
            raise LosaError(f"--limit is {limit}: must be at least 0, which is all")
        self._data = dict(task_data or {})
        self._names = harness.expand(names or ["demo-next-line" if source == "demo" else "paper"], self._data)
        self._limit = limit

    @functools.cached_property
    def key(self) -> str:
        """A short hash of what decides the answers of a model."""
        what = {"tasks": dict(map(self._known_by, self._names)), "limit": self._limit}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _known_by(self, name: str) -> tuple[str, Any]:
        """A task by its local rows, by the definition in its file (not by what that refers to), or by its name."""
        if name in self._data:
            return name, local.rows(name, Path(os.path.expanduser(self._data[name])))
        if Path(name).is_file():
            return Path(name).name, Path(name).read_text(encoding="utf-8")
        return name, platform.python_version() if name.startswith("demo") else ""

    @functools.cached_property
    def _prepared(self) -> dict[str, Any]:
        return harness.prepare(self._names, self._data)

    @functools.cached_property
    def refusal(self) -> str:
        """Why they cannot be asked on this machine; empty if they can."""
        try:
            without = [name for name, task in self._prepared.items() if "acc" not in task.aggregation()]
        except LosaError as error:
            return str(error)
        return f"task {without[0]!r} has no accuracy (acc) among its metrics: leave it out" if without else ""

    def ask(self, source: str, recipe: Recipe, progress: Progress) -> dict[str, Any]:
        """Scores of the model `source` by task, as `harness.run` has them, and the mean of their accuracies.

        recipe: device and dtype are read.
        """
        config = model.load_config(source)
        tokenizer = model.load_tokenizer(source, config)
        with progress.working("loading"):
            whole = model.load_whole(source, recipe)
        quiet = progress.quiet or not sys.stderr.isatty()
        found = harness.run(whole, tokenizer, self._prepared, self._limit, quiet=quiet)
        return {"accuracy": found["mean"]["acc"], "tasks": found["tasks"]}
