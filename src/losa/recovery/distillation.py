"""The dense model as a teacher: its predictions, computed on the fly or kept as the likeliest tokens of every position.

The divergence is KL(teacher || student) at one temperature. Of a cached teacher it is that over its k likeliest tokens
and one bucket for all others, which is at most the whole KL, and zero only where these masses agree.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa import data, distributed, model
from losa.blocks import Subject
from losa.errors import LosaError
from losa.inputs import Inputs, fingerprint
from losa.recipe import Recipe
from losa.recovery import footprint

if TYPE_CHECKING:
    from losa.run import Run

SHARD = 128  # rows whose predictions are one file: what a kill can cost
CHUNK = 1 << 26  # logits (256 MiB in fp32) whose loss is computed at once


@dataclass
class Prediction:
    """What a teacher says of n positions: log-probabilities, fp32 [n, k], of the tokens `ids` (int64 [n, k]), and the
    logarithm of what all others of the first `vocabulary` tokens have, [n]; ids and rest None: of all of these."""

    vocabulary: int
    logs: Tensor
    ids: Tensor | None = None
    rest: Tensor | None = None

    def split(self, size: int) -> "list[Prediction]":
        """In pieces of `size` positions."""
        if self.ids is None or self.rest is None:
            return [Prediction(self.vocabulary, logs) for logs in self.logs.split(size)]
        parts = zip(self.logs.split(size), self.ids.split(size), self.rest.split(size), strict=True)
        return [Prediction(self.vocabulary, *part) for part in parts]


class Teacher(Protocol):
    """Predicts what follows every counted position of some recovery rows, in the order of rows and positions."""

    temperature: float

    def predict(self, rows: Sequence[int], inputs: dict[str, Tensor]) -> Prediction:
        """rows: their numbers among all recovery rows; inputs: what `data.collate` makes of them, on the model's device."""


def counted(labels: Tensor) -> Tensor:
    """Which of the positions 0..length-2 predict a label that counts: bool [rows, length - 1]."""
    return labels[:, 1:] != data.IGNORED


def divergence(logits: Tensor, said: Prediction, temperature: float) -> Tensor:
    """Sum over n positions of KL(teacher || student), both at `temperature`; logits [n, vocabulary], any float.

    Tokens that only one of them knows (rows of padding in a head) take no part.
    """
    scaled = logits[:, : said.vocabulary].float() / temperature
    if said.ids is None or said.rest is None:
        return F.kl_div(F.log_softmax(scaled, dim=-1), said.logs, reduction="sum", log_target=True)
    whole = scaled.logsumexp(dim=-1)
    others = scaled.scatter(1, said.ids, torch.finfo(torch.float32).min).logsumexp(dim=-1)
    top = F.kl_div(scaled.gather(1, said.ids) - whole.unsqueeze(1), said.logs, reduction="sum", log_target=True)
    # where nothing is left over, its logarithm is held finite so that 0 * log 0 is 0
    return top + F.kl_div(others - whole, said.rest.clamp(min=-1e4), reduction="sum", log_target=True)


