"""Every allocator against its contract, RMI against brute force and the linear programme against scipy's solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog  # type: ignore[import-untyped]
from torch import Tensor

from losa import registry
from losa.allocators.base import Allocator, Evidence
from losa.allocators.rmi import ALMOST_ALL, RMI, default_delta, importance, rmi_matrix, solve_box
from losa.errors import LosaError


def features(units: int, samples: int = 6, seed: int = 0) -> list[Tensor]:
    """Raw features [samples, width], of another width in every unit and far from centred."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 5 + u, generator=generator).double() + 3 for u in range(units)]


def centred_grams(raw: list[Tensor]) -> list[Tensor]:
    return [(x - x.mean(dim=0)) @ (x - x.mean(dim=0)).T for x in raw]


def evidence(
    target: float, floors: list[float], counts: list[int] | None = None, seed: int = 0, name: str = "rmi"
) -> Evidence:
    counts = counts or [10] * len(floors)
    return Evidence(target, counts, floors, seen(make(name), target, floors, seed))


def seen(allocator: Allocator, target: float, floors: list[float], seed: int) -> list[Tensor] | None:
    """What the allocator needs of units that differ."""
    if allocator.needs == "grams":
        return centred_grams(features(len(floors), seed=seed))
    generator = torch.Generator().manual_seed(seed)
    if allocator.needs == "scores":
        return [allocator.digest(torch.rand(500, generator=generator) ** 20) for _ in floors]
    if allocator.needs == "errors":
        tried = [allocator.probes(target, floor, None) for floor in floors]
        return [torch.tensor([r, torch.rand(len(r), generator=generator).tolist()]).double() for r in tried]
    return None


def mean(rates: list[float], counts: list[int]) -> float:
    return sum(r * c for r, c in zip(rates, counts, strict=True)) / sum(counts)


def make(name: str) -> Allocator:
    allocator: Allocator = registry.get("allocator", name)()
    return allocator


every_allocator = pytest.mark.parametrize("name", sorted(registry.ALLOCATORS))


# ------------------------------------------------------------------------------------------------- the contract


@every_allocator
@given(
    target=st.one_of(st.sampled_from([0.0, 0.5, 0.6, 0.99, 0.9995]), st.floats(0, 0.9999)),
    shares=st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 0.99)), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_contract(name: str, target: float, shares: list[tuple[int, float]], seed: int) -> None:
    counts, floors = [c for c, _ in shares], [f for _, f in shares]
    above = mean(floors, counts)
    if above > target:  # floors that leave a solution, some of them far above the target
        floors = [f * target / above for f in floors]
    rates = make(name).rates(evidence(target, floors, counts, seed, name))
    assert mean(rates, counts) == pytest.approx(target, abs=1e-12)
    assert all(floor <= rate < 1 for rate, floor in zip(rates, floors, strict=True))


@every_allocator
@pytest.mark.parametrize("target", [0.0, 0.3, 0.99, 0.9999])
def test_one_block_gets_the_target(name: str, target: float) -> None:
    assert make(name).rates(evidence(target, [0.0], name=name)) == pytest.approx([target], abs=1e-15)


@every_allocator
def test_nothing_is_pruned_at_target_0(name: str) -> None:
    assert make(name).rates(evidence(0.0, [0.0] * 4, name=name)) == [0.0] * 4


@every_allocator
def test_floors_that_leave_no_solution_are_returned(name: str) -> None:
    assert make(name).rates(evidence(0.3, [0.5, 0.2, 0.4], name=name)) == [0.5, 0.2, 0.4]


@every_allocator
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_every_step_of_a_schedule_reaches_its_mean(name: str, steps: int) -> None:
    floors = [0.0] * 5
    counts = [7, 100, 3, 50, 20]
    for step in range(1, steps + 1):
        target = 0.7 * (1 - (1 - step / steps) ** 3)
        rates = make(name).rates(evidence(target, floors, counts, step, name))
        assert mean(rates, counts) == pytest.approx(target, abs=1e-12)
        assert all(rate >= floor for rate, floor in zip(rates, floors, strict=True))
        floors = rates


# ------------------------------------------------------------------------------------------------- uniform


def test_uniform_is_the_mean_everywhere() -> None:
    assert make("uniform").rates(evidence(0.55, [0.5, 0.0, 0.1], [1, 10, 100])) == [0.55] * 3


def test_uniform_makes_up_for_a_floor_above_the_mean() -> None:
    assert make("uniform").rates(evidence(0.5, [0.8, 0.0, 0.1])) == pytest.approx([0.8, 0.35, 0.35])


