"""The demo: one model dense, pruned only, and with LoSA, measured on held-out text."""

import shutil
from pathlib import Path
from typing import Any

from losa import recipe
from losa.checkpoint import weight_bytes
from losa.errors import LosaError
from losa.generation import SEEDED, continued
from losa.inputs import check
from losa.pipeline import compress
from losa.progress import Progress
from losa.run import check_output
from losa.sparse.convert import convert


def demo(output: Path, chosen: dict[str, Any], resume: bool, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Compress the built-in model twice, without recovery in output/pruned and with LoSA in output/losa, both ordinary
    models with their zeros; output/pruned-packed and output/losa-packed are the same without them. chosen: settings on top
    of the demo's recipe.

    Returns perplexity, sparsity and bytes on disk of the three models, and what each makes of one prompt.
    """
    settings = recipe.load("demo", chosen)
    settings.at(format="packed").validate()
    ways = {"pruned": recipe.load("demo", chosen | {"recovery": "none", "steps": 1}), "losa": settings}
    begun = {name: resume and (output / name / "run").is_dir() for name in ways}
    if (output / "losa").exists() and not overwrite and not resume:
        raise LosaError(
            f"{str(output)!r} holds a demo: --resume goes on with it, --overwrite replaces it, --output names another folder"
        )
    for name, way in ways.items():
        check("demo", way, output / name, overwrite, begun[name])
    if output.exists() and not any((output / name).exists() for name in ways):
        check_output(output)
    made, packed = {}, {name: output / f"{name}-packed" for name in ways}
    for folder in packed.values():  # first, so that an interrupted demo has none of an earlier one
        if overwrite and (folder / "losa.json").is_file():
            shutil.rmtree(folder)
    for name, way in ways.items():
        progress.say("pruned only, in one step" if name == "pruned" else f"LoSA, {way.steps} steps")
        made[name] = compress("demo", way, output / name, resume=begun[name], overwrite=overwrite, progress=progress)
        if not packed[name].exists():
            convert(output / name, packed[name], "packed", "auto", progress=progress)

    from losa.model import load, locate

    first = made["losa"].measurements
    original = {"sparsity": 0.0, "kept": first["sparse"]["weights"], "bytes": weight_bytes(Path(locate("demo")))}
    lines = {"dense": first["dense"] | original}
    for title, name in (("pruned only", "pruned"), ("LoSA", "losa")):
        size = {"bytes": weight_bytes(output / name), "bytes_packed": weight_bytes(packed[name])}
        lines[title] = made[name].measurements["sparse"] | size
    models = {"dense": load("demo", settings), "pruned only": made["pruned"].model, "LoSA": made["losa"].model}
    prompt = settings.prompts[0]
    samples = {name: continuation(model, made["losa"].tokenizer, prompt) for name, model in models.items()}
    folders = {"output": str(output / "losa"), "packed": str(packed["losa"])}
    return folders | {"models": lines, "prompt": prompt, "samples": samples}


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model makes of the prompt; a seeded sample, since the likeliest tokens of so small a model soon repeat."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = continued(model, tokenizer, inputs, 60, seed=0, **SEEDED)
    return str(tokenizer.decode(ids, skip_special_tokens=True))
