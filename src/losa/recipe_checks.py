"""What of a recipe can be known to be wrong before anything is read."""

import dataclasses
import math
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from losa import patterns, registry
from losa.errors import LosaError

if TYPE_CHECKING:
    from losa.recipe import Recipe

KINDS_WITH_OPTIONS: tuple[Literal["pruner", "allocator", "recovery"], ...] = ("pruner", "allocator", "recovery")
TARGETS = {
    "all": r".*",
    "qv": r".*\b(q_proj|v_proj)$",  # where q, k and v are one linear, nothing
    "qkvo": r"\b(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|query_key_value)$|attention\.dense$",
}
TARGETS |= {",".join(name): pattern for name, pattern in TARGETS.items() if name != "all"}  # q,v as well


def check(recipe: "Recipe") -> None:
    """Raise LosaError for the first setting that cannot be."""
    for f in dataclasses.fields(recipe):
        check_type(f.name, getattr(recipe, f.name), f.type)
    require(0 <= recipe.sparsity < 1, "sparsity", recipe.sparsity, "at least 0 and below 1")
    kept = patterns.parse(recipe.pattern)
    if kept.sparsity is not None and abs(kept.sparsity - recipe.sparsity) > 1e-9:
        raise LosaError(
            f"sparsity {recipe.sparsity:g} contradicts pattern {kept}, which keeps {kept.n} of {kept.m}: leave it out"
        )
    _check_kind_of_pruner(recipe)
    for kind in KINDS_WITH_OPTIONS:
        cls, options = registry.get(kind, getattr(recipe, kind)), getattr(recipe, f"{kind}_options")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise registry.unknown(f"setting of {kind} {getattr(recipe, kind)!r}", name, known)
        for f in dataclasses.fields(cls):
            if f.name in options:
                check_type(f"{kind}_options.{f.name}", options[f.name], f.type)
        try:
            recipe.build(kind)
        except LosaError as error:
            raise LosaError(f"{kind}_options: {error}") from None
    _check_what_pruner_reads(recipe)
    check_format(recipe)
    _check_recovery(recipe)
    positive = "steps calibration_samples sequence_length allocation_samples train_length batch_size"
    require(recipe.rows > 0, "train_samples", recipe.train_samples, "above 0")
    others = ("epochs", "distill_temperature", "teacher_top", "reconstruct_rate")
    for name in [*positive.split(), "micro_batch_size", "base_rank", "alpha", "clip", *others]:
        require(getattr(recipe, name) > 0, name, getattr(recipe, name), "above 0")
    require(recipe.mean_rank >= 1, "mean_rank", recipe.mean_rank, "at least 1: every adapted linear has a rank")
    least = "rank_growth error_tokens reconstruct weight_decay eval_tokens eval_window checkpoint_minutes "
    least += "eval_step_tokens sample_tokens"
    for name in least.split():
        require(getattr(recipe, name) >= 0, name, getattr(recipe, name), "at least 0")
    require(recipe.eval_tokens != 1, "eval_tokens", recipe.eval_tokens, "at least 2, or 0 for all")
    require(recipe.eval_window != 1, "eval_window", recipe.eval_window, "at least 2, or 0 for the model's")
    require(recipe.eval_step_tokens != 1, "eval_step_tokens", recipe.eval_step_tokens, "at least 2, or 0 for none")
    require("" not in recipe.prompts, "prompts", recipe.prompts, "texts that are not empty")
    for name in ("warmup", "last_step_share", "distill", "finetune_first"):
        require(0 <= getattr(recipe, name) <= 1, name, getattr(recipe, name), "between 0 and 1")
    require(
        recipe.batch_size % recipe.micro_batch_size == 0,
        "micro_batch_size",
        recipe.micro_batch_size,
        f"a divisor of batch_size ({recipe.batch_size})",
    )
    if registry.get("recovery", recipe.recovery).trains:
        rows = recipe.rows - len(recipe.rows_of(0))
        require(rows >= recipe.steps, "train_samples", recipe.train_samples, "at least one row a step")
    _check_rate(recipe)
    allocator = registry.get("allocator", recipe.allocator)
    if recipe.rates_per == "linear" and not allocator.per_linear:
        raise LosaError(f"allocator {recipe.allocator!r} knows blocks only: set rates_per to block")
    if recipe.allocator == "rmi":
        for name in ("allocation_samples", "calibration_samples"):
            require(getattr(recipe, name) >= 2, name, getattr(recipe, name), "at least 2: RMI compares sequences")
    if recipe.memory:
        parse_size("memory", recipe.memory)
    require(abs(recipe.seed) <= 10**15, "seed", recipe.seed, "at most 1e15 either way")
    if recipe.teacher_model and not recipe.distill:
        raise LosaError(f"teacher_model {recipe.teacher_model!r} would never be asked: set distill above 0")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?", recipe.device):
        raise LosaError(f"device {recipe.device!r}: use auto, cpu or cuda (cuda:0, cuda:1 ...)")
    ignored = [("ignore", pattern) for pattern in recipe.ignore]
    for name, pattern in [*ignored, *([] if recipe.targets in TARGETS else [("targets", recipe.targets)])]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise LosaError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def _check_rate(recipe: "Recipe") -> None:
    """Raise LosaError for a learning rate that is neither a number above 0 nor auto."""
    if isinstance(recipe.learning_rate, str):
        if recipe.learning_rate != "auto":
            raise LosaError(f"learning_rate is {recipe.learning_rate!r}: must be a number or auto")
        steps = [1, recipe.steps] if registry.get("recovery", recipe.recovery).trains else []
        rows = [len(recipe.rows_of(step)) for step in (*steps, *([0] if recipe.finetune_first else []))]
        if min(rows, default=2) < 2:
            raise LosaError(
                f"train_samples is {recipe.rows}: learning_rate auto holds one row back and trains on others, so a step "
                "needs two: raise it, or name a learning_rate"
            )
    else:
        require(recipe.learning_rate > 0, "learning_rate", recipe.learning_rate, "above 0, or auto")


