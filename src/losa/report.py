"""What runs did, as one page that needs nothing else: no network, no other file."""

import base64
import dataclasses
import gzip
import importlib
import json
import math
import shlex
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from losa import story
from losa.errors import LosaError
from losa.pictures import PHASES, pictures
from losa.recipe import Recipe
from losa.run import REPORT, is_report, write_bytes
from losa.story import Row, Story
from losa.units import duration, number, size


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page about the runs in `folders` (more than one: compared) to `output`, in one step; returns its place.

    output: None is report.html in the first folder. A page of ours that is there is replaced. Raises LosaError for a
    folder that is no run, and for an output that is something else or cannot be written.
    """
    stories = [story.read(folder) for folder in folders]
    output = output or folders[0] / REPORT
    if output.exists() and not is_report(output):
        raise LosaError(f"{str(output)!r} is there and no report of losa: --output names another file")
    page = render(stories)
    try:
        write_bytes(output, page.encode())
    except OSError as error:
        raise LosaError(f"{str(output)!r} cannot be written: {error.strerror}") from None
    return output


def render(stories: list[Story]) -> str:
    """The page. Everything from the runs is escaped: by jinja, and in JSON and in plotly's labels by hand."""
    import jinja2
    from markupsafe import Markup

    from losa import __version__

    _tell_apart(stories)
    drawn = pictures(stories)
    files = resources.files("losa").joinpath("page")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files.joinpath("report.html").read_text()
    )
    figures = json.dumps({picture.id: _finite(picture.figure) for row in drawn for picture in row}).replace(
        "<", "\\u003c"
    )
    one = stories[0] if len(stories) == 1 else None
    return template.render(
        losa=__version__,
        made=time.strftime("%-d %B %Y, %H:%M"),
        title=_title(one) if one else f"{len(stories)} runs compared",
        headline=_headline(one) if one else _comparison(stories),
        explained=_explained(one) if one else _methods(stories),
        states=[state for s in stories if (state := _state(s, len(stories) > 1))],
        tiles=_tiles(one) if one else [],
        verdict=_verdict(stories),
        footnotes=_footnotes(stories),
        pictures=drawn,
        absent=_absent(stories),
        samples=_samples(stories),
        recipe=_recipe(stories),
        where=_where(stories),
        figures=Markup(figures),
        plotly=Markup(_plotly()),
        css=Markup(files.joinpath("report.css").read_text()),
        js=Markup(files.joinpath("report.js").read_text()),
    )


