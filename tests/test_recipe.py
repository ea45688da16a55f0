"""The recipe: documented, checked, and the same after JSON; schedules and constants against the paper's."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa import recipe, registry
from losa.errors import LosaError
from losa.recipe import RECIPES, Recipe, from_settings, load
from losa.recipe_checks import refuse_unread

FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_documented(name: str) -> None:
    assert FIELDS[name].metadata["doc"].strip()


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", [None, *RECIPES])
def test_shipped_recipes_round_trip_through_json(name: str | None, tmp_path: Path) -> None:
    made = load(name)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(made.to_json(), allow_nan=False))
    assert load(str(path)) == made


def test_all_files_shipped_are_listed() -> None:
    assert {path.stem for path in (Path(recipe.__file__).parent / "recipes").glob("*.json")} == set(RECIPES)


def test_overrides_go_on_top() -> None:
    assert load("paper", {"sparsity": 0.5}) == dataclasses.replace(load("paper"), sparsity=0.5)


@pytest.mark.parametrize("make", [Recipe, lambda **settings: from_settings(settings)])
def test_a_whole_number_is_a_float_where_one_is_meant(make: Any) -> None:
    made = make(alpha=16, sparsity=0)
    assert (type(made.alpha), type(made.sparsity)) == (float, float)


def test_changing_the_json_does_not_change_the_recipe() -> None:
    made = Recipe(ignore=["lm_head"])
    made.to_json()["ignore"].append("x")
    assert made.ignore == ["lm_head"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "one JSON object"),
        (b"\xff\xfe", "is not JSON"),
        ('{"steps": "5"}', "steps"),
        ('{"steps": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_files_are_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LosaError, match=message):
        load(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(LosaError, match=r"nowhere\.json.*does not exist"):
        load("nowhere.json")


# ------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("settings", "near"),
    [
        ({"sparsty": 0.5}, "sparsity"),
        ({"pruner": "wand"}, "wanda"),
        ({"allocator": "unifrm"}, "uniform"),
        ({"recovery": "losaa"}, "losa"),
        ({"schedule": "cubik"}, "cubic"),
        ({"rank_by": "eror"}, "error"),
        ({"pruner": "sparsegpt", "pruner_options": {"dampp": 0.1}}, "damp"),
        ({"pruner": "magnitude", "pruner_options": {"unit": "rows"}}, "row"),
        ({"allocator_options": {"detla": 0.1}}, "delta"),
    ],
)
def test_unknown_names_get_the_nearest(settings: dict[str, Any], near: str) -> None:
    with pytest.raises(LosaError, match=f"did you mean '{near}'"):
        from_settings(settings)


def test_an_unknown_recipe_gets_the_nearest() -> None:
    with pytest.raises(LosaError, match="did you mean 'paper'"):
        load("papers")


def test_a_name_near_to_none_gets_them_all() -> None:
    with pytest.raises(LosaError, match=", ".join(sorted(registry.KINDS["pruner"]))):
        Recipe(pruner="qqq")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("steps", 0),
        ("steps", 5.0),
        ("mean_rank", -1.0),
        ("rank_growth", -1.0),
        ("targets", "("),
        ("ignore", ["("]),
        ("ignore", [1]),
        ("ignore", "lm_head"),
        ("calibration_samples", 0),
        ("calibration_samples", 1),
        ("sequence_length", 0),
        ("allocation_samples", 1),
        ("error_tokens", -1),
        ("train_samples", 4),
        ("train_length", 0),
        ("last_step_share", 1.1),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("micro_batch_size", 3),
        ("warmup", -0.1),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("alpha", 0.0),
        ("alpha", 10**400),
        ("base_rank", 0),
        ("eval_tokens", -1),
        ("checkpoint_minutes", -1.0),
        ("seed", 10**30),
        ("device", "gpu"),
        ("dtype", "float64"),
        ("schedule", []),
        ("pruner", 3),
        ("pruner_options", []),
        ("allocator_options", {"delta": "wide"}),
        ("allocator_options", {"delta": -0.1}),
        ("allocator_options", {"beta": None}),
        ("allocator_options", {"beta": math.nan}),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(LosaError, match=name):
        from_settings({name: value})


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if f.type is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", [1.0]])
def test_what_is_no_finite_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(LosaError, match=rf"^{name}: "):
        from_settings({name: value})


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if f.type is int])
@pytest.mark.parametrize("value", [True, 64.0, "64", None, math.nan])
def test_what_is_no_int_is_refused(name: str, value: object) -> None:
    if value is None and FIELDS[name].default is None:
        pytest.skip("its default")
    with pytest.raises(LosaError, match=rf"^{name}: expected int"):
        from_settings({name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"allocator": "uniform", "allocation_samples": 1, "calibration_samples": 1},
        {"recovery": "none", "steps": 1, "train_samples": 1},
        {"pruner": "sparsegpt", "pruner_options": {"damp": 1, "block": 64}},
        {"allocator_options": {"delta": None}},
        {"device": "cuda:1"},
    ],
)
def test_what_is_not_bad_is_accepted(settings: dict[str, Any]) -> None:
    assert from_settings(settings).to_json() == Recipe().to_json() | settings


# ------------------------------------------------------------------------------------------------- schedules


def test_cubic_schedule() -> None:
    made = Recipe(sparsity=0.6, steps=5, schedule="cubic")
    want = [0.2928, 0.4704, 0.5616, 0.5952, 0.6]
    assert [made.sparsity_at(step) for step in range(1, 6)] == pytest.approx(want, abs=1e-12)


def test_linear_schedule() -> None:
    made = Recipe(sparsity=0.6, steps=5, schedule="linear")
    assert [made.sparsity_at(step) for step in range(1, 6)] == pytest.approx([0.12, 0.24, 0.36, 0.48, 0.6], abs=1e-12)


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
@given(sparsity=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 50))
def test_schedules_rise_to_exactly_the_sparsity(schedule: Any, sparsity: float, steps: int) -> None:
    made = Recipe(sparsity=sparsity, steps=steps, schedule=schedule)
    values = [made.sparsity_at(step) for step in range(1, steps + 1)]
    assert values == sorted(values)
    assert values[-1] == sparsity


def test_mean_rank_grows_and_bounds_the_largest() -> None:
    made = Recipe(mean_rank=6.0, rank_growth=1.5, steps=5)
    assert [made.mean_rank_at(step) for step in range(1, 6)] == [6, 7.5, 9, 10.5, 12]
    assert made.max_rank == 24
    assert Recipe(mean_rank=2.0, steps=1).max_rank == 16


@given(steps=st.integers(1, 12), extra=st.integers(0, 500), share=st.floats(0, 1))
def test_every_row_is_used_exactly_once(steps: int, extra: int, share: float) -> None:
    made = Recipe(steps=steps, train_samples=steps + extra, last_step_share=share, learning_rate=1e-3)
    rows = [row for step in range(1, steps + 1) for row in made.rows_of(step)]
    assert rows == list(range(steps + extra))
    if 0 < share < 1:
        assert all(len(made.rows_of(step)) > 0 for step in range(1, steps + 1))


@pytest.mark.parametrize(("batch", "micro"), [(8, 4), (6, 3), (2, 2), (7, 1)])
def test_rows_at_once_fit_the_batch(batch: int, micro: int) -> None:
    assert Recipe(batch_size=batch).micro_batch_size == micro


# ------------------------------------------------------------------------------------------------- the paper's


def test_paper_recipe_has_the_papers_constants() -> None:
    made = load("paper")
    assert [made.mean_rank_at(step) for step in range(1, made.steps + 1)] == [6, 7, 8, 9, 10]
    assert (made.schedule, made.pruner, made.allocator, made.rank_by) == ("cubic", "wanda", "rmi", "error")
    assert (made.alpha, made.base_rank, made.scaling) == (16, 8, 2)
    assert (made.calibration, made.calibration_samples, made.sequence_length) == ("c4", 128, 2048)
    assert made.allocation_samples == 64
    assert (made.train_data, made.train_length, made.loss_on) == ("alpaca-gpt4", 1024, "all")
    assert [len(made.rows_of(step)) for step in range(1, 6)] == [1000, 1000, 1000, 1000, 6000]
    assert (made.learning_rate, made.warmup, made.weight_decay, made.clip) == (2e-4, 0.3, 0.001, 0.3)
    assert (made.batch_size, made.micro_batch_size) == (8, 4)
    assert (made.targets, made.ignore, made.eval_data) == ("all", [], "wikitext2")
    assert registry.get("allocator", made.allocator)(**made.allocator_options).beta == 1


@pytest.mark.parametrize(("name", "recovery"), [("lora", "lora"), ("sparse-lora", "sparse-lora"), ("sora", "sora")])
def test_comparisons_are_one_step_of_rank_8_and_uniform_rates(name: str, recovery: str) -> None:
    made = load(name)
    assert (made.recovery, made.steps, made.mean_rank) == (recovery, 1, 8)
    assert (made.allocator, made.rank_by) == ("uniform", "uniform")


@pytest.mark.parametrize("name", ["paper", "demo"])
@pytest.mark.parametrize("recovery", sorted(registry.RECOVERIES))
def test_a_recovery_named_beside_a_recipe_takes_of_it_what_it_can(name: str, recovery: str) -> None:
    method, made = registry.get("recovery", recovery), load(name, {"recovery": recovery})
    assert made.steps == (1 if method.once else 5)
    assert made.rank_by == method.rank_by[0]
    assert made.calibration == load(name).calibration
    if method.once:  # what is asked for beside it is not bent
        with pytest.raises(LosaError, match="set steps to 1"):
            load(name, {"recovery": recovery, "steps": 5})
    assert load(None, {"recovery": "none"}).steps == 1


def test_recipes_go_on_top_of_each_other(tmp_path: Path) -> None:
    both = load("demo,best", {"seed": 3})
    demo, best = (
        json.loads((Path(recipe.__file__).parent / "recipes" / f"{n}.json").read_text()) for n in ("demo", "best")
    )
    assert both == from_settings(demo | best | {"seed": 3})
    assert both.calibration == "demo" and both.recovery == "full"
    path = tmp_path / "mine,too.json"
    path.write_text('{"steps": 2}')
    assert load(str(path)).steps == 2
    with pytest.raises(LosaError, match="did you mean 'best'"):
        load("demo,bets")


@pytest.mark.parametrize(("name", "ranks"), [("best", False), ("best-adapters", True)])
def test_best_says_nothing_of_data(name: str, ranks: bool) -> None:
    made = load(name)
    assert registry.get("recovery", made.recovery).ranks == ranks and registry.get("recovery", made.recovery).merges
    assert (made.calibration, made.train_data, made.learning_rate) == ("c4", "alpaca-gpt4", "auto")


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"recovery": "none", "distill": 0.5}, "distill"),
        ({"recovery": "none", "targets": "qv"}, "targets"),
        ({"recovery": "full", "mean_rank": 8.0}, "mean_rank"),
        ({"recovery": "full", "alpha": 8.0}, "alpha"),
        ({"recovery": "full", "rank_by": "error"}, "rank_by"),
        ({"distill_temperature": 2.0}, "distill_temperature"),
        ({"teacher": "cached"}, "teacher"),
        ({"distill": 0.5, "teacher_top": 8}, "teacher_top"),
        ({"reconstruct_rate": 0.1}, "reconstruct_rate"),
        ({"recovery": "none", "learning_rate": 1e-3}, "learning_rate"),
        ({"recovery": "none", "train_data": "rows.jsonl"}, "train_data"),
        ({"recovery": "none", "warmup": 0.2}, "warmup"),
        ({"steps": 1, "schedule": "linear"}, "schedule"),
        ({"recovery": "sparse-lora", "rank_growth": 2.0}, "rank_growth"),
        ({"eval_tokens": 100}, "eval_tokens"),
        ({"allocator": "uniform", "allocation_samples": 8}, "allocation_samples"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(asked: dict[str, Any], name: str) -> None:
    """Where it is asked for by hand; recipes that are combined may hold it, and the usual value says nothing."""
    made = load(None, asked)
    with pytest.raises(LosaError, match=f"{name} .* would change nothing: leave it out, or"):
        refuse_unread(made, asked)
    refuse_unread(made, {key: value for key, value in asked.items() if key != name})
    if name != "rank_by":
        refuse_unread(made, {name: getattr(Recipe(), name)})


def test_what_is_read_is_not_refused() -> None:
    for names, asked in (
        (None, {"distill": 0.5, "teacher": "cached", "teacher_top": 8}),
        (None, {"mean_rank": 8.0, "alpha": 8.0}),
        ("finetune-then-sparsify", {"mean_rank": 4.0, "targets": "qv", "learning_rate": 1e-3}),
        (None, {"recovery": "none", "reconstruct": 2, "warmup": 0.2, "reconstruct_rate": 0.1}),
    ):
        refuse_unread(load(names, asked), asked)
