"""The one configuration: every setting with its type, meaning and bounds; checked before a model loads; saved beside every result."""

import copy
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from losa import patterns, recipe_checks, registry
from losa.errors import LosaError
from losa.patterns import Amount
from losa.recipe_checks import check_type, widened

if TYPE_CHECKING:
    from losa.blocks import Block

RECIPES = (
    *("paper", "best", "best-adapters", "demo", "lora", "sparse-lora", "adalora", "sora", "finetune-then-sparsify"),
)
MOST_ROWS = 10_000  # recovery rows where none are asked for: the paper's


def setting(default: Any, doc: str) -> Any:
    """A field of the recipe with its help text."""
    factory = default if callable(default) else None
    if factory:
        return field(default_factory=factory, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def default_of(field: Any) -> Any:
    """The default of a field of the recipe, of its own where it can be changed."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed. Constants are the paper's (section 3.1 and its code) where it has them."""

    sparsity: float = setting(
        None, "share of the weights of pruned linears that becomes zero, in [0, 1); default 0.6, or what N:M says"
    )
    pattern: str = setting(
        "unstructured",
        "what is kept: unstructured; N:M, N kept of every M; mixed-N:M, every block its own N, with mean N; structured, "
        "whole key/value heads and MLP channels: the model gets smaller (with allocator uniform, all blocks alike)",
    )
    undivided: Literal["refuse", "dense"] = setting(
        "refuse", "linears whose input width the M of N:M does not divide: refuse them, or leave them dense"
    )
    pruner: str = setting(
        None,
        f"which weights go: {', '.join(sorted(registry.PRUNERS))}; with pattern structured, which heads and channels: "
        f"{', '.join(sorted(registry.STRUCTURED))}; default wanda, or wanda-sp",
    )
    pruner_options: dict[str, Any] = setting(dict, "settings of the pruner, as JSON")
    true_sequential: bool = setting(
        False, "prune a block's linears in the order they run, each seeing those before it pruned, not all at once"
    )
    allocator: str = setting("rmi", "sparsity per block: " + ", ".join(sorted(registry.ALLOCATORS)))
    allocator_options: dict[str, Any] = setting(dict, "settings of the allocator, as JSON")
    rates_per: Literal["block", "linear"] = setting("block", "what has a sparsity of its own")
    schedule: Literal["cubic", "linear"] = setting("cubic", "how sparsity grows over the steps (equations 8, 10)")
    steps: int = setting(
        None,
        "steps of pruning and recovery (T); 1 prunes at once; default 5, or 1 with a recovery that can take one only, or "
        "trains nothing",
    )
    mean_rank: float = setting(
        6.0, "mean rank of the adapters at the first step; grows by rank_growth a step (equation 9)"
    )
    rank_growth: float = setting(1.0, "what the mean rank gains at every step after the first")
    rank_by: Literal["error", "sparsity", "uniform"] = setting(
        None,
        "what decides the rank of a block (equation 7); default error, or uniform where a recovery has one rank for all",
    )
    recovery: str = setting("losa", "how quality is won back: " + ", ".join(sorted(registry.RECOVERIES)))
    recovery_options: dict[str, Any] = setting(dict, "settings of the recovery, as JSON")
    finetune_first: float = setting(
        0.0,
        "share of the recovery rows that fine-tune the dense model, by LoRA that is merged, before it is pruned; "
        "all of them (1) with recovery none (appendix C.4)",
    )
    targets: str = setting("all", "linears that get adapters: all, qv, qkvo, or a regular expression on their names")
    ignore: list[str] = setting(list, "linears that are not pruned: regular expressions on their names, repeatable")
    calibration: str = setting("c4", "calibration text: c4, wikitext2, demo, a hub name or a local file")
    calibration_samples: int = setting(128, "calibration sequences")
    sequence_length: int = setting(2048, "tokens of a calibration sequence")
    allocation_samples: int = setting(64, "calibration sequences the allocator reads, if it reads any")
    error_tokens: int = setting(
        4096, "dense features kept for the reconstruction errors, tokens per block; 0 keeps all"
    )
    train_data: str = setting("alpaca-gpt4", "recovery data: alpaca-gpt4, demo, a hub name or a local file")
    train_samples: int | None = setting(
        None, f"recovery rows over all steps, each used once; default: all there are, {MOST_ROWS} at most"
    )
    train_length: int = setting(1024, "tokens of a recovery row at most")
    last_step_share: float = setting(
        0.6, "share of the recovery rows for the last step; the others share the rest evenly"
    )
    loss_on: Literal["all", "answer"] = setting("all", "tokens the loss counts: the whole text, or the answer only")
    epochs: int = setting(1, "times each step reads its recovery rows")
    distill: float = setting(
        0.0, "share of the loss that is the divergence from a teacher's predictions; the rest is the next token's"
    )
    distill_temperature: float = setting(1.0, "temperature of both sides of the divergence")
    teacher: Literal["live", "cached"] = setting(
        "live", "live: a frozen copy of the dense model; cached: what it says of the rows, written into the run first"
    )
    teacher_top: int = setting(64, "tokens kept of each prediction of a cached teacher; the others are one bucket")
    teacher_model: str = setting("", "another model as the teacher, with the same vocabulary; empty: the dense one")
    reconstruct: int = setting(
        0,
        "times each block's kept weights read the calibration sequences, once pruned, to come near the dense block's output",
    )
    reconstruct_rate: float = setting(
        0.02, "peak learning rate of that, as a share of the root mean square of a linear's kept weights"
    )
    learning_rate: float | str = setting(
        "auto", "peak learning rate of AdamW; auto: by short trials, on rows held out from them"
    )
    batch_size: int = setting(8, "recovery rows an optimizer step takes")
    micro_batch_size: int = setting(
        None, "rows that go through the model at once, a divisor of batch_size; default: the largest up to 4"
    )
    optimizer: Literal["adamw", "adamw-8bit"] = setting(
        "adamw", "adamw-8bit: bitsandbytes' paged one, whose moments take 2 bytes a weight instead of 8; on CUDA only"
    )
    checkpointing: bool = setting(
        False, "keep only the inputs of each block during recovery and run it again when its gradients are due"
    )
    shard: Literal["none", "blocks"] = setting(
        "none",
        "blocks: in memory of the devices each of several processes holds a slice of every block's weights, for models "
        "that do not fit one; the whole stays in the machine's memory, once a process",
    )
    warmup: float = setting(0.1, "share of each step's updates over which the learning rate rises")
    weight_decay: float = setting(0.001, "AdamW's weight decay")
    clip: float = setting(1.0, "largest norm of the gradient")
    alpha: float = setting(16.0, "scale of the low-rank product is alpha / base_rank, whatever the rank")
    base_rank: int = setting(8, "see alpha")
    eval_data: str = setting("", "text for perplexity before and after; empty measures none")
    eval_tokens: int = setting(0, "tokens of eval_data that are read; 0 reads all")
    eval_window: int = setting(
        0, "tokens of eval_data that are read at once; 0 is all the model can read, 4096 at most (the paper's)"
    )
    eval_step_tokens: int = setting(
        8192,
        "tokens, spread over eval_data, for the perplexity after every pruning and every recovery; 0 measures none",
    )
    prompts: list[str] = setting(
        list, "texts that the model continues before and after, for the report, repeatable; default: two of eval_data"
    )
    sample_tokens: int = setting(64, "tokens of each continuation at most; 0 makes none")
    memory: str = setting(
        "",
        "the most memory a run may take, such as 8GB; empty: what is free. What does not fit stays on disk: activations, "
        "and of a one-shot run (steps 1, recovery none) the model too, which then comes block by block",
    )
    checkpoint_minutes: float = setting(5.0, "minutes between checkpoints during recovery")
    format: Literal["dense", "packed"] = setting(
        "dense",
        "how the model is saved: dense, zeros and all; packed, without them: smaller, and loads after import losa",
    )
    values: Literal["auto", "int8"] = setting(
        "auto",
        "what packed keeps of the weights: auto, as they are; int8, rounded, with a scale for 256 columns of a row",
    )
    seed: int = setting(0, "seed of everything random")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "type the model computes in; auto: bfloat16 where the processor multiplies it fast, else float32"
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, widened(getattr(self, f.name), f.type))
        check_type("pattern", self.pattern, str)
        if self.sparsity is None:
            said = self.kept.sparsity
            object.__setattr__(self, "sparsity", 0.6 if said is None else said)
        if self.micro_batch_size is None:
            check_type("batch_size", self.batch_size, int)
            size = max((n for n in range(1, 5) if self.batch_size % n == 0), default=1)
            object.__setattr__(self, "micro_batch_size", size)
        if self.pruner is None:
            object.__setattr__(self, "pruner", "wanda-sp" if self.structured else "wanda")
        check_type("recovery", self.recovery, str)
        recovery = registry.get("recovery", self.recovery)
        if self.steps is None:
            object.__setattr__(self, "steps", 5 if recovery.trains and not recovery.once else 1)
        if self.rank_by is None:
            object.__setattr__(self, "rank_by", recovery.rank_by[0])
        self.validate()

    def validate(self) -> None:
        """Raise LosaError for the first setting that cannot be."""
        recipe_checks.check(self)

    def build(self, kind: Literal["pruner", "allocator", "recovery"]) -> Any:
        """The pruner (of single weights, or where the pattern is structured, of heads), allocator or recovery, with its
        options."""
        return registry.get(kind, getattr(self, kind))(**getattr(self, f"{kind}_options"))

    @property
    def trains(self) -> bool:
        """Whether the recovery rows are read."""
        return self.finetune_first > 0 or bool(registry.get("recovery", self.recovery).trains)

    @property
    def structured(self) -> bool:
        """Whether whole heads and channels go."""
        return self.kept.kind == "structured"

    @property
    def kept(self) -> patterns.Pattern:
        """The pattern of what is kept, parsed."""
        return patterns.parse(self.pattern)

    def amounts(self, block: "Block", rates: dict[str, float]) -> dict[str, Amount]:
        """How much of each linear of `block` is pruned, from the rate of its unit: its own, or its block's."""
        return {name: self.kept.amount(rates.get(name, rates.get(block.name, 0.0))) for name in block.linears}

    @property
    def scaling(self) -> float:
        """s = alpha / r0, fixed while ranks change."""
        return self.alpha / self.base_rank

    def sparsity_at(self, step: int) -> float:
        """Mean sparsity after step 1..T (equations 8 and 10)."""
        t = step / self.steps
        return self.sparsity * (1 - (1 - t) ** 3 if self.schedule == "cubic" else t)

    def mean_rank_at(self, step: int) -> float:
        """Mean rank of step 1..T (equation 9); that of step 0, fine-tuning the dense model, is the first's."""
        return self.mean_rank + self.rank_growth * max(0, step - 1)

    @property
    def rows(self) -> int:
        """The recovery rows of all steps, the most there can be as long as the data have not been read."""
        return MOST_ROWS if self.train_samples is None else self.train_samples

    @property
    def max_rank(self) -> int:
        """The most a block can get: max(16, twice the last mean)."""
        return max(16, math.ceil(2 * self.mean_rank_at(self.steps)))

    def rows_of(self, step: int) -> range:
        """The recovery rows of step 1..T: the last takes its share, the others divide the rest; every row once.

        None is left without, unless the share is 0 or 1. Step 0 is the fine-tuning of the dense model, if there is one."""
        first = math.ceil(self.rows * self.finetune_first)
        if step == 0:
            return range(first)
        rows = self.rows - first
        early = 0 if self.steps == 1 else round(rows * (1 - self.last_step_share))
        if self.steps > 1 and 0 < self.last_step_share < 1:  # at least one row a step
            early = min(max(early, self.steps - 1), rows - 1)
        bounds = [first + early * s // max(1, self.steps - 1) for s in range(self.steps)] + [self.rows]
        return range(bounds[step - 1], bounds[step])

    @property
    def peak_rate(self) -> float:
        """The learning rate, once it is a number."""
        assert isinstance(self.learning_rate, float), "the learning rate has not been searched for"
        return self.learning_rate

    @property
    def needs_dense_copy(self) -> bool:
        """Whether the dense model is read once pruning has begun, beyond a block's turn in the first pass."""
        taught = self.distill and self.teacher == "live" and not self.teacher_model
        again = self.steps > 1 or registry.get("pruner", self.pruner).needs_gradients
        return bool(taught and registry.get("recovery", self.recovery).trains) or bool(self.reconstruct and again)

    def at(self, **settings: Any) -> "Recipe":
        """The same with other settings, which are taken as they are."""
        made = copy.copy(self)
        for name, value in settings.items():
            object.__setattr__(made, name, value)
        return made

    prunes: ClassVar[bool] = True  # or takes the masks as they are (losa.repair_recipe)

    @property
    def command(self) -> str:
        """What on the command line runs it."""
        return "compress" if self.prunes else "recover"

    @classmethod
    def part_of(cls, shipped: dict[str, Any]) -> dict[str, Any]:
        """What counts of the settings of a recipe that comes with losa."""
        return shipped

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load(names: str | None, overrides: dict[str, Any] | None = None, kind: type[Recipe] = Recipe) -> Recipe:
    """The recipe of that name or JSON file, or of several with commas between them, each on top of those before it
    (demo,best: the demo's data, the best method); None: the defaults. `overrides` go on top. Raises LosaError.

    kind: what is made of them; a Repair takes of recipes that come with losa the part that is not about pruning.
    """
    settings: dict[str, Any] = {}
    for name in [names] if names is None or os.path.isfile(names) else names.split(","):
        found = {} if name is None else _settings_of(name)
        settings |= kind.part_of(found) if name in RECIPES else found
    overrides = overrides or {}
    gone = _gone(settings, overrides)
    return from_settings({key: value for key, value in settings.items() if key not in gone} | overrides, kind)


def _gone(settings: dict[str, Any], overrides: dict[str, Any]) -> set[str]:
    """What of recipes' settings gives way to a pattern, or a recovery, that is named on top and cannot be so."""
    gone: set[str] = set()
    pattern, recovery = overrides.get("pattern"), overrides.get("recovery")
    if "pattern" in overrides and "sparsity" not in overrides:
        if isinstance(pattern, str) and patterns.parse(pattern).sparsity:
            gone.add("sparsity")
        others = registry.PRUNERS if pattern == "structured" else registry.STRUCTURED
        if "pruner" not in overrides and settings.get("pruner") in others:
            gone |= {"pruner", "pruner_options"}
    if isinstance(recovery, str):
        method = registry.get("recovery", recovery)
        if method.once:
            gone.add("steps")
        if settings.get("rank_by") not in method.rank_by:
            gone.add("rank_by")
    return gone


def _settings_of(name_or_path: str) -> dict[str, Any]:
    if name_or_path in RECIPES:
        shipped: dict[str, Any] = json.loads(
            resources.files("losa").joinpath("recipes", f"{name_or_path}.json").read_text()
        )
        return shipped
    path = Path(name_or_path)
    if not path.is_file():
        if path.suffix or "/" in name_or_path:
            raise LosaError(f"recipe file {name_or_path!r} does not exist")
        raise registry.unknown("recipe", name_or_path, RECIPES)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LosaError(f"recipe file {name_or_path!r} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise LosaError(f"recipe file {name_or_path!r} holds no settings: expected one JSON object")
    return settings


def recipe_of(what: Any, kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe of that kind from itself, a dict of settings, or the name or file of one. Raises LosaError for all else."""
    if isinstance(what, str | Path):
        return load(str(what), kind=kind)
    if isinstance(what, dict):
        return from_settings(what, kind)
    if isinstance(what, kind):
        return what
    named = f"a {kind.__name__}, a dict of settings, or the name or file of a recipe"
    raise LosaError(f"a {type(what).__name__} is no recipe: expected {named}")


def from_settings(settings: dict[str, Any], kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe from a plain dict. Unknown names raise LosaError with the nearest valid one."""
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    for name in settings:
        if name not in known:
            raise registry.unknown("setting", name, known)
    return kind(**settings)
