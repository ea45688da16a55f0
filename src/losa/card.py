"""The model card, README.md of a saved model: what it is, from what, how, measured how, and how to load it."""

import os
from pathlib import Path
from typing import Any

from losa.checkpoint import MASKS
from losa.errors import LosaError
from losa.run import rates_found
from losa.sources import SOURCES, Hub, place_of
from losa.units import number, size

LICENSE = ("license", "license_name", "license_link")


def write(folder: Path, made: dict[str, Any], source: Path | None) -> None:
    """README.md of the model in `folder`, with metadata as the hub has it.

    made: what losa.json says. source: where the files of the model that it was made from are, if they are on this
    machine: of its card nothing but the license is taken over.
    """
    recipe, name = made["recipe"], f"{_short(made['source'])}, {made['measurements']['sparse']['sparsity']:.0%} sparse"
    base, license_ = _base(made["source"]), _license(source)
    tags = ["losa", "pruned", "sparse", *([recipe["pruner"]] if "pruner" in recipe else [])]
    body = [
        _what(folder, made, base),
        "## How to load it\n\n" + _loading(folder, made["measurements"]["sparse"].get("loads", "")),
        "## What was measured\n\n" + _measured(made),
        "## How it was made\n\n" + _how(made),
        "## Licence and use\n\n" + _terms(license_),
    ]
    _save(folder, name, body, license_, base_model=base, tags=tags, eval_results=_results(made) or None)


def write_exported(folder: Path, source: Path, form: str, values: str, loads: str) -> None:
    """README.md of a model in `folder` that others made and losa only stored otherwise; `source` is what it was."""
    license_, name = _license(source), f"{source.resolve().name}, {form}"
    note = (
        "rounded to 8 bits, with a scale for 256 columns of a row" if values == "int8" else "bit for bit as they were"
    )
    body = [
        f"`{source.resolve().name}`, written by losa export in {form} form. Its weights are {note}.",
        "## How to load it\n\n" + _loading(folder, loads),
        "## What was measured\n\nNothing.",
        "## Licence and use\n\n" + _terms(license_),
    ]
    _save(folder, name, body, license_, tags=["losa", "sparse"])


def _save(folder: Path, name: str, body: list[str], license_: dict[str, Any], **fields: Any) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    common: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "model_name": name}
    data = ModelCardData(**common, **fields, **license_)
    text = "\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {name}", *body]) + "\n"
    ModelCard(text)  # raises for metadata that is not
    (folder / "README.md").write_text(text, encoding="utf-8")


def _short(source: str) -> str:
    """A model's name without the place where it lay, which is nobody's business."""
    return source.rstrip("/").rpartition("/")[2]


def _base(source: str) -> str | None:
    """The hub's name of the model, if that is where it came from."""
    from losa.model import HUB_NAME

    here = source == "demo" or os.path.exists(os.path.expanduser(source)) or "/" not in source
    return source if not here and HUB_NAME.fullmatch(source) else None


def _license(source: Path | None) -> dict[str, Any]:
    """The license that the source's own card names."""
    from huggingface_hub import ModelCard

    card = source / "README.md" if source else None
    if card is None or not card.is_file():
        return {}
    try:
        said = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever a stranger wrote there, it is no metadata
        return {}
    return {name: said[name] for name in LICENSE if isinstance(said.get(name), str)}


