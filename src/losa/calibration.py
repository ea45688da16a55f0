"""Streams calibration sequences through a model block by block; knows nothing of what is gathered from them.

Held at a time: the hidden states that enter one block (each batch is replaced by what leaves it), never two blocks' full
features, and on the compute device one block and one batch. With a folder to spill to, hidden states are in a file there,
mapped into memory, and take none that the system could not have back.
"""

import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa import distributed
from losa.blocks import Block
from losa.errors import LosaError
from losa.run import writing

BATCH_TOKENS = 4096  # tokens that go through a block at once: GEMMs are long enough, intermediates stay small


class _Captured(Exception):
    """Ends a forward pass once the last block would run."""


class Stream:
    """The hidden states of `tokens` (int64 [samples, length]) in front of the next block, in batches.

    Of several processes each holds its share of the sequences, `tokens` then; `samples` are all of them. `device` is where
    blocks compute: a block whose weights live elsewhere visits it and goes back. `sequences`: how many make a batch; None:
    as many as have BATCH_TOKENS. `spill`: the folder for the hidden states; None: in memory. Raises LosaError if the disk
    has no room for them.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        tokens: Tensor,
        device: torch.device,
        sequences: int | None = None,
        spill: Path | None = None,
    ) -> None:
        self.device, self._spill = device, spill
        self.samples, self.length = tokens.shape
        self.tokens = tokens[slice_of(distributed.own_range(self.samples))]
        self.batches = self.tokens.split(sequences or max(1, BATCH_TOKENS // self.length))
        self.hiddens: list[Tensor] = []
        self.unpacked = False  # whether the model takes the first of what a block returns; known once one has run
        # a block's keyword arguments (mask, rotary embeddings) differ between blocks and batch sizes, not between batches
        self._arguments: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._rest = torch.empty(0)  # the part of the file that no batch has yet, [sequences, length, hidden]
        home = home_of(model)
        with torch.no_grad(), _ends(blocks), replaced(blocks, self._recorder(blocks)):
            for batch in self.batches:
                try:
                    model(input_ids=batch.to(home), use_cache=False)
                except _Captured:
                    continue
                raise LosaError(f"{type(model).__name__} does not run its blocks in order: it is not supported")

    def _recorder(self, blocks: list[Block]) -> Callable[[Block], Callable[..., Any]]:
        def recorder(block: Block) -> Callable[..., Any]:
            def record(hidden: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
                hidden = named.pop("hidden_states") if hidden is None else hidden
                if block is blocks[0]:
                    self.hiddens.append(self._placed(hidden))
                whole = self.hiddens[-1]  # some models unpack what a block returns, and then hand on a part of `hidden`
                kept = self._arguments.setdefault((block.name, len(whole)), (rest, named))
                if not _same(kept, (rest, named)):  # what is kept is every batch's, and these would get another's
                    raise LosaError(f"{block.name} is given more of the text than hidden states: it is not supported")
                if block is blocks[-1]:
                    raise _Captured
                return whole

            return record

        return recorder

    def _placed(self, hidden: Tensor) -> Tensor:
        """A new batch, where the stream keeps its hidden states."""
        if self._spill is None:
            return hidden
        if not self.hiddens:
            self._rest = mapped(self._spill, (len(self.tokens), *hidden.shape[1:]), hidden.dtype)
        place, self._rest = self._rest[: len(hidden)], self._rest[len(hidden) :]
        return place.copy_(hidden)

    def _replace(self, index: int, out: Tensor) -> None:
        """The batch is now what a block made of it."""
        if self._spill is None:
            self.hiddens[index] = out.to(self.hiddens[index].device)
        else:
            self.hiddens[index].copy_(out)

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """What `block` makes of one batch, [sequences, length, hidden]; both are on the compute device already."""
        rest, named = _to(self._arguments[block.name, len(hidden)], self.device)
        out = block.module(hidden, *rest, **named)
        self.unpacked = isinstance(out, tuple)
        made: Tensor = out[0] if self.unpacked else out
        return made

    def outputs(self, block: Block) -> Generator[Tensor]:
        """What `block` makes of each batch; the stream stays in front of it."""
        with torch.no_grad(), visiting(block, self.device):
            for hidden in self.hiddens:
                yield self.run(block, hidden.to(self.device))

    def behind(self, blocks: list[Block], hidden: Tensor) -> AbstractContextManager[None]:
        """Inside, a pass through the model takes its blocks to have made `hidden` of it."""
        made = (hidden,) if self.unpacked else hidden
        return replaced(blocks, lambda block: lambda *rest, **named: made)

    @torch.no_grad()
    def logits(self, model: nn.Module, blocks: list[Block]) -> Generator[tuple[Tensor, Tensor]]:
        """Each batch's ids and what the model makes of them; the stream has passed all blocks."""
        with _ends(blocks):
            for batch, hidden in zip(self.batches, self.hiddens, strict=True):
                ids = batch.to(hidden.device)
                with self.behind(blocks, hidden):
                    logits = model(input_ids=ids, use_cache=False).logits
                yield ids, logits

    def advance(self, block: Block) -> None:
        """Run `block` for good: the stream stands behind it."""
        for i, out in enumerate(self.outputs(block)):
            self._replace(i, out)

    def observe(self, block: Block, statistics: dict[str, Any], advance: bool = False) -> list[str]:
        """Run `block`; every linear's inputs go to its statistic: update(x [tokens, in], sequences).

        The stream moves on only with `advance`; without, a batch ends where the inputs of the last linear are there: its
        product, a fifth of a Llama's block, is of no use.

        Linears that are given the very same tensor (q, k, v) get the same statistic, gathered once. An expert is given
        the tokens that reach it, and counts the sequences of those batches that do: a scale, which no mask depends on.
        Returns the names of experts that no token reached.
        """
        sequences, last = 0, (None, "")  # type: tuple[int, tuple[Tensor | None, str]]
        shares: dict[str, str] = {}
        calls: list[str] = []  # of the first batch
        end = ""

        def hook(name: str) -> Callable[..., None]:
            def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                nonlocal last
                (x,) = inputs
                if name not in shares:
                    shares[name] = last[1] if x is last[0] else name
                    last = (x, shares[name])
                if shares[name] == name:
                    statistics[name].update(x.reshape(-1, x.shape[-1]), sequences)
                if name == end:
                    raise _Captured
                calls.append(name)

            return see

        hooks = [block.linears[name].register_forward_pre_hook(hook(name)) for name in statistics]
        try:
            with torch.no_grad(), visiting(block, self.device):
                for i, hidden in enumerate(self.hiddens):
                    sequences = len(hidden)
                    with suppress(_Captured):
                        out = self.run(block, hidden.to(self.device))
                        if advance:
                            self._replace(i, out)
                    if i == 0 and not advance:
                        end = _last(calls, set(statistics), block)
        finally:
            for handle in hooks:
                handle.remove()
        for name, owner in shares.items():
            statistics[name] = statistics[owner]
        return unreached(block, list(statistics), set(shares))

    def order(self, block: Block) -> list[list[str]]:
        """The block's linears in the order they run, those together that are given the very same tensor (q, k, v).

        Those that differ in an index only, as experts do, go together too.
        """
        calls: list[tuple[str, Tensor]] = []
        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, name=name: calls.append((name, inputs[0])))
            for name, linear in block.linears.items()
        ]
        try:
            outputs = self.outputs(block)
            next(outputs)
            outputs.close()
        finally:
            for handle in hooks:
                handle.remove()
        groups: list[list[str]] = []
        last = None
        for name, x in calls:
            alike = next((g for g in groups if _unnumbered(g[0], block) == _unnumbered(name, block)), None)
            if alike is None and x is last:
                alike = groups[-1]
            if alike is None:
                groups.append(alike := [])
            alike.append(name)
            last = x
        for name in block.linears:  # experts that this batch did not reach
            if not any(name in group for group in groups):
                alike = next((g for g in groups if _unnumbered(g[0], block) == _unnumbered(name, block)), None)
                groups.append([name]) if alike is None else alike.append(name)
        return groups

    def sample(self, positions: Tensor | None) -> Tensor:
        """The features at `positions` (int64, rising, counted over all tokens; None: all) in front of the next block.

        [n, hidden]: those of this process's sequences.
        """
        return self._at(positions, self.hiddens)

    def sample_of(self, block: Block, positions: Tensor | None) -> Tensor:
        """The same of what `block` would make of them; the stream stays in front of it."""
        return self._at(positions, self.outputs(block))

    def _at(self, positions: Tensor | None, batches: Iterable[Tensor]) -> Tensor:
        if positions is None:
            return torch.cat([hidden.flatten(0, 1) for hidden in batches])
        positions = positions[own_rows(positions, self.samples, self.length)]
        positions = positions - distributed.own_range(self.samples).start * self.length
        per_batch = len(self.hiddens[0]) * self.length
        return torch.cat(
            [
                hidden.flatten(0, 1)[positions[positions // per_batch == i].to(hidden.device) - i * per_batch]
                for i, hidden in enumerate(batches)
            ]
        )

    def gram(self, samples: int) -> Tensor:
        """The centred Gram matrix [n, n] float64 of the first `samples` sequences' features, each sequence one vector (equation 6).

        It pairs sequences of different processes: each is sent some of the features of all.
        """
        total = torch.zeros(samples, samples, dtype=torch.float64)
        step, processes = max(1, BATCH_TOKENS // samples), distributed.world()
        own = len([i for i in distributed.own_range(self.samples) if i < samples])
        for start in range(0, self.length, step * processes):
            pieces = []
            for at in range(start, start + step * processes, step):
                parts = [hidden[:, at : at + step].flatten(1) for hidden in self.hiddens]
                pieces.append(torch.cat(parts)[:own])
            features = distributed.exchange(pieces).float()
            features -= features.mean(dim=0)
            total += (features @ features.T).double().cpu()
        distributed.sum_([total])
        return total


def own_rows(positions: Tensor | None, samples: int, length: int) -> slice:
    """Which of `positions` (rising, among all tokens of `samples` sequences; None: all) are in this process's sequences."""
    own = distributed.own_range(samples)
    bounds = torch.tensor([own.start, own.stop]) * length
    if positions is not None:
        bounds = torch.searchsorted(positions, bounds)
    return slice(*bounds.tolist())


def slice_of(part: range) -> slice:
    return slice(part.start, part.stop)


def unreached(block: Block, names: list[str], ran: set[str]) -> list[str]:
    """Those of `names` that are experts which no token reached: they did not run, but one with another index did."""
    alike = {_unnumbered(name, block) for name in ran}
    return [name for name in names if name not in ran and _unnumbered(name, block) in alike]


def _last(calls: list[str], names: set[str], block: Block) -> str:
    """The linear behind which none of `names` runs, as the `calls` of one batch show it; "" if other batches may differ.

    They may where tokens are routed to experts.
    """
    routed = any(_unnumbered(name, block) != name.removeprefix(block.name) for name in names)
    return "" if routed or {*calls} != names or calls.count(calls[-1]) > 1 else calls[-1]


def _unnumbered(name: str, block: Block) -> str:
    return re.sub(r"\.\d+\.", ".#.", name.removeprefix(block.name))


@contextmanager
def replaced(blocks: list[Block], make: Callable[[Block], Callable[..., Any]]) -> Iterator[None]:
    """Each block's forward is what `make` makes for it."""
    for block in blocks:
        block.module.forward = make(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


def _ends(blocks: list[Block]) -> AbstractContextManager[None]:
    """What stands around the blocks can be used inside."""
    return blocks[0].home.ends() if blocks[0].home else nullcontext()


@contextmanager
def visiting(block: Block, device: torch.device) -> Iterator[None]:
    """`block` is on `device`, and back where it was at the end: in memory elsewhere, or on disk."""
    with block.present():
        home = next(block.module.parameters()).device
        if home == device:
            yield
            return
        block.module.to(device)
        try:
            yield
        finally:
            block.module.to(home)


def home_of(model: nn.Module) -> torch.device:
    """Where what comes from the model is kept: where its weights are, or the CPU if these are on disk."""
    home = next(model.parameters()).device
    return torch.device("cpu") if home.type == "meta" else home


def mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file of `folder` that nobody else sees, and that is gone with it. Raises LosaError if the disk is full.

    The file has its room before it is written through the mapping, where a full disk would end the process.
    """
    size = torch.Size(shape).numel()
    with writing(folder):
        handle, path = tempfile.mkstemp(prefix="activations-", dir=folder)  # another process of the run makes its own
        try:
            os.posix_fallocate(handle, 0, size * dtype.itemsize)
            return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)


def _to(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether the tensors in two values of one form are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(one[k], other[k]) for k in one)
    return not isinstance(one, tuple | list) or all(map(_same, one, other))
