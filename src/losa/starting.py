"""How a run starts: everything checked, the model loaded, then what is to be made of it; nothing is written before."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from losa import data, disk, distributed, inspection, memory, model, registry, usage
from losa.blocks import Subject, subject_of
from losa.errors import LosaError
from losa.inputs import Inputs, check, fingerprint, not_held_out, read
from losa.progress import Progress
from losa.recipe import Recipe
from losa.recovery.distillation import check_vocabulary
from losa.run import Run, code, read_made, short_of_room, versions
from losa.units import dtype_name


@dataclass
class Result:
    """A compressed model: merged, in memory, dense or packed as it was saved, and where. `history` has rates, errors and ranks of every step.

    `model` is None where it was left on disk, or computes as measured only with the pairs saved beside it (a recovery that
    does not merge): `path` has it.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    measurements: dict[str, Any]
    history: list[dict[str, Any]]
    path: Path | None


def start(
    source: Any,
    recipe: Recipe,
    output: str | Path | None,
    begin: Callable[[Subject, Recipe, Inputs], Callable[[Run], Result]],
    tokenizer: Any,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
) -> Result:
    """Check everything, load the model, and run what `begin` makes of it. If that raises, nothing has been written or
    replaced yet. The other arguments are those of `compress`."""
    output = Path(output) if output is not None else None
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    name = model.name_of(source)
    with distributed.joined(device_of(recipe)):
        config = check(source, recipe, output, overwrite, resume)
        asked = {
            "model": name,
            "output": str(output),
            "resume": resume,
            "overwrite": overwrite,
            "the code of losa": code(),
        }
        distributed.check_alike(asked | versions() | recipe.to_json())
        return _start(source, name, config, tokenizer, recipe, output, begin, resume, overwrite, progress)


def _start(
    source: Any,
    name: str,
    config: Any,
    tokenizer: Any,
    recipe: Recipe,
    output: Path | None,
    begin: Callable[[Subject, Recipe, Inputs], Callable[[Run], Result]],
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
) -> Result:
    if output is None and not registry.get("recovery", recipe.recovery).merges:
        raise LosaError(f"recovery {recipe.recovery!r} does not merge: name an output for the pairs it trains")
    if output is None and recipe.distill and recipe.teacher == "cached":
        raise LosaError("a cached teacher's predictions are kept in the run: name an output, or set teacher to live")
    if tokenizer is None:
        place = source if isinstance(source, str) else config.name_or_path  # empty if it was not loaded by transformers
        if not place:
            raise LosaError(f"a loaded model ({name}) needs its tokenizer: pass tokenizer=")
        tokenizer = model.load_tokenizer(place, config)
    else:
        data.check_tokenizer(tokenizer, config.get_text_config().vocab_size)
    if teacher := recipe.teacher_model:
        check_vocabulary(model.load_tokenizer(teacher, model.load_config(teacher)), tokenizer, teacher)
    run, device = Run(output, progress or Progress(quiet=True)), device_of(recipe)
    dtype = model.choose_dtype(recipe.dtype, device) if isinstance(source, str) else source.dtype
    computed = {"dtype": dtype_name(dtype), "device": device.type}
    try:
        if resume:
            run.resume(recipe, name, computed)
            if run.finished:
                return finished(run, recipe, tokenizer)
        way = memory.choose(source, recipe, config, output is not None, run.from_disk)
        run.say_if(way.shortage)
        with run.phase("reading"):
            inputs = read(recipe, tokenizer, config)
            counted = with_rows(recipe, len(inputs.examples))
        if isinstance(source, str) and run.writes and not resume:
            assert output is not None
            run.say_if(short_of_room(output, inspection.plan(source, counted, config, way)["disk"]))
        with run.phase("loading"):
            if way.from_disk:
                subject = disk.OnDisk(disk.local(source), dtype).subject(tokenizer, name, recipe, config.dtype)
            else:
                loaded = model.load(source, recipe) if isinstance(source, str) else source
                subject = subject_of(loaded, tokenizer, name, recipe, config.dtype)
        subject.spill = run.folder if way.spill else None
        if distributed.world() > 1:
            distributed.check_alike(fingerprint(subject, inputs))
        go = begin(subject, counted, inputs)
        if not resume:  # only now: what fails before leaves no trace, and nothing replaced
            run.start(recipe, name, overwrite, way.from_disk, computed)
        run.log("machine", **usage.machine(device_of(recipe)), dtype=dtype_name(subject.model.dtype))
        if isinstance(source, str) and recipe.dtype == "auto" and config.dtype not in (None, subject.stored):
            was, now = map(dtype_name, (config.dtype, subject.stored))
            run.say(f"stored in {was}, computed and saved in {now}: --dtype float32 keeps what is stored")
        run.say_if(not_held_out(recipe))
        if way.from_disk or way.spill:
            run.say(str(way))
        return go(run)
    finally:
        run.close()


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    """`recipe` with the number of recovery rows that were found. Raises LosaError if they are too few for its steps."""
    if not recipe.trains or recipe.train_samples is not None:
        return recipe
    made = recipe.at(train_samples=rows)
    made.validate()
    return made


def finished(run: Run, recipe: Recipe, tokenizer: Any) -> Result:
    """The result of a run that has nothing left to do, but to clear away its states if it was killed just then."""
    output = run.output
    assert output is not None
    run.drop_states()
    run.say(f"{output} was finished before: nothing is left to do")
    made = read_made(output / "losa.json")
    whole = not run.from_disk and registry.get("recovery", recipe.recovery).merges
    loaded = model.load(str(output), recipe) if whole else None
    return Result(loaded, tokenizer, recipe, made["measurements"], made["history"], output)


def device_of(recipe: Recipe) -> torch.device:
    """Where blocks compute: they visit it one at a time if the model lives elsewhere."""
    return model.choose_device(recipe.device)
