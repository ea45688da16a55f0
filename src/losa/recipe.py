"""The one configuration: every setting with its type, meaning and bounds; checked before a model loads; saved beside every result."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

from losa import patterns, registry
from losa.errors import LosaError
from losa.patterns import Amount

if TYPE_CHECKING:
    from losa.model import Block

RECIPES = (
    *("paper", "best", "best-adapters", "demo", "lora", "sparse-lora", "adalora", "sora", "finetune-then-sparsify"),
)
MOST_ROWS = 10_000  # recovery rows where none are asked for: the paper's
KINDS_WITH_OPTIONS: tuple[Literal["pruner", "allocator", "recovery"], ...] = ("pruner", "allocator", "recovery")


def setting(default: Any, doc: str) -> Any:
    """A field of the recipe with its help text."""
    factory = default if callable(default) else None
    if factory:
        return field(default_factory=factory, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


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
        "steps of pruning and recovery (T); 1 prunes at once; default 5, or 1 with a recovery that can take one only",
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
            object.__setattr__(self, f.name, _widened(getattr(self, f.name), f.type))
        _check_type("pattern", self.pattern, str)
        if self.sparsity is None:
            said = self.kept.sparsity
            object.__setattr__(self, "sparsity", 0.6 if said is None else said)
        if self.micro_batch_size is None:
            _check_type("batch_size", self.batch_size, int)
            size = max((n for n in range(1, 5) if self.batch_size % n == 0), default=1)
            object.__setattr__(self, "micro_batch_size", size)
        if self.pruner is None:
            object.__setattr__(self, "pruner", "wanda-sp" if self.structured else "wanda")
        _check_type("recovery", self.recovery, str)
        recovery = registry.get("recovery", self.recovery)
        if self.steps is None:
            object.__setattr__(self, "steps", 1 if recovery.once or not recovery.merges else 5)
        if self.rank_by is None:
            object.__setattr__(self, "rank_by", recovery.rank_by[0])
        self.validate()

    def validate(self) -> None:
        """Raise LosaError for the first setting that cannot be."""
        for f in dataclasses.fields(self):
            _check_type(f.name, getattr(self, f.name), f.type)
        _require(0 <= self.sparsity < 1, "sparsity", self.sparsity, "at least 0 and below 1")
        kept = patterns.parse(self.pattern)
        if kept.sparsity is not None and abs(kept.sparsity - self.sparsity) > 1e-9:
            raise LosaError(
                f"sparsity {self.sparsity:g} contradicts pattern {kept}, which keeps {kept.n} of {kept.m}: leave it out"
            )
        self._check_kind_of_pruner()
        for kind in KINDS_WITH_OPTIONS:
            cls, options = registry.get(kind, getattr(self, kind)), getattr(self, f"{kind}_options")
            known = [f.name for f in dataclasses.fields(cls)]
            for name in options:
                if name not in known:
                    raise registry.unknown(f"setting of {kind} {getattr(self, kind)!r}", name, known)
            for f in dataclasses.fields(cls):
                if f.name in options:
                    _check_type(f"{kind}_options.{f.name}", options[f.name], f.type)
            try:
                self.build(kind)
            except LosaError as error:
                raise LosaError(f"{kind}_options: {error}") from None
        self._check_what_pruner_reads()
        self._check_format()
        self._check_recovery()
        positive = "steps calibration_samples sequence_length allocation_samples train_length batch_size"
        _require(self.rows > 0, "train_samples", self.train_samples, "above 0")
        others = ("epochs", "distill_temperature", "teacher_top", "reconstruct_rate")
        for name in [*positive.split(), "micro_batch_size", "base_rank", "alpha", "clip", *others]:
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(self.mean_rank >= 1, "mean_rank", self.mean_rank, "at least 1: every adapted linear has a rank")
        least = "rank_growth error_tokens reconstruct weight_decay eval_tokens eval_window checkpoint_minutes "
        least += "eval_step_tokens sample_tokens"
        for name in least.split():
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.eval_tokens != 1, "eval_tokens", self.eval_tokens, "at least 2, or 0 for all")
        _require(self.eval_window != 1, "eval_window", self.eval_window, "at least 2, or 0 for the model's")
        _require(self.eval_step_tokens != 1, "eval_step_tokens", self.eval_step_tokens, "at least 2, or 0 for none")
        _require("" not in self.prompts, "prompts", self.prompts, "texts that are not empty")
        for name in ("warmup", "last_step_share", "distill", "finetune_first"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            "micro_batch_size",
            self.micro_batch_size,
            f"a divisor of batch_size ({self.batch_size})",
        )
        if registry.get("recovery", self.recovery).trains:
            rows = self.rows - len(self.rows_of(0))
            _require(rows >= self.steps, "train_samples", self.train_samples, "at least one row a step")
        self._check_rate()
        allocator = registry.get("allocator", self.allocator)
        if self.rates_per == "linear" and not allocator.per_linear:
            raise LosaError(f"allocator {self.allocator!r} knows blocks only: set rates_per to block")
        if self.allocator == "rmi":
            for name in ("allocation_samples", "calibration_samples"):
                _require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2: RMI compares sequences")
        if self.memory:
            parse_size("memory", self.memory)
        _require(abs(self.seed) <= 10**15, "seed", self.seed, "at most 1e15 either way")
        if self.teacher_model and not self.distill:
            raise LosaError(f"teacher_model {self.teacher_model!r} would never be asked: set distill above 0")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?", self.device):
            raise LosaError(f"device {self.device!r}: use auto, cpu or cuda (cuda:0, cuda:1 ...)")
        ignored = [("ignore", pattern) for pattern in self.ignore]
        for name, pattern in [*ignored, *([] if self.targets in TARGETS else [("targets", self.targets)])]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise LosaError(f"{name}: {pattern!r} is no regular expression: {error}") from None

    def _check_rate(self) -> None:
        """Raise LosaError for a learning rate that is neither a number above 0 nor auto."""
        if isinstance(self.learning_rate, str):
            if self.learning_rate != "auto":
                raise LosaError(f"learning_rate is {self.learning_rate!r}: must be a number or auto")
            steps = [1, self.steps] if registry.get("recovery", self.recovery).trains else []
            rows = [len(self.rows_of(step)) for step in (*steps, *([0] if self.finetune_first else []))]
            if min(rows, default=2) < 2:
                raise LosaError(
                    f"train_samples is {self.rows}: learning_rate auto holds one row back and trains on others, so a step "
                    "needs two: raise it, or name a learning_rate"
                )
        else:
            _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0, or auto")

    def _check_kind_of_pruner(self) -> None:
        """Raise LosaError for a pruner of single weights where whole heads go, and the other way round."""
        if not self.structured:
            if self.pruner in registry.STRUCTURED:
                raise LosaError(
                    f"pruner {self.pruner!r} prunes whole heads and channels: set pattern to structured; with pattern "
                    f"{self.kept} use {' or '.join(sorted(registry.PRUNERS))}"
                )
            return
        if self.pruner in registry.PRUNERS:
            raise LosaError(
                f"pruner {self.pruner!r} prunes single weights; with --pattern structured use "
                f"{' or '.join(sorted(registry.STRUCTURED))}"
            )
        if self.rates_per != "block":
            raise LosaError(
                "rates_per linear: pattern structured prunes the linears of a block together: set it to block"
            )
        if self.allocator == "error":
            raise LosaError("allocator 'error' tries single linears; with --pattern structured use owl, rmi or uniform")

    def _check_what_pruner_reads(self) -> None:
        """Raise LosaError for settings that mean nothing to a pruner without inputs, or with gradients."""
        pruner, allocator = registry.get("pruner", self.pruner), registry.get("allocator", self.allocator)
        if self.true_sequential and not pruner.needs_inputs:
            raise LosaError(f"true_sequential changes inputs, which pruner {self.pruner!r} does not read: leave it out")
        if pruner.needs_gradients:
            if allocator.needs == "errors":
                raise LosaError(
                    f"allocator {self.allocator!r} prunes each block for trial on the way forward, where pruner "
                    f"{self.pruner!r} has no gradients yet: use another allocator"
                )
            least = "at least 2: a loss needs a next token"
            _require(self.sequence_length >= 2, "sequence_length", self.sequence_length, least)

    def _check_format(self) -> None:
        """Raise LosaError for what cannot be packed."""
        merges = registry.get("recovery", self.recovery).merges
        if self.format == "dense":
            if self.values != "auto":
                raise LosaError(f"values {self.values} are of packed models: set format to packed")
            return
        if self.structured:
            raise LosaError("format packed: pattern structured leaves no zeros to leave out: leave format dense")
        if not merges:
            raise LosaError(
                f"format packed: recovery {self.recovery!r} keeps its pairs apart, for PEFT, which knows dense linears "
                "only: set format to dense, or recovery to losa or none"
            )
        least = "at least 0.1 with format packed: below that, masks take what zeros give"
        _require(self.sparsity >= 0.1, "sparsity", self.sparsity, least)

    def _check_recovery(self) -> None:
        """Raise LosaError for settings that contradict the recovery."""
        recovery = registry.get("recovery", self.recovery)
        if recovery.once and self.steps > 1:
            raise LosaError(
                f"recovery {self.recovery!r} sets mask and ranks once, so that only one step is possible: set steps to 1"
            )
        if self.rank_by not in recovery.rank_by:
            raise LosaError(f"rank_by {self.rank_by}: recovery {self.recovery!r} knows {' or '.join(recovery.rank_by)}")
        share = self.finetune_first
        if recovery.trains and share == 1:
            raise LosaError(
                f"finetune_first is {share:g}: no rows are left for recovery {self.recovery!r}: lower it, or set recovery to none"
            )
        if recovery.trains or not share:
            return
        if 0 < share < 1:
            raise LosaError(
                f"finetune_first is {share:g}: recovery {self.recovery!r} reads no rows, so set it to 1 or 0"
            )
        if self.distill:
            raise LosaError(
                "distill: the dense model is fine-tuned by next tokens only, and nothing is after it: set it to 0"
            )

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


TARGETS = {
    "all": r".*",
    "qv": r".*\b(q_proj|v_proj)$",  # where q, k and v are one linear, nothing
    "qkvo": r"\b(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|query_key_value)$|attention\.dense$",
}


def load(names: str | None, overrides: dict[str, Any] | None = None, kind: type[Recipe] = Recipe) -> Recipe:
    """The recipe of that name or JSON file, or of several with commas between them, each on top of those before it
    (demo,best: the demo's data, the best method); None: the defaults. `overrides` go on top. Raises LosaError.

    kind: what is made of them; a Repair takes of recipes that come with losa the part that is not about pruning.
    """
    settings: dict[str, Any] = {}
    for name in [names] if names is None or Path(names).is_file() else names.split(","):
        found = {} if name is None else _settings_of(name)
        settings |= kind.part_of(found) if name in RECIPES else found
    overrides = overrides or {}
    if "pattern" in overrides and "sparsity" not in overrides:
        said = isinstance(overrides["pattern"], str) and patterns.parse(overrides["pattern"]).sparsity
        settings = {key: value for key, value in settings.items() if key != "sparsity" or not said}
        structured = overrides["pattern"] == "structured"
        if "pruner" not in overrides and settings.get("pruner") in (
            registry.PRUNERS if structured else registry.STRUCTURED
        ):
            settings = {key: value for key, value in settings.items() if key not in ("pruner", "pruner_options")}
    return from_settings(settings | overrides, kind)


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LosaError(f"recipe file {name_or_path!r} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise LosaError(f"recipe file {name_or_path!r} holds no settings: expected one JSON object")
    return settings


def from_settings(settings: dict[str, Any], kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe from a plain dict. Unknown names raise LosaError with the nearest valid one."""
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    for name in settings:
        if name not in known:
            raise registry.unknown("setting", name, known)
    return kind(**settings)


def _ranks(made: Recipe) -> bool:
    return bool(registry.get("recovery", made.recovery).ranks)


# settings that count only beside others: when, and what is to be done where they do not
READ_WHEN: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "distill": (lambda made: bool(registry.get("recovery", made.recovery).trains), "set recovery to one that trains"),
    "targets": (lambda made: made.trains, "set recovery to one that trains"),
    "mean_rank": (lambda made: _ranks(made) or made.finetune_first > 0, "set recovery to one of low-rank pairs"),
    "alpha": (lambda made: _ranks(made) or made.finetune_first > 0, "set recovery to one of low-rank pairs"),
    "base_rank": (lambda made: _ranks(made) or made.finetune_first > 0, "set recovery to one of low-rank pairs"),
    "rank_by": (_ranks, "set recovery to one of low-rank pairs"),
    "teacher": (lambda made: made.distill > 0, "set distill above 0"),
    "distill_temperature": (lambda made: made.distill > 0, "set distill above 0"),
    "teacher_top": (lambda made: made.distill > 0 and made.teacher == "cached", "distil from a cached teacher"),
    "reconstruct_rate": (lambda made: made.reconstruct > 0, "set reconstruct above 0"),
}


