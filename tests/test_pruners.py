"""Every pruner against its contract, and each against a brute-force float64 oracle written here.

SparseGPT's oracle knows nothing of Cholesky factors: per row it deletes one weight at a time by the optimal brain
surgeon's formula, with the inverse of the Hessian of the columns left, inverted afresh at every column.
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from losa import data, masks, model, recipe, registry
from losa.errors import LosaError
from losa.patterns import NM, Amount
from losa.pruners.base import Pruner, Statistic
from losa.pruners.magnitude import Magnitude
from losa.pruners.pruner_zero import PrunerZero
from losa.pruners.sparsegpt import Gram, SparseGPT
from losa.pruners.wanda import Wanda

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TIE = 1e-6  # relative difference of scores below which a choice is not determined
EVERY = sorted(registry.PRUNERS)
PATTERNS = [NM(2, 4), NM(4, 8), NM(2, 8)]
SERIES = [*([pattern] for pattern in PATTERNS), [NM(6, 8), NM(4, 8), NM(2, 8)]]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(features: int, sequences: int = 4, tokens: int = 40, seed: int = 1) -> Tensor:
    """[sequences, tokens, features]: channels of unlike loudness that go together, as in a transformer."""
    mixed = draw(sequences, tokens, features, seed=seed) @ (
        torch.eye(features) + 0.3 * draw(features, features, seed=2)
    )
    return (
        mixed * torch.linspace(0.3, 3, features)[torch.randperm(features, generator=torch.Generator().manual_seed(3))]
    )


def gather(pruner: Pruner, x: Tensor | None, rows: int = 0) -> Statistic | None:
    """The pruner's statistic of x [sequences, tokens, in], one sequence at a time; of gradients of `rows` made from it."""
    if x is not None and pruner.needs_gradients:
        gradients = pruner.gradient_statistic((rows, x.shape[-1]), "cpu")
        for sequence, dy in zip(x, draw(len(x), rows, x.shape[1], seed=4), strict=True):
            gradients.update(dy @ sequence, 1)
        return gradients
    if x is None or (statistic := pruner.statistic(x.shape[-1], "cpu")) is None:
        return None
    for sequence in x:
        statistic.update(sequence, 1)
    return statistic


def units(pruner: Pruner, mask: Tensor) -> list[Tensor]:
    """The parts of a mask that each have an exact count."""
    if pruner.unit == "matrix":
        return [mask]
    if pruner.unit == "row":
        return list(mask)
    return list(torch.split(mask, int(pruner.unit.removesuffix(" columns")), dim=1))


def make(name: str) -> Pruner:
    pruner: Pruner = registry.get("pruner", name)()
    return pruner


# ---- the contract, of all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_contract(name: str) -> None:
    pruner = make(name)
    assert pruner.name == name and dataclasses.is_dataclass(pruner)
    assert all(hasattr(pruner, fact) for fact in ("unit", "needs_inputs", "needs_gradients", "changes_weights"))
    weight, x = draw(10, 150, seed=0), inputs(150)
    statistic = gather(pruner, x, 10)
    assert (statistic is not None) == (pruner.needs_inputs or pruner.needs_gradients)
    before, within = weight.clone(), None
    for sparsity in (0.0, 0.3, 0.3, 0.55, 0.9):
        given_weight, given_mask = weight.clone(), None if within is None else within.clone()
        pruned, mask = pruner.prune(weight, within, sparsity, statistic)
        assert pruned.dtype == torch.float32 and mask.dtype == torch.bool
        assert pruned.shape == mask.shape == weight.shape and pruned.is_contiguous() and mask.is_contiguous()
        assert torch.equal(weight, given_weight), "the weight given is left alone"
        assert not pruned[~mask].any() and not pruned[~mask].signbit().any()
        for unit in units(pruner, mask):
            assert int((~unit).sum()) == masks.count_pruned(sparsity, unit.numel())
        if within is not None:
            assert given_mask is not None and torch.equal(within, given_mask)
            assert not (mask & ~within).any(), "a pruned weight came back"
        if not pruner.changes_weights:
            assert torch.equal(pruned[mask], before[mask])
        again = pruner.prune(weight, within, sparsity, statistic)
        assert torch.equal(again[0], pruned) and torch.equal(again[1], mask), "not deterministic"
        weight, within = pruned, mask


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("series", SERIES, ids=lambda series: " ".join(map(str, series)))
def test_n_of_m(name: str, series: list[NM]) -> None:
    """Exactly N of every M are kept, also in SparseGPT's narrower last block, and by a series that shrinks."""
    pruner, weight, within = make(name), draw(6, 136, seed=0), None
    statistic = gather(pruner, inputs(136), 6)
    for pattern in series:
        given_weight = weight.clone()
        pruned, mask = pruner.prune(weight, within, pattern, statistic)
        assert torch.equal(weight, given_weight) and mask.is_contiguous() and pruned.is_contiguous()
        assert (mask.view(-1, pattern.m).sum(dim=1) == pattern.n).all()
        assert not pruned[~mask].any() and not pruned[~mask].signbit().any()
        assert within is None or not (mask & ~within).any()
        assert pruner.changes_weights or torch.equal(pruned[mask], weight[mask])
        weight, within = (pruned + 0.1 * draw(6, 136, seed=1)) * mask, mask


