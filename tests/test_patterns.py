"""Patterns: what they accept, and that mixed N keep their mean, their bounds and their nesting at every step."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny, tiny, tokenizer
from hypothesis import given
from hypothesis import strategies as st

import losa
from losa import masks, patterns
from losa.allocators.error import MeasuredError
from losa.errors import LosaError
from losa.export import load_masks
from losa.recipe import Recipe, load


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "mixed-1:8", "mixed-8:8", "mixed-0:8"])
def test_impossible_patterns(text: str) -> None:
    with pytest.raises(LosaError, match=text):
        patterns.parse(text)


@pytest.mark.parametrize(("text", "near"), [("unstructred", "unstructured"), ("mixed-2-8", "mixed-N:M"), ("", "known")])
def test_an_unknown_pattern_names_the_nearest(text: str, near: str) -> None:
    with pytest.raises(LosaError, match=near):
        Recipe(pattern=text)


@pytest.mark.parametrize("text", ["unstructured", "structured", "2:4", "mixed-2:8"])
def test_a_pattern_reads_what_it_writes(text: str) -> None:
    assert str(patterns.parse(text)) == text


def test_n_of_m_says_the_sparsity() -> None:
    assert Recipe(pattern="2:8").sparsity == 0.75
    assert Recipe().sparsity == 0.6
    assert load("demo", {"pattern": "mixed-3:4"}).sparsity == 0.25  # though the recipe has its own
    assert load("demo", {"pattern": "structured"}).sparsity == 0.6
    with pytest.raises(LosaError, match=r"sparsity 0\.6 contradicts pattern 2:4"):
        Recipe(pattern="2:4", sparsity=0.6)


def schedule(n: int, m: int, steps: int) -> list[float]:
    return [(1 - n / m) * (1 - (1 - t / steps) ** 3) for t in range(1, steps + 1)]


@given(m=st.integers(2, 16), share=st.floats(0, 1), steps=st.integers(1, 7), units=st.integers(1, 5))
def test_uniform_n_follows_the_schedule(m: int, share: float, steps: int, units: int) -> None:
    n = 1 + math.floor(share * (m - 2))
    pattern = patterns.parse(f"{n}:{m}")
    kept = []
    for target in schedule(n, m, steps):
        rates = pattern.nearest([target] * units, [3] * units, target, [0.0] * units)
        amount = pattern.amount(rates[0])
        assert isinstance(amount, patterns.NM) and len(set(rates)) == 1
        assert amount.n >= m * (1 - target) - 1e-9 > amount.n - 1  # the smallest N that is not below the schedule
        kept.append(amount.n)
    assert all(a >= b for a, b in pairwise(kept)) and kept[-1] == n


@given(
    m=st.integers(3, 16),
    share=st.floats(0, 1),
    steps=st.integers(1, 7),
    wishes=st.lists(st.floats(-1, 1), min_size=1, max_size=9),
)
def test_mixed_n_keep_mean_bounds_and_nesting(m: int, share: float, steps: int, wishes: list[float]) -> None:
    n = 2 + math.floor(share * (m - 3))
    pattern = patterns.parse(f"mixed-{n}:{m}")
    assert pattern.spread == 1 / m
    counts = [7] * len(wishes)
    floors = [0.0] * len(wishes)
    for target in schedule(n, m, steps):
        wanted = [max(floor, min(0.999, target + w / m)) for w, floor in zip(wishes, floors, strict=True)]
        rates = pattern.nearest(wanted, counts, target, floors)
        kept = [round(m * (1 - rate)) for rate in rates]
        assert rates == [1 - k / m for k in kept]
        mean = m * (1 - target)
        assert abs(sum(kept) - mean * len(kept)) <= 0.5 + 1e-6
        assert all(k >= max(1, mean - 1 - 1e-6) for k in kept)
        assert all(rate >= floor for rate, floor in zip(rates, floors, strict=True))
        floors = rates
    assert sum(kept) == n * len(kept)


def test_mixed_n_follow_the_order_of_the_rates() -> None:
    pattern = patterns.parse("mixed-2:8")
    assert pattern.nearest([0.625, 0.875, 0.75, 0.75], [1] * 4, 0.75, [0.0] * 4) == [0.625, 0.875, 0.75, 0.75]
    # the largest remainder is kept first
    assert pattern.nearest([0.70, 0.80, 0.74, 0.76], [1] * 4, 0.75, [0.0] * 4) == [0.75, 0.75, 0.75, 0.75]


def of_groups(mask: torch.Tensor, m: int) -> set[int]:
    """How many are kept in the groups of `m` of a row."""
    return set(mask.view(-1, m).sum(dim=1).tolist())


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_a_run_ends_with_n_of_m(pruner: str, small: Recipe, llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(**small.to_json() | {"pattern": "2:4", "pruner": pruner, "steps": 3, "sparsity": None})
    result = losa.compress(str(llama), recipe, tmp_path / "out")
    for bits in load_masks(tmp_path / "out").values():
        width = 48 if bits.shape[1] == 6 else 32
        assert of_groups(masks.unpack(bits, width), 4) == {2}
    assert result.measurements["sparse"]["sparsity"] == 0.5
    assert [set(record["rates"].values()) for record in result.history] == [{0.25}, {0.25}, {0.5}]


@pytest.mark.parametrize("allocator", ["rmi", "owl", "error", "uniform"])
def test_a_mixed_run_keeps_its_mean(allocator: str, small: Recipe) -> None:
    settings = small.to_json() | {"pattern": "mixed-4:8", "allocator": allocator, "sparsity": None, "steps": 1}
    result = losa.compress(tiny(), settings, tokenizer=tokenizer())
    kept = [round(8 * (1 - rate)) for rate in result.history[-1]["rates"].values()]
    assert sum(kept) == 4 * len(kept) and all(3 <= n <= 5 for n in kept)
    assert (len(set(kept)) > 1) == (allocator != "uniform")


def test_mixed_n_are_priced_where_they_can_be(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rate that is tried is an N within one of the mean (4.5, then 4), tried once: no error stands at a rate beside its own."""
    tried: list[list[float]] = []

    def spy(self: Any, evidence: Any, rates: Any = MeasuredError.rates) -> Any:
        tried.append([8 * (1 - rate) for table in evidence.seen for rate in table[0].tolist()])
        return rates(self, evidence)

    monkeypatch.setattr(MeasuredError, "rates", spy)
    settings = small.to_json() | {"pattern": "mixed-4:8", "allocator": "error", "sparsity": None, "recovery": "none"}
    result = losa.compress(tiny(), settings, tokenizer=tokenizer())
    first = [round(8 * (1 - rate)) for rate in result.history[0]["rates"].values()]
    assert sorted(first) == [4, 4, 5] or sorted(first) == [4, 5, 5]
    assert tried[0] == [5.0, 4.0] * 3
    assert tried[1] == [n for most in first for n in range(most, 2, -1)]


def narrow(folder: Path) -> Path:
    """A model whose down_proj has an input width of 48, which 32 does not divide."""
    return save_tiny(folder)


def test_a_width_that_m_does_not_divide(small: Recipe, tmp_path: Path) -> None:
    source = str(narrow(tmp_path / "m"))
    settings: dict[str, Any] = small.to_json() | {"pattern": "16:32", "sparsity": None}
    with pytest.raises(LosaError, match=r"layers\.0\.mlp\.down_proj: pattern 16:32 .* width that 32 divides, not 48"):
        losa.compress(source, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = losa.compress(source, settings | {"undivided": "dense"}, tmp_path / "out")
    assert result.model.model.layers[0].mlp.down_proj.weight.count_nonzero() == 48 * 32
    assert result.measurements["sparse"]["sparsity"] == 0.5
    with pytest.raises(LosaError, match="no linear of LlamaForCausalLM has an input width that 31 divides"):
        losa.compress(source, settings | {"undivided": "dense", "pattern": "16:31"}, tmp_path / "other")