def _plotly() -> str:
    """plotly's script, packed: a third of its size, and any browser of today unpacks it."""
    script = importlib.import_module("plotly.offline").get_plotlyjs()
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _finite(value: Any) -> Any:
    """What JSON has no word for, and losses may be, left out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _tell_apart(stories: list[Story]) -> None:
    """Folders of the same name are called by their whole path."""
    names = [s.folder.resolve().name for s in stories]
    for s, name in zip(stories, names, strict=True):
        s.name = name if names.count(name) == 1 else str(s.folder)


# ----------------------------------------------------------------------------------------------------- what is said


def _title(s: Story) -> str:
    what = s.source.rstrip("/").rpartition("/")[2]
    reached = s.measurements.get("sparse", {}).get("sparsity")
    return (
        f"{what}, {reached:.1%} sparse" if reached is not None else f"{what} on its way to {s.recipe['sparsity']:.0%}"
    )


def _method(s: Story) -> str:
    recipe = s.recipe
    recovery = "no recovery" if recipe["recovery"] == "none" else f"recovery by {recipe['recovery']}"
    if recipe["distill"]:
        recovery += f", {recipe['distill']:.0%} distilled"
    if s.command == "recover":
        return f"pruned already, {recovery}"
    first = "fine-tuned first, " if recipe["finetune_first"] else ""
    pattern = "" if recipe["pattern"] == "unstructured" else f", {recipe['pattern']}"
    steps = f"{recipe['steps']} steps" if recipe["steps"] > 1 else "one step"
    return (
        f"{first}{recipe['sparsity']:.0%} by {recipe['pruner']}{pattern} in {steps}, rates by {recipe['allocator']}, "
        f"{recovery}"
    )


def _headline(s: Story) -> str:
    first, sparse = s.first, s.measurements.get("sparse", {})
    if not sparse:
        return f"{_method(s)[0].upper()}{_method(s)[1:]}."
    gone = f"{sparse['sparsity']:.1%} of the weights are gone"
    if sparse["perplexity"] is None:
        return f"{gone}; perplexity was not measured (no eval_data)."
    grown = sparse["perplexity"] / first["perplexity"] - 1
    change = f"{abs(grown):.1%} {'higher' if grown > 0 else 'lower'}"
    return f"{gone}; perplexity went from {number(first['perplexity'])} to {number(sparse['perplexity'])}, {change}."


def _comparison(stories: list[Story]) -> str:
    """Which run ends best, if they can be told by the same measure."""
    ends = [s.measurements.get("sparse", {}) for s in stories]
    if not all(end.get("perplexity") for end in ends):
        return "Not all of them have a perplexity at their end."
    if len({(s.first["perplexity"], s.recipe["eval_data"]) for s in stories}) > 1:
        return "They were measured from different models or on different texts: their perplexities do not compare."
    low, best = min((end["perplexity"], s.name) for end, s in zip(ends, stories, strict=True))
    return f"{best} ends lowest: perplexity {number(low)}, where it began at {number(stories[0].first['perplexity'])}."


def _methods(stories: list[Story]) -> list[str]:
    """Of each run; once, if all are alike: where they differ is in the settings that differ."""
    methods = [_method(s) for s in stories]
    if len(set(methods)) > 1:
        return [f"{s.name}: {method}." for s, method in zip(stories, methods, strict=True)]
    return [f"{'Both' if len(stories) == 2 else 'All'}: {methods[0]}."]


def _explained(s: Story) -> list[str]:
    """The method, and what the latest recovery won back, on the same tokens."""
    lines = [f"{_method(s)[0].upper()}{_method(s)[1:]}."] if s.measurements.get("sparse") else []
    dense, last = s.measurements.get("dense", {}).get("sample_perplexity"), s.history[-1] if s.history else None
    found = last["perplexity"] if last else {}
    pruned, recovered = found.get("pruned"), found.get("recovered")
    if recovered:  # of a run that ended, what was saved: the table's figure, in the dtype that weights are stored in
        recovered = s.measurements.get("sparse", {}).get("sample_perplexity") or recovered
    if last and dense and pruned and recovered and pruned > dense:
        share = (pruned - recovered) / (pruned - dense)
        lines.append(
            f"After the pruning of step {last['step']}, perplexity stood at {number(pruned)}; the recovery that followed "
            f"brought it to {number(recovered)}"
            + (f", {share:.0%} of the way back to dense" if share > 0 else "")
            + (f" (on a sample of the text, where dense has {number(dense)})." if s.sampled else ".")
        )
    return lines


def _state(s: Story, named: bool) -> dict[str, str] | None:
    """What to know of a run that has not finished."""
    if s.status == "finished":
        return None
    who = f"{s.name}: this run" if named else "This run"
    at = ""
    if s.now:
        step = f"step {s.now['step']} of {s.recipe['steps']}, " if s.now.get("step") else ""  # 0: fine-tuned first
        at = f" at {step}{PHASES.get(s.now['phase'], s.now['phase'])}"
        if "update" in s.now:
            at += f", update {s.now['update']} of {s.now['of']}"
    if s.status == "going":
        what = f"{who} is going on{',' if at else ''}{at}. The page shows what was there at {_clock(s.ended)}."
        return {"text": what, "command": ""}
    command = shlex.join(["losa", s.command, s.source, "--output", str(s.folder.resolve()), "--resume"])
    there = f" in {s.begun_in}" if s.begun_in else ""  # what names of files are relative to
    return {"text": f"{who} was cut short{at}, {_clock(s.ended)}. It goes on{there} with", "command": command}


def _clock(when: float | None) -> str:
    return time.strftime("%-d %B, %H:%M", time.localtime(when)) if when else "a time unknown"


def _tiles(s: Story) -> list[dict[str, str]]:
    first, sparse = s.first, s.measurements.get("sparse", {})
    if not sparse:
        return []
    was = "dense" if "dense" in s.measurements else "as it came"
    tiles = []
    if sparse["perplexity"] is not None:
        more = f"{number(first['perplexity'])} {was}, {sparse['tokens']:,} tokens"
        tiles.append({"what": "perplexity", "value": number(sparse["perplexity"]), "more": more})
    more = f"{sparse['kept']:,} of {sparse['weights']:,} kept"
    tiles.append({"what": "weights gone", "value": f"{sparse['sparsity']:.1%}", "more": more})
    if first.get("disk") and sparse.get("disk"):
        more = f"{size(first['disk'])} {was}"
        tiles.append({"what": "size on disk", "value": size(sparse["disk"]), "more": more})
    if s.phases:
        more = peaks(s)
        tiles.append({"what": "time of the run", "value": duration(s.seconds), "more": more})
    return tiles


def _verdict(stories: list[Story]) -> dict[str, Any]:
    """The rows of all runs; the dense model once, if it is the same."""
    rows: list[tuple[str, Row, bool]] = []
    for s in stories:
        told = s.verdict()
        for row in told:
            same = row.name == "dense" and any(
                other.name == "dense" and (other.perplexity, other.memory) == (row.perplexity, row.memory)
                for _, other, _ in rows
            )
            if not same:
                rows.append((s.name, row, s.status == "finished" and row is told[-1]))
    return verdict_table(rows, several=len(stories) > 1, sampled=any(s.sampled for s in stories))


def verdict_table(rows: list[tuple[str, Row, bool]], several: bool, sampled: bool) -> dict[str, Any]:
    """Columns, and cells as they are shown; without those that hold nothing. rows: (run, row, whether it is the result)."""

    def perplexity(row: Row) -> float | None:
        return row.perplexity if sampled or row.perplexity is not None else row.sample

    columns: list[tuple[str, Any]] = [
        ("", lambda name, row: f"{name}: {row.name}" if several and row.name != "dense" else row.name),
        ("perplexity", lambda _, row: number(perplexity(row))),
        ("on a sample", lambda _, row: number(row.sample) if sampled else "-"),
        ("sparsity", lambda _, row: "-" if row.sparsity is None else f"{row.sparsity:.1%}"),
        ("in memory", lambda _, row: size(row.memory) if row.memory else "-"),
        ("on disk", lambda _, row: size(row.disk) if row.disk else "-"),
        ("decoding", lambda _, row: f"{row.speed:.0f} tokens/s" if row.speed else "-"),
    ]
    cells = [[make(name, row) for name, row, _ in rows] for _, make in columns]
    shown = [i for i, column in enumerate(cells) if i == 0 or any(cell != "-" for cell in column)]
    return {
        "columns": [columns[i][0] for i in shown],
        "rows": [{"cells": [cells[i][n] for i in shown], "result": result} for n, (_, _, result) in enumerate(rows)],
    }


def peaks(s: Story) -> str:
    """The most memory the run took, of the machine and of its device, for people; "" if nobody looked."""
    told = [(s.peak, "of memory"), (s.device_peak, "of the device's")]
    said = " and ".join(f"{size(most)} {of}" for most, of in told if most)
    return f"{said} at its peak" if said else ""


def _footnotes(stories: list[Story]) -> list[str]:
    notes = []
    if any(s.sampled for s in stories):
        notes.append(
            "The sample is the part of the evaluation text, spread over it, on which every step is measured "
            "(eval_step_tokens)."
        )
    repaired = [s for s in stories if s.history and s.history[-1]["step"] > 1 and s.recipe["recovery"] != "none"]
    if any(row.name.startswith("pruned, step") for s in repaired for row in s.verdict()):
        notes.append(
            "The pruned model of the last step is one that the steps before it have repaired: what pruning alone costs is "
            "another run (--recovery none --steps 1), and both can be compared here."
        )
    for s in stories:
        if s.exported:
            came = Path(s.exported["from"]).name
            who = f"{s.name} was e" if len(stories) > 1 else "E"
            notes.append(
                f"{who}xported from {came} in {s.exported['format']} form; all but this form's size and speed was measured "
                "before."
            )
    whole = [
        s
        for s in stories
        if {"dense", "sparse"} <= s.measurements.keys()
        and s.measurements["sparse"].get("size") == s.measurements["dense"].get("size")
    ]
    if whole:
        who = "Zeros" if len(whole) == len(stories) else f"{', '.join(s.name for s in whole)}: zeros"
        timed = any("tokens_per_second" in s.measurements["sparse"] for s in whole)
        alike = "size is" if timed else "size and speed are"
        notes.append(f"{who} are stored like other weights, so that {alike} the dense model's.")
    return notes


def _absent(stories: list[Story]) -> list[str]:
    """What has no picture, and why."""
    notes = []
    for s in stories:
        who = f"{s.name}: " if len(stories) > 1 else ""
        logged = (s.folder / "run" / "log.jsonl").is_file()
        if not logged:
            notes.append(f"{who}no losses, times or samples: the run's log (run/log.jsonl) is not there.")
        elif s.command == "compress" and s.history and not any("rmi" in seen for seen in s.evidence.values()):
            notes.append(f"{who}no RMI matrix: allocator {s.recipe['allocator']} does not compute it.")
        if logged and s.status == "finished" and not s.samples:
            notes.append(
                f"{who}no samples of what it writes: from disk, and without prompts or sample_tokens, none are made."
            )
        if s.unread:
            lines = "1 line of the log was" if s.unread == 1 else f"{s.unread} lines of the log were"
            notes.append(f"{who}{lines} broken, as a kill leaves them, and left out.")
    return notes


def _samples(stories: list[Story]) -> list[dict[str, Any]]:
    """The prompts that all runs continued, with what each model made of it; the dense model's once."""
    told = [s for s in stories if s.samples]
    if not told:
        return []
    several = len(stories) > 1
    shown = []
    for number_, prompt in enumerate(next(iter(told[0].samples.values()))["prompts"]):
        texts: dict[str, str] = {}
        for s in told:
            for kind, made in s.samples.items():
                if made["prompts"][number_ : number_ + 1] == [prompt]:
                    name = f"{s.name}: {kind}" if several and kind != "dense" else kind
                    texts.setdefault(name, made["texts"][number_])
        shown.append({"prompt": prompt, "texts": list(texts.items())})
    return shown


