"""The dense model as a teacher: the divergence against float64, whole and bucketed; what is cached; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, files, killed_after, save_tiny, tiny, tokenizer
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import losa
from losa import data
from losa.blocks import Subject, find_blocks
from losa.errors import LosaError
from losa.inputs import Inputs
from losa.inspection import plan
from losa.progress import Progress
from losa.recipe import Recipe
from losa.recovery import distillation
from losa.recovery.distillation import Cached, Live, Prediction, divergence, mixed_loss, shortened
from losa.run import Run

# ------------------------------------------------------------------------------------------------- the divergence


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in float64, summed, 0 log 0 being 0."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum()


def bucketed(p: Tensor, ids: Tensor) -> Tensor:
    """The masses of the tokens `ids` and of all others together."""
    top = p.gather(1, ids)
    return torch.cat([top, (1 - top.sum(1, keepdim=True)).clamp(min=0)], dim=1)


@given(
    n=st.integers(1, 6),
    vocabulary=st.integers(2, 40),
    padding=st.integers(0, 3),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    sharp=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
@bounded(max_examples=100, deadline=None)
def test_it_is_kl_of_all_tokens_or_of_the_likeliest_and_the_rest(
    n: int, vocabulary: int, padding: int, k: int, temperature: float, sharp: float, seed: int
) -> None:
    """The student's head may be padded: what the teacher does not know takes no part."""
    generator = torch.Generator().manual_seed(seed)
    student = (sharp * torch.randn(n, vocabulary + padding, generator=generator)).requires_grad_()
    teacher = sharp * torch.randn(n, vocabulary, generator=generator)
    q = F.softmax(student[:, :vocabulary].double() / temperature, dim=1)
    p = F.softmax(teacher.double() / temperature, dim=1)
    whole = Prediction(vocabulary, F.log_softmax(teacher / temperature, dim=1))
    part = shortened(whole, min(k, vocabulary))
    assert part.ids is not None
    found = {}
    for name, said, truth in (
        ("whole", whole, kl(p, q)),
        ("part", part, kl(bucketed(p, part.ids), bucketed(q, part.ids))),
    ):
        got = divergence(student, said, temperature)
        gradient = torch.autograd.grad(got, student, retain_graph=True)[0]
        expected = torch.autograd.grad(truth, student, retain_graph=True)[0]
        torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
        found[name] = float(got.detach())
    assert -1e-5 <= found["part"] <= found["whole"] + 1e-4
    if k >= vocabulary:
        assert found["part"] == pytest.approx(found["whole"], rel=1e-3, abs=1e-4)


