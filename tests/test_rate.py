"""The learning rate that short trials choose: the best of those tried, and nothing else changed by trying."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, files, killed_after, tiny, tokenizer

import losa
from losa import pipeline, registry
from losa.blocks import Subject, find_blocks
from losa.data import training_examples
from losa.errors import Diverged, LosaError
from losa.progress import Progress
from losa.recipe import Recipe, from_settings
from losa.recovery import rate as rates
from losa.recovery.base import Recovery
from losa.run import Run

QUIET = Run(None, Progress(quiet=True))


def subject_of(recipe: Recipe) -> Subject:
    model = tiny()
    subject = Subject(model, tokenizer(), find_blocks(model), "tiny", torch.float32)
    recovery = registry.get("recovery", recipe.recovery)
    subject.wrap(recovery.layer, recipe, recipe.max_rank if recovery.ranks else 0)
    if recovery.ranks:
        pipeline.set_ranks(subject, recipe, 1, recipe.rank_by, [1.0, 1.0, 1.0])
    return subject


@pytest.mark.parametrize("best", [1.6e-2, 4e-3, 2e-3, 1e-3, 3e-5, 1e-6, 10.0])
@pytest.mark.parametrize("fails_from", [math.inf, 3e-2])
def test_it_is_the_lowest_of_a_valley(
    best: float, fails_from: float, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of the square root of two, and never out of bounds."""
    tried: list[float] = []

    class Fake(registry.get("recovery", "none")):  # type: ignore[misc]
        def recover(self, _subject: Any, _examples: Any, recipe: Recipe, *_: Any) -> None:
            tried.append(recipe.peak_rate)
            if recipe.peak_rate >= fails_from:
                raise Diverged("diverged")

    monkeypatch.setattr(rates, "held_out_loss", lambda *_: abs(math.log(tried[-1] / best)))
    recipe = changed(small, steps=1, learning_rate="auto")
    examples = training_examples(small.train_data, tokenizer(), 16, 24, 0)
    found = rates.choose_rate(subject_of(recipe), Fake(), examples, recipe, 1, QUIET)
    reachable = min(max(best, rates.LOWEST), rates.HIGHEST, fails_from / 1.0001)
    assert reachable / 2 <= found <= reachable * (1.42 if best > rates.LOWEST else 2)
    assert min(tried) >= rates.LOWEST and max(tried) <= rates.HIGHEST and len(tried) == len(set(tried))


@pytest.mark.parametrize("name", [n for n in registry.RECOVERIES if registry.get("recovery", n).trains])
def test_trials_leave_the_model_as_it_was(name: str, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = changed(
        small, recovery=name, rank_by=registry.get("recovery", name).rank_by[0], steps=1, learning_rate="auto"
    )
    subject = subject_of(recipe)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    rows: list[int] = []
    method: type[Recovery] = registry.get("recovery", name)
    recover = method.recover

    def spy(self: Any, subject: Any, examples: Any, *rest: Any) -> None:
        rows.append(len(examples))
        recover(self, subject, examples, *rest)

    monkeypatch.setattr(method, "recover", spy)
    examples = training_examples(small.train_data, tokenizer(), 30, 24, 0)
    monkeypatch.setattr(rates, "TRIAL", 2)
    kept = rates._trained(subject.blocks[0].masked["model.layers.0.mlp.up_proj"], method())
    assert ("weight" in kept) == (not method.ranks) and "mask_bits" not in kept
    found = rates.choose_rate(subject, method(), examples, recipe, 1, QUIET)
    assert found > 0 and len(rows) >= 3 and set(rows) == {8}
    after = subject.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())


@pytest.mark.parametrize("highest", [1.5e-3, 1e-4, 1.6e-5])
def test_a_loss_that_is_no_number_loses(highest: float, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search begins: below it there is one that trains."""
    tried: list[float] = []

    class Fake(registry.get("recovery", "none")):  # type: ignore[misc]
        def recover(self, _subject: Any, _examples: Any, recipe: Recipe, *_: Any) -> None:
            tried.append(recipe.peak_rate)

    monkeypatch.setattr(rates, "held_out_loss", lambda *_: math.nan if tried[-1] > highest else tried[-1])
    recipe = changed(small, steps=1, learning_rate="auto")
    examples = training_examples(small.train_data, tokenizer(), 16, 24, 0)
    assert rates.choose_rate(subject_of(recipe), Fake(), examples, recipe, 1, QUIET) < highest


def test_what_no_rate_trains_is_said(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "held_out_loss", lambda *_: math.nan)
    recipe = changed(small, steps=1, learning_rate="auto")
    with pytest.raises(LosaError, match=r"no learning rate from 1\.\d+e-05 to 0\.004 trains"):
        losa.compress(tiny(), recipe, tokenizer=tokenizer())


def test_what_has_nothing_to_do_with_the_rate_is_said(small: Recipe) -> None:
    class Fake(registry.get("recovery", "none")):  # type: ignore[misc]
        def recover(self, *_: Any) -> None:
            raise LosaError("one rank only")

    recipe = changed(small, steps=1, learning_rate="auto")
    examples = training_examples(small.train_data, tokenizer(), 16, 24, 0)
    with pytest.raises(LosaError, match="one rank only"):
        rates.choose_rate(subject_of(recipe), Fake(), examples, recipe, 1, QUIET)


def test_a_run_uses_and_tells_what_was_found(llama: Path, small: Recipe, tmp_path: Path) -> None:
    """First and last step search, those between take the first's; the same as giving the number; a kill changes nothing."""
    recipe = changed(small, learning_rate="auto", steps=3, train_samples=30, checkpoint_minutes=0.0)
    result = losa.compress(str(llama), recipe, tmp_path / "whole")
    found = [record["learning_rate"] for record in result.history]
    events = [json.loads(line) for line in (tmp_path / "whole" / "run" / "log.jsonl").read_text().splitlines()]
    trials = [event for event in events if event["event"] == "trial"]
    assert {trial["step"] for trial in trials} == {1, 3} and found[0] == found[1]
    for step in (1, 3):
        tried = {trial["rate"]: trial["loss"] for trial in trials if trial["step"] == step}
        assert found[step - 1] == min(tried, key=lambda rate: tried[rate])
    used = {event["step"]: event["rate"] for event in events if event["event"] == "update" and event["update"] == 1}
    assert used[1] == found[0]
    for moment in (3, 4, 6, 12):  # the first rate, the first update, the second step, the last rate
        output = tmp_path / f"killed-{moment}"
        with killed_after(moment):
            losa.compress(str(llama), recipe, output)
        losa.compress(str(llama), recipe, output, resume=True)
        assert files(output) == files(tmp_path / "whole")


def test_what_is_neither_a_number_nor_auto_is_refused(small: Recipe) -> None:
    with pytest.raises(LosaError, match="learning_rate is 'fast': must be a number or auto"):
        changed(small, learning_rate="fast")
    with pytest.raises(LosaError, match="train_samples"):
        changed(small, learning_rate="auto", train_samples=2)
    assert type(from_settings({"learning_rate": 1}).learning_rate) is float


def test_trials_show_how_far_they_are(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Progress, "track", lambda _, items, what, *rest: shown.append(what) or iter(items))
    monkeypatch.setattr(rates, "TRIAL", 1)
    recipe = changed(small, steps=1, learning_rate="auto")
    examples = training_examples(small.train_data, tokenizer(), 16, 24, 0)
    rates.choose_rate(subject_of(recipe), recipe.build("recovery"), examples, recipe, 1, QUIET)
    assert {"step 1/1: trying 0.002", "step 1/1: trying 0.004"} <= set(shown)