def mixed_loss(student: nn.Module, inputs: dict[str, Tensor], said: Prediction, recipe: Recipe, labels: int) -> float:
    """Add the gradients of (1 - d) next-token loss + d T^2 divergence, both over `labels`; returns it.

    d is the recipe's `distill`, T its temperature (T^2 keeps the scale of the gradients whatever T is). The losses are
    computed in chunks: of the fp32 copies of the logits no more than CHUNK values are there at a time.
    """
    named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    where = counted(inputs["labels"])
    logits: Tensor = student(**named, use_cache=False).logits[:, :-1][where]
    targets = inputs["labels"][:, 1:][where]
    size = max(1, CHUNK // logits.shape[1])
    share, temperature = recipe.distill, recipe.distill_temperature
    total, gradients = 0.0, []
    for part, target, prediction in zip(logits.split(size), targets.split(size), said.split(size), strict=True):
        leaf = part.detach().requires_grad_()
        loss = share * temperature**2 * divergence(leaf, prediction, temperature)
        if share < 1:
            loss = loss + (1 - share) * F.cross_entropy(leaf.float(), target, reduction="sum")
        loss = loss / labels
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        total += loss.item()
    torch.autograd.backward(logits, torch.cat(gradients))
    return total


class Live:
    """A frozen model that predicts when it is asked: a second one in memory."""

    def __init__(self, model: Any, vocabulary: int, temperature: float) -> None:
        self.model, self.vocabulary, self.temperature = model.eval().requires_grad_(False), vocabulary, temperature

    @torch.no_grad()
    def predict(self, rows: Sequence[int], inputs: dict[str, Tensor]) -> Prediction:
        """All its log-probabilities."""
        named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = self.model(**named, use_cache=False).logits[:, :-1][counted(inputs["labels"])]
        logs = F.log_softmax(logits[:, : self.vocabulary].float() / self.temperature, dim=-1)
        return Prediction(self.vocabulary, logs)


class Cached:
    """What a teacher said of every recovery row, read from the run directory as rows are asked for.

    teacher-N.safetensors holds of the N-th SHARD rows: `ids` int32 [n, k], `logs` fp16 [n, k], `rest` fp16 [n], over all
    positions n that count, and `starts` int64 [rows + 1], where each row begins.
    """

    def __init__(self, run: "Run", shards: range, vocabulary: int, temperature: float) -> None:
        from safetensors import safe_open

        self.vocabulary, self.temperature = vocabulary, temperature
        self._files = {number: safe_open(run.path(_shard(number)), framework="pt") for number in shards}
        self._starts: dict[int, Tensor] = {number: file.get_tensor("starts") for number, file in self._files.items()}

    def predict(self, rows: Sequence[int], inputs: dict[str, Tensor]) -> Prediction:
        """Its likeliest tokens, and the rest."""
        parts: dict[str, list[Tensor]] = {"ids": [], "logs": [], "rest": []}
        for row in rows:
            file, starts, place = self._files[row // SHARD], self._starts[row // SHARD], row % SHARD
            for name, found in parts.items():
                found.append(file.get_slice(name)[int(starts[place]) : int(starts[place + 1])])
        device = inputs["labels"].device
        ids, logs, rest = (torch.cat(parts[name]).to(device) for name in ("ids", "logs", "rest"))
        logs, rest = logs.float(), rest.float()
        # what fp16 has rounded sums to one again
        whole = torch.cat([logs, rest.unsqueeze(1)], dim=1).logsumexp(dim=1)
        return Prediction(self.vocabulary, logs - whole.unsqueeze(1), ids.long(), rest - whole)


def teacher_of(subject: Subject, recipe: Recipe, inputs: Inputs, run: "Run") -> Teacher | None:
    """The teacher that the recipe asks for, if any, while `subject` is still dense.

    Raises LosaError if it is another model than the run was started with.
    """
    if not (recipe.distill and inputs.examples):
        return None
    dense, name = subject.model, recipe.teacher_model
    if name:
        dense = model.load(name, recipe)
        seen = fingerprint(Subject(dense, None, [], name, dense.dtype), inputs)
        saved = run.load("teacher-model")
        if saved and saved.meta["seen"] != seen:
            raise LosaError(f"teacher_model {name!r} is not what the run was started with: start a new run")
        run.save("teacher-model", {}, {"seen": seen})
        dense = dense.to(subject.model.device)  # a loaded model may be elsewhere than the recipe says
    elif recipe.teacher == "live":
        dense = subject.dense
    # heads may be padded, each to a size of its own
    common = min(m.get_output_embeddings().weight.shape[0] for m in (dense, subject.model))
    live = Live(dense, common, recipe.distill_temperature)
    return live if recipe.teacher == "live" else cached(live, inputs.examples, subject.pad_id, recipe, run)


def cached(live: Live, examples: list[data.Example], pad_id: int, recipe: Recipe, run: "Run") -> Cached:
    """The predictions of `live` for the examples, in the run; what is there already is not made again.

    Files with nothing but rows that fine-tune the dense model, which nobody teaches, are left out."""
    shards = range(len(recipe.rows_of(0)) // SHARD, -(-len(examples) // SHARD))
    missing = [number for number in shards if not run.path(_shard(number)).is_file()]
    missing = distributed.gather(missing)[0]  # rank 0's, which writes them
    device, most = next(live.model.parameters()).device, footprint.padded(live.model, recipe)
    for number in run.track(missing, "the teacher's predictions", "part", done=len(shards) - len(missing)):
        rows = range(number * SHARD, min((number + 1) * SHARD, len(examples)))
        own = distributed.own_range(len(rows))
        top = min(recipe.teacher_top, live.vocabulary)
        made = {
            "ids": [torch.empty(0, top).int()],
            "logs": [torch.empty(0, top).half()],
            "rest": [torch.empty(0).half()],
        }
        lengths = []
        for row in rows[own.start : own.stop]:
            inputs = {k: v.to(device) for k, v in data.collate([examples[row]], pad_id, most).items()}
            said = shortened(live.predict([row], inputs), top)
            assert said.ids is not None and said.rest is not None
            lengths.append(len(said.rest))
            made["ids"].append(said.ids.int().cpu())
            made["logs"].append(said.logs.half().cpu())
            made["rest"].append(said.rest.half().cpu())
        tensors = {name: distributed.collect(torch.cat(parts)) for name, parts in made.items()}
        begins = [0, *itertools.accumulate(length for part in distributed.gather(lengths) for length in part)]
        run.save(_shard(number), {**tensors, "starts": torch.tensor(begins)}, {"rows": len(rows)})
    distributed.gather(None)  # rank 0 has written them all
    return Cached(run, shards, live.vocabulary, recipe.distill_temperature)


def shortened(said: Prediction, k: int) -> Prediction:
    """Of a prediction over all tokens, the `k` likeliest and the mass of the others."""
    logs, ids = said.logs.topk(k, dim=-1)
    others = said.logs.scatter(1, ids, -torch.inf)
    return Prediction(said.vocabulary, logs, ids, others.logsumexp(dim=-1))


def _shard(number: int) -> str:
    return f"teacher-{number:04d}"


def check_vocabulary(tokenizer: Any, own: Any, name: str) -> None:
    """Raise LosaError unless the teacher's tokenizer writes the very ids of the student's."""
    theirs, ours = tokenizer.get_vocab(), own.get_vocab()
    if theirs != ours:
        differ = next(token for token in [*ours, *theirs] if ours.get(token) != theirs.get(token))
        raise LosaError(
            f"teacher_model {name!r} has another vocabulary ({len(theirs)} tokens, the model {len(ours)}; they differ in "
            f"{differ!r}): what it predicts cannot be compared; use the dense model, or one of the same tokenizer"
        )