@pytest.mark.parametrize("name", EVERY)
def test_n_of_m_refuses_another_width(name: str) -> None:
    pruner = make(name)
    with pytest.raises(LosaError, match="4:8 needs an input width that 8 divides, not 132"):
        pruner.prune(draw(3, 132, seed=0), None, NM(4, 8), gather(pruner, inputs(132), 3))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [1, 10])
def test_any_layout(name: str, rows: int) -> None:
    """A transposed weight gives the same and is left alone (its own transpose is contiguous: no view may slip out)."""
    pruner, weight, statistic = make(name), draw(rows, 40, seed=0), gather(make(name), inputs(40), rows)
    turned = weight.t().contiguous().t()
    want, got = pruner.prune(weight, None, 0.5, statistic), pruner.prune(turned, None, 0.5, statistic)
    assert torch.equal(turned, draw(rows, 40, seed=0)) and torch.equal(weight, turned)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[0].is_contiguous() and got[1].is_contiguous()


@pytest.mark.parametrize("name", EVERY)
def test_more_pruned_than_asked_stays(name: str) -> None:
    pruner, weight, x = make(name), draw(6, 140, seed=0), inputs(140)
    within = torch.rand(6, 140, generator=torch.Generator().manual_seed(5)) < 0.2
    pruned, mask = pruner.prune(weight * within, within, 0.3, gather(pruner, x, 6))
    assert torch.equal(mask, within) and not pruned[~mask].any()


@pytest.mark.parametrize("name", EVERY)
def test_nan_is_an_error(name: str) -> None:
    pruner, weight, x = make(name), draw(4, 20, seed=0), inputs(20)
    weight[2, 3] = math.nan
    with pytest.raises(LosaError, match="NaN"):
        pruner.prune(weight, None, 0.5, gather(pruner, x, 4))
    if pruner.needs_inputs or pruner.needs_gradients:
        x[0, 0, 3] = math.nan
        with pytest.raises(LosaError, match="NaN"):
            pruner.prune(draw(4, 20, seed=0), None, 0.5, gather(pruner, x, 4))


@pytest.mark.parametrize("name", [name for name in EVERY if make(name).needs_inputs])
def test_statistic(name: str) -> None:
    pruner, x = make(name), inputs(30, sequences=6)
    whole = gather(pruner, x)
    halves = gather(pruner, x[:3]), gather(pruner, x[3:])
    assert whole is not None and halves[0] is not None and halves[1] is not None
    merged = pruner.statistic(30, "cpu")
    assert merged is not None
    merged.merge(halves[0].tensors())
    merged.merge({key: tensor.double() for key, tensor in halves[1].tensors().items()})  # reduced in fp64
    for key, tensor in whole.tensors().items():
        torch.testing.assert_close(merged.tensors()[key], tensor, rtol=1e-6, atol=1e-5 * float(tensor.abs().max()))
    weight = draw(8, 30, seed=0)
    for got, want in zip(pruner.prune(weight, None, 0.5, merged), pruner.prune(weight, None, 0.5, whole), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for key, tensor in whole.tensors().items():  # it sums: a batch at once is the same as one by one
        together = pruner.statistic(30, "cpu")
        assert together is not None
        together.update(x.flatten(0, 1), 6)
        torch.testing.assert_close(together.tensors()[key], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))
    state = {key: tensor.clone() for key, tensor in whole.tensors().items()}
    pruner.prune(weight, None, 0.5, whole)
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.tensors().items()), "pruning spoils it"