def _recipe(stories: list[Story]) -> dict[str, Any]:
    """Of one run, what differs from losa's defaults; of several, what differs between them."""
    names = list(dict.fromkeys(name for s in stories for name in s.recipe))
    every = [[name, *(_setting(s, name) for s in stories)] for name in names]
    if len(stories) == 1:
        usual = {f.name: _value(value) for f, value in zip(dataclasses.fields(Recipe), _defaults(), strict=True)}
        rows = [row for row in every if row[1] != usual.get(row[0])]
        title, note = "Recipe", "What differs from losa's defaults"
        note += ", and the learning rate that was found." if stories[0].rates else "."
    else:
        rows = [row for row in every if len(set(row[1:])) > 1]
        title, note = "What differs", "Settings in which the runs differ." if rows else "No setting differs."
    return {
        "title": title,
        "note": note,
        "rows": rows,
        "all": every,
        "columns": ["setting", *(s.name for s in stories)],
    }


def _setting(s: Story, name: str) -> str:
    """As it was asked for; the learning rate that was asked to be found, with what was found."""
    value = _value(s.recipe.get(name))
    return f"{value}: {' and '.join(f'{rate:g}' for rate in s.rates)}" if name == "learning_rate" and s.rates else value


def _defaults() -> list[Any]:
    usual = Recipe()
    return [getattr(usual, f.name) for f in dataclasses.fields(usual)]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _where(stories: list[Story]) -> dict[str, Any]:
    keys = [("machine", key) for key in dict.fromkeys(key for s in stories for key in s.machine)]
    keys += [("versions", key) for key in dict.fromkeys(key for s in stories for key in s.versions)]
    rows = [["model", *(s.source for s in stories)], ["folder", *(str(s.folder.resolve()) for s in stories)]]
    rows.append(["began", *(_clock(s.began) for s in stories)])
    rows += [[key, *(_value(getattr(s, group).get(key, "-")) for s in stories)] for group, key in keys]
    return {"columns": ["", *(s.name for s in stories)], "rows": rows}
