"""Runs zero-shot tasks through lm-evaluation-harness on a model that is already loaded."""

import contextlib
import copy
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from losa import registry
from losa.errors import LosaError
from losa.tasks import local

FOLDER = Path(__file__).parent
PAPER = ("hellaswag", "winogrande", "boolq", "openbookqa", "piqa", "arc_easy", "arc_challenge")  # its table 2
NAMES = (*PAPER, "demo-next-line")


def expand(names: Iterable[str], task_data: Mapping[str, str]) -> list[str]:
    """`names` with `paper` replaced by its seven tasks, none twice; checked, as is what `task_data` names.

    A name may also be a file of the harness's own form (NAME.yaml). Raises LosaError for any other.
    """
    found: dict[str, None] = {}
    for name in names:
        if name != "paper" and name not in NAMES and not (name.endswith(".yaml") and Path(name).is_file()):
            raise registry.unknown("task", name, ["paper", *NAMES, "FILE.yaml"])
        found |= dict.fromkeys(PAPER if name == "paper" else [name])
    for name, path in task_data.items():
        if name not in local.FIELDS:
            raise registry.unknown("task in --task-data", name, local.FIELDS)
        if name not in found:
            raise LosaError(f"--task-data {name}={path}: {name} is not among the tasks ({', '.join(found) or 'none'})")
        local.find(name, Path(os.path.expanduser(path)))
    return [*found]


def prepare(names: Sequence[str], task_data: Mapping[str, str]) -> dict[str, Any]:
    """The harness's tasks by name, with their rows: from `task_data` (files or folders) where it has them, else the hub.

    Raises LosaError if rows are not there or cannot be read, with what to do.
    """
    if not names:
        return {}
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ImportError as error:
        raise LosaError(f"tasks need lm-evaluation-harness ({error}): pip install 'lm_eval[hf]'") from None
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    prepared: dict[str, Any] = {}
    for name in names:
        if name in task_data:
            prepared[name] = _with_rows(manager, name, Path(os.path.expanduser(task_data[name])))
            continue
        try:
            with _hushed(output=True):
                prepared |= manager.load([name])["tasks"]
        except (
            Exception
        ) as error:  # network, hub, cache and formats each have their own; the user's way out is the same
            way_out = f"give its rows with --task-data {name}=FILE or FOLDER" if name in local.FIELDS else "mend it"
            raise LosaError(
                f"task {name!r} cannot be read ({_first_line(error)}): check the network, or {way_out}"
            ) from error
    return prepared


def _with_rows(manager: Any, name: str, path: Path) -> Any:
    """Our definition of a task with the rows of a local file in place of its dataset, each checked to have its answer."""
    import datasets  # type: ignore[import-untyped]

    rows = local.rows(name, path)

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(rows)}

    changed = {"custom_dataset": dataset, "training_split": None, "validation_split": None, "test_split": "test"}
    # a group is how the harness lets a definition be read by name and changed
    spec = {"group": "local", "task": [{"task": name} | changed]}
    try:
        with _hushed(output=True):
            task = manager.load([spec])["tasks"][name]
    except Exception as error:
        raise LosaError(f"the rows of {local.find(name, path)} do not fit {name}: {_first_line(error)}") from error
    for number, row in enumerate(task.test_docs(), 1):
        with contextlib.suppress(KeyError, ValueError, TypeError):
            # where the choices are beginnings, doc_to_text says which of them is right
            right = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
            if isinstance(right, int) and 0 <= right < len(task.doc_to_choice(row)):
                continue
        answer = local.FIELDS[name][-1]
        raise LosaError(
            f"{local.find(name, path)}, row {number}: {answer} {row[answer]!r} is none of the choices of {name}"
        )
    return task


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    task_data: Mapping[str, str] | None = None,
    limit: int = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Scores of a loaded causal language model on tasks by name: `expand`, `prepare` and `run` in one."""
    data = task_data or {}
    return run(model, tokenizer, prepare(expand(tasks, data), data), limit, batch_size)


def run(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], limit: int = 0, batch_size: int = 8, quiet: bool = True
) -> dict[str, Any]:
    """Scores of a loaded causal language model on prepared tasks, as the harness computes them.

    Returns {"tasks": {name: {"rows", "cut", metric, metric_stderr, ...}}, "mean": {metric: mean over all tasks}}, the
    latter of metrics that every task has. limit: only the first so many questions (0: all). cut: answers that had the
    beginning of their question left out, since both together are longer than the model reads.
    Raises LosaError for an answer that alone is longer than that.
    """
    from lm_eval import evaluate  # type: ignore[import-untyped]

    lm = as_the_harness_reads(model, tokenizer, batch_size)
    scores: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        lm.cut = 0
        with _hushed(output=quiet):
            found = evaluate(lm, {"tasks": {name: task}}, limit=limit or None, log_samples=False)
        scores[name] = {"rows": found["n-samples"][name]["effective"], "cut": lm.cut}
        for key, value in found["results"][name].items():
            metric, _, kind = key.partition(",")
            if kind and isinstance(value, int | float):
                scores[name][metric] = value
    shared = set.intersection(*(set(score) for score in scores.values())) - {"rows", "cut"}
    means = {
        metric: sum(score[metric] for score in scores.values()) / len(scores)
        for metric in sorted(shared)
        if not metric.endswith("_stderr")
    }
    return {"tasks": scores, "mean": means}


def as_the_harness_reads(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The loaded model as the harness's HFLM: its device and dtype stay as they are.

    Log-probabilities are taken in fp32 whatever the model computes in, so that they depend on the batch no more than its
    logits do; the harness alone would take them in the model's dtype.
    """
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    class Loaded(HFLM):  # type: ignore[misc]
        """Counts what the harness only warns of, and says what it only asserts."""

        cut = 0

        def _loglikelihood_tokens(self, requests: Any, *rest: Any, **named: Any) -> Any:
            for _, context, continuation in requests:
                if len(continuation) > self.max_length:
                    raise LosaError(
                        f"an answer has {len(continuation)} tokens, and the model reads at most {self.max_length}: "
                        "this task cannot be scored on it"
                    )
                self.cut += len(context) + len(continuation) > self.max_length + 1
            return super()._loglikelihood_tokens(requests, *rest, **named)

    with _hushed():
        return Loaded(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _hushed(output: bool = False) -> Iterator[None]:
    """Without the harness's advice to those who call it otherwise, and with `output` without its bars."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            if output:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
    finally:
        log.setLevel(level)
