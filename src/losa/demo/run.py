"""The demo: one model dense, pruned only, and with LoSA, measured on held-out text."""

from pathlib import Path
from typing import Any

from losa import recipe
from losa.checkpoint import weight_bytes
from losa.errors import LosaError
from losa.generation import continued
from losa.inputs import check
from losa.pipeline import compress
from losa.progress import Progress
from losa.run import check_output


def demo(output: Path, sparsity: float | None, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Compress the built-in model twice, without recovery in output/pruned and with LoSA in output/losa.

    Returns perplexity, sparsity and bytes on disk of the three models, and what each makes of one prompt.
    """
    chosen: dict[str, Any] = {"format": "packed"} | ({} if sparsity is None else {"sparsity": sparsity})
    settings = recipe.load("demo", chosen)
    if (output / "losa").exists() and not overwrite:
        raise LosaError(f"{str(output)!r} holds a demo: --overwrite replaces it, --output names another folder")
    for folder in (output / "pruned", output / "losa"):
        check("demo", settings, folder, overwrite=overwrite)
    if output.exists() and not (output / "losa").exists():
        check_output(output)
    progress.say("pruned only, in one step")
    pruned = compress(
        "demo",
        recipe.load("demo", chosen | {"recovery": "none", "steps": 1}),
        output / "pruned",
        overwrite=overwrite,
        progress=progress,
    )
    progress.say(f"LoSA, {settings.steps} steps")
    losa = compress("demo", settings, output / "losa", overwrite=overwrite, progress=progress)

    from losa.model import load, locate

    dense = load("demo", settings)
    total = losa.measurements["sparse"]["weights"]
    lines = {
        "dense": losa.measurements["dense"]
        | {"sparsity": 0.0, "kept": total, "bytes": weight_bytes(Path(locate("demo")))},
        "pruned only": pruned.measurements["sparse"] | {"bytes": weight_bytes(output / "pruned")},
        "LoSA": losa.measurements["sparse"] | {"bytes": weight_bytes(output / "losa")},
    }
    models = {"dense": dense, "pruned only": pruned.model, "LoSA": losa.model}
    prompt = settings.prompts[0]
    samples = {name: continuation(model, losa.tokenizer, prompt) for name, model in models.items()}
    return {"output": str(output / "losa"), "models": lines, "prompt": prompt, "samples": samples}


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model makes of the prompt; a seeded sample, since the likeliest tokens of so small a model soon repeat."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = continued(model, tokenizer, inputs, 60, seed=0, do_sample=True, temperature=0.6, top_p=0.9)
    return str(tokenizer.decode(ids, skip_special_tokens=True))