@pytest.mark.parametrize("name", [name for name in EVERY if make(name).needs_inputs])
def test_statistic_in_half_precision_and_without_gradients(name: str) -> None:
    pruner, x = make(name), inputs(16).flatten(0, 1)
    half, full = pruner.statistic(16, "cpu"), pruner.statistic(16, "cpu")
    assert half is not None and full is not None
    kept = x.bfloat16()
    half.update(kept.requires_grad_(), 1)
    full.update(x.bfloat16().float(), 1)
    for key, tensor in full.tensors().items():
        assert torch.equal(half.tensors()[key], tensor) and not half.tensors()[key].requires_grad
    assert torch.equal(kept, x.bfloat16())


@pytest.mark.parametrize("name", [name for name in EVERY if make(name).needs_inputs])
def test_statistic_refused(name: str) -> None:
    pruner, weight = make(name), draw(4, 20, seed=0)
    with pytest.raises(LosaError, match="needs calibration inputs"):
        pruner.prune(weight, None, 0.5, None)
    with pytest.raises(LosaError, match="input features"):
        pruner.prune(weight, None, 0.5, gather(pruner, inputs(21)))
    with pytest.raises(LosaError, match="no calibration sequence"):
        pruner.prune(weight, None, 0.5, pruner.statistic(20, "cpu"))


CASE = 12, 21


@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None, max_examples=40)
@given(sparsities=st.lists(st.floats(0, 1), min_size=2, max_size=4).map(sorted), seed=st.integers(0, 2**31))
def test_masks_are_nested(name: str, sparsities: list[float], seed: int) -> None:
    pruner = make(name) if name != "sparsegpt" else SparseGPT(block=8)
    statistic = gather(pruner, inputs(CASE[1], seed=seed), CASE[0])
    weight, within = draw(*CASE, seed=seed), None
    for sparsity in sparsities:
        pruned, mask = pruner.prune(weight, within, sparsity, statistic)
        assert within is None or not (mask & ~within).any()
        assert not pruned[~mask].any()
        assert all(int((~u).sum()) == masks.count_pruned(sparsity, u.numel()) for u in units(pruner, mask))
        # recovery moves what is kept before the next step
        weight, within = (pruned + 0.1 * draw(*CASE, seed=seed + 1)) * mask, mask


# ---- oracles --------------------------------------------------------------------------------------------------------


def assert_choice(got: Bools, scores: Floats, within: Bools, count: int, what: str) -> None:
    """One unit, flat: `got` prunes the `count` lowest of (gone before, score, index), but for ties within TIE."""
    order = sorted(range(len(scores)), key=lambda i: (bool(within[i]), scores[i] if within[i] else 0.0, i))
    want = within.copy()
    want[order[:count]] = False
    assert (~got).sum() == (~want).sum(), what
    assert not (got & ~within).any(), what
    if (got != want).any():
        edge = scores[order[count - 1]]
        off = np.abs(scores[got != want] - edge) / max(abs(edge), 1e-300)
        assert (off <= TIE).all(), f"{what}: mask differs, scores {off} from the threshold"


def array(tensor: Tensor) -> Floats:
    return tensor.double().numpy()


