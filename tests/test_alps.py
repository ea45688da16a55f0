"""ALPS against float64: its paper's iteration with V, rho and inverses written out, and what must hold of any optimum."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, tokenizer
from test_pruners import Bools, Floats, array, damage, draw, gather, inputs, some_within
from torch import Tensor

import losa
from losa import masks, pruning
from losa.errors import LosaError
from losa.patterns import NM, Amount
from losa.pruners.alps import ALPS, _factor, _solve_by
from losa.pruners.sparsegpt import SparseGPT
from losa.recipe import Recipe

ROWS, COLUMNS = 12, 36
CASES: list[Amount] = [0.3, 0.6, 0.85, NM(2, 4), NM(1, 4), NM(4, 12)]
# Between the least that stays and the most that goes, relative: below it rounding may choose otherwise in fp32.
CLEAR = 5e-6


class Oracle:
    """Equations 4 and 6 of arXiv 2406.07831 in float64, with the authors' schedule of rho and their end."""

    def __init__(self, weight: Tensor, within: Tensor, x: Tensor, amount: Amount, pruner: ALPS | None = None) -> None:
        self.options, self.happened = pruner or ALPS(), set[str]()
        self.within, self.amount, self.gap = within.numpy(), amount, math.inf
        flat = array(x).reshape(-1, x.shape[-1])
        gram = flat.T @ flat / len(x)
        gram += 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
        self.scale = np.sqrt(np.diag(gram))
        self.hessian = gram / np.outer(self.scale, self.scale)
        self.dense = array(weight) * self.scale

    def largest(self, values: Floats) -> Bools:
        """One unit after the other, by sorting all of it."""
        keep = np.zeros(values.shape, dtype=bool)
        units = (
            [np.arange(values.size)]
            if not isinstance(self.amount, NM)
            else np.arange(values.size).reshape(-1, self.amount.m)
        )
        for unit in units:
            stay = (
                self.amount.n if isinstance(self.amount, NM) else len(unit) - math.floor(self.amount * len(unit) + 1e-9)
            )
            alive = [i for i in unit if self.within.flat[i]]
            alive.sort(key=lambda i: -abs(values.flat[i]))
            if 0 < stay < len(alive):
                least, most = abs(values.flat[alive[stay - 1]]), abs(values.flat[alive[stay]])
                self.gap = min(self.gap, (least - most) / least)
            for i in alive[:stay]:
                keep.flat[i] = True
        return keep

    def support(self) -> Bools:
        first, rho, grown = self.largest(self.dense), self.options.rho, False
        keep, d, v = first, self.dense * first, np.zeros_like(self.dense)
        for t in range(1, 301):
            b = (self.dense @ self.hessian - v + rho * d) @ np.linalg.inv(self.hessian + rho * np.eye(len(self.scale)))
            chosen = self.largest(b + v / rho)
            d = (b + v / rho) * chosen
            v = v + rho * (b - d)
            if t % 3:
                continue
            change = (chosen != keep).sum() / first.sum()
            keep = chosen
            if change > 0.1:
                rho, grown = rho * 1.3, True
            elif change > 0.005:
                rho, grown = rho * 1.2, True
            elif change and grown:
                rho *= 1.1
            elif change:
                rho, d, v = rho / 5, self.dense * first, np.zeros_like(v)
                self.happened.add("restart")
            elif grown:
                break
            else:
                rho /= 5
                self.happened.add("shrink")
            rho = min(rho, 1e6)
            if t > self.options.settle and change < self.options.tolerance:
                self.happened.add("settle")
                break
        self.free = b
        return self.largest(b)

    def solve(self, keep: Bools, steps: int = 10) -> Floats:
        """Conjugate gradients on the support, row by row, from what ADMM left there."""
        pruned = np.zeros_like(self.dense)
        for row, alive in enumerate(keep):
            hessian, w = self.hessian[np.ix_(alive, alive)], self.free[row, alive]
            r = (self.hessian[alive] @ self.dense[row]) - hessian @ w
            p = r.copy()
            for _ in range(steps if alive.any() else 0):
                if not (rr := r @ r):
                    break
                alpha = rr / (p @ hessian @ p)
                w = w + alpha * p
                r = r - alpha * hessian @ p
                p = r + r @ r / rr * p
            pruned[row, alive] = w / self.scale[alive]
        return pruned


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("amount", CASES, ids=str)
def test_oracle(amount: Amount, nested: bool) -> None:
    within, x = some_within(ROWS, COLUMNS, nested), inputs(COLUMNS)
    weight = draw(ROWS, COLUMNS, seed=0) * within
    pruner = ALPS()
    pruned, mask = pruner.prune(weight, within, amount, gather(pruner, x))
    oracle = Oracle(weight, within, x, amount)
    keep = oracle.support()
    assert oracle.gap > CLEAR, "no fair case: take another seed"
    np.testing.assert_array_equal(mask.numpy(), keep)
    assert (keep != oracle.largest(oracle.dense)).any() or nested, "magnitude would have chosen the same"
    np.testing.assert_allclose(array(pruned), oracle.solve(keep), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("columns", [1, 128, 129, 300])
def test_solved_by_blocks(columns: int) -> None:
    """rows (H / rho + 1)^-1, in place, of any width."""
    hessian, rows = np.cov(array(inputs(columns, tokens=200)).reshape(-1, columns).T).reshape(columns, columns), 5
    right = draw(rows, columns, seed=0)
    want = array(right) @ np.linalg.inv(hessian / 0.3 + np.eye(columns))
    factor = torch.full((columns, columns), math.nan)
    _factor(torch.tensor(hessian, dtype=torch.float32), 0.3, factor)
    _solve_by(factor, right)
    np.testing.assert_allclose(array(right), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amount", CASES, ids=str)
def test_many_steps_reach_the_optimum_on_the_support(amount: Amount) -> None:
    """Row by row against a dense solver; and ten steps, the default, are nearly there."""
    weight, x = draw(ROWS, COLUMNS, seed=0), inputs(COLUMNS)
    statistic = gather(ALPS(), x)
    pruned, mask = ALPS(cg_steps=200).prune(weight, None, amount, statistic)
    oracle = Oracle(weight, mask, x, amount)
    best = np.zeros((ROWS, COLUMNS))
    for row, alive in enumerate(mask.numpy()):
        right = oracle.hessian[alive] @ oracle.dense[row]
        best[row, alive] = np.linalg.solve(oracle.hessian[np.ix_(alive, alive)], right) / oracle.scale[alive]
    np.testing.assert_allclose(array(pruned), best, rtol=1e-3, atol=1e-4)
    ten, ten_mask = ALPS().prune(weight, None, amount, statistic)
    assert torch.equal(ten_mask, mask) and damage(x, weight, ten) < 1.02 * damage(x, weight, best)


@pytest.mark.parametrize("amount", CASES, ids=str)
def test_better_than_sparsegpt(amount: Amount) -> None:
    weight, x = draw(48, 72, seed=0), inputs(72, tokens=80)
    alps, _ = ALPS().prune(weight, None, amount, gather(ALPS(), x))
    sparsegpt = SparseGPT(block=24)
    other, _ = sparsegpt.prune(weight, None, amount, gather(sparsegpt, x))
    assert damage(x, weight, alps) < 0.9 * damage(x, weight, other)


@pytest.mark.parametrize("loud", [1.0, 1e-6, 1e6])
def test_near_the_best_of_all_supports(loud: float) -> None:
    """Two rows of six, half kept: all 924 supports are tried. However loud the inputs, it is the same choice."""
    weight, x = draw(2, 6, seed=3), inputs(6, tokens=30)
    pruned, mask = ALPS().prune(weight, None, 0.5, gather(ALPS(), loud * x))
    hessian = (x.reshape(-1, 6).double().T @ x.reshape(-1, 6).double()).numpy()
    of_row: list[dict[int, float]] = []
    for row in array(weight):
        best: dict[int, float] = {}
        for bits in range(64):
            alive = np.array([bits >> j & 1 for j in range(6)], dtype=bool)
            off = row.copy()
            off[alive] -= np.linalg.solve(hessian[np.ix_(alive, alive)], hessian[alive] @ row)
            kept = int(alive.sum())
            best[kept] = min(best.get(kept, math.inf), float(off @ hessian @ off))
        of_row.append(best)
    optimum = min(of_row[0][k] + of_row[1][6 - k] for k in range(7))
    assert int(mask.sum()) == 6
    assert optimum * (1 - 1e-6) <= damage(x, weight, pruned) <= 1.1 * optimum


@pytest.mark.parametrize(
    ("options", "amount", "happens"),
    [
        ({"rho": 300.0}, 0.6, "shrink"),
        ({"rho": 300.0}, NM(4, 12), "shrink"),
        ({"rho": 10.0}, 0.3, "restart"),
        ({"rho": 10.0}, NM(1, 4), "restart"),
        ({"settle": 3, "tolerance": 1.0}, 0.6, "settle"),
        ({"settle": 3, "tolerance": 1.0}, NM(2, 4), "settle"),
    ],
)
def test_oracle_of_what_is_rare(options: dict[str, Any], amount: Amount, happens: str) -> None:
    """On small matrices only other options lead there: support that hardly moves, and the end before it stands still."""
    weight, x, pruner = draw(48, COLUMNS, seed=0), inputs(COLUMNS), ALPS(**options)
    _, mask = pruner.prune(weight, None, amount, gather(pruner, x))
    oracle = Oracle(weight, torch.ones_like(mask), x, amount, pruner)
    keep = oracle.support()
    assert oracle.gap > CLEAR and happens in oracle.happened
    np.testing.assert_array_equal(mask.numpy(), keep)


@pytest.mark.parametrize("loud", [1.0, 0.0])
@pytest.mark.parametrize("within", [None, some_within(8, 16, True)], ids=["all", "nested"])
def test_unrelated_inputs_leave_what_is_kept(within: Tensor | None, loud: float) -> None:
    """A diagonal Gram matrix has no compensation, nor have silent inputs; a dead column has the damping alone."""
    weight = draw(8, 16, seed=0) if within is None else draw(8, 16, seed=0) * within
    x = loud * torch.diag(torch.linspace(0.5, 4, 16)).unsqueeze(0)
    x[..., 5] = 0
    pruned, mask = ALPS().prune(weight, within, 0.5, gather(ALPS(), x))
    assert int(mask.sum()) == 64 and (within is None or not (mask & ~within).any())
    torch.testing.assert_close(pruned, weight * mask, rtol=1e-5, atol=1e-6)


def test_columns_that_are_copies() -> None:
    """A Gram matrix of rank 4 out of 32: the weights stay finite, and four columns' worth of them are enough."""
    x = draw(2, 40, 4, seed=1) @ draw(4, 32, seed=2)
    weight = draw(8, 32, seed=0)
    pruned, mask = ALPS().prune(weight, None, 0.5, gather(ALPS(), x))
    assert pruned.isfinite().all() and int(mask.sum()) == 128
    assert damage(x, weight, pruned) < 1e-3 * damage(x, weight, torch.zeros(8, 32))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damp", 0), ("damp", math.nan), ("rho", -1.0), ("rho", "0.1"), ("tolerance", math.inf), ("damp", True),
        ("iterations", 0), ("iterations", 3.0), ("settle", -1), ("cg_steps", None),
    ],
)  # fmt: skip
def test_options_refused(option: str, value: Any) -> None:
    with pytest.raises(LosaError, match=f"{option} must be a .*, not {value!r}"):
        ALPS(**{option: value})


