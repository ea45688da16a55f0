"""The smaller model: pruned rows and columns leave the linears, and the configuration says so.

Where plain transformers can build what is left, its configuration is an ordinary one. Where it cannot (blocks differ,
or a bias stands where the architecture has none), config.json keeps the dense model's widths, so that nothing but an
error comes of loading it without losa, and `quantization_config`, transformers' way in for other storage, holds the
shapes; `losa.loading` reads them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from losa import masks, model
from losa.blocks import Block, Subject, prunable
from losa.errors import LosaError
from losa.loading import STRUCTURED
from losa.recipe import Recipe
from losa.structure import find
from losa.widths import attentions, linear_like, recount, resize

PLAIN, OURS = "transformers", "transformers, after import losa"  # what loads a saved model


@torch.no_grad()
def shrink(subject: Subject, bits: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Take what the masks prune out of the merged model, in place, and configure it so that it can be saved.

    bits: packed masks [out, in] by linear, each the product of its rows and columns. Returns these as
    `name.rows` (bool [out]) and `name.columns` (bool [in]), True kept; and what loads the model: PLAIN or OURS.
    """
    kept: dict[str, Tensor] = {}
    for block in subject.blocks:
        for name, linear in block.linears.items():
            mask = masks.unpack(bits[name], linear.in_features)
            rows, columns = mask.any(dim=1), mask.any(dim=0)
            if not torch.equal(mask, rows[:, None] & columns):
                raise LosaError(f"{name}: its mask is not made of whole rows and columns")
            smaller = linear_like(linear, int(rows.sum()), int(columns.sum()), linear.bias is not None, "meta")
            smaller.weight = nn.Parameter(linear.weight[rows][:, columns].contiguous(), requires_grad=False)
            if linear.bias is not None:
                smaller.bias = nn.Parameter(linear.bias[rows], requires_grad=False)
            block.linears[name] = smaller
            subject.model.set_submodule(name, smaller)
            kept |= {f"{name}.rows": rows.cpu(), f"{name}.columns": columns.cpu()}
    recount(subject.model)
    if _configure_plainly(subject):
        return kept, PLAIN
    shapes = {
        name: [linear.out_features, linear.in_features, linear.bias is not None]
        for block in subject.blocks
        for name, linear in block.linears.items()
    }
    subject.model.config.quantization_config = {"quant_method": STRUCTURED, "linears": shapes}
    return kept, OURS


def rehearse(config: Any, recipe: Recipe) -> None:
    """Raise LosaError if a model of this configuration does not run with fewer heads and channels than it says.

    On the meta device, without weights, one unit of each kind taken out of every block.
    """
    whole = model.skeleton(config)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        whole(input_ids=tokens, use_cache=False)
    except Exception:  # it reads values, which are not there: nothing can be said
        return
    shapes: dict[str, list[Any]] = {}
    for block in prunable(whole, recipe):
        for group in find(block):
            cut = min(1, group.count - 1)
            for name, rows in group.rows.items():
                linear = block.linears[name]
                shapes[name] = [linear.out_features - cut * rows, linear.in_features, linear.bias is not None]
            linear = block.linears[group.reader]
            shapes[group.reader] = [
                linear.out_features,
                linear.in_features - cut * group.width,
                linear.bias is not None,
            ]
    try:
        resize(whole, shapes)
        whole(input_ids=tokens, use_cache=False)
    except Exception as error:
        reason = f"{type(whole).__name__} does not run with fewer heads or channels than its configuration says"
        raise LosaError(f"{reason}: {error}") from error


def _configure_plainly(subject: Subject) -> bool:
    """Give the model a configuration from which transformers builds just this, if there is one.

    What is built has the same tensors but for biases that are zero (they are added or dropped), and its attentions
    remember the same numbers.
    """
    old = subject.model.config
    ours = subject.model.state_dict()
    for make, fields in _configurations(old, subject.blocks):
        try:
            built = model.skeleton(make.from_dict(fields))
        except Exception:  # a configuration checks itself, in its own ways
            continue
        theirs = {name: tensor.shape for name, tensor in built.state_dict().items()}
        added, dropped = theirs.keys() - ours.keys(), ours.keys() - theirs.keys()
        if any(ours[name].shape != shape for name, shape in theirs.items() if name in ours):
            continue
        if not all(name.endswith(".bias") for name in added) or any(bool(ours[name].any()) for name in dropped):
            continue
        if _numbers(built) != _numbers(subject.model):
            continue
        for name in [*added, *dropped]:
            linear = subject.model.get_submodule(name.removesuffix(".bias"))
            zero = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
            linear.register_parameter("bias", zero if name in added else None)
        built.config._attn_implementation = old._attn_implementation
        for module in subject.model.modules():
            if getattr(module, "config", None) is old:
                module.config = built.config
        return True
    return False


def _configurations(old: Any, blocks: list[Block]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Classes of configurations, and fields, that may describe the model: as wide as its first block, biases and all."""
    from transformers import MistralConfig

    fields = {key: value for key, value in old.to_dict().items() if key != "quantization_config"}
    attention: Any = next(iter(attentions(blocks[0].module).values()))
    named = {name.rpartition(".")[2]: module for name, module in blocks[0].module.named_modules()}
    out, reader = named.get("o_proj", named.get("out_proj")), named.get("down_proj", named.get("fc2"))
    assert isinstance(out, nn.Linear) and isinstance(reader, nn.Linear)
    widths = {
        "num_attention_heads": attention.q_proj.out_features // attention.head_dim,
        "num_key_value_heads": attention.k_proj.out_features // attention.head_dim,
        "intermediate_size": reader.in_features,
        "ffn_dim": reader.in_features,
        "attention_bias": out.bias is not None,
        "mlp_bias": reader.bias is not None,
    }
    fields |= {name: value for name, value in widths.items() if name in fields}
    if "num_key_value_heads" in fields:
        fields["head_dim"] = attention.head_dim  # else it follows from the number of heads
    yield type(old), fields
    if (
        old.model_type == "llama"
    ):  # Llama insists that heads divide the hidden size; Mistral is the same network and does not
        left_out = ("model_type", "attention_bias", "mlp_bias", "pretraining_tp")
        fields = {key: value for key, value in fields.items() if key not in left_out}
        yield MistralConfig, fields | {"sliding_window": None}


def _numbers(whole: nn.Module) -> dict[str, dict[str, float]]:
    """What each attention module remembers: head size, scale, ..."""
    return {
        name: {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float) and key != "training" and not key.startswith("_")
        }
        for name, module in attentions(whole).items()
    }