def _check_kind_of_pruner(recipe: "Recipe") -> None:
    """Raise LosaError for a pruner of single weights where whole heads go, and the other way round."""
    if not recipe.structured:
        if recipe.pruner in registry.STRUCTURED:
            raise LosaError(
                f"pruner {recipe.pruner!r} prunes whole heads and channels: set pattern to structured; with pattern "
                f"{recipe.kept} use {' or '.join(sorted(registry.PRUNERS))}"
            )
        return
    if recipe.pruner in registry.PRUNERS:
        raise LosaError(
            f"pruner {recipe.pruner!r} prunes single weights; with --pattern structured use "
            f"{' or '.join(sorted(registry.STRUCTURED))}"
        )
    if recipe.rates_per != "block":
        raise LosaError("rates_per linear: pattern structured prunes the linears of a block together: set it to block")
    if recipe.allocator == "error":
        raise LosaError("allocator 'error' tries single linears; with --pattern structured use owl, rmi or uniform")


def _check_what_pruner_reads(recipe: "Recipe") -> None:
    """Raise LosaError for settings that mean nothing to a pruner without inputs, or with gradients."""
    pruner, allocator = registry.get("pruner", recipe.pruner), registry.get("allocator", recipe.allocator)
    if recipe.true_sequential and not pruner.needs_inputs:
        raise LosaError(f"true_sequential changes inputs, which pruner {recipe.pruner!r} does not read: leave it out")
    if pruner.needs_gradients:
        if allocator.needs == "errors":
            raise LosaError(
                f"allocator {recipe.allocator!r} prunes each block for trial on the way forward, where pruner "
                f"{recipe.pruner!r} has no gradients yet: use another allocator"
            )
        least = "at least 2: a loss needs a next token"
        require(recipe.sequence_length >= 2, "sequence_length", recipe.sequence_length, least)


def check_format(recipe: "Recipe") -> None:
    """Raise LosaError for what cannot be packed."""
    merges = registry.get("recovery", recipe.recovery).merges
    if recipe.format == "dense":
        if recipe.values != "auto":
            raise LosaError(f"values {recipe.values} are of packed models: set format to packed")
        return
    if recipe.structured:
        raise LosaError("format packed: pattern structured leaves no zeros to leave out: leave format dense")
    if not merges:
        raise LosaError(
            f"format packed: recovery {recipe.recovery!r} keeps its pairs apart, for PEFT, which knows dense linears "
            "only: set format to dense, or recovery to losa or none"
        )
    least = "at least 0.1 with format packed: below that, masks take what zeros give"
    require(recipe.sparsity >= 0.1, "sparsity", recipe.sparsity, least)


