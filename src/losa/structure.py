"""Whole heads and channels: which rows and columns of a block's linears belong together, and pruning them together.

A unit is a key/value head with the query heads that share it, or a channel of the MLP. What a unit computes is read by
one linear only (o_proj, down_proj), so that its columns there decide whether it goes, and nothing is left if it does.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from losa import masks
from losa.adapters import MaskedLinear
from losa.blocks import Block
from losa.calibration import Stream
from losa.errors import LosaError
from losa.pruners.base import Statistic, StructuredPruner
from losa.pruning import observe

# kind, the linears that make the units, the linear that reads them; found by the names of what stands in one module
LAYOUTS: tuple[tuple[Literal["heads", "channels"], tuple[str, ...], str], ...] = (
    ("heads", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    ("heads", ("q_proj", "k_proj", "v_proj"), "out_proj"),
    ("channels", ("gate_proj", "up_proj"), "down_proj"),
    ("channels", ("fc1",), "fc2"),
)
SUPPORTED = (
    "pattern structured knows q_proj, k_proj, v_proj and o_proj (or out_proj), and gate_proj, up_proj and down_proj (or "
    "fc1 and fc2), as in Llama, Mistral, Qwen2, Qwen3 and OPT"
)


@dataclass
class Group:
    """The units of one kind in a block: unit u owns rows [u r, (u + 1) r) of each linear of `rows` (name -> r), and
    columns [u width, (u + 1) width) of the linear `reader`. Names are full; `module` holds the linears."""

    kind: Literal["heads", "channels"]
    count: int
    rows: dict[str, int]
    reader: str
    width: int
    module: nn.Module


def find(block: Block) -> list[Group]:
    """The heads of `block`, then its channels; a kind whose linears are all ignored is left out.

    Raises LosaError, naming a linear, for what cannot be pruned so: fused or unknown linears, experts, heads that
    anything else depends on, and where only some of a kind's linears are prunable.
    """
    families: dict[str, dict[str, Any]] = {}  # by the module they stand in
    for name, module in block.module.named_modules():
        if isinstance(module, nn.Linear | MaskedLinear):
            parent, _, last = f"{block.name}.{name}".rpartition(".")
            families.setdefault(parent, {})[last] = module
    groups = {}
    for parent, linears in families.items():
        prunable = [name for name in linears if f"{parent}.{name}" in block.linears]
        layout = next((la for la in LAYOUTS if {*la[1], la[2]} == set(linears)), None)
        if layout is None or layout[0] in groups:
            odd = next((n for n in linears if not any(n in (*la[1], la[2]) for la in LAYOUTS)), next(iter(linears)))
            if not prunable:
                continue
            raise LosaError(f"{parent}.{odd} belongs to no heads or channels that losa can remove: {SUPPORTED}")
        if prunable and len(prunable) < len(linears):
            left = next(name for name in linears if name not in prunable)
            raise LosaError(
                f"ignore leaves {parent}.{left} out, but not {prunable[0]}: pattern structured prunes all of them or none"
            )
        kind, makers, reader = layout
        module = block.module.get_submodule(parent.removeprefix(block.name).removeprefix("."))
        _check_alone(parent, module, set(linears), block)
        sizes = _head_sizes(parent, module, linears) if kind == "heads" else (1, 1, 1)
        rows = {f"{parent}.{name}": size for name, size in zip(makers, sizes, strict=False)}
        group = Group(kind, linears[reader].in_features // sizes[0], rows, f"{parent}.{reader}", sizes[0], module)
        made = [linears[name].out_features == group.count * rows[f"{parent}.{name}"] for name in makers]
        if not all(made) or linears[reader].in_features != group.count * group.width:
            odd = reader if all(made) else makers[made.index(False)]
            raise LosaError(f"{parent}.{odd} does not divide into {group.count} {kind}: {SUPPORTED}")
        groups[kind] = group
    for kind, what in (("heads", "attention"), ("channels", "MLP")):
        if kind not in groups and block.linears:
            raise LosaError(f"{block.name} has no {what} that losa can prune (a mixture of experts?): {SUPPORTED}")
    return [groups[k] for k in ("heads", "channels") if k in groups and groups[k].reader in block.linears]


def _head_sizes(parent: str, module: nn.Module, linears: dict[str, Any]) -> tuple[int, int, int]:
    """Rows of q, k and v that are one key/value head and the query heads that share it."""
    size, queries, keys = getattr(module, "head_dim", 0), linears["q_proj"].out_features, linears["k_proj"].out_features
    if not isinstance(size, int) or not 0 < size <= keys or queries % keys:
        raise LosaError(f"{parent}: cannot tell its heads (q {queries}, k {keys}, head size {size}): {SUPPORTED}")
    return queries // keys * size, size, size


def _check_alone(parent: str, module: nn.Module, linears: set[str], block: Block) -> None:
    """Raises LosaError if the units' module holds more than its linears (a norm over them, a router, sinks); norms of
    one head's width may stay as they are."""
    if module is block.module:
        return
    for name, parameter in module.named_parameters():
        inner, _, of_module = name.partition(".")
        if inner not in linears and not (of_module and parameter.numel() == getattr(module, "head_dim", 0)):
            raise LosaError(f"{parent}.{name} depends on heads or channels that losa would remove: {SUPPORTED}")


