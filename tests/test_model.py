"""Blocks are found by structure; what is no usable model is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import MODELS, changed, save_tiny, tiny, tokenizer
from torch import nn

from losa import model
from losa.blocks import find_blocks, subject_of
from losa.errors import LosaError
from losa.inputs import check
from losa.pipeline import compress
from losa.recipe import Recipe


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_hold_every_linear_of_the_decoder_and_nothing_else(kind: str) -> None:
    whole = tiny(kind)
    blocks = find_blocks(whole)
    assert [block.index for block in blocks] == [0, 1, 2]
    found = {name for block in blocks for name in block.linears}
    layers = blocks[0].name.rpartition(".")[0] + "."
    every = {name for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name in every if name.startswith(layers)}
    assert len(found) == 3 * (6 if kind == "opt" else 7)


def test_ignored_linears_are_not_prunable_and_their_blocks_stay_in_line() -> None:
    blocks = find_blocks(tiny(), [r"layers\.1\.", r"down_proj$"])
    assert [len(block.linears) for block in blocks] == [6, 0, 6]


def test_ignoring_everything_is_refused() -> None:
    with pytest.raises(LosaError, match="leaves no linear"):
        find_blocks(tiny(), [".*"])


def test_a_model_without_linear_layers_is_refused_by_name() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64))
    with pytest.raises(LosaError, match="GPT2LMHeadModel has no decoder blocks"):
        find_blocks(gpt2)
    with pytest.raises(LosaError, match="Sequential has no Linear layers"):
        find_blocks(nn.Sequential(nn.ReLU()))


def test_targets_that_match_nothing_are_refused(small: Recipe) -> None:
    subject = subject_of(tiny("opt"), tokenizer(), "opt", small)
    chosen = Recipe(**{**small.to_json(), "targets": "gate_proj"})
    from losa.adapters import MaskedLinear

    with pytest.raises(LosaError, match="match none of the linears"):
        subject.wrap(MaskedLinear, chosen, 4)


def broken(llama: Path, folder: Path) -> Path:
    return Path(shutil.copytree(llama, folder))


def refused(folder: Path | str, recipe: Recipe, what: str) -> None:
    output = Path(folder).parent / "output"
    with pytest.raises(LosaError, match=what):
        compress(str(folder), recipe, output)
    assert not (output / "losa.json").exists()


def test_a_folder_without_a_model(tmp_path: Path, small: Recipe) -> None:
    (tmp_path / "m").mkdir()
    refused(tmp_path / "m", small, "no config.json")
    refused(tmp_path / "nowhere" / "m", small, "does not exist")


def test_a_configuration_that_is_not_json(llama: Path, tmp_path: Path, small: Recipe) -> None:
    folder = broken(llama, tmp_path / "m")
    (folder / "config.json").write_text("{")
    refused(folder, small, "cannot load the model")


def test_truncated_weights_are_found_before_they_are_read(llama: Path, tmp_path: Path, small: Recipe) -> None:
    folder = broken(llama, tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LosaError, match="is damaged"):
        check(str(folder), small, tmp_path / "output", False)


def test_a_shard_that_did_not_arrive(llama: Path, tmp_path: Path, small: Recipe) -> None:
    folder = broken(llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    refused(folder, small, "has no model.safetensors")
    weight_map = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    refused(folder, small, "has no model-00001-of-00001.safetensors")


def test_pickles_are_not_loaded(llama: Path, tmp_path: Path, small: Recipe) -> None:
    folder = broken(llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, small, "pytorch_model.bin is a pickle")


def test_missing_tensors_are_not_made_up(llama: Path, tmp_path: Path, small: Recipe) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, small, "incomplete: 1 are missing, such as model.layers.1.mlp.up_proj.weight")


def test_weights_that_are_not_a_number(llama: Path, tmp_path: Path, small: Recipe) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, small, "model.layers.2.mlp.up_proj.weight holds NaN")


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, small: Recipe) -> None:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", small, "cannot load the model")  # no tokenizer at all
    tokenizer().save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", small, "tokenizer does not fit the model: it has 2048 tokens, the embedding 100 rows")


def test_an_encoder_is_no_causal_model(tmp_path: Path, small: Recipe) -> None:
    sizes = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=2048)
    transformers.T5Config(**sizes).save_pretrained(tmp_path / "m")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    tokenizer().save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", small, "cannot load the model")


def test_sequences_longer_than_the_model_reads(llama: Path, tmp_path: Path, small: Recipe) -> None:
    refused(
        llama,
        changed(small, sequence_length=65),
        "^sequence_length is 65: the model reads at most 64 tokens: lower it$",
    )
    both = changed(small, sequence_length=65, train_length=128)
    refused(
        llama, both, "^sequence_length is 65 and train_length is 128: the model reads at most 64 tokens: lower them$"
    )


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(LosaError, match="is not there"):
            model.choose_device("cuda")


def test_bf16_models_stay_so_on_disk(tmp_path: Path, small: Recipe) -> None:
    """Computed in fp32, saved as it was stored; what is measured is what is saved."""
    folder = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    result = compress(str(folder), small, tmp_path / "out")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16
    from losa.data import evaluation_tokens
    from losa.evaluate import perplexity

    tokens = evaluation_tokens(small.eval_data, tokenizer())[: small.eval_tokens]
    again = perplexity(saved.float(), tokens, 64)
    assert again == pytest.approx(result.measurements["sparse"]["perplexity"], rel=1e-6)
