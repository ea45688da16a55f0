"""What work takes, and what is read along the way: seconds, memory, samples, places of a text."""

import json
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from conftest import LONG, changed, tiny, tokenizer
from hypothesis import given
from hypothesis import strategies as st

import losa
from losa import evaluate, measuring, usage
from losa.blocks import Subject
from losa.errors import LosaError
from losa.inputs import Inputs, read
from losa.progress import Progress
from losa.recipe import Recipe
from losa.run import Run
from losa.usage import Usage


def test_memory_is_what_was_held_inside() -> None:
    """Whether that is the process's peak or not: it is still held at the last look."""
    with Usage() as nothing:
        pass
    with Usage() as held:
        kept = numpy.ones(40_000_000)  # 320 MB
    assert 250e6 < held.found["memory"] - nothing.found["memory"] < 400e6 and len(kept)


def test_a_peak_is_the_works_or_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, present = 100, 50
    looked = threading.Event()

    def look() -> int:
        if present == 90:
            looked.set()
        return present

    monkeypatch.setattr(usage, "_meters", lambda: {"memory": (lambda: peak, look)})
    monkeypatch.setattr(usage, "SAMPLED", LONG)
    with Usage() as nothing:
        pass
    with Usage() as kept:
        present = 70
    with Usage() as freed:
        present = 60
    with Usage() as more:
        peak = 130
    monkeypatch.setattr(usage, "SAMPLED", 0.001)
    with Usage() as between:
        present = 90
        assert looked.wait(LONG)
        present = 60
    found = [used.found["memory"] for used in (nothing, kept, freed, more, between)]
    assert found == [50, 70, 70, 130, 90]


def test_seconds_are_those_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "time", SimpleNamespace(monotonic=iter([10.0, 12.3456]).__next__))
    with Usage() as used:
        pass
    assert used.found["seconds"] == 2.346


def test_the_machine_is_named() -> None:
    found = usage.machine(torch.device("cpu"))
    assert found["processor"] and found["cores"] and found["threads"] == torch.get_num_threads()


@given(st.integers(2, 400), st.integers(2, 50), st.integers(2, 500))
def test_a_spread_sample_is_whole_windows_in_order(count: int, window: int, wanted: int) -> None:
    tokens = torch.arange(count)
    found = evaluate.spread(tokens, window, wanted)
    if wanted >= count:
        assert torch.equal(found, tokens)
        return
    size = min(window, wanted)
    parts = found.split(size)
    assert 0 < len(found) <= wanted and len(found) + size > min(wanted, count // size * size)
    starts = [int(part[0]) for part in parts]
    assert all(
        start % size == 0 and torch.equal(part, tokens[start : start + size])
        for start, part in zip(starts, parts, strict=True)
    )
    gaps = [after - before for before, after in pairwise(starts)]
    assert not gaps or (min(gaps) > 0 and max(gaps) - min(gaps) <= size)


def subject(**changes: Any) -> Subject:
    model = tiny()
    for name, value in changes.items():
        setattr(model, name, value)
    return Subject(model, tokenizer(), [], "tiny", model.dtype)


def samples_of(subject: Subject, recipe: Recipe, prompts: list[str], folder: Path) -> list[str]:
    """What `sample` logs of them."""
    run = Run(folder, Progress(quiet=True))
    run.start(recipe, "tiny", overwrite=True)
    inputs = Inputs(torch.empty(0, 0, dtype=torch.int64), [], None, prompts)
    measuring.sample(subject, recipe, inputs, "dense", run)
    run.close()
    found: list[str] = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])["texts"]
    return found


def test_samples_are_seeded_and_leave_torch_alone(small: Recipe, tmp_path: Path) -> None:
    recipe, model = changed(small, sample_tokens=6), subject()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = samples_of(model, recipe, ["def", "class"], tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)
    assert first == samples_of(subject(), recipe, ["def", "class"], tmp_path / "out") and len(first) == 2
    assert first != samples_of(subject(), changed(recipe, seed=1), ["def", "class"], tmp_path / "out")


def test_samples_end_where_the_model_does(small: Recipe, tmp_path: Path) -> None:
    """Tiny models read 64 tokens."""
    words = tokenizer()
    text = words.decode(torch.arange(300, 360))
    count = len(words(text)["input_ids"])
    assert 60 <= count < 64
    (made,) = samples_of(subject(), changed(small, sample_tokens=100), [text], tmp_path / "out")
    assert len(words(made)["input_ids"]) <= 2 * (64 - count)
    with pytest.raises(LosaError, match="reads at most 64"):
        losa.compress(tiny(), changed(small, prompts=[text * 3]), tokenizer=words)
    with pytest.raises(LosaError, match="texts that are not empty"):
        changed(small, prompts=[""])


def test_prompts_are_the_users_or_the_texts(small: Recipe) -> None:
    words, config = tokenizer(), tiny().config
    assert read(changed(small, prompts=["def"]), words, config).prompts == ["def"]
    assert read(changed(small, sample_tokens=0, prompts=["def"]), words, config).prompts == []
    assert read(changed(small, eval_data=""), words, config).prompts == []
    inputs = read(small, words, config)
    assert inputs.evaluation is not None
    text = words.decode(inputs.evaluation)
    assert len(inputs.prompts) == 2 and all(prompt in text for prompt in inputs.prompts)


def test_a_model_that_cannot_continue_says_what_to_leave_out(small: Recipe, tmp_path: Path) -> None:
    with pytest.raises(LosaError, match="--sample-tokens 0"):
        samples_of(subject(generate=None), small, ["def"], tmp_path / "out")


def test_size_is_that_of_the_type_it_is_saved_in() -> None:
    made = subject()
    values = sum(parameter.numel() for parameter in made.model.parameters())
    assert made.size == 4 * values
    made.stored = torch.bfloat16
    assert made.size == 2 * values
    tied = Subject(tiny("llama-tied"), tokenizer(), [], "tiny", torch.float32)
    assert tied.size == 4 * sum(parameter.numel() for parameter in tied.model.parameters())
