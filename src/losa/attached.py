"""Masked adapters on a user's own model, for a training loop of their own or transformers' Trainer; merged exactly later.

While they are attached, the model's state dict is that of an ordinary sparse model, each weight as merging would leave
it, with the pairs beside it. So whatever is saved on the way (`save_pretrained`, the Trainer's checkpoints) is read as
the right model by those who do not know of losa, and goes on exactly when it is loaded into the attached model. No
adapter_config.json is written: PEFT would add the pair without its mask, and fill the zeros.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa import masks, registry
from losa.adapters import MaskedLinear
from losa.blocks import find_blocks, targeted
from losa.checkpoint import MASKS
from losa.errors import LosaError
from losa.model import refuse_adapters
from losa.repair import find_masks, weights_of
from losa.repair_recipe import Repair
from losa.run import FORMAT, replacing

HANDLE = "_losa_adapters"  # the attribute of a model that holds its Adapters


class AttachedLinear(MaskedLinear):
    """A masked linear whose state dict holds the merged weight, and which finds its own again when that is loaded."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.merge().weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """The pair is taken; the base stays, which is right only if both together make the weight that was saved."""
        merged = state_dict.get(f"{prefix}weight")
        if merged is None or f"{prefix}lora_A" not in state_dict:  # a plain model's: its weight is a new base
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        state_dict = {**state_dict, f"{prefix}weight": self.weight.detach()}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # rounded as what was saved: in bf16 that alone is more than 1e-3
        mine, theirs = self.effective_weight(merged.dtype).float(), merged.to(self.weight.device, torch.float32)
        if mine.shape == theirs.shape and bool((mine - theirs).norm() > 1e-3 * theirs.norm()):
            *_, error_msgs = rest
            error_msgs.append(f"{prefix}weight is not what this base and the saved pair make: attach to the same model")


class Adapters:
    """The masked adapters of one model. `masks`: keep-masks of all its prunable linears, packed (`losa.masks`), by name."""

    def __init__(self, model: Any, bits: dict[str, Tensor], trainable: set[str]) -> None:
        self.model, self.masks, self._trainable = model, bits, trainable

    def parameters(self) -> list[nn.Parameter]:
        """What there is to train: A and B of every adapter, fp32. All else is frozen."""
        return [p for _, linear in self._linears() for p in (linear.lora_A, linear.lora_B) if p is not None]

    def merge(self) -> Any:
        """Put plain linears back, the pairs merged, every pruned weight zero; what could be trained before can be again.

        In place; returns the model. Raises LosaError if that has been done.
        """
        linears = self._linears()
        if not linears:
            raise LosaError("the adapters are merged already")
        for name, linear in linears:
            self.model.set_submodule(name, linear.merge(in_place=True))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        delattr(self.model, HANDLE)
        return self.model

    def save_masks(self, folder: str | Path) -> None:
        """Write masks.safetensors into `folder`, beside what save_pretrained wrote: a later `recover` or `attach` takes
        these instead of the zeros, so that kept weights which happen to be zero stay kept."""
        from safetensors.torch import save_file

        bits = {name: mask.cpu() for name, mask in self.masks.items()}
        with replacing(Path(folder) / MASKS) as new:
            save_file(bits, new, {"losa": str(FORMAT)})

    def _linears(self) -> list[tuple[str, AttachedLinear]]:
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, AttachedLinear)]


def attach(
    model: Any,
    rank: int = 8,
    *,
    targets: str = "all",
    ignore: Iterable[str] = (),
    alpha: float = 16.0,
    base_rank: int = 8,
    recovery: str = "losa",
    masks_from: str | Path | None = None,
    seed: int = 0,
) -> Adapters:
    """Give a loaded transformers model masked low-rank adapters, in place; everything else is frozen. Outputs do not move.

    y = x (M * (W + s B A))^T + b with s = alpha / base_rank, on the linears of the decoder blocks whose names `targets`
    matches (all, qv, qkvo, or a regular expression). M: the zeros of W, unless they are less than 1% (a dense linear
    keeps all), or what the masks.safetensors in the folder `masks_from` says. Train `handle.parameters()`, or give the
    model to a Trainer; then `handle.merge()` or `losa.merge(model)`. recovery: one that merges and needs no training
    loop of its own. Raises LosaError, and changes nothing, for what cannot be adapted.
    """
    settings = {"mean_rank": rank, "targets": targets, "ignore": list(ignore), "alpha": alpha, "base_rank": base_rank}
    recipe = Repair(**settings, recovery=recovery, seed=seed)
    method = registry.get("recovery", recovery)
    if not method.ranks or method.layer is not MaskedLinear:
        raise LosaError(f"recovery {recovery!r} ({method.trained}) needs losa's own training loop: attach with losa")
    if type(rank) is not int:
        raise LosaError(f"rank must be a whole number, not {rank!r}")
    refuse(model)
    blocks = find_blocks(model, recipe.ignore)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    wanted = targeted(list(linears), recipe)
    modules = dict(model.named_modules())
    if inside := sorted(wanted - set(modules)):
        raise LosaError(
            f"{inside[0]} is an expert, and all experts are one parameter here: choose targets without them"
        )
    if (useful := max(min(linears[name].weight.shape) for name in wanted)) < rank:
        raise LosaError(f"rank is {rank}, the widest linear has {useful}: lower it")
    bits = find_masks(weights_of(blocks), Path(masks_from) if masks_from else None).bits

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in (name for name in linears if name in wanted):
        layer = AttachedLinear(modules[name], rank, recipe.scaling)
        layer.set_mask(masks.unpack(bits[name].to(layer.weight.device), layer.in_features))
        layer.set_rank(rank, generator)
        model.set_submodule(name, layer)
    adapters = Adapters(model, bits, trainable)
    setattr(model, HANDLE, adapters)
    return adapters


def refuse(model: Any) -> None:
    """Raise LosaError for a model that attach cannot take."""
    if not isinstance(model, nn.Module):
        raise LosaError(f"attach takes a loaded model, not a {type(model).__name__}")
    if any(HANDLE in vars(module) for module in model.modules()):
        raise LosaError("the model has adapters of losa already: merge them first (losa.merge)")
    refuse_adapters(model)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise LosaError(f"{name} is {parameter.dtype}: attach needs weights in floating point, not quantised ones")


def merge(model: Any) -> Any:
    """Merge the adapters that `attach` gave to `model`, exactly and in place; returns it. A wrapper (DDP, compile) may be
    around it. Raises LosaError if there are none."""
    found = [vars(module)[HANDLE] for module in model.modules() if HANDLE in vars(module)]
    if not found:
        raise LosaError(f"{type(model).__name__} has no adapters of losa: losa.attach gives it some")
    for adapters in found:
        adapters.merge()
    return model