# ------------------------------------------------------------------------------------------------- the box


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[float], list[int], float, list[float], list[float]]:
    units = draw(st.integers(1, 8))
    share = st.floats(0, 1, width=32)
    # a grid: what costs the same within the solver's tolerance costs the same
    cost = draw(st.lists(st.integers(0, 1000).map(lambda i: i / 1000), min_size=units, max_size=units))
    counts = draw(st.lists(st.integers(1, 1000), min_size=units, max_size=units))
    ends = draw(st.lists(st.tuples(share, share), min_size=units, max_size=units))
    low, high = [min(e) for e in ends], [max(e) for e in ends]
    where = draw(share)
    target = (1 - where) * mean(low, counts) + where * mean(high, counts)
    return cost, counts, target, low, high


@given(box=boxes())
@settings(max_examples=200, deadline=None)
def test_box_is_solved_as_by_linprog(box: tuple[list[float], list[int], float, list[float], list[float]]) -> None:
    cost, counts, target, low, high = box
    rates = solve_box(*box)
    weights = np.array(counts) / sum(counts)
    bounds = list(zip(low, high, strict=True))
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    best = linprog(cost, A_eq=weights[None], b_eq=[target], bounds=bounds, method="highs", options=tight)
    assert best.status == 0
    assert float(np.dot(cost, rates)) == pytest.approx(best.fun, abs=1e-9)


@given(box=boxes())
def test_box_has_the_exact_mean_and_stays_within(
    box: tuple[list[float], list[int], float, list[float], list[float]],
) -> None:
    _, counts, target, low, high = box
    rates = solve_box(*box)
    assert mean(rates, counts) == pytest.approx(target, abs=1e-12)
    assert all(a <= rate <= b for a, rate, b in zip(low, rates, high, strict=True))


def test_rounding_does_not_leave_the_box() -> None:
    low, high = 0.33, 0.87
    assert low + (high - low) > high
    assert solve_box([0.0, 1.0], [1, 1], high, [low, low], [high, 1.0])[0] == high


# ------------------------------------------------------------------------------------------------- RMI


@given(units=st.integers(1, 6), samples=st.integers(2, 9), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_rmi_is_linear_cka_of_the_features(units: int, samples: int, seed: int) -> None:
    raw = features(units, samples, seed)
    found = rmi_matrix(centred_grams(raw))
    for i, x in enumerate(raw):
        for j, y in enumerate(raw):
            a, b = x.numpy() - x.numpy().mean(axis=0), y.numpy() - y.numpy().mean(axis=0)
            want = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
            assert float(found[i, j]) == pytest.approx(want, rel=1e-10)


def test_importance_is_equation_4() -> None:
    rmi = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.0]], dtype=torch.float64)
    sums = np.array([0.6, 0.7, 0.3])
    assert importance(rmi, 3.0).tolist() == pytest.approx(np.exp(-3 * sums / 1.6), rel=1e-12)


def test_importance_survives_rounding_below_zero() -> None:
    rmi = torch.tensor([[1.0, -4e-16], [-4e-16, 1.0]], dtype=torch.float64)
    assert importance(rmi, 1.0).tolist() == [1.0, 1.0]


def test_blocks_that_repeat_the_others_are_pruned_more() -> None:
    raw = features(4)
    raw[1] = raw[3] = raw[2] * 2
    rates = RMI().rates(Evidence(0.6, [10] * 4, [0.0] * 4, centred_grams(raw)))
    assert rates == pytest.approx([0.58, 0.62, 0.62, 0.58])  # block 0 is unlike the others; of three equals, one pays


@pytest.mark.parametrize("beta", [0.1, 100.0, 700.0])
def test_beta_does_not_move_the_optimum(beta: float) -> None:
    given = evidence(0.6, [0.0] * 6)
    assert RMI(beta=beta).rates(given) == RMI().rates(given)


@pytest.mark.parametrize(
    ("target", "delta"),
    [(0.1, 0.01), (0.5, 0.01), (0.51, 0.02), (0.6 + 1e-16, 0.02), (0.61, 0.03), (0.7, 0.03), (0.8, 0.03), (0.9, 0.03)],
)
def test_delta_is_the_papers(target: float, delta: float) -> None:
    assert default_delta(target) == delta


@pytest.mark.parametrize("delta", [None, 0.0, 0.05])
def test_rates_stay_in_the_box(delta: float | None) -> None:
    rates = RMI(delta=delta).rates(evidence(0.5, [0.0] * 6))
    width = 0.01 if delta is None else delta
    assert (min(rates), max(rates)) == pytest.approx((0.5 - width, 0.5 + width))


def test_no_block_loses_almost_all_its_weights() -> None:
    assert max(RMI().rates(evidence(0.99, [0.0] * 4))) == ALMOST_ALL


