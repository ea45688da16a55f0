"""Every table of the paper as data: cells (row, column) with what each changes of the recipe, and what the paper claims."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from losa import registry
from losa.errors import LosaError

Settings = dict[str, Any]
Place = tuple[str, str]  # row, column
# what was measured, by place; none where nothing was
Values = dict[Place, list[Any]]


@dataclass(frozen=True)
class Claim:
    """What the paper says. `pairs`: of both places, the first has less of `measure`; or `check` says in words whether it holds."""

    text: str
    pairs: tuple[tuple[Place, Place], ...] = ()
    measure: str = "perplexity"
    check: Callable[[Values], str] | None = None


@dataclass(frozen=True)
class Table:
    """`cells` change a recipe; `default` is what the paper chose for all of them and flags may choose otherwise.

    measures: what is shown of each cell (`losa.experiments.cells`). kind: a run of `losa compress`, such a run whose result is
    asked zero-shot tasks, or a timing of decoding.
    """

    name: str
    title: str
    cells: dict[Place, Settings]
    default: Settings
    claims: tuple[Claim, ...] = ()
    measures: tuple[str, ...] = ("perplexity",)
    kind: str = "compress"

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))


def shipped(name: str) -> Settings:
    """The settings of a recipe that comes with losa."""
    found: Settings = json.loads(resources.files("losa").joinpath("recipes", f"{name}.json").read_text())
    return found


PRUNED: Settings = {"recovery": "none", "steps": 1, "allocator": "uniform"}
LORA, SPARSE_LORA = shipped("lora"), shipped("sparse-lora")
LOSA: Settings = {"recovery": "losa"}
METHODS: dict[str, Settings] = {"": PRUNED, " w. LoRA": LORA, " w. LoSA": LOSA}
LABELS = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "pruner-zero": "Pruner-Zero", "alps": "ALPS"}
LABELS |= {"wanda-sp": "Wanda-sp", "flap": "FLAP"}
WANDA: Settings = {"pruner": "wanda"}
HIGH: Settings = {"pruner": "wanda", "sparsity": 0.7}
MIDDLE: Settings = {"pruner": "wanda", "sparsity": 0.6}
BOTH = ("sparsegpt", "wanda")
DENSE = "dense"  # the row of a table in which nothing is run: the model as it is


def grid(rows: dict[str, Settings], columns: dict[str, Settings]) -> dict[Place, Settings]:
    return {(row, column): above | beside for row, above in rows.items() for column, beside in columns.items()}


def sparsities(*shares: float) -> dict[str, Settings]:
    return {f"{share:.0%}": {"sparsity": share} for share in shares}


def by_method(pruners: Iterable[str], methods: dict[str, Settings] = METHODS) -> dict[str, Settings]:
    return {f"{LABELS[p]}{name}": {"pruner": p} | settings for p in pruners for name, settings in methods.items()}


def lower(
    text: str, better: Iterable[str], worse: Iterable[str], columns: Iterable[str], measure: str = "perplexity"
) -> Claim:
    """Each of the rows `better` has less of it than the row of `worse` beside it, in every column."""
    columns = list(columns)
    pairs = [((a, c), (b, c)) for a, b in zip(better, worse, strict=True) for c in columns]
    return Claim(text, tuple(pairs), measure)


def higher(text: str, better: list[str], worse: list[str], columns: Iterable[str], measure: str) -> Claim:
    """Each of the rows `better` has more of it."""
    return lower(text, worse, better, columns, measure)


def how_sure(pairs: Iterable[tuple[Place, Place]], values: Values) -> str:
    """Of the differences between two places each: how many are within the noise, twice their standard error."""
    pairs = list(pairs)
    seeds = [len(values[place]) for pair in pairs for place in pair]
    if min(seeds) == 1:
        return "some of it one seed" if max(seeds) > 1 else "one seed"
    unsure = 0
    for a, b in pairs:
        gap = statistics.mean(values[b]) - statistics.mean(values[a])
        error = math.sqrt(sum(statistics.variance(values[place]) / len(values[place]) for place in (a, b)))
        unsure += abs(gap) <= 2 * error
    return f"{unsure} of {len(pairs)} differences within the noise" if unsure else "beyond the noise"


def _losa_beats_lora(pruners: Iterable[str], columns: Iterable[str]) -> tuple[Claim, ...]:
    labels = [LABELS[p] for p in pruners]
    return (
        lower(
            "LoSA has a lower perplexity than LoRA kept apart",
            [f"{name} w. LoSA" for name in labels],
            [f"{name} w. LoRA" for name in labels],
            columns,
        ),
    )


def _comparison(name: str, title: str, pruners: Iterable[str], columns: dict[str, Settings]) -> Table:
    pruners = list(pruners)
    return Table(name, title, grid(by_method(pruners), columns), {}, _losa_beats_lora(pruners, columns))


def _zero_shot() -> Table:
    columns = sparsities(0.5, 0.6, 0.7)
    pruned, lora, losa = ([f"{LABELS[pruner]}{method}" for pruner in BOTH] for method in METHODS)
    claims = (
        higher("LoSA is right more often than LoRA kept apart", losa, lora, columns, "accuracy"),
        higher("LoSA is right more often than the model that is pruned only", losa, pruned, columns, "accuracy"),
    )
    cells = grid({DENSE: {}}, columns) | grid(by_method(BOTH), columns)
    return Table("zero-shot", "Zero-shot tasks, mean accuracy; table 2", cells, {}, claims, ("accuracy",), "zero-shot")


def _strategies() -> Table:
    off: dict[str, Settings] = {
        "LSR": {"allocator": "uniform"},
        "SRA": {"rank_by": "uniform"},
        "DSA": {"steps": 1, "mean_rank": 8.0},
    }
    rows = {"LoSA": LOSA | {"allocator": "rmi", "rank_by": "error"}}
    for left in (["LSR"], ["SRA"], ["DSA"], ["LSR", "SRA"], ["LSR", "DSA"], ["SRA", "DSA"]):
        rows["w/o " + " ".join(left)] = rows["LoSA"] | {k: v for name in left for k, v in off[name].items()}
    rows["w/o LSR SRA DSA"] = SPARSE_LORA  # what is left then, to the byte
    names = list(rows)
    one, two, three = names[1:4], names[4:7], names[7]
    column = "perplexity"
    claims = [lower(f"Taking {what} away makes it worse", ["LoSA"], [f"w/o {what}"], [column]) for what in off]
    fewer = [(a, b) for a in one for b in two if set(a.split()) < set(b.split())] + [(b, three) for b in two]
    claims.append(Claim("The more strategies are away, the worse", tuple(((a, column), (b, column)) for a, b in fewer)))
    others = [((b, column), ("w/o DSA", column)) for b in ("w/o LSR", "w/o SRA")]
    claims.append(Claim("Steps (DSA) matter most", tuple(others)))
    return Table(
        "strategies",
        "Strategies switched off: rates by layer (LSR), ranks by error (SRA), steps (DSA); table 6",
        grid(rows, {column: {}}),
        HIGH,
        tuple(claims),
    )


def _one_setting(
    name: str, title: str, default: Settings, rows: dict[str, Settings], claims: Iterable[tuple[str, str, str]]
) -> Table:
    """LoSA with one setting changed. claims: text, and the rows of which the first is better."""
    column = "perplexity"
    made = [lower(text, [better], [worse], [column]) for text, better, worse in claims]
    cells = grid({row: LOSA | settings for row, settings in rows.items()}, {column: {}})
    return Table(name, title, cells, default, tuple(made))


def _curve(name: str, title: str, setting: str, values: Iterable[float], what: str) -> Table:
    rows = {f"{value:g}": {setting: type(value)(value)} for value in values}
    ends = list(rows)

    def inside(found: Values) -> str:
        means = {row: sum(v) / len(v) for row in ends if (v := found.get((row, "perplexity"), []))}
        if len(means) < len(ends):
            return "not all of it has been measured"
        best, inner = (min(rows, key=lambda row: means[row]) for rows in (ends, ends[1:-1]))
        beside = ", ".join(f"{means[end]:.2f} at {end}" for end in (ends[0], ends[-1]))
        lowest = f"lowest at {what} {best} ({means[best]:.2f}; {beside})"
        if min(len(found[row, "perplexity"]) for row in ends) == 1:  # of six that are alike, four are inside
            return f"one seed does not tell: {lowest}"
        sure = how_sure([((inner, "perplexity"), (end, "perplexity")) for end in (ends[0], ends[-1])], found)
        return f"{'holds' if best == inner else 'does not hold'}: {lowest}; {sure}"

    claim = Claim(f"There is a best {what}, and more is worse again", check=inside)
    return Table(name, title, grid({r: LOSA | s for r, s in rows.items()}, {"perplexity": {}}), HIGH, (claim,))


def _nm() -> Table:
    cells: dict[Place, Settings] = {}
    for row, settings in by_method(BOTH).items():
        for column in ("2:8", "2:4"):
            mixed = "mixed-" if "LoSA" in row else ""
            cells[f"{row} (mixed)" if mixed else row, column] = settings | {"pattern": mixed + column}
    labels = [LABELS[p] for p in BOTH]
    claim = lower(
        "LoSA with mixed N:M has a lower perplexity than LoRA with uniform N:M",
        [f"{name} w. LoSA (mixed)" for name in labels],
        [f"{name} w. LoRA" for name in labels],
        ["2:8", "2:4"],
    )
    return Table("nm", "N kept of every M weights; tables 3 and 19", cells, {}, (claim,))


def _structured() -> Table:
    methods = {"": PRUNED, " w. LoSA": LOSA}
    rows = {
        row: settings | {"pattern": "structured"} for row, settings in by_method(("wanda-sp", "flap"), methods).items()
    }
    rows["SparseGPT w. LoSA, unstructured"] = LOSA | {"pruner": "sparsegpt", "pattern": "unstructured"}
    columns = sparsities(0.2, 0.5)
    return Table(
        "structured",
        "Whole heads and channels; tables 12 and 16 (SliceGPT, LLM-Pruner, LoRAPrune and LoRAShear are not in losa)",
        grid(rows, columns),
        {},
        (
            lower(
                "LoSA repairs what structured pruning leaves",
                ["Wanda-sp w. LoSA", "FLAP w. LoSA"],
                ["Wanda-sp", "FLAP"],
                columns,
            ),
            lower(
                "At 50% unstructured pruning is far better than structured",
                ["SparseGPT w. LoSA, unstructured"],
                ["Wanda-sp w. LoSA"],
                ["50%"],
            ),
        ),
    )


def _finetune_first() -> Table:
    first, columns = "fine-tune first, then sparsify", sparsities(0.5, 0.6, 0.7)
    cells = grid({first: shipped("finetune-then-sparsify"), "LoSA": LOSA}, columns)
    claim = lower("LoSA has a lower perplexity than fine-tuning first", ["LoSA"], [first], columns)
    return Table("finetune-first", "Fine-tuning before pruning; table 13", cells, WANDA, (claim,))


def _sparse_lora() -> Table:
    methods = {"": PRUNED, " w. sparse LoRA": SPARSE_LORA, " w. LoRA": LORA, " w. LoSA": LOSA}
    labels, column = [LABELS[p] for p in BOTH], ["perplexity"]
    rows = by_method(BOTH, methods)
    losa, lora, sparse = ([f"{name} w. {m}" for name in labels] for m in ("LoSA", "LoRA", "sparse LoRA"))
    claims = (
        lower("LoSA has a lower perplexity than sparse LoRA", losa, sparse, column),
        lower("Sparse LoRA has a higher one than LoRA kept apart", lora, sparse, column),
    )
    cells = grid(rows, {column[0]: {}})
    return Table("sparse-lora", "LoRA under a fixed mask; table 14", cells, {"sparsity": 0.7}, claims)


def _pruners() -> Table:
    pruners = ("pruner-zero", "alps")
    cells = grid(by_method(pruners), {"perplexity": {}})
    claims = _losa_beats_lora(pruners, ["perplexity"])
    return Table("pruners", "Other pruners; table 17", cells, {"sparsity": 0.7}, claims)


def _rank_methods() -> Table:
    rows = {"Wanda": PRUNED, "w. LoRA": LORA, "w. AdaLoRA": shipped("adalora"), "w. SoRA": shipped("sora")}
    rows |= {"w. LoSA": LOSA}
    claim = lower(
        "LoSA has a lower perplexity than LoRA, AdaLoRA and SoRA",
        ["w. LoSA"] * 3,
        ["w. LoRA", "w. AdaLoRA", "w. SoRA"],
        ["perplexity"],
    )
    cells = grid(rows, {"perplexity": {}})
    return Table("rank-methods", "Other methods that choose ranks; table 18", cells, HIGH, (claim,))


def _layer_rates() -> Table:
    columns = sparsities(0.5, 0.6, 0.7)

    def ends_lower(found: Values) -> str:
        said = []
        for column in columns:
            runs = found.get(("LoSA", column), [])
            if runs:
                means = [sum(block) / len(block) for block in zip(*runs, strict=True)]
                middle = means[1:-1] or means
                below = max(means[0], means[-1]) < sum(middle) / len(middle)
                said.append(f"{'holds' if below else 'does not hold'} at {column}")
        return ", ".join(said) or "nothing has been measured yet"

    claim = Claim("The first and last blocks are pruned less than those between", check=ends_lower)
    cells = grid({"LoSA": LOSA}, columns)
    return Table("layer-rates", "Sparsity by block; figure 3", cells, WANDA, (claim,), ("by_block",))


def _cost() -> Table:
    columns: dict[str, Settings] = {"": {}}
    losa, lora = ["SparseGPT w. LoSA", "Wanda w. LoSA"], ["SparseGPT w. LoRA", "Wanda w. LoRA"]
    claims = (
        lower("LoSA trains fewer values than LoRA", losa, lora, columns, "trained"),
        lower("LoSA takes longer than LoRA", lora, losa, columns, "seconds"),
    )
    measures = ("trained", "seconds", "processor", "memory", "rates", "errors")
    title = "What it takes; table 8 and appendix H (rates: RMI at a step; errors: the pass over the dense model)"
    return Table("cost", title, grid(by_method(BOTH), columns), {"sparsity": 0.7}, claims, measures)


def _latency() -> Table:
    rows = sparsities(0.5, 0.6, 0.7)

    def faster(found: Values) -> str:
        ratios = {row: statistics.median(v) for row in rows if (v := found.get((row, ""), []))}
        if not ratios:
            return "nothing has been measured yet"
        holds = "holds" if min(ratios.values()) > 1 else "does not hold"
        return f"{holds}: {', '.join(f'{ratio:.2f} times as fast at {row}' for row, ratio in ratios.items())}"

    growing = tuple(((a, ""), (b, "")) for a, b in (("50%", "60%"), ("60%", "70%")))
    claims = (
        Claim("Merged decodes faster than with LoRA kept apart", (), "merged_over_apart", faster),
        Claim("What LoRA costs grows with sparsity", growing, "merged_over_apart"),
    )
    measures = (
        *("dense", "apart", "merged", "apart_speedup", "merged_speedup", "merged_over_apart"),
        *("native_dense", "native_merged", "native_speedup"),
    )
    title = "Decoding, tokens a second: dense, sparse with LoRA kept apart, sparse and merged; table 9"
    return Table("latency", title, grid(rows, {"": {}}), {}, claims, measures, "latency")


def _tables() -> Iterable[Table]:
    main = sparsities(0.5, 0.6, 0.7)
    yield _comparison("main", "Pruned only, with LoRA kept apart, with LoSA; table 1", BOTH, main)
    wide = sparsities(0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    yield _comparison("sparsity-range", "The same from 40 to 90%; table 5", BOTH, wide)
    yield _zero_shot()
    yield _strategies()
    ranks = {name: {"rank_by": name} for name in ("error", "sparsity")}
    said = "Ranks by error are better than by sparsity"
    yield _one_setting("rank-by", "What decides the ranks; table 7", HIGH, ranks, [(said, "error", "sparsity")])
    schedules = {name: {"schedule": name} for name in ("cubic", "linear")}
    said = "The cubic schedule is better than the linear one"
    yield _one_setting("schedule", "How sparsity grows; table 10", MIDDLE, schedules, [(said, "cubic", "linear")])
    targets = {name: {"targets": name} for name in ("qv", "qkvo", "all")}
    said = "Adapting {} is better than {}"
    claims = [(said.format(a, b), a, b) for a, b in (("all", "qkvo"), ("qkvo", "qv"))]
    yield _one_setting("targets", "Which linears are adapted; table 11", MIDDLE, targets, claims)
    yield _finetune_first()
    yield _sparse_lora()
    yield _pruners()
    yield _rank_methods()
    yield _nm()
    yield _structured()
    yield _curve("steps", "Steps of pruning and recovery; figure 2", "steps", (1, 2, 3, 5, 7, 10), "number of steps")
    ranks_at_first = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
    yield _curve("rank-budget", "Mean rank at the first step; figure 2", "mean_rank", ranks_at_first, "mean rank")
    yield _layer_rates()
    yield _cost()
    yield _latency()


TABLES = {table.name: table for table in _tables()}
ALL = "all"


def chosen(names: Iterable[str]) -> list[Table]:
    """The tables of these names, in their order; `all` is every one. Raises LosaError for a name there is not."""
    found: dict[str, Table] = {}
    for name in names:
        if name != ALL and name not in TABLES:
            raise registry.unknown("experiment", name, [*TABLES, ALL])
        found |= TABLES if name == ALL else {name: TABLES[name]}
    if not found:
        raise LosaError(f"name an experiment: {', '.join([*TABLES, ALL])}")
    return list(found.values())