def test_inputs_that_overflow() -> None:
    with pytest.raises(LosaError, match="overflow"):
        ALPS().prune(draw(4, 20, seed=0), None, 0.5, gather(ALPS(), 1e20 * inputs(20)))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_in_two_steps_with_recovery(pattern: str, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step lies within the one before, counts exactly, and carries the pair: pruned is the product with it."""
    steps: dict[str, list[Tensor]] = {}
    prune_linear = pruning.prune_linear

    def spy(name: str, linear: Any, pruner: Any, amount: Amount, statistic: Any, device: torch.device) -> None:
        seen = steps.setdefault(name, [])
        pair = linear.lora_A.clone(), linear.lora_B.clone()
        assert bool(pair[1].any()) == bool(seen), "trained between the steps"
        want, _ = pruner.prune(linear.effective_weight(torch.float32), linear.mask, amount, statistic)
        prune_linear(name, linear, pruner, amount, statistic, device)
        assert torch.equal(linear.lora_A, pair[0]) and torch.equal(linear.lora_B, pair[1])
        torch.testing.assert_close(linear.effective_weight(torch.float32), want, rtol=1e-5, atol=1e-5)
        assert not seen or not (linear.mask & ~seen[-1]).any()
        kept = int(linear.mask.sum())
        if isinstance(amount, NM):
            assert (linear.mask.view(-1, amount.m).sum(dim=1) == amount.n).all()
        else:
            assert linear.mask.numel() - kept == masks.count_pruned(amount, linear.mask.numel())
        seen.append(linear.mask.clone())

    monkeypatch.setattr(pruning, "prune_linear", spy)
    settings = small.to_json() | {"pruner": "alps", "pattern": pattern}
    result = losa.compress(
        tiny(), settings | ({} if pattern == "unstructured" else {"sparsity": None}), tokenizer=tokenizer()
    )
    assert len(steps) == 21 and {len(seen) for seen in steps.values()} == {2}
    assert result.measurements["sparse"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    for name, seen in steps.items():
        assert not result.model.get_submodule(name).weight[~seen[-1]].any()