def _results(made: dict[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    value = made["measurements"]["sparse"]["perplexity"]
    if value is None:
        return []
    name, where = _data(made["recipe"]["eval_data"])
    measured = {"metric_type": "perplexity", "metric_name": "perplexity", "metric_value": round(value, 4)}
    return [EvalResult(task_type="text-generation", dataset_type=where, dataset_name=name, **measured)]


def _data(source: str) -> tuple[str, str]:
    """What a data source is called, and the hub's name of it, or what stands for that."""
    known = SOURCES.get(source)
    if isinstance(known, Hub):
        return source, str((known.measure or known.learn)["path"])
    if known is not None:
        held = "" if known == "train" else " that losa's own model never learned from"
        return f"modules of Python's standard library{held}", f"losa-demo-{known}"
    try:
        if place_of(source) == "hub":
            return source, source.partition(":")[0]
    except LosaError:  # a file that is not there any more
        pass
    return Path(source).name, "local-file"


def _what(folder: Path, made: dict[str, Any], base: str | None) -> str:
    recipe, sparse = made["recipe"], made["measurements"]["sparse"]
    if base:
        source = f"[{base}](https://huggingface.co/{base})"
    elif made["source"] == "demo":
        source = "the small model built into losa"
    else:
        source = f"`{_short(made['source'])}`, a model that was not loaded from the hub,"
    doing = "repaired (it was pruned already)" if made["command"] == "recover" else "made"
    lines = [
        f"A causal language model, {doing} from {source} with losa, after "
        "[LoSA](https://arxiv.org/abs/2502.14816), dynamic low-rank sparse adaptation: "
        f"{sparse['sparsity']:.1%} of the {sparse['weights']:,} weights in its pruned linears are gone, {sparse['kept']:,} are kept."
    ]
    if recipe.get("pattern") == "structured":
        lines.append("They were whole heads and MLP channels, so that the model is smaller as it is.")
    elif recipe.get("pattern", "unstructured") != "unstructured":
        lines.append(f"The pattern is {recipe['pattern']}: N weights of every M are kept.")
    if recipe["format"] == "packed":
        kept = "rounded to 8 bits" if recipe["values"] == "int8" else "as they are"
        lines.append(f"It is stored packed: a bit for every weight, and those that are kept, {kept}.")
    elif recipe.get("pattern") != "structured":
        lines.append("They are stored as zeros.")
    if (folder / MASKS).is_file():
        lines.append(f"`{MASKS}` says which.")
    if (folder / "adapter").is_dir():
        lines.append("Low-rank adapters that repair it lie beside it, in `adapter/`; the measurements are with them.")
    return " ".join(lines)


def _loading(folder: Path, loads: str) -> str:
    """Code, and where DIR is. loads: what loads the model, as `losa.shrink` says."""
    before = "import losa  # first: transformers does not know this form by itself\n" if "losa" in loads else ""
    after = ""
    if (folder / "adapter").is_dir():
        before += "from peft import PeftModel\n"
        after = 'model = PeftModel.from_pretrained(model, "DIR/adapter")\n'
    return (
        f"```python\n{before}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR")\n'
        f'{after}tokenizer = AutoTokenizer.from_pretrained("DIR")\n```\n\n`DIR` is the folder that holds this file.'
    )


def _measured(made: dict[str, Any]) -> str:
    recipe, measurements = made["recipe"], made["measurements"]
    rows = [["", *({"before": "as it came", "finetuned": "fine-tuned"}.get(name, name) for name in measurements)]]
    rows.append(["---", *("---:" for _ in measurements)])
    told = [found for found in measurements.values()]
    sparse = measurements["sparse"]
    if sparse["perplexity"] is not None:
        rows.append(["perplexity", *(number(found["perplexity"]) for found in told)])
    rows.append(["weights gone", *(f"{found.get('sparsity', 0):.1%}" for found in told)])
    rows.append(["size in memory", *(size(found["size"]) for found in told)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    if "exported" in made:
        came = _short(made["exported"]["from"])
        table += f"\n\nAll of it but this form's size was measured before the model was exported from `{came}`."
    if sparse["perplexity"] is None:
        return f"{table}\n\nNo perplexity was measured."
    part = (
        f", its first {recipe['eval_tokens']:,} tokens" if recipe["eval_tokens"] else f", {sparse['tokens']:,} tokens"
    )
    return (
        f"{table}\n\nPerplexity on {_data(recipe['eval_data'])[0]}{part}, in whole windows of "
        f"{sparse['window']:,} tokens that do not overlap, each without context before it, all models computed "
        "in the same way. Nothing else was measured: what the model has forgotten beyond that text is not known."
    )


def _how(made: dict[str, Any]) -> str:
    recipe, rows = made["recipe"], []
    if made["command"] == "compress":
        steps = f"{recipe['steps']} steps" if recipe["steps"] > 1 else "one step"
        rows = [
            f"- {recipe['sparsity']:.0%} in {steps} ({recipe['schedule']} schedule), pattern {recipe['pattern']}",
            f"- weights chosen by {recipe['pruner']}, sparsity of each {recipe['rates_per']} by {recipe['allocator']}",
            f"- calibrated on {recipe['calibration_samples']} sequences of {recipe['sequence_length']} tokens of "
            f"{_data(recipe['calibration'])[0]}",
        ]
        if recipe["finetune_first"]:
            rows.insert(
                0, f"- the dense model fine-tuned first, by {recipe['finetune_first']:.0%} of the recovery rows"
            )
    if recipe["recovery"] == "none":
        rows.append("- no recovery")
    else:
        rate = " and ".join(f"{rate:g}" for rate in rates_found(made["history"])) or f"{recipe['learning_rate']:g}"
        distilled = f", {recipe['distill']:.0%} of the loss by distillation" if recipe["distill"] else ""
        rows.append(
            f"- recovery {recipe['recovery']}: {recipe['train_samples']:,} rows of {_data(recipe['train_data'])[0]}, "
            f"learning rate {rate}{distilled}"
        )
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return "\n".join(rows) + f"\n\n{versions}; seed {recipe['seed']}. `losa.json` has every setting."


def _terms(license_: dict[str, Any]) -> str:
    said = license_.get("license_name") or license_.get("license")
    what = (
        f"The card of the model it was made from names `{said}`" if said else "No licence was found beside that model"
    )
    return f"{what}; this model is derived from it, and its terms, intended use and limits apply here too."
