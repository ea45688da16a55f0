"""Linears of other widths than the configuration says: put into a model before its weights are read, or by `losa.shrink`."""

from typing import Any

import torch
from torch import nn

from losa.errors import LosaError


def read_widths(config: dict[str, Any]) -> dict[str, list[Any]]:
    """The linears that `losa.shrink` wrote into config.json, for `resize`. Raises LosaError for what it cannot have written."""
    found: Any = config.get("linears")
    try:
        for entry in found.values():
            rows, columns, bias = entry
            if any(type(number) is not int or number < 1 for number in (rows, columns)) or type(bias) is not bool:
                raise ValueError(entry)
    except (AttributeError, TypeError, ValueError) as error:
        raise LosaError(
            f"config.json does not describe linears of other widths ({error!r}): the model is damaged"
        ) from None
    linears: dict[str, list[Any]] = found
    return linears


def resize(whole: nn.Module, linears: dict[str, list[Any]]) -> None:
    """Give the linears of a model, which may be on the meta device, new shapes: name -> [out, in, whether it has a bias].

    Raises LosaError where the model has no such linear, or only a narrower one.
    """
    for full, (rows, columns, bias) in linears.items():
        name, old = named(whole, full)
        if not isinstance(old, nn.Linear):
            raise LosaError(f"config.json resizes {full!r}, which is no linear of {type(whole).__name__}")
        if rows > old.out_features or columns > old.in_features:
            has = [old.out_features, old.in_features]
            raise LosaError(f"config.json resizes {full} to {[rows, columns]}, the model has no more than {has}")
        whole.set_submodule(name, linear_like(old, rows, columns, bias, old.weight.device))
    recount(whole)


def named(whole: nn.Module, name: str) -> tuple[str, nn.Module | None]:
    """The module of that name, None if there is none, and its name in `whole`: a base model's have no prefix."""
    for found in (name, name.partition(".")[2]):
        try:
            return found, whole.get_submodule(found)
        except AttributeError:
            continue
    return name, None


def recount(whole: nn.Module) -> None:
    """Set what attention modules remember of their number of heads by what their linears have; most remember none."""
    for module in attentions(whole).values():
        counts = {
            "num_heads": module.q_proj.out_features // module.head_dim,
            "num_attention_heads": module.q_proj.out_features // module.head_dim,
            "num_key_value_heads": module.k_proj.out_features // module.head_dim,
        }
        for name, count in counts.items():
            if hasattr(module, name):
                setattr(module, name, count)


def attentions(whole: nn.Module) -> dict[str, Any]:
    """The attention modules of a model, by name."""
    return {n: m for n, m in whole.named_modules() if hasattr(m, "q_proj") and hasattr(m, "head_dim")}


def linear_like(like: nn.Linear, rows: int, columns: int, bias: bool, device: torch.device | str) -> nn.Linear:
    """A linear of that shape, uninitialised, of the type and mode of another."""
    made = nn.Linear(columns, rows, bias=bias, device=device, dtype=like.weight.dtype)
    return made.requires_grad_(like.weight.requires_grad).train(like.training)