def refuse_unread(made: Recipe, given: dict[str, Any]) -> None:
    """Raise LosaError for the first setting of `given`, asked for by hand, that nothing in `made` would read.

    Not part of `validate`: recipes that are combined, and the cells of a table, may share settings that some do not read.
    """
    usual = {f.name: f.default for f in dataclasses.fields(Recipe)}
    for name, value in given.items():
        is_read, instead = READ_WHEN.get(name, (lambda _: True, ""))
        if value != usual[name] and not is_read(made):
            raise LosaError(f"{name} {value!r} would change nothing: leave it out, or {instead}")


UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(name: str, text: str) -> float:
    """Bytes, from `8GB`, `500 MB`, `16GiB` or a number of them. Raises LosaError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((found[2] or "B").upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise LosaError(f"{name} {text!r}: write a size such as 8GB, 500MB or 16GiB")
    return float(found[1]) * unit


def _widened(value: Any, kind: Any) -> Any:
    """6 as 6.0 where a float is meant (JSON does not tell them apart), unless no float is as large."""
    whole = type(value) is int and abs(value) < 2**1023
    return float(value) if whole and float in (kind, *get_args(kind)) else value


def _check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise registry.unknown(name, value, get_args(kind))
        return
    parts = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    allowed = tuple(get_origin(part) or part for part in parts)
    value = _widened(value, kind)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        named = " or ".join(k.__name__ for k in allowed if k is not NoneType)
        raise LosaError(f"{name}: expected {named}, got {value!r}")
    if kind == list[str] and not all(isinstance(part, str) for part in value):
        raise LosaError(f"{name}: expected a list of strings, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise LosaError(f"{name}: {value} is not a finite number")


def _require(true: bool, name: str, value: object, what: str) -> None:
    if not true:
        raise LosaError(f"{name} is {value}: must be {what}")