def some_within(rows: int, columns: int, nested: bool) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(7)) < (0.8 if nested else 2.0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
@pytest.mark.parametrize("unit", ["matrix", "row"])
def test_magnitude_oracle(unit: str, sparsity: float, nested: bool) -> None:
    within = some_within(13, 29, nested)
    weight = draw(13, 29, seed=0) * within
    pruned, mask = Magnitude(unit=unit).prune(weight, within, sparsity, None)  # type: ignore[arg-type]
    scores, got, was = np.abs(array(weight)), mask.numpy(), within.numpy()
    if unit == "matrix":
        assert_choice(got.ravel(), scores.ravel(), was.ravel(), math.floor(sparsity * 13 * 29), "matrix")
    else:
        for row in range(13):
            assert_choice(got[row], scores[row], was[row], math.floor(sparsity * 29), f"row {row}")
    assert torch.equal(pruned, weight * mask)


def wanda_scores(weight: Tensor, x: Tensor) -> Floats:
    scores = np.zeros(weight.shape)
    for row, column in np.ndindex(*weight.shape):
        per_sequence = (array(x)[:, :, column] ** 2).sum(axis=1)
        scores[row, column] = abs(float(weight[row, column])) * math.sqrt(per_sequence.sum() / len(x))
    return scores


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_wanda_oracle(sparsity: float, nested: bool) -> None:
    within, x = some_within(13, 29, nested), inputs(29)
    weight = draw(13, 29, seed=0) * within
    pruner = Wanda()
    pruned, mask = pruner.prune(weight, within, sparsity, gather(pruner, x))
    scores = wanda_scores(weight, x)
    for row in range(13):
        assert_choice(mask[row].numpy(), scores[row], within[row].numpy(), math.floor(sparsity * 29), f"row {row}")
    assert torch.equal(pruned, weight * mask)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("pruner", [Magnitude(), Magnitude(unit="row"), Wanda()], ids=repr)
def test_magnitude_and_wanda_oracle_n_of_m(pruner: Pruner, pattern: NM, nested: bool) -> None:
    within, x = some_within(13, 24, nested), inputs(24)
    weight = draw(13, 24, seed=0) * within
    pruned, mask = pruner.prune(weight, within, pattern, gather(pruner, x))
    scores = wanda_scores(weight, x) if isinstance(pruner, Wanda) else np.abs(array(weight))
    groups = (part.reshape(-1, pattern.m) for part in (mask.numpy(), scores, within.numpy()))
    for at, group in enumerate(zip(*groups, strict=True)):
        assert_choice(*group, pattern.m - pattern.n, f"group {at}")
    assert torch.equal(pruned, weight * mask)


def pruner_zero_scores(weight: Tensor, gradients: Tensor) -> Floats:
    """gradients [sequences, out, in]"""
    root = np.zeros(weight.shape)
    for row, column in np.ndindex(*weight.shape):
        root[row, column] = math.sqrt(sum(float(g) ** 2 for g in gradients[:, row, column]))
    scaled = (root - root.min()) / (root.max() - root.min())
    return np.abs(array(weight)) * np.abs(array(weight)) * scaled


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("amount", [0.25, 0.6, *PATTERNS], ids=str)
def test_pruner_zero_oracle(amount: Amount, nested: bool) -> None:
    within, gradients = some_within(13, 24, nested), 1e-4 * draw(5, 13, 24, seed=1)
    weight = draw(13, 24, seed=0) * within
    pruner = PrunerZero()
    whole, merged = [pruner.gradient_statistic((13, 24), "cpu") for _ in range(2)]
    for gradient in gradients:
        whole.update(gradient, 1)
        part = pruner.gradient_statistic((13, 24), "cpu")
        part.update(gradient, 1)
        merged.merge({key: tensor.double() for key, tensor in part.tensors().items()})  # reduced in fp64
    pruned, mask = pruner.prune(weight, within, amount, whole)
    scores, size = pruner_zero_scores(weight, gradients), amount.m if isinstance(amount, NM) else 24
    count = amount.m - amount.n if isinstance(amount, NM) else math.floor(amount * 24)
    groups = (part.reshape(-1, size) for part in (mask.numpy(), scores, within.numpy()))
    for at, group in enumerate(zip(*groups, strict=True)):
        assert_choice(*group, count, f"group {at}")
    assert torch.equal(pruned, weight * mask)
    torch.testing.assert_close(merged.tensors(), whole.tensors(), rtol=1e-6, atol=0)


def surgeon(
    weight: Tensor,
    within: Tensor,
    x: Tensor,
    amount: Amount,
    got: Tensor,
    damp: float = 0.01,
    block: int = 8,
    hand_on: bool = True,
) -> Floats:
    """SparseGPT by optimal brain surgery in float64; asserts the choice of mask `got` block by block and follows it.

    Of N:M each row's M are chosen when the first of them comes, as compensated by then: `block` plays no part.
    hand_on False is the wrong variant, which holds what was pruned before at zero and drops its compensation.
    """
    w, was, keep, flat = array(weight).copy(), within.numpy(), got.numpy(), array(x).reshape(-1, x.shape[-1])
    rows, columns = w.shape
    hessian = np.zeros((columns, columns))
    for token in flat:
        hessian += np.outer(token, token) * 2 / len(x)
    dead = [j for j in range(columns) if hessian[j, j] == 0]
    for j in dead:
        hessian[j, j] = 1
        w[:, j] = 0
    hessian += damp * np.trace(hessian) / columns * np.eye(columns)
    # of column j, the inverse over the columns that are not yet fixed: j and those behind it
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    width = amount.m if isinstance(amount, NM) else block
    for start in range(0, columns, width):
        end = min(start + width, columns)
        scores = np.stack([w[:, j] ** 2 / inverses[j][0, 0] for j in range(start, end)], axis=1)
        choice = keep[:, start:end], scores, was[:, start:end]
        if isinstance(amount, NM):
            for row in range(rows):
                assert_choice(*(part[row] for part in choice), amount.m - amount.n, f"row {row}, column {start}")
        elif hand_on:
            count = math.floor(amount * rows * (end - start) + 1e-9)
            assert_choice(*(part.ravel() for part in choice), count, f"columns {start} to {end}")
        for row in range(rows):
            for j in range(start, end):
                if keep[row, j]:
                    continue
                if hand_on or was[row, j]:
                    w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][:, 0]
                w[row, j] = 0
    return w


