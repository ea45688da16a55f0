"""What a run directory tells of its run: finished, going on, or cut short."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from losa.errors import LosaError
from losa.run import FORMAT, in_use, rates_found

# what is measured of the models that a run makes one of, and what these are called
NAMES = {"dense": "dense", "finetuned": "fine-tuned", "before": "as it came"}


@dataclass
class Row:
    """A line of the verdict; None is what was not measured. `sample` is the perplexity on the tokens the steps are measured on."""

    name: str
    perplexity: float | None = None
    sample: float | None = None
    sparsity: float | None = None
    memory: int | None = None  # bytes of the weights, loaded
    disk: int | None = None  # bytes of their files
    speed: float | None = None  # tokens a second, decoding one text


@dataclass
class Story:
    """A run, as its directory has it. `history` has a record a pruned step, `updates` the losses of recovery in order."""

    folder: Path
    status: Literal["finished", "going", "cut short"]
    source: str
    command: str  # compress or recover
    recipe: dict[str, Any]
    versions: dict[str, str]
    measurements: dict[str, dict[str, Any]]
    history: list[dict[str, Any]]
    updates: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    evidence: dict[int, dict[str, Any]] = field(default_factory=dict)  # what rates were made from, by step
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the model before and after
    exported: dict[str, str] = field(default_factory=dict)  # from where and in what form, by losa export
    begun_in: str = ""  # the folder that the names of its files are relative to; known until it has finished
    machine: dict[str, Any] = field(default_factory=dict)
    now: dict[str, Any] | None = None  # the phase under way, or that was
    began: float | None = None  # seconds since 1970
    ended: float | None = None
    unread: int = 0  # lines of the log that a kill left broken
    name: str = ""  # what it is called among others

    @property
    def seconds(self) -> float:
        return float(sum(phase["seconds"] for phase in self.phases))

    @property
    def peak(self) -> int | None:
        """The most memory that a phase took, in bytes."""
        return max((phase["memory"] for phase in self.phases if phase.get("memory")), default=None)

    @property
    def device_peak(self) -> int | None:
        """The same of the device's memory."""
        return max((phase["device_memory"] for phase in self.phases if phase.get("device_memory")), default=None)

    @property
    def first(self) -> dict[str, Any]:
        """What was measured of the model as it came: dense, or pruned already."""
        return next(iter(self.measurements.values()), {})

    @property
    def rates(self) -> list[float]:
        """The learning rates that trials found; none where one was named."""
        return rates_found(self.history)

    @property
    def sampled(self) -> bool:
        """Whether the steps were measured on other tokens than the first and the final model."""
        return self.first.get("perplexity") != self.first.get("sample_perplexity")

    def verdict(self) -> list[Row]:
        """The model as it came (and fine-tuned), after the latest pruning, and after the latest recovery; the result comes last."""
        sparse = self.measurements.get("sparse")
        rows = [_row(NAMES.get(name, name), found) for name, found in self.measurements.items() if name != "sparse"]
        if self.history:
            last = self.history[-1]
            found, reached = last["perplexity"], last["mean_sparsity"]
            if "pruned" in found and (not sparse or "recovered" in found):
                rows.append(Row(f"pruned, step {last['step']}", sample=found["pruned"], sparsity=reached))
            if "recovered" in found and not sparse:
                rows.append(Row(f"recovered, step {last['step']}", sample=found["recovered"], sparsity=reached))
            if sparse:
                rows.append(_row("recovered" if "recovered" in found else "pruned", sparse))
        return rows


def _row(name: str, measured: dict[str, Any]) -> Row:
    found = [measured.get(key) for key in ("size", "disk", "tokens_per_second")]
    return Row(name, measured["perplexity"], measured.get("sample_perplexity"), measured.get("sparsity", 0.0), *found)


def read(folder: Path) -> Story:
    """The story of the run in `folder`. Raises LosaError if there is none, or one of another format, or a damaged one."""
    asked, made = folder / "run" / "recipe.json", folder / "losa.json"
    if not folder.is_dir():
        raise LosaError(f"{str(folder)!r} is no folder: name the output of losa compress or recover")
    if not asked.is_file() and not made.is_file():
        inner = sorted(str(path.parents[1]) for path in folder.glob("*/run/recipe.json"))
        hint = (
            f"it holds runs, name these: {', '.join(inner)}" if inner else "name the output of losa compress or recover"
        )
        raise LosaError(f"{str(folder)!r} is no run of losa: {hint}")
    try:
        told = _read(made if made.is_file() else asked)
        status = "finished" if made.is_file() else "going" if in_use(folder) else "cut short"
        story = Story(
            folder=folder,
            name=folder.resolve().name,
            status=status,  # type: ignore[arg-type]
            source=told["source"],
            command=told["command"],
            recipe=told["recipe"],
            versions=told["versions"],
            measurements=told.get("measurements", {}),
            history=told.get("history", []),
            exported=told.get("exported", {}),
            begun_in=told.get("folder", ""),
        )
        _read_log(story, folder / "run" / "log.jsonl")
        story.verdict()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise LosaError(f"the run in {str(folder)!r} is damaged ({type(error).__name__}: {error})") from None
    return story


def _read(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if told["format"] != FORMAT:
        raise LosaError(f"{path} is of format {told['format']}, this losa reads {FORMAT}: use the losa that wrote it")
    return told


def _read_log(story: Story, path: Path) -> None:
    """What the log adds. Where a run was killed and resumed, what was done again counts once, as it was the last time."""
    if not path.is_file():
        return
    history: dict[int, dict[str, Any]] = {}
    updates: dict[tuple[int, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
            kind, when = event["event"], event["time"]
        except (ValueError, KeyError, TypeError, RecursionError):
            story.unread += 1
            continue
        story.began = when if story.began is None else min(story.began, when)
        story.ended = when
        if kind == "machine":
            story.machine = {key: value for key, value in event.items() if key not in ("event", "time")}
        elif kind == "begins":
            story.now = event
        elif kind == "phase":
            story.phases.append(event)
            story.now = None
        elif kind in NAMES and story.status != "finished":
            story.measurements[kind] = event
        elif kind == "samples":
            story.samples[event["model"]] = event
        elif kind == "rates":
            story.evidence[event["step"]] = event
        elif kind in ("pruned", "step"):
            history[event["step"]] = event
        elif kind == "update":
            updates[event["step"], event["update"]] = event
            if story.now:
                story.now = story.now | {"update": event["update"], "of": event["of"]}
    story.history = story.history or [history[step] for step in sorted(history)]
    story.updates = [updates[key] for key in sorted(updates)]