def batch(rows: int = 3, length: int = 9, ignored: bool = True) -> tuple[list[data.Example], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in range(rows):
        ids = torch.randint(2, 2048, (length - row,), generator=generator)
        labels = ids.clone()
        labels[: 2 * row * ignored] = data.IGNORED
        examples.append(data.Example(ids, labels))
    return examples, data.collate(examples, 0, length + 5)


@pytest.mark.parametrize("chunk", [1, 5000, 1 << 26])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_mixed_loss_has_the_gradients_of_its_formula(
    share: float, chunk: int, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    recipe = changed(small, distill=share, distill_temperature=2.0)
    student, teacher = tiny(), tiny("llama")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter *= 1.1
    _, inputs = batch()
    labels = int(distillation.counted(inputs["labels"]).sum())
    weights = [linear.weight for block in find_blocks(student) for linear in block.linears.values()]
    said = Live(teacher, 2048, 2.0).predict([0, 1, 2], inputs)
    got = mixed_loss(student, inputs, said, recipe, labels)
    gradients = [weight.grad.clone() for weight in weights]
    student.zero_grad()
    where = inputs["labels"][:, 1:] != data.IGNORED
    named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = (model(**named).logits[:, :-1][where].double() for model in (student, teacher))
    p, q = F.softmax(theirs.detach() / 2, dim=1), F.softmax(ours / 2, dim=1)
    truth = (1 - share) * F.cross_entropy(ours, inputs["labels"][:, 1:][where], reduction="sum") + share * 4 * kl(p, q)
    (truth / labels).backward()
    assert got == pytest.approx(float(truth.detach()) / labels, rel=1e-4)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert (weight.grad - gradient).norm() <= 1e-4 * weight.grad.norm()


def test_a_student_that_is_the_teacher_stays_as_it_is(small: Recipe) -> None:
    recipe = changed(small, sparsity=0.0, steps=1, distill=1.0, recovery="full", weight_decay=0.0, learning_rate=1e-5)
    result = losa.compress(tiny(), recipe, tokenizer=tokenizer())
    before, after = (m["perplexity"] for m in result.measurements.values())
    assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("teacher", ["live", "cached"])
def test_distilling_comes_nearer_to_the_dense_model(teacher: str, llama: Path, small: Recipe, tmp_path: Path) -> None:
    """Nearer in divergence on held-out text than the same training without."""
    import transformers

    dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
    more = changed(small, train_samples=160, learning_rate=5e-3, steps=1, recovery="full", train_length=16)
    held = data.evaluation_tokens(small.eval_data, tokenizer())[-640:].view(-1, 32)

    def away(model: Any) -> float:
        with torch.no_grad():
            q, p = (F.log_softmax(m(held).logits, dim=-1) for m in (model, dense))
        return float(F.kl_div(q, p, log_target=True, reduction="sum")) / held.numel()

    plain = losa.compress(str(llama), more, tmp_path / "plain").model
    recipe = changed(more, distill=0.9, teacher=teacher, distill_temperature=1.5)
    taught = losa.compress(str(llama), recipe, tmp_path / "taught").model
    assert away(taught) < 0.9 * away(plain)


# ------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(("first", "made"), [(0.0, 3), (0.5, 2)])
def test_the_cache_says_what_the_model_says(
    first: float, made: int, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different lengths, in any order, over several files; none of rows that only fine-tune."""
    monkeypatch.setattr(distillation, "SHARD", 2)
    examples, _ = batch(rows=5, length=12)
    run = Run(tmp_path, Progress(quiet=True))
    (tmp_path / "run").mkdir()
    live = Live(tiny(), 2000, 1.5)  # the last tokens are none of theirs
    recipe = changed(small, teacher="cached", teacher_top=7, train_samples=5, finetune_first=first)
    cache = distillation.cached(live, examples, 0, recipe, run)
    assert isinstance(cache, Cached) and len(list((tmp_path / "run").iterdir())) == made
    rows = [4, 0 if made == 3 else 3, 3]
    inputs = data.collate([examples[row] for row in rows], 0)
    want, got = shortened(live.predict(rows, inputs), 7), cache.predict(rows, inputs)
    assert want.ids is not None and got.ids is not None and want.rest is not None and got.rest is not None
    assert torch.equal(got.ids, want.ids) and int(got.ids.max()) < 2000
    torch.testing.assert_close(got.logs.exp(), want.logs.exp(), rtol=0, atol=2e-3)
    torch.testing.assert_close(got.logs.exp().sum(1) + got.rest.exp(), torch.ones(len(got.rest)))


@pytest.mark.parametrize("moment", [2, 3, 5, 7])
def test_a_run_with_a_cached_teacher_killed_anywhere(
    moment: int, llama: Path, tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "SHARD", 6)
    recipe = changed(small, distill=0.5, teacher="cached", epochs=2, checkpoint_minutes=0.0)
    losa.compress(str(llama), recipe, tmp_path / "whole")
    with killed_after(moment):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "run").glob("*.safetensors"))


def test_a_live_teacher_is_dense_after_a_kill_too(llama: Path, tmp_path: Path, small: Recipe) -> None:
    recipe = changed(small, distill=0.5, checkpoint_minutes=0.0)
    losa.compress(str(llama), recipe, tmp_path / "whole")
    with killed_after(6):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_rows_are_read_again_in_another_order(small: Recipe) -> None:
    from losa.recovery.training import order_of

    order = order_of(50, changed(small, epochs=3))
    assert order[:50] == list(range(50)) and len(order) == 150
    assert sorted(order[50:100]) == sorted(order[100:]) == order[:50]
    assert order[50:100] != order[100:] and order[50:100] != order[:50]


# ------------------------------------------------------------------------------------------------- other teachers


def test_another_model_may_teach(llama: Path, tmp_path: Path, small: Recipe) -> None:
    """One with another head: what is beyond the tokens of both takes no part."""
    larger = tiny()
    larger.resize_token_embeddings(2056, mean_resizing=False)
    larger.save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = changed(small, distill=0.5, teacher_model=str(tmp_path / "teacher"), checkpoint_minutes=0.0)
    by_itself = losa.compress(str(llama), changed(recipe, teacher_model=""), tmp_path / "own").measurements
    by_other = losa.compress(str(llama), recipe, tmp_path / "other").measurements
    assert by_other["sparse"]["perplexity"] == pytest.approx(by_itself["sparse"]["perplexity"], rel=1e-3)
    with killed_after(3):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    larger.model.norm.weight.data *= 1.01
    larger.save_pretrained(tmp_path / "teacher")
    with pytest.raises(LosaError, match="not what the run was started with"):
        losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)


def test_a_teacher_goes_where_the_model_is(llama: Path, small: Recipe) -> None:
    student = tiny().to("meta")
    subject = Subject(student, tokenizer(), find_blocks(student), "tiny", torch.float32)
    recipe = changed(small, distill=0.5, teacher_model=str(llama))
    inputs = Inputs(torch.zeros(1, 2, dtype=torch.int64), batch()[0], None, [])
    live = distillation.teacher_of(subject, recipe, inputs, Run(None, Progress(quiet=True)))
    assert isinstance(live, Live) and live.model.device.type == "meta"


def test_a_teacher_of_another_vocabulary_is_refused(llama: Path, tmp_path: Path, small: Recipe) -> None:
    other = save_tiny(tmp_path / "teacher")
    added = tokenizer()
    added.add_tokens(["<new>"])
    model = tiny()
    model.resize_token_embeddings(2049, mean_resizing=False)
    model.save_pretrained(other)
    added.save_pretrained(other)
    recipe = changed(small, distill=0.5, teacher_model=str(other))
    with pytest.raises(LosaError, match=r"another vocabulary .*differ in '<new>'"):
        losa.compress(str(llama), recipe, tmp_path / "out")
    with pytest.raises(LosaError, match="does not exist"):
        losa.compress(str(llama), changed(recipe, teacher_model="./nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_mean_nothing_are_refused(small: Recipe) -> None:
    with pytest.raises(LosaError, match="would never be asked"):
        changed(small, teacher_model="gpt2")
    with pytest.raises(LosaError, match="name an output, or set teacher to live"):
        losa.compress(tiny(), changed(small, distill=0.5, teacher="cached"), tokenizer=tokenizer())
    for name, value in (("distill", 1.1), ("distill_temperature", 0.0), ("teacher_top", 0), ("epochs", 0)):
        with pytest.raises(LosaError, match=name):
            changed(small, **{name: value})


def test_a_plan_counts_the_teacher(llama: Path, small: Recipe) -> None:
    plain = plan(str(llama), small)
    live = plan(str(llama), changed(small, distill=0.5))
    cache = plan(str(llama), changed(small, distill=0.5, teacher="cached"))
    assert live["memory_parts"]["model"] - plain["memory_parts"]["model"] == 4 * plain["parameters"]
    assert cache["memory_parts"]["model"] == plain["memory_parts"]["model"]
    assert cache["disk"] - plain["disk"] == 16 * 24 * 64 * 6 and live["disk"] == plain["disk"]
