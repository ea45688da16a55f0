"""The model card of a saved model: true, valid for the hub, and never in the place of another's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import changed, save_tiny, tiny, tokenizer
from huggingface_hub import ModelCard

import losa
from losa import card, story
from losa.recipe import Recipe
from losa.report import render
from losa.sparse.convert import convert
from losa.units import size


@pytest.fixture
def brief(small: Recipe) -> Recipe:
    return changed(small, steps=1, train_samples=4, sample_tokens=0, eval_step_tokens=0)


def code_of(text: str, folder: Path) -> str:
    return text.partition("```python\n")[2].partition("```")[0].replace("DIR", str(folder))


def test_the_card_is_valid_and_true(llama: Path, tmp_path: Path, brief: Recipe) -> None:
    out = tmp_path / "out"
    result = losa.compress(str(llama), brief, out)
    read = ModelCard.load(out / "README.md")
    assert read.data.library_name == "transformers" and read.data.pipeline_tag == "text-generation"
    assert read.data.tags == ["losa", "pruned", "sparse", "wanda"] and read.data.license is None
    assert read.data.base_model is None  # a folder on this machine is no name on the hub
    (measured,) = read.data.eval_results
    assert measured.metric_type == "perplexity" and measured.dataset_name == "rows.jsonl"
    sparse = result.measurements["sparse"]
    assert measured.metric_value == pytest.approx(sparse["perplexity"], abs=1e-4)
    for fact in (
        f"{sparse['kept']:,}",
        f"{sparse['weights']:,}",
        "`llama`",
        "rows.jsonl",
        "seed 0",
        "first 500 tokens",
    ):
        assert fact in read.text, fact
    assert str(llama) not in read.text  # where it lay is nobody's business
    names: dict[str, Any] = {}
    exec(code_of(read.text, out), names)
    tokens = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(names["model"](tokens).logits, result.model(tokens).logits)
    assert names["tokenizer"]("def")["input_ids"]


def test_the_sources_license_is_named_and_its_card_is_not_copied(tmp_path: Path, brief: Recipe) -> None:
    source = save_tiny(tmp_path / "dense")
    text = "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\ntags: [theirs]\n---\n# A great model\n"
    (source / "README.md").write_text(text)
    losa.compress(str(source), brief, tmp_path / "out")
    read = ModelCard.load(tmp_path / "out" / "README.md")
    assert (read.data.license, read.data.license_name) == ("other", "tiny-1") and "`tiny-1`" in read.text
    assert "theirs" not in read.content and "great" not in read.content
    (source / "README.md").write_text("---\nlicense: [broken\n---\n")
    losa.compress(str(source), brief, tmp_path / "again")
    assert "No licence was found" in (tmp_path / "again" / "README.md").read_text()


def test_a_readme_that_is_not_losas_stays(
    llama: Path, tmp_path: Path, brief: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tell = losa.pipeline.tell

    def write_notes(*arguments: Any) -> None:
        tell(*arguments)
        (out / "README.md").write_text("my notes")

    with monkeypatch.context() as patch:
        patch.setattr("losa.pipeline.tell", write_notes)
        losa.compress(str(llama), brief, out)
    assert (out / "README.md").read_text() == "my notes"
    assert ModelCard.load(out / "run" / "README.md").data.library_name == "transformers"
    losa.compress(str(llama), brief, out, overwrite=True)
    assert (out / "README.md").read_text() == "my notes"
    losa.compress(str(llama), brief, tmp_path / "clean")
    losa.compress(str(llama), changed(brief, seed=1), tmp_path / "clean", overwrite=True)  # ours is ours to replace
    assert "seed 1" in (tmp_path / "clean" / "README.md").read_text()


def test_a_model_from_the_hub_is_linked(tmp_path: Path, llama: Path, brief: Recipe) -> None:
    losa.compress(str(llama), changed(brief, eval_data=""), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "losa.json").read_text())
    made["source"] = "someone/some-7b"
    made["recipe"] |= {"calibration": "c4", "train_data": "alpaca-gpt4"}
    card.write(tmp_path, made, None)
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == "someone/some-7b" and "huggingface.co/someone/some-7b" in read.text
    assert read.data.eval_results is None and "No perplexity was measured" in read.text
    made["recipe"]["eval_data"] = "wikitext2"
    made["measurements"] = json.loads(
        json.dumps(made["measurements"])
        .replace('"perplexity": null', '"perplexity": 9.5')
        .replace('"window": null', '"window": 64')
    )
    card.write(tmp_path, made, None)
    (measured,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (measured.dataset_type, measured.metric_value) == ("Salesforce/wikitext", 9.5)
    assert "whole windows of 64 tokens" in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_what_needs_more_than_transformers_says_so_and_loads(tmp_path: Path, llama: Path, brief: Recipe) -> None:
    pytest.importorskip("peft")
    losa.compress(str(llama), changed(brief, recovery="lora"), tmp_path / "apart")
    names: dict[str, Any] = {}
    text = (tmp_path / "apart" / "README.md").read_text()
    exec(code_of(text, tmp_path / "apart"), names)
    assert type(names["model"]).__name__.startswith("Peft") and "in `adapter/`" in text
    recipe = changed(brief, pattern="structured", pruner="wanda-sp", allocator="owl", recovery="none")
    losa.compress(str(llama), recipe, tmp_path / "smaller")
    text = (tmp_path / "smaller" / "README.md").read_text()
    code = code_of(text, tmp_path / "smaller")
    assert code.startswith("import losa") and "smaller as it is" in text
    exec(code, names)
    assert isinstance(names["model"], transformers.PreTrainedModel)


def test_a_loaded_model_has_a_card_too(tmp_path: Path, brief: Recipe) -> None:
    losa.compress(tiny(), brief, tmp_path / "out", tokenizer=tokenizer())
    assert "`LlamaForCausalLM`" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_exported_has_a_card_of_its_own(tmp_path: Path, llama: Path, brief: Recipe) -> None:
    losa.compress(str(llama), changed(brief, format="packed"), tmp_path / "packed")
    text = (tmp_path / "packed" / "README.md").read_text()
    assert "stored packed" in text and code_of(text, tmp_path / "packed").startswith("import losa")
    convert(tmp_path / "packed", tmp_path / "dense", "dense")
    text = (tmp_path / "dense" / "README.md").read_text()
    assert "stored as zeros" in text and "exported from `packed`" in text
    assert "import losa" not in code_of(text, tmp_path / "dense")


def test_an_exported_models_size_is_its_own(tmp_path: Path, llama: Path, brief: Recipe) -> None:
    """Its speed was measured in the other form, and is of no use in this one."""
    for form in ("dense", "packed"):
        losa.compress(str(llama), changed(brief, format=form), tmp_path / form)
    path = tmp_path / "dense" / "losa.json"
    told = json.loads(path.read_text())
    told["measurements"]["sparse"]["tokens_per_second"] = 9.0
    path.write_text(json.dumps(told))
    convert(tmp_path / "dense", tmp_path / "exported", "packed")
    made = {
        name: json.loads((tmp_path / name / "losa.json").read_text())["measurements"] for name in ("packed", "exported")
    }
    packed, exported = (found["sparse"] for found in made.values())
    assert [exported[key] for key in ("size", "disk")] == [packed[key] for key in ("size", "disk")]
    assert packed["size"] < made["packed"]["dense"]["size"] and "tokens_per_second" not in exported
    text = (tmp_path / "exported" / "README.md").read_text()
    sizes = [size(found["size"]) for found in made["packed"].values()]
    assert f"| size in memory | {' | '.join(sizes)} |" in text and "All of it but this form's size" in text
    page = render([story.read(tmp_path / "exported")])
    assert f">{sizes[1]}</td>" in page and "Exported from dense in packed form" in page
    assert "stored like other weights" not in page


def test_a_card_of_others_is_not_carried_over_by_an_export(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "theirs")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A great model\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[:, ::2] = 0
    model.save_pretrained(source)
    convert(source, tmp_path / "ours", "packed")
    read = ModelCard.load(tmp_path / "ours" / "README.md")
    assert read.data.license == "mit" and "great" not in read.content and "`theirs`" in read.text
    assert code_of(read.text, tmp_path / "ours").startswith("import losa") and "bit for bit" in read.text
    assert read.data.eval_results is None


def test_a_repaired_model_says_that_it_was_pruned_already(tmp_path: Path, llama: Path, brief: Recipe) -> None:
    losa.compress(str(llama), changed(brief, recovery="none"), tmp_path / "pruned")
    kept = {name: getattr(brief, name) for name in ("train_data", "train_samples", "train_length", "eval_data")}
    settings = kept | {"batch_size": 4, "mean_rank": 2.0, "eval_tokens": 500, "sample_tokens": 4, "dtype": "float32"}
    losa.recover(str(tmp_path / "pruned"), settings, tmp_path / "repaired")
    text = (tmp_path / "repaired" / "README.md").read_text()
    assert "repaired (it was pruned already)" in text and "| as it came | sparse |" in text
    told = story.read(tmp_path / "repaired")
    assert [row.name for row in told.verdict()] == ["as it came", "recovered"] and told.samples.keys() == {
        "before",
        "sparse",
    }
    page = render([told])
    assert "Pruned already, recovery by losa." in page and "no RMI matrix" not in page
