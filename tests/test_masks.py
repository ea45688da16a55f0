"""Choosing against a Python sort, packing against bit arithmetic written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losa import masks
from losa.errors import LosaError


def oracle(scores: Tensor, within: Tensor, sparsity: float, unit: str) -> Tensor:
    """Per unit: sort by (pruned before, score, index) and drop from the front; what was gone stays gone."""
    rows, columns = scores.shape
    keep = within.clone()
    everything = [(r, c) for r in range(rows) for c in range(columns)]
    units = [everything] if unit == "matrix" else [everything[r * columns : (r + 1) * columns] for r in range(rows)]
    for members in units:
        order = sorted(members, key=lambda rc: (bool(within[rc]), float(scores[rc]) if within[rc] else 0.0, rc))
        for rc in order[: math.floor(sparsity * len(members) + 1e-9)]:
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_choose_takes_any_float_and_layout(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, -math.inf, 1.0], [2.0, 0.0, math.inf]], dtype=dtype).t().contiguous().t()
    within = torch.tensor([[True, True, False], [True, True, True]])
    keep = masks.choose(scores, within, 0.67, "row")
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
        for sparsity in (0.0, 0.5):
            with pytest.raises(LosaError, match="not a number"):
                masks.choose(scores, within, sparsity, "row")
    # 0 * infinity where the weight is long gone is nobody's business
    assert masks.choose(scores, torch.tensor([[True, False]]), 0.5, "row").tolist() == [[True, False]]
    with pytest.raises(LosaError, match="mask must be bool"):
        masks.choose(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), 0.5, "row")
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


def test_sparsity() -> None:
    assert masks.sparsity(torch.tensor([[True, False], [False, False]])) == 0.75
    assert masks.sparsity(torch.ones(3, 3, dtype=torch.bool)) == 0