def damage(x: Tensor, dense: Tensor, pruned: Floats | Tensor) -> float:
    """||X (W - W')||^2"""
    off = array(dense) - (pruned if isinstance(pruned, np.ndarray) else array(pruned))
    return float(((array(x).reshape(-1, off.shape[1]) @ off.T) ** 2).sum())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("block", [8, 21, 128])
def test_sparsegpt_oracle(block: int, sparsity: float, nested: bool) -> None:
    rows, columns = 9, 37  # 37: the last block is narrower
    within, x = some_within(rows, columns, nested), inputs(columns)
    weight = draw(rows, columns, seed=0) * within
    pruner = SparseGPT(block=block)
    pruned, mask = pruner.prune(weight, within, sparsity, gather(pruner, x))
    want = surgeon(weight, within, x, sparsity, mask, block=block)
    np.testing.assert_allclose(array(pruned), want, rtol=1e-5, atol=1e-5)
    if sparsity and not nested:
        magnitude, _ = Magnitude().prune(weight, None, sparsity, None)
        assert damage(x, weight, pruned) < 0.7 * damage(x, weight, magnitude)
        assert (pruned[mask] != weight[mask]).any()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("pattern", [*PATTERNS, NM(7, 20)], ids=str)
@pytest.mark.parametrize("block", [40, 120])
def test_sparsegpt_oracle_n_of_m(block: int, pattern: NM, nested: bool) -> None:
    rows, columns = 7, 80 if pattern.m == 20 else 56  # more than one block, the last one narrower where M allows
    within, x = some_within(rows, columns, nested), inputs(columns)
    weight = draw(rows, columns, seed=0) * within
    pruner = SparseGPT(block=block)
    pruned, mask = pruner.prune(weight, within, pattern, gather(pruner, x))
    want = surgeon(weight, within, x, pattern, mask)
    np.testing.assert_allclose(array(pruned), want, rtol=1e-5, atol=1e-5)


def test_sparsegpt_n_of_m_over_steps() -> None:
    weight, x = draw(8, 48, seed=0), inputs(48)
    pruner, within = SparseGPT(block=32), torch.ones(8, 48, dtype=torch.bool)
    for n in (6, 4, 2):
        pruned, mask = pruner.prune(weight, within, NM(n, 8), gather(pruner, x))
        np.testing.assert_allclose(array(pruned), surgeon(weight, within, x, NM(n, 8), mask), rtol=1e-5, atol=1e-5)
        weight, within = pruned, mask


@pytest.mark.parametrize("block", [4, 12, 31])
def test_sparsegpt_blocks_do_not_cut_groups(block: int) -> None:
    weight, x = draw(3, 24, seed=0), inputs(24)
    pruner, whole = SparseGPT(block=block), SparseGPT(block=24)
    pruned, mask = pruner.prune(weight, None, NM(4, 8), gather(pruner, x))
    want, same = whole.prune(weight, None, NM(4, 8), gather(whole, x))
    assert torch.equal(mask, same) and bool((mask.view(3, 3, 8).sum(dim=2) == 4).all())
    np.testing.assert_allclose(array(pruned), array(want), rtol=1e-5, atol=1e-5)


