"""The merged model out: a Hugging Face folder, dense with zeros or packed, with masks.safetensors and losa.json beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losa import card
from losa.blocks import Subject
from losa.checkpoint import MASKS, Checkpoint, weight_bytes
from losa.errors import LosaError
from losa.model import ADAPTER, folder_of, load_config
from losa.recipe import Recipe
from losa.run import CARD, FORMAT, Run, make_readable, sync, versions, write_json, writing
from losa.sparse.linear import layouts_in


def save(
    subject: Subject,
    recipe: Recipe,
    bits: dict[str, Tensor],
    pairs: dict[str, tuple[Tensor, Tensor]] | None,
    measurements: dict[str, Any],
    history: list[dict[str, Any]],
    run: Run,
) -> Path | None:
    """The merged model with all that belongs to it.

    bits: keep-masks by linear, packed, or the rows and columns that `shrink` kept, without those that packed linears
    hold. pairs: (A [r, in], B [out, r]) by linear if they do not merge. Raises LosaError
    if the disk refuses.
    """

    def write(staging: Path) -> int:
        subject.model.save_pretrained(staging)
        _name_architecture(subject.model.config, staging)
        if pairs is not None:
            _save_adapter(staging / ADAPTER, pairs, recipe, subject.source)
        return weight_bytes(staging) + sum(path.stat().st_size for path in staging.glob(f"{ADAPTER}/*"))

    return publish(subject, recipe, write, bits, measurements, history, run)


def publish(
    subject: Subject,
    recipe: Recipe,
    write: Callable[[Path], int],
    bits: dict[str, Tensor],
    measurements: dict[str, Any],
    history: list[dict[str, Any]],
    run: Run,
) -> Path | None:
    """Write everything into run/export, then move it into place; losa.json, written last, says that it is whole.

    write: what writes the model there, and returns the bytes of its weights.
    """
    if run.output is None or not run.writes:
        return run.output
    from safetensors.torch import save_file

    staging = run.output / "run" / "export"
    with writing(run.output):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        measurements["sparse"]["disk"] = write(staging)
        subject.tokenizer.save_pretrained(staging)
        if bits:
            save_file({name: mask.cpu() for name, mask in bits.items()}, staging / MASKS, {"losa": str(FORMAT)})
        summary = {
            "format": FORMAT,
            "command": recipe.command,
            "source": subject.source,
            "versions": versions(),
            "recipe": recipe.to_json(),
            "measurements": measurements,
            "history": history,
        }
        write_json(staging / "losa.json", summary)
        card.write(staging, summary, folder_of(subject.source))
        if (run.output / CARD).exists() and CARD not in run.claimed:
            (staging / CARD).replace(run.folder / CARD)
            run.say(f"{run.output / CARD} is not losa's and stays; the model card is {run.folder / CARD}")
        run.claim([path.name for path in staging.iterdir()])
        for path in sorted(staging.iterdir(), key=lambda p: p.name == "losa.json"):
            for file in path.iterdir() if path.is_dir() else [path]:
                make_readable(file)
                sync(file)
            if path.is_dir():
                shutil.rmtree(run.output / path.name, ignore_errors=True)
            path.replace(run.output / path.name)
        sync(run.output)
        staging.rmdir()
        run.drop_states()
    return run.output


def _name_architecture(config: Any, folder: Path) -> None:
    """A Llama that `losa.shrink` has configured as a Mistral is saved as what it will be loaded as."""
    if config.model_type == "mistral" and config.architectures == ["LlamaForCausalLM"]:
        config.architectures = ["MistralForCausalLM"]
        config.save_pretrained(folder)


def take_pairs(subject: Subject) -> dict[str, tuple[Tensor, Tensor]]:
    """Take the low-rank pairs out of the model: (A, B) by linear. What is left computes without them."""
    pairs = {}
    for block in subject.blocks:
        for name, linear in block.masked.items():
            if linear.rank:
                a, b = linear.pair()
                pairs[name] = (a.detach().clone(), b.detach().clone())
                linear.rank = 0
    return pairs


def _save_adapter(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], recipe: Recipe, source: str) -> None:
    """The pairs as a LoRA that PEFT loads onto the sparse model in the folder above."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": recipe.scaling * rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: recipe.scaling * r for name, r in ranks.items() if r != rank},
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    write_json(folder / "adapter_config.json", config)


def load_masks(folder: Path) -> dict[str, Tensor]:
    """The keep-masks of a saved model, packed (`masks.pack`), or the rows and columns of `shrink`.

    Packed linears hold their own, what is dense has them in masks.safetensors. Raises LosaError if there are none.
    """
    layouts = layouts_in(load_config(str(folder)))
    if layouts is None:
        return read_masks(folder)
    files = Checkpoint(folder, layouts)
    found = {name: files.packed_linear(name).mask for name in layouts}
    return found | (read_masks(folder) if (folder / MASKS).exists() else {})


def read_masks(folder: Path) -> dict[str, Tensor]:
    """What is in masks.safetensors, whatever else is in `folder`. Raises LosaError if it is not there or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / MASKS)
    except FileNotFoundError:
        raise LosaError(f"{str(folder)!r} has no {MASKS}: it was not made by losa") from None
    except (SafetensorError, OSError) as error:
        raise LosaError(f"{folder / MASKS} is damaged: {error}") from None
    for name, bits in found.items():
        if not name.endswith((".rows", ".columns")) and (bits.dtype != torch.uint8 or bits.ndim != 2):
            what = f"{name} is {bits.dtype} {list(bits.shape)}, a packed mask is {torch.uint8} [out, in / 8]"
            raise LosaError(f"{folder / MASKS} is damaged: {what}")
    return found
