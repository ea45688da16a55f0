"""Choosing against a Python sort, packing against bit arithmetic written out."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losa import masks
from losa.errors import LosaError
from losa.patterns import NM


def oracle(scores: Tensor, within: Tensor, amount: float | NM, unit: str) -> Tensor:
    """Per unit: sort by (pruned before, score, index) and drop from the front; what was gone stays gone."""
    rows, columns = scores.shape
    keep = within.clone()
    everything = [(r, c) for r in range(rows) for c in range(columns)]
    size = amount.m if isinstance(amount, NM) else rows * columns if unit == "matrix" else columns
    for start in range(0, rows * columns, size):
        members = everything[start : start + size]
        count = amount.m - amount.n if isinstance(amount, NM) else math.floor(amount * size + 1e-9)
        order = sorted(members, key=lambda rc: (bool(within[rc]), float(scores[rc]) if within[rc] else 0.0, rc))
        for rc in order[:count]:
            keep[rc] = False
    return keep


@pytest.mark.parametrize(
    ("sparsity", "n", "count"),
    [(0, 7, 0), (0.5, 7, 3), (0.29, 100, 29), (0.6, 5, 3), (1, 7, 7), (0.999, 10, 9), (0.1 + 0.2, 10, 3), (0.5, 0, 0)],
)
def test_count(sparsity: float, n: int, count: int) -> None:
    assert masks.count_pruned(sparsity, n) == count


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_count_refuses(sparsity: float) -> None:
    with pytest.raises(LosaError, match="within 0 and 1"):
        masks.count_pruned(sparsity, 10)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    levels=st.integers(1, 8),  # few levels: many ties
    gone=st.floats(0, 1),
    sparsity=st.floats(0, 1),
    unit=st.sampled_from(["row", "matrix"]),
    seed=st.integers(0, 2**31),
)
def test_choose(rows: int, columns: int, levels: int, gone: float, sparsity: float, unit: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, columns), generator=generator).float()
    within = torch.rand(rows, columns, generator=generator) >= gone
    got = masks.choose(scores, within, sparsity, unit)  # type: ignore[arg-type]
    assert torch.equal(got, oracle(scores, within, sparsity, unit))
    full = torch.ones_like(within)
    assert torch.equal(masks.choose(scores, None, sparsity, unit), oracle(scores, full, sparsity, unit))  # type: ignore[arg-type]
    if (count := masks.count_pruned(sparsity, columns)) > 0:  # the sort stands for other devices
        assert torch.equal(masks._smallest(scores, count), scores.sort(dim=1).values[:, count - 1 : count])


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    n_m=st.integers(1, 9).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))),
    levels=st.sampled_from([1, 2, 5, 1000]),
    gone=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_choose_n_of_m(rows: int, groups: int, n_m: tuple[int, int], levels: int, gone: float, seed: int) -> None:
    pattern, columns = NM(*n_m), groups * n_m[1]
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (columns, rows), generator=generator).float().t()  # as SparseGPT hands them over
    within = torch.rand(rows, columns, generator=generator) >= gone
    full = torch.ones_like(within)
    for unit in ("row", "matrix"):
        got = masks.choose(scores, None, pattern, unit)  # type: ignore[arg-type]
        assert torch.equal(got, oracle(scores, full, pattern, unit))
        assert (got.view(-1, pattern.m).sum(dim=1) == pattern.n).all()
        nested = masks.choose(scores, within, pattern, unit)  # type: ignore[arg-type]
        assert torch.equal(nested, oracle(scores, within, pattern, unit))
        assert not (nested & ~within).any()
        kept, open_ = nested.view(-1, pattern.m).sum(dim=1), within.view(-1, pattern.m).sum(dim=1)
        assert torch.equal(kept, open_.clamp(max=pattern.n)), "the dead count first"


def test_n_of_m() -> None:
    assert str(NM(2, 8)) == "2:8" and NM(2, 8).sparsity == 0.75
    # written out: 2 KEPT of 4; ties go by index; the one that is gone is the first of the two
    scores = torch.tensor([[1.0, 1, 1, 1, 9, 3, 7, 8]])
    within = torch.tensor([[True] * 7 + [False]])
    keep = masks.choose(scores, within, NM(2, 4), "row")
    assert keep.tolist() == [[False, False, True, True, True, False, True, False]]


@pytest.mark.parametrize("unit", ["row", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_choose_takes_any_float_and_layout(dtype: torch.dtype, unit: Literal["row", "matrix"]) -> None:
    scores = torch.tensor([[3.0, -math.inf, 1.0], [2.0, 0.0, math.inf]], dtype=dtype).t().contiguous().t()
    within = torch.tensor([[True, True, False], [True, True, True]])
    keep = masks.choose(scores.requires_grad_(), within, 0.67, unit)
    assert keep.tolist() == [[True, False, False], [False, False, True]]
    assert keep.is_contiguous() and keep.dtype == torch.bool


def test_choose_returns_its_own_mask() -> None:
    within = torch.tensor([[True, False, True]])
    masks.choose(torch.ones(1, 3), within, 0.0, "row").zero_()
    masks.choose(torch.ones(1, 3), within, 0.3, "row").zero_()
    assert within.tolist() == [[True, False, True]]


def test_choose_refuses() -> None:
    scores = torch.tensor([[1.0, math.nan]])
    for within in (None, torch.tensor([[True, True]])):
        for sparsity in (0.0, 0.5, NM(1, 2)):
            with pytest.raises(LosaError, match="not a number"):
                masks.choose(scores, within, sparsity, "row")
    # 0 * infinity where the weight is long gone is nobody's business
    assert masks.choose(scores, torch.tensor([[True, False]]), 0.5, "row").tolist() == [[True, False]]
    with pytest.raises(LosaError, match="mask must be bool"):
        masks.choose(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), 0.5, "row")
    with pytest.raises(LosaError, match="2:4 needs an input width that 4 divides, not 6"):
        masks.choose(torch.ones(2, 6), None, NM(2, 4), "matrix")
    with pytest.raises(LosaError, match="row or matrix"):
        masks.choose(torch.ones(2, 3), None, 0.5, "column")  # type: ignore[arg-type]


@settings(deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_pack(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (rows, -(-columns // 8))
    for row, packed in zip(mask.tolist(), bits.tolist(), strict=True):
        assert sum(byte << 8 * j for j, byte in enumerate(packed)) == sum(bit << c for c, bit in enumerate(row))
    back = masks.unpack(bits, columns)
    assert back.dtype == torch.bool and back.is_contiguous() and torch.equal(back, mask)


def test_unpack_of_rows_and_in_inference_mode() -> None:
    masks._table.cache_clear()
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = masks.pack(mask)
    with torch.inference_mode():
        assert torch.equal(masks.unpack(bits[2:5], 24), mask[2:5])
    assert not masks._table(torch.device("cpu")).is_inference()
    assert torch.equal(masks.unpack(masks.pack(mask.t()), 6), mask.t())


@pytest.mark.parametrize("columns", [8, 17])
def test_unpack_refuses_another_width(columns: int) -> None:
    with pytest.raises(LosaError, match="packed mask"):
        masks.unpack(torch.zeros(3, 2, dtype=torch.uint8), columns)


def test_a_saved_mask_fits_its_weight() -> None:
    bits = masks.pack(torch.ones(3, 17, dtype=torch.bool))
    assert bool(masks.of_weight("it", (3, 17), bits, "there").all())
    for wrong in (bits[:2], bits[:, :2]):
        with pytest.raises(LosaError, match=r"it: the mask in 'there' does not fit its weight \[3, 17\]"):
            masks.of_weight("it", (3, 17), wrong, "there")
    bits[1, 2] |= 2
    with pytest.raises(LosaError, match="it: spare bits of the mask in 'there' are set"):
        masks.of_weight("it", (3, 17), bits, "there")


def test_sparsity() -> None:
    assert masks.sparsity(torch.tensor([[True, False], [False, False]])) == 0.75
    assert masks.sparsity(torch.ones(3, 3, dtype=torch.bool)) == 0
