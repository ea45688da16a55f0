"""Gradients of the model's own loss, gathered block by block from the last to the first; the counterpart of calibration.

Held at a time: one block's statistics and one sequence's activations, on the compute device; and where the model lives,
in its type, the gradient with respect to one block's output and the hidden states in front of at most log2(blocks) + 1
blocks. Those in front of the others are computed again when their turn comes, which over 32 blocks is one and a half
passes forward; to keep them all would take more memory than the whole model's gradients do.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losa.blocks import Block
from losa.calibration import Stream, unreached, visiting
from losa.errors import LosaError
from losa.pruners.base import Pruner, Statistic
from losa.recovery.training import next_token_loss


class Backward:
    """The gradient of the loss of each sequence of `tokens` (int64 [samples, length]) behind the next block to be gathered.

    The loss is the cross entropy summed over a sequence's next tokens, each sequence on its own, through whatever the
    model does behind its blocks. Linears may be masked and adapted: the gradient is that of the merged weight, also where
    the mask prunes it. Blocks from the one last gathered on may change; those before it, and the model's ends, may not.
    Raises LosaError for a loss that is not a number.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], tokens: Tensor, device: torch.device) -> None:
        self.blocks = blocks
        # one at a time: squares are summed over sequences, and a block may mix up the tokens of a batch (experts)
        self.stream = Stream(model, blocks, tokens, device, sequences=1)
        self._kept = [(0, self.stream.hiddens)]  # (block, the hidden states in front of it), rising
        self._behind = self._before(len(blocks))
        self._kept.pop()
        for i, ids in enumerate(self.stream.tokens.split(1)):
            self._behind[i] = self._of_loss(model, self._behind[i], ids)

    def _of_loss(self, model: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
        """The gradient of one sequence's loss with respect to what the last block makes, `hidden` [1, length, hidden]."""
        hidden, ids = hidden.detach().requires_grad_(), ids.to(next(model.parameters()).device)
        with torch.enable_grad(), self.stream.behind(self.blocks, hidden):
            loss = next_token_loss(model, ids, torch.ones_like(ids), ids)
        if not math.isfinite(loss.item()):
            raise LosaError("the calibration loss is not a number: the weights are damaged or overflow in this dtype")
        return torch.autograd.grad(loss, hidden)[0]

    def _before(self, index: int) -> list[Tensor]:
        """The hidden states in front of block `index`; those on the way there are kept at every half of what is left."""
        while self._kept[-1][0] > index:
            self._kept.pop()
        while (start := self._kept[-1][0]) < index:
            stop = (start + index + 1) // 2
            self.stream.hiddens = list(self._kept[-1][1])
            for block in self.blocks[start:stop]:
                self.stream.advance(block)
            self._kept.append((stop, self.stream.hiddens))
        self.stream.hiddens = self._kept[-1][1]
        return self.stream.hiddens

    def fresh(self, block: Block, pruner: Pruner) -> Callable[[str], Statistic]:
        """Makes an empty statistic of a linear of `block`, by name."""
        return lambda name: pruner.gradient_statistic(block.linears[name].weight.shape, self.stream.device)

    def gather(self, block: Block, pruner: Pruner) -> tuple[dict[str, Statistic], list[str]]:
        """The pruner's statistic of each linear of `block`, by name; blocks come once each, from the last to the first.

        Those of this process's sequences. And the names of experts that no token reached: theirs is the statistic of gradients that are all zero.
        """
        device = self.stream.device
        statistics = {name: self.fresh(block, pruner)(name) for name in block.linears}
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in block.linears}
        reached: set[str] = set()

        def hook(name: str) -> Callable[..., Tensor]:
            def see(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
                x = inputs[0].detach()
                out.register_hook(lambda dy: calls[name].append((x, dy)))
                return (
                    out.clone()
                )  # were `out` a view, a model that adds to it in place, as Falcon does, would lose the hook

            return see

        hooks = [linear.register_forward_hook(hook(name)) for name, linear in block.linears.items()]
        try:
            with visiting(block, device):
                for i, hidden in enumerate(self._before(block.index)):
                    x = hidden.detach().to(device).requires_grad_()
                    with torch.enable_grad():
                        out = self.stream.run(block, x)
                    (dx,) = torch.autograd.grad(out, x, self._behind[i].to(device))
                    self._behind[i] = dx.to(hidden.device)
                    for name, seen in calls.items():
                        if seen:
                            reached.add(name)
                            statistics[name].update(_of_weight(seen), 1)
                            seen.clear()
        finally:
            for handle in hooks:
                handle.remove()
        missed = unreached(block, list(statistics), reached)
        for name in missed:
            statistics[name].update(torch.zeros(block.linears[name].weight.shape, device=device), 1)
        return statistics, missed


@torch.no_grad()
def _of_weight(calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of a linear's weight, [out, in] in fp32 or wider: of all its calls (input, gradient of the output)."""
    x, dy = (torch.cat([part.flatten(0, -2) for part in side]) for side in zip(*calls, strict=True))
    wide = torch.promote_types(x.dtype, torch.float32)
    return dy.to(wide).t() @ x.to(wide)