def test_sparsegpt_over_steps_hands_on_what_was_pruned() -> None:
    """Three nested steps: each is the oracle's, and better than to drop the compensation of what was pruned before."""
    weight, x = draw(16, 48, seed=0), inputs(48)
    pruner, within = SparseGPT(block=16), torch.ones(16, 48, dtype=torch.bool)
    statistic = gather(pruner, x)
    for sparsity in (0.3, 0.5, 0.65):
        pruned, mask = pruner.prune(weight, within, sparsity, statistic)
        want = surgeon(weight, within, x, sparsity, mask, block=16)
        np.testing.assert_allclose(array(pruned), want, rtol=1e-5, atol=1e-5)
        if not within.all():
            dropped = surgeon(weight, within, x, sparsity, mask, block=16, hand_on=False)
            assert damage(x, weight, pruned) < damage(x, weight, dropped)
        weight, within = pruned, mask


def test_sparsegpt_dead_columns() -> None:
    weight, x = draw(9, 37, seed=0), 0.03 * inputs(37)  # quiet: the ones on dead diagonals weigh in the damping
    x[..., [2, 11, 36]] = 0
    pruner = SparseGPT(block=16)
    for sparsity in (0.0, 0.5):
        pruned, mask = pruner.prune(weight, None, sparsity, gather(pruner, x))
        full = torch.ones_like(mask)
        np.testing.assert_allclose(array(pruned), surgeon(weight, full, x, sparsity, mask, block=16), 1e-5, 1e-5)
        assert not pruned[:, [2, 11, 36]].any()
        assert mask[:, [2, 11, 36]].all() if sparsity == 0 else not mask[:, [2, 11, 36]].any()
        for unit in units(pruner, mask):
            assert int((~unit).sum()) == masks.count_pruned(sparsity, unit.numel())


