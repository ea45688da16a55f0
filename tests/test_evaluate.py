"""Perplexity against a float64 oracle, texts beside the dense model's, and what `losa evaluate` refuses before a model loads."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, save_tiny, tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import losa
from losa import compare, evaluate, model
from losa.cli import main
from losa.errors import LosaError
from losa.evaluate import Evaluation
from losa.recipe import Recipe

DOUBLE = tiny().double()
TEXT = torch.randint(2048, (90,), generator=torch.Generator().manual_seed(0))


def loss(tokens: Tensor, at: int, first: int) -> float:
    """Of the token at `at`, given those from `first` on."""
    with torch.no_grad():
        logits = DOUBLE(input_ids=tokens[None, first:at]).logits[0, -1]
    return -float(logits.log_softmax(-1)[tokens[at]])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_token_counts_once_with_the_context_its_window_gives(draw: st.DataObject) -> None:
    window = draw.draw(st.integers(2, 12))
    stride = draw.draw(st.integers(0, window - 1))
    tokens = TEXT[: draw.draw(st.integers(window, 30))]
    expected, seen = [], 1
    for first in range(0, len(tokens), stride or window):
        end = min(first + window, len(tokens))
        if not stride and end - first < window:
            break  # left out
        expected += [loss(tokens, at, first) for at in range(max(seen, first + 1), end)]
        seen = end
        if end == len(tokens):
            break
    assert not stride or len(expected) == len(tokens) - 1
    found = losa.perplexity(DOUBLE, tokens, window, stride)
    assert found == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)  # its losses are fp32


@pytest.mark.parametrize(("window", "stride"), [(91, 0), (1, 0), (16, 16), (16, -1)])
def test_windows_that_cannot_be(window: int, stride: int) -> None:
    with pytest.raises(LosaError, match="window"):
        losa.perplexity(DOUBLE, TEXT, window, stride)


def test_strides_on_the_command_line(llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--data", str(text), "--tokens", "300", "--window", "32", "--dtype", "float32"]
    assert main(["evaluate", str(llama), *rest, "--stride", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    joined = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines())
    tokens = torch.tensor(tokenizer()(joined)["input_ids"][:300])
    assert found["perplexity"] == pytest.approx(losa.perplexity(tiny(), tokens, 32, 8), rel=1e-6)
    assert (found["tokens"], found["window"], found["stride"]) == (300, 32, 8)
    assert main(["evaluate", str(llama), *rest, "--stride", "8"]) == 0
    assert "over 300 tokens" in (said := capsys.readouterr().out) and "windows of 32 every 8" in said
    assert main(["evaluate", str(llama), *rest]) == 0
    assert "over 288 tokens" in capsys.readouterr().out, "what fills no window is not read"


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: name --data"),
        (["--data", "short.txt"], "gives 3 tokens to evaluate on, less than one window of 64"),
        (["--data", "long.txt", "--tokens", "20"], "gives 20 tokens to evaluate on, less than one window of 64"),
        (["--data", "long.txt", "--window", "65"], "a window of 65 tokens: the model reads at most 64"),
        (["--data", "long.txt", "--stride", "64"], "--stride is 64: must be below the window of 64 tokens"),
        (["--data", "long.txt", "--stride", "-1"], "--limit and --stride at least 0"),
        (["--data", "nowhere.txt"], "does not exist"),
        (["--tasks", "demo-next-line", "--stride", "4"], "--data"),
        (["--tasks", "piqq"], "unknown task 'piqq': did you mean 'piqa'?"),
        (["--tasks", "mine.yaml"], "unknown task 'mine.yaml'"),
        (["--tasks", "piqa", "--task-data", "piqa"], "--task-data piqa: expected NAME=PATH"),
        (["--tasks", "piqa", "--task-data", "pica=x"], "unknown task in --task-data 'pica': did you mean 'piqa'?"),
        (["--tasks", "piqa", "--task-data", "boolq=x"], "boolq is not among the tasks (piqa)"),
        (["--tasks", "piqa", "--task-data", "piqa=nowhere"], "no such file or folder"),
        (["--data", "long.txt", "--task-data", "piqa=nowhere"], "--task-data is for --tasks"),
        (["--tasks", "piqa", "--limit", "-1"], "--limit"),
        (["--tasks", "piqa", "--batch-size", "0"], "--batch-size"),
        (["--against", "demo"], "give both"),
        (["--prompts", "long.txt"], "give both"),
        (["--against", "demo", "--prompts", "blank.txt"], "there is no prompt in it"),
        (["--against", "demo", "--prompts", "wikitext2"], "name a file"),
        (["--against", "demo", "--prompts", "long.txt"], "prompt 1 has 201 tokens, and the model reads at most 64"),
        (["--against", "other", "--prompts", "short.txt", "--max-new-tokens", "8"], "have different vocabularies"),
        (["--against", "nowhere/", "--prompts", "short.txt", "--max-new-tokens", "8"], "does not exist"),
    ],
)
def test_bad_input_is_known_before_the_model_loads(
    arguments: list[str],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("import os\n")
    Path("long.txt").write_text("def " * 200)
    Path("blank.txt").write_text("\n  \n")
    whole = json.loads((save_tiny(Path("other")) / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Path("other/tokenizer.json").write_text(json.dumps(whole))
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("the model was loaded"))
    assert main(["evaluate", str(llama), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("losa: ") and err.count("\n") == 1 and message in err


def test_compress_refuses_less_than_a_window(
    llama: Path, tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model, "load", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(LosaError, match="gives 40 tokens to evaluate on, less than one window of 64"):
            losa.compress(str(llama), changed(small, eval_tokens=40), tmp_path / "out")
        with pytest.raises(LosaError, match="a window of 65 tokens: the model reads at most 64"):
            losa.compress(str(llama), changed(small, eval_window=65), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = losa.compress(str(llama), changed(small, eval_tokens=40, eval_window=20, recovery="none", steps=1))
    from losa.data import evaluation_tokens

    tokens = evaluation_tokens(small.eval_data, tokenizer(), 20, 40)
    assert result.measurements["dense"]["perplexity"] == pytest.approx(losa.perplexity(tiny(), tokens, 20), rel=1e-5)


# ------------------------------------------------------------------------------------------------- texts side by side


def greedy(of: Any, ids: list[int], count: int) -> list[int]:
    """What it writes, the whole text read anew for every token."""
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count:
            ids = [*ids, int(of(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == of.config.eos_token_id:
                break
    return ids[start:]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A dense model that asks to be sampled from, and one with less in it."""
    dense, sparse = tiny(), tiny()
    for each in (dense, sparse):
        each.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    with torch.no_grad():
        for weight in sparse.parameters():
            weight[weight.abs() < 0.3 * weight.std()] = 0
    return dense, sparse