def check(blocks: list[Block]) -> None:
    """Raise LosaError for the first block that cannot be pruned by heads and channels."""
    for block in blocks:
        find(block)


def prepare(blocks: list[Block], pruner: StructuredPruner) -> None:
    """Give the readers a bias (zero) if the pruner needs one, before anything is pruned or restored."""
    readers = [block.masked[group.reader] for block in blocks for group in find(block)]
    for linear in readers if pruner.compensates else []:
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)


@torch.no_grad()
def prune_block(
    block: Block, pruner: StructuredPruner, rate: float, stream: Stream, true_sequential: bool = False
) -> None:
    """Prune floor(rate * count) of the key/value heads of `block`, and of its channels; one of each always stays.

    Where heads are few, that is less than `rate` of its weights; the step's line says so.

    Channels see the block's inputs as they are before its heads go; true_sequential: after.
    """
    groups = find(block)
    for together in [[group] for group in groups] if true_sequential else [groups]:
        seen, _ = observe(block, pruner, [group.reader for group in together], stream)
        for group in together:
            try:
                prune_group(block, group, pruner, rate, seen[group.reader], stream.device)
            except LosaError as error:
                raise LosaError(f"{group.reader}: {error}") from error


def prune_group(
    block: Block,
    group: Group,
    pruner: StructuredPruner,
    rate: float,
    statistic: Statistic | None,
    device: torch.device,
) -> None:
    """New masks for the linears of one group; what goes is what scores least in the reader's columns, merged."""
    reader = block.masked[group.reader]
    merged = reader.effective_weight(torch.float32).to(device)
    alive = units_alive(reader.mask.to(device), group)
    scores = pruner.columns(merged, statistic, group.kind == "heads").view(group.count, group.width).sum(dim=1)
    rate = min(rate, 1 - 1 / group.count)
    keep = masks.choose(scores[None], alive[None], rate, "row")[0]
    if pruner.compensates:
        assert reader.bias is not None, "prepare comes first"
        gone = (alive & ~keep).repeat_interleave(group.width)  # those pruned before are in the bias already
        mean = pruner.means(statistic, reader.in_features)[gone]
        reader.bias.add_((merged[:, gone].to(mean) @ mean).to(reader.bias))
    for name, rows in group.rows.items():
        linear = block.masked[name]
        linear.set_mask(linear.mask & keep.repeat_interleave(rows)[:, None].to(linear.weight.device))
    reader.set_mask(reader.mask & keep.repeat_interleave(group.width).to(reader.weight.device))


def units_alive(mask: Tensor, group: Group) -> Tensor:
    """bool [count]: the units that the reader's mask (bool [out, in]) keeps."""
    return mask[0].view(group.count, group.width)[:, 0]