def test_zero_grams_still_reach_the_mean() -> None:
    grams = [torch.zeros(3, 3, dtype=torch.float64)] * 4
    assert not rmi_matrix(grams).any()
    rates = RMI().rates(Evidence(0.5, [10] * 4, [0.0] * 4, grams))
    assert mean(rates, [10] * 4) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_grams_are_refused(bad: float) -> None:
    grams = [torch.eye(3).double(), torch.full((3, 3), bad).double()]
    with pytest.raises(LosaError, match="NaN or infinity"):
        RMI().rates(Evidence(0.5, [1, 1], [0.0, 0.0], grams))


@pytest.mark.parametrize(
    ("option", "value"), [("beta", 0.0), ("beta", -1.0), ("beta", 1e4), ("delta", -0.1), ("delta", 2.0)]
)
def test_bad_options_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(LosaError, match=option):
        RMI(**{option: value})


# ------------------------------------------------------------------------------------------------- outliers


def owl_by_hand(shares: list[float], target: float, half: float) -> list[float]:
    ratios = 100 * np.array(shares)
    spread = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * half * 2)
    rates: list[float] = (target - (spread - spread.mean())).tolist()
    return rates


def test_owl_is_the_published_rule() -> None:
    shares = [0.01, 0.02, 0.05, 0.005]
    given_shares = [torch.tensor(share, dtype=torch.float64) for share in shares]
    rates = registry.get("allocator", "owl")().rates(Evidence(0.6, [5] * 4, [0.0] * 4, given_shares))
    assert rates == pytest.approx(owl_by_hand(shares, 0.6, 0.08), abs=1e-12)
    wider = registry.get("allocator", "owl")().rates(Evidence(0.6, [5] * 4, [0.0] * 4, given_shares, spread=0.25))
    assert wider == pytest.approx(owl_by_hand(shares, 0.6, 0.25), abs=1e-12)


def test_owl_counts_scores_above_a_multiple_of_their_mean() -> None:
    scores = torch.tensor([1.0] * 97 + [1000.0, 200.0, 5.0])
    assert float(make("owl").digest(scores)) == pytest.approx(0.02)
    assert float(registry.get("allocator", "owl")(outlier=20.0).digest(scores)) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "name, options", [("owl", {"outlier": 0.0}), ("owl", {"half_range": 0.6}), ("error", {"points": 1})]
)
def test_allocators_refuse_what_cannot_be(name: str, options: dict[str, float]) -> None:
    with pytest.raises(LosaError, match=next(iter(options))):
        registry.get("allocator", name)(**options)


# ------------------------------------------------------------------------------------------------- measured errors


@given(seed=st.integers(0, 10**6), units=st.integers(1, 6), points=st.integers(2, 5), target=st.floats(0.1, 0.9))
@settings(deadline=None)
def test_measured_errors_are_minimised(seed: int, units: int, points: int, target: float) -> None:
    """For convex curves the piecewise linear optimum is that of a linear programme over the pieces."""
    random = np.random.default_rng(seed)
    allocator = registry.get("allocator", "error")(points=points)
    counts = random.integers(1, 50, units).tolist()
    tables, costs, widths = [], [], []
    for _ in range(units):
        rates = allocator.probes(target, 0.0, None)
        slopes = np.sort(random.random(points - 1))
        errors = np.concatenate([[0.1], 0.1 + np.cumsum(slopes * np.diff(rates))])
        tables.append(torch.tensor(np.stack([rates, errors])))
        costs.append(slopes)
        widths.append(np.diff(rates))
    found = allocator.rates(Evidence(target, counts, [0.0] * units, tables))
    assert mean(found, counts) == pytest.approx(target, abs=1e-12)
    low = np.array([float(table[0, 0]) for table in tables])
    weights = np.repeat(counts, points - 1)
    solved = linprog(
        np.concatenate(costs),
        A_eq=[weights],
        b_eq=[target * sum(counts) - low @ np.array(counts)],
        bounds=list(zip(np.zeros(len(weights)), np.concatenate(widths), strict=True)),
    )
    paid = sum(float(np.interp(rate, table[0], table[1])) - 0.1 for rate, table in zip(found, tables, strict=True))
    assert paid == pytest.approx(solved.fun, abs=1e-7)


def test_a_dent_in_the_errors_is_bridged() -> None:
    """Where more pruning costs less than some, the way there is priced as a whole."""
    tables = [torch.tensor([[0.4, 0.5, 0.6], [0.0, 1.0, 0.2]]), torch.tensor([[0.4, 0.5, 0.6], [0.0, 0.5, 1.0]])]
    assert make("error").rates(Evidence(0.5, [1, 1], [0.0, 0.0], tables)) == pytest.approx([0.6, 0.4])