@pytest.mark.parametrize("columns", [1, 128, 129, 515])
def test_sparsegpt_factor_of_any_width(columns: int) -> None:
    """U^T U is the inverse of the damped Hessian: beyond 128 columns it is inverted by halves."""
    x = inputs(columns, tokens=200)
    statistic = gather(SparseGPT(), x)
    assert isinstance(statistic, Gram)
    upper, dead = SparseGPT()._factor(statistic)
    flat = array(x).reshape(-1, columns)
    hessian = 2 / len(x) * flat.T @ flat
    hessian += 0.01 * np.trace(hessian) / columns * np.eye(columns)
    want = np.linalg.cholesky(np.linalg.inv(hessian)).T
    assert not dead.any() and not upper.tril(-1).any()
    assert np.abs(array(upper) - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
def test_gram_is_gathered_in_float64(products: torch.dtype) -> None:
    """By panels and from two processes' tokens; with float32 products, as on a GPU, off by what these round."""
    x = inputs(600, sequences=8, tokens=600).reshape(-1, 600)
    grams = [Gram(600, "cpu"), Gram(600, "cpu")]
    assert grams[0].products == torch.float64 and Gram(8, "meta").products == torch.float32
    for gram, half in zip(grams, (x[:2100], x[2100:]), strict=True):
        gram.products = products
        gram.update(half.view(-1, 600), 4)
    grams[0].merge(grams[1].tensors())
    found, want = grams[0].symmetric(), x.double().T @ x.double()
    scale = want.diagonal().sqrt()
    assert ((found - want).abs() / scale / scale[:, None]).max() < (1e-14 if products == torch.float64 else 1e-6)
    assert torch.equal(found, found.T) and grams[0].sequences == 8


@pytest.fixture(scope="module")
def built_in() -> dict[str, tuple[Tensor, Tensor]]:
    """The linears of the built-in model's last block: weight, and inputs of 16 x 512 tokens held out of its training."""
    whole = model.load("demo", recipe.load("demo", {"dtype": "float32"}))
    tokenizer = model.load_tokenizer("demo", whole.config)
    ids = torch.as_tensor(data.evaluation_tokens("demo:validation", tokenizer, 512, 16 * 512)).view(16, 512)
    seen: dict[str, Tensor] = {}
    linears = {name: one for name, one in whole.model.layers[-1].named_modules() if isinstance(one, nn.Linear)}
    for name, one in linears.items():
        one.register_forward_hook(lambda _one, given, _out, name=name: seen.update({name: given[0]}))
    with torch.no_grad():
        whole(ids)
    return {name: (linears[name].weight.detach(), seen[name]) for name in linears}


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("name", ["sparsegpt", "wanda"])
def test_built_in_model_against_float64(name: str, sparsity: float, built_in: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Real weights and inputs, whose Hessian multiplies what is rounded a thousandfold, in every linear of a block."""
    for linear, (weight, x) in built_in.items():
        pruner = make(name)
        pruned, mask = pruner.prune(weight, None, sparsity, gather(pruner, x))
        flat, w, keep = array(x).reshape(-1, x.shape[-1]), array(weight).copy(), mask.numpy()
        if name == "wanda":
            scores = np.abs(w) * np.sqrt((flat**2).sum(axis=0) / len(x))
            for row in range(len(w)):
                count = masks.count_pruned(sparsity, w.shape[1])
                assert_choice(keep[row], scores[row], np.ones_like(keep[row]), count, f"{linear}, row {row}")
            assert torch.equal(pruned, weight * mask)
            continue
        hessian = flat.T @ flat * 2 / len(x)
        hessian += 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
        for j in range(w.shape[1]):
            if j % 128 == 0:
                span = slice(j, j + 128)
                scores = (w[:, span] / np.diagonal(upper)[span]).ravel() ** 2
                part, count = keep[:, span].ravel(), masks.count_pruned(sparsity, scores.size)
                assert_choice(part, scores, np.ones_like(part), count, f"{linear}, column {j}")
            error = np.where(keep[:, j], 0, w[:, j]) / upper[j, j]
            w[:, j:] -= np.outer(error, upper[j, j:])
        np.testing.assert_allclose(array(pruned), w * keep, rtol=1e-6, atol=1e-6, err_msg=linear)


def test_sparsegpt_with_fewer_tokens_than_columns() -> None:
    """The Hessian alone is singular; damping makes it whole."""
    weight, x = draw(5, 40, seed=0), inputs(40, sequences=1, tokens=10)
    pruner = SparseGPT(block=16)
    pruned, mask = pruner.prune(weight, None, 0.5, gather(pruner, x))
    want = surgeon(weight, torch.ones_like(mask), x, 0.5, mask, block=16)
    np.testing.assert_allclose(array(pruned), want, rtol=1e-4, atol=1e-4)  # condition number 4000


def test_sparsegpt_damps_until_it_factorises() -> None:
    weight = draw(3, 4, seed=0)
    pruner = SparseGPT()
    statistic = pruner.statistic(4, "cpu")
    # not positive definite, as rounding may leave it: eigenvalue -0.3 of a mean diagonal of 1
    statistic.total.copy_(torch.eye(4))
    statistic.total[0, 1] = statistic.total[1, 0] = 1.3
    statistic.sequences = 2
    pruned, mask = pruner.prune(weight, None, 0.5, statistic)
    enough = copy.deepcopy(statistic)
    exact = SparseGPT(damp=1.0).prune(weight, None, 0.5, enough)  # 0.01, 0.1 do not do; 1 does
    torch.testing.assert_close(pruned, exact[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(mask, exact[1])
    statistic.total[0, 1] = statistic.total[1, 0] = 1e4
    with pytest.raises(LosaError, match="does not factorise"):
        pruner.prune(weight, None, 0.5, statistic)


@pytest.mark.parametrize("options", [{"damp": 0}, {"damp": math.nan}, {"damp": "1"}, {"block": 0}, {"block": 1.5}])
def test_sparsegpt_refuses(options: dict[str, float]) -> None:
    with pytest.raises(LosaError, match=next(iter(options))):
        SparseGPT(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sparsegpt_refuses_weights_that_are_not_finite(value: float) -> None:
    weight = draw(3, 4, seed=0)
    weight[1, 2] = value
    with pytest.raises(LosaError, match="weights that hold NaN or infinity"):
        SparseGPT().prune(weight, None, 0.5, gather(SparseGPT(), inputs(4)))


@pytest.mark.parametrize("loud", [1e18, 1e22, 1e30])
def test_sparsegpt_refuses_inputs_whose_scores_overflow(loud: float) -> None:
    x = loud * inputs(16)
    with pytest.raises(LosaError, match="overflow in their squares"):
        SparseGPT().prune(draw(8, 16, seed=0), None, 0.5, gather(SparseGPT(), x))


def test_magnitude_refuses() -> None:
    with pytest.raises(LosaError, match="did you mean 'matrix'"):
        Magnitude(unit="matrixx")  # type: ignore[arg-type]
    assert SparseGPT(block=64).unit == "64 columns" and SparseGPT().unit == "128 columns"