def test_agreement_and_perplexity_against_an_oracle(pair: tuple[Any, Any]) -> None:
    dense, sparse = pair
    prompts = ["def main():", "import os\nimport sys\n"]
    found = compare.compare(sparse, dense, tokenizer(), prompts, 12)
    agreeing, of_dense, of_sparse = [], [], []
    for prompt, line in zip(prompts, found["prompts"], strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        texts = greedy(dense, ids, 12), greedy(sparse, ids, 12)
        assert [line["dense"], line["sparse"]] == [tokenizer().decode(text, skip_special_tokens=True) for text in texts]
        assert line["same"] == next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 12)
        here = [greedy(sparse, ids + texts[0][:i], 1)[0] == texts[0][i] for i in range(len(texts[0]))]
        losses = [[loss(torch.tensor(ids + t), len(ids) + i, 0) for i in range(len(t))] for t in texts]
        assert line["agreement"] == sum(here) / len(here)
        for name, of in zip(("dense", "sparse"), losses, strict=True):
            assert line["perplexity"][name] == pytest.approx(math.exp(sum(of) / len(of)), rel=1e-4)
        agreeing += here
        of_dense += losses[0]
        of_sparse += losses[1]
    assert 0 < found["agreement"] == sum(agreeing) / len(agreeing) < 1
    assert found["perplexity"]["dense"] == pytest.approx(math.exp(sum(of_dense) / len(of_dense)), rel=1e-4)
    assert found["perplexity"]["sparse"] == pytest.approx(math.exp(sum(of_sparse) / len(of_sparse)), rel=1e-4)


def test_a_model_agrees_with_itself(pair: tuple[Any, Any]) -> None:
    found = compare.compare(pair[0], pair[0], tokenizer(), ["def main():"], 9)
    assert found["agreement"] == 1 and found["perplexity"]["dense"] == found["perplexity"]["sparse"]
    assert found["prompts"][0]["dense"] == found["prompts"][0]["sparse"] and found["prompts"][0]["same"] == 9


def test_side_by_side(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"text": "import os\\n"}\n{"instruction": "Name [bold]one[/bold].", "output": "x"}'
    )
    rest = ["--against", str(llama), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "6"]
    window = {"max_new_tokens": 6, "against": str(llama), "prompts": str(tmp_path / "prompts.jsonl")}
    with pytest.raises(LosaError, match="prompt 2 has"):  # the prompt is the instruction in its template
        evaluate.evaluate(str(llama), Evaluation(**window), Recipe())
    (tmp_path / "prompts.jsonl").write_text('{"text": "import os\\n"}\n{"text": "# [bold]x[/bold]"}')
    assert main(["evaluate", str(llama), *rest]) == 0
    said = capsys.readouterr().out
    assert "[bold]x[/bold]" in said and "agreement 100.0% of the tokens" in said
    assert main(["evaluate", str(llama), *rest, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["comparison"]
    assert [line["prompt"] for line in found["prompts"]] == ["import os\n", "# [bold]x[/bold]"]