def _check_recovery(recipe: "Recipe") -> None:
    """Raise LosaError for settings that contradict the recovery."""
    recovery = registry.get("recovery", recipe.recovery)
    if recovery.once and recipe.steps > 1:
        why = "sets mask and ranks once" if recovery.merges else "does not merge"
        raise LosaError(f"recovery {recipe.recovery!r} {why}, so that only one step is possible: set steps to 1")
    if recipe.rank_by not in recovery.rank_by:
        raise LosaError(f"rank_by {recipe.rank_by}: recovery {recipe.recovery!r} knows {' or '.join(recovery.rank_by)}")
    share = recipe.finetune_first
    if recovery.trains and share == 1:
        raise LosaError(
            f"finetune_first is {share:g}: no rows are left for recovery {recipe.recovery!r}: lower it, or set recovery to none"
        )
    if recovery.trains or not share:
        return
    if 0 < share < 1:
        raise LosaError(f"finetune_first is {share:g}: recovery {recipe.recovery!r} reads no rows, so set it to 1 or 0")
    if recipe.distill:
        raise LosaError(
            "distill: the dense model is fine-tuned by next tokens only, and nothing is after it: set it to 0"
        )


def _ranks(made: "Recipe") -> bool:
    return bool(registry.get("recovery", made.recovery).ranks)


# fmt: off
TRAINING = (
    "train_data", "train_samples", "train_length", "loss_on", "epochs", "learning_rate", "batch_size", "micro_batch_size",
    "optimizer", "checkpointing", "checkpoint_minutes", "weight_decay", "clip", "targets",
)
# settings that count only beside others: which, when, and what is to be done where they do not
READ_WHEN: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (TRAINING, lambda made: made.trains, "set recovery to one that trains"),
    (("warmup",), lambda made: made.trains or made.reconstruct > 0, "set recovery to one that trains"),
    (("distill",), lambda made: registry.get("recovery", made.recovery).trains, "set recovery to one that trains"),
    (("mean_rank", "alpha", "base_rank"), lambda made: _ranks(made) or made.finetune_first > 0,
     "set recovery to one of low-rank pairs"),
    (("rank_by",), lambda made: _ranks(made), "set recovery to one of low-rank pairs"),
    (("schedule", "rank_growth", "last_step_share"), lambda made: made.steps > 1, "set steps above 1"),
    (("teacher", "distill_temperature"), lambda made: made.distill > 0, "set distill above 0"),
    (("teacher_top",), lambda made: made.distill > 0 and made.teacher == "cached", "distil from a cached teacher"),
    (("reconstruct_rate",), lambda made: made.reconstruct > 0, "set reconstruct above 0"),
    (("eval_tokens", "eval_window", "eval_step_tokens"), lambda made: made.eval_data != "", "name eval_data"),
    (("allocation_samples",), lambda made: registry.get("allocator", made.allocator).needs != "",
     "set allocator to one that looks at the model"),
)
# fmt: on


def refuse_unread(made: "Recipe", given: dict[str, Any]) -> None:
    """Raise LosaError for the first setting of `given`, asked for by hand, that nothing in `made` would read.

    Not part of `validate`: recipes that are combined, and the cells of a table, may share settings that some do not read.
    """
    usual = {f.name: f.default for f in dataclasses.fields(made)}
    for names, is_read, instead in READ_WHEN:
        for name in names:
            if name in given and given[name] != usual[name] and not is_read(made):
                raise LosaError(f"{name} {given[name]!r} would change nothing: leave it out, or {instead}")


UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(name: str, text: str) -> float:
    """Bytes, from `8GB`, `500 MB`, `16GiB` or a number of them. Raises LosaError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((found[2] or "B").upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise LosaError(f"{name} {text!r}: write a size such as 8GB, 500MB or 16GiB")
    return float(found[1]) * unit


def widened(value: Any, kind: Any) -> Any:
    """6 as 6.0 where a float is meant (JSON does not tell them apart), unless no float is as large."""
    whole = type(value) is int and abs(value) < 2**1023
    return float(value) if whole and float in (kind, *get_args(kind)) else value


def check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise registry.unknown(name, value, get_args(kind))
        return
    parts = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    allowed = tuple(get_origin(part) or part for part in parts)
    value = widened(value, kind)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        named = " or ".join(k.__name__ for k in allowed if k is not NoneType)
        raise LosaError(f"{name}: expected {named}, got {value!r}")
    if kind == list[str] and not all(isinstance(part, str) for part in value):
        raise LosaError(f"{name}: expected a list of strings, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise LosaError(f"{name}: {value} is not a finite number")


def require(true: bool, name: str, value: object, what: str) -> None:
    if not true:
        raise LosaError(f"{name} is {value}: must be {what}")
