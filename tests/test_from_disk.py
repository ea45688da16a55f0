"""A model that stays on disk, block by block: the same bytes as in memory, killed or not, and what it cannot do, said."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, MODELS, changed, files, killed_after, save_tiny, tiny, tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

import losa
from losa import calibration, disk, memory
from losa.errors import LosaError
from losa.inspection import inspect
from losa.recipe import Recipe


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 120)


@pytest.fixture
def one_shot(small: Recipe) -> Recipe:
    return changed(small, steps=1, recovery="none")


DISK, SPILLED = 2, 3  # of the ways there are


def compress(source: Path, recipe: Recipe, output: Path, way: int, resume: bool = False) -> losa.Result:
    """As if this way of keeping model and activations were the only one that fits."""
    ways = memory.ways
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "ways", lambda *rest: [ways(*rest)[way]])
        return losa.compress(str(source), recipe, output, resume=resume)


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        key: tensor for path in sorted(folder.glob("model*.safetensors")) for key, tensor in load_file(path).items()
    }


def assert_same(whole: Path, parts: Path) -> None:
    """The model, bit for bit, under the same keys; masks, byte for byte; what surrounds them."""
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype and torch.equal(tensor, found[key]), key
    for name in ("config.json", "generation_config.json", "masks.safetensors", "tokenizer.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    one, two = inspect(whole), inspect(parts)
    for what in ("dense", "sparse"):
        sizes = [found["measurements"][what].pop("disk") for found in (one, two)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # but for headers
    assert one["measurements"] == two["measurements"] and one["blocks"] == two["blocks"]


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, SPILLED) for kind in MODELS | ARCHITECTURES), ("llama", DISK), ("mixtral", DISK)]
)
def test_from_disk_the_model_is_the_one_from_memory(kind: str, way: int, tmp_path: Path, one_shot: Recipe) -> None:
    source = save_tiny(tmp_path / "dense", kind)
    whole = losa.compress(str(source), one_shot, tmp_path / "whole")
    result = compress(source, one_shot, tmp_path / "out", way)
    assert result.history == whole.history and result.model is None
    assert_same(tmp_path / "whole", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = torch.arange(1, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, whole.model(text).logits)
    assert not [path for path in os.listdir(tmp_path / "out" / "run") if path.endswith((".safetensors", "activations"))]


@pytest.mark.parametrize(
    "extra",
    [
        {"pruner": "sparsegpt", "true_sequential": True},
        {"pruner": "alps"},
        {"pruner": "magnitude", "allocator": "uniform", "eval_data": ""},
        {"allocator": "owl", "rates_per": "linear"},
        {"allocator": "error", "pattern": "mixed-4:8", "pruner": "sparsegpt"},
        {"pattern": "2:4", "error_tokens": 0},
        {"ignore": [r"layers\.1\."], "reconstruct": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_whatever_prunes(kind: str, extra: dict[str, Any], tmp_path: Path, one_shot: Recipe) -> None:
    """Stored in bf16 and computed in fp32: what pruners change is rounded before the next block sees it."""
    source = save_tiny(tmp_path / "dense", kind, torch.bfloat16)
    recipe = changed(one_shot, **extra)
    whole = losa.compress(str(source), recipe, tmp_path / "whole")
    result = compress(source, recipe, tmp_path / "out", SPILLED)
    assert result.history == whole.history
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mixtral"])
def test_from_shards(kind: str, tmp_path: Path, one_shot: Recipe) -> None:
    """A block may lie across files."""
    source = save_tiny(tmp_path / "dense", kind)
    tiny(kind).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*"))) > 3
    losa.compress(str(source), one_shot, tmp_path / "whole")
    compress(tmp_path / "shards", one_shot, tmp_path / "out", DISK)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_activations_alone_go_to_disk(llama: Path, tmp_path: Path, small: Recipe) -> None:
    """Where recovery keeps the model in memory."""
    whole = losa.compress(str(llama), small, tmp_path / "whole")
    result = compress(llama, small, tmp_path / "out", 1)
    assert result.history == whole.history
    assert_same(tmp_path / "whole", tmp_path / "out")


def is_kept(name: str) -> bool:
    return "input_layernorm" in name or name == "model.norm.weight"


def test_what_transformers_keeps_in_fp32_stays(
    tmp_path: Path, one_shot: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of routers of some mixtures; here of norms in the blocks and behind them. In memory, from disk, as it is loaded."""
    monkeypatch.setattr(
        transformers.LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["input_layernorm", "model.norm"]
    )
    source, exact = save_tiny(tmp_path / "dense", dtype=torch.bfloat16), tiny().state_dict()
    dense = {n: exact[n] if is_kept(n) else weight for n, weight in weights(source).items()}
    save_file(dense, source / "model.safetensors", {"format": "pt"})
    whole = losa.compress(str(source), one_shot, tmp_path / "whole")
    compress(source, one_shot, tmp_path / "out", DISK)
    assert_same(tmp_path / "whole", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for made in (weights(tmp_path / "out"), whole.model.state_dict(), loaded.state_dict()):
        for name, weight in made.items():
            assert weight.dtype == (torch.float32 if is_kept(name) else torch.bfloat16)
            assert not is_kept(name) or torch.equal(weight, exact[name])


def test_killed_and_resumed_is_never_killed(tmp_path: Path, one_shot: Recipe) -> None:
    """After each save: three of the dense pass and its end, rates, three blocks' masks."""
    source = save_tiny(tmp_path / "dense", "mixtral", torch.bfloat16)
    recipe = changed(one_shot, pruner="sparsegpt", reconstruct=1)
    whole = compress(source, recipe, tmp_path / "whole", DISK)
    for saves in range(1, 9):
        out = tmp_path / f"out-{saves}"
        with killed_after(saves):
            compress(source, recipe, out, DISK)
        assert not (out / "config.json").exists()
        resumed = compress(source, recipe, out, DISK, resume=True)
        assert resumed.history == whole.history
        assert files(out) == files(tmp_path / "whole")


def test_resuming_a_finished_run_loads_no_model(llama: Path, tmp_path: Path, one_shot: Recipe) -> None:
    first = compress(llama, one_shot, tmp_path / "out", DISK)
    again = compress(llama, one_shot, tmp_path / "out", DISK, resume=True)
    assert again.model is None and again.measurements == first.measurements


def test_a_run_from_disk_is_resumed_from_disk(llama: Path, tmp_path: Path, one_shot: Recipe) -> None:
    """Whatever is free by then."""
    with killed_after(7):
        compress(llama, one_shot, tmp_path / "out", DISK)
    assert (tmp_path / "out" / "model-00001-of-00004.safetensors").exists()
    assert losa.compress(str(llama), one_shot, tmp_path / "out", resume=True).model is None
    losa.compress(str(llama), one_shot, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_never_more_than_one_block_and_no_activations(
    llama: Path, tmp_path: Path, one_shot: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory while blocks run: their own weights, and no other's."""
    seen: list[set[str]] = []
    outputs = calibration.Stream.outputs

    def spy(stream: Any, block: Any) -> Any:
        generator = outputs(stream, block)
        seen.append(set())
        for out in generator:
            owner = block.home.model
            seen[-1] |= {
                name.split(".")[2] for name, p in owner.named_parameters() if not p.is_meta and "layers." in name
            }
            seen[-1] |= {name for name, p in owner.named_parameters() if not p.is_meta and "layers." not in name}
            yield out

    monkeypatch.setattr(calibration.Stream, "outputs", spy)
    compress(llama, one_shot, tmp_path / "out", SPILLED)
    assert seen and all(len(here) == 1 for here in seen)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"recovery": "losa"}, "recovery 'losa' trains all of it"),
        ({"steps": 2}, "there are several steps"),
        ({"pattern": "structured", "allocator": "uniform", "pruner": None}, "pattern structured changes its shape"),
        ({"pruner": "pruner-zero"}, "pruner 'pruner-zero' reads gradients"),
        ({"format": "packed"}, "format packed is made of all of it"),
    ],
)
def test_what_needs_the_model_in_memory_is_said_before(
    extra: dict[str, Any], reason: str, llama: Path, tmp_path: Path, one_shot: Recipe
) -> None:
    recipe = changed(one_shot, memory="1MB", **extra)
    with pytest.raises(LosaError, match=rf"memory 1MB is too small .* about 0\.\d+ GB would do.*{reason}"):
        losa.compress(str(llama), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_too_small_for_one_block(llama: Path, tmp_path: Path, one_shot: Recipe) -> None:
    with pytest.raises(LosaError, match="memory 100MB is too small for one block") as refused:
        losa.compress(str(llama), changed(one_shot, memory="100MB"), tmp_path / "out")
    enough = re.search(r"about (0\.\d+) GB would do$", str(refused.value))
    assert enough
    with pytest.raises(LosaError, match="a loaded model is there already"):
        losa.compress(tiny(), changed(one_shot, memory="100MB"), tmp_path / "out", tokenizer=tokenizer())
    with pytest.raises(LosaError, match="there is no output folder"):
        losa.compress(str(llama), changed(one_shot, memory="100MB"))
    assert not (tmp_path / "out").exists()
    losa.compress(str(llama), changed(one_shot, memory=f"{enough[1]}GB"), tmp_path / "out")
    with pytest.raises(LosaError, match="too small"):
        losa.compress(str(llama), changed(one_shot, memory=f"{float(enough[1]) - 0.01:.2f}GB"), tmp_path / "less")


@pytest.mark.parametrize("text", ["8 parrots", "GB", "-8GB", "0", "8GB8"])
def test_memory_that_is_no_size(text: str, one_shot: Recipe) -> None:
    with pytest.raises(LosaError, match="write a size such as 8GB"):
        changed(one_shot, memory=text)


def test_a_disk_that_fills_while_spilling(
    llama: Path, tmp_path: Path, one_shot: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(LosaError, match="cannot be written: No space left on device"):
        patch.setattr(os, "posix_fallocate", full)
        compress(llama, one_shot, tmp_path / "out", SPILLED)
    assert not list((tmp_path / "out").rglob("*activations*")) and not list((tmp_path / "out").glob("*.safetensors"))
    (tmp_path / "out" / "run" / "activations-1").touch()  # what a kill could leave
    compress(llama, one_shot, tmp_path / "out", SPILLED, resume=True)
    assert not list((tmp_path / "out").rglob("*activations*"))
    losa.compress(str(llama), one_shot, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_disk_that_fills_while_a_block_is_written(
    llama: Path, tmp_path: Path, one_shot: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = transformers.PreTrainedModel.save_pretrained, 0

    def full(self: Any, folder: Path, **rest: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            Path(folder).mkdir()
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, folder, **rest)

    with monkeypatch.context() as patch, pytest.raises(LosaError, match="No space left on device; what was saved"):
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        compress(llama, one_shot, tmp_path / "out", DISK)
    assert [path.name for path in (tmp_path / "out").iterdir()].count("model-00001-of-00004.safetensors") == 1
    assert not list((tmp_path / "out").glob("model-00002*")) and not (tmp_path / "out" / "run" / "shard").exists()
    compress(llama, one_shot, tmp_path / "out", DISK, resume=True)
    losa.compress(str(llama), one_shot, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("wrong", ["elsewhere", "nowhere", "twice"])
def test_shards_that_disagree_with_their_index(wrong: str, tmp_path: Path, one_shot: Recipe) -> None:
    source = tmp_path / "shards"
    tiny().save_pretrained(source, max_shard_size="20KB")
    tokenizer().save_pretrained(source)
    first, second = sorted(source.glob("model-*"))[:2]
    one, two = load_file(first), load_file(second)
    key = next(iter(one))
    if wrong == "twice":
        two[key] = one[key].clone()
    else:
        moved = one.pop(key)
        two |= {key: moved} if wrong == "elsewhere" else {}
    for path, tensors in ((first, one), (second, two)):
        save_file(tensors, path, {"format": "pt"})
    said = {
        "elsewhere": f"says that {first.name} holds {key}, but {second.name} does",
        "nowhere": f"says that {first.name} holds {key}, but no file does",
        "twice": f"both {first.name} and {second.name} hold {key}",
    }
    with pytest.raises(LosaError, match=f"{said[wrong]}: download the model again"):
        losa.compress(str(source), one_shot, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_the_model_of_their_configuration(tmp_path: Path, one_shot: Recipe) -> None:
    source = save_tiny(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    missing = {key: tensor for key, tensor in tensors.items() if key != "model.layers.1.mlp.up_proj.weight"}
    save_file(missing, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LosaError, match=r"1 are missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        compress(source, one_shot, tmp_path / "out", DISK)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LosaError, match=r"up_proj\.weight is \[3, 3\], the model wants \[48, 32\]"):
        compress(source, one_shot, tmp_path / "out", DISK)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path, one_shot: Recipe) -> None:
    broken = tiny()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(LosaError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        compress(tmp_path / "dense", one_shot, tmp_path / "out", DISK)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_another_model_is_not_resumed(tmp_path: Path, one_shot: Recipe) -> None:
    source = save_tiny(tmp_path / "dense")
    with killed_after(6):
        compress(source, one_shot, tmp_path / "out", DISK)
    other = tiny()
    other.model.norm.weight.data.mul_(1.01)
    other.save_pretrained(source)
    with pytest.raises(LosaError, match="not what the run was started with"):
        compress(source, one_shot, tmp_path / "out", DISK, resume=True)


# ------------------------------------------------------------------------------------------------- the parts themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS | ARCHITECTURES)
def test_parts_are_those_of_from_pretrained(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights and buffers, stored or not, of every block and of what is around them; nothing stays."""
    source = save_tiny(tmp_path / "dense", kind)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    home = disk.OnDisk(source, dtype)
    subject = home.subject(None, "dense", Recipe(), None)
    for name, buffer in expected.named_buffers():
        found = home.model.get_buffer(name)
        assert found.dtype == buffer.dtype and torch.equal(found, buffer), name
    state = expected.state_dict()
    for block in subject.blocks:
        with block.present(), block.present():
            for name, tensor in block.module.state_dict(prefix=f"{block.name}.").items():
                assert torch.equal(tensor, state[name]) and tensor.dtype == dtype, name
        assert all(parameter.is_meta for parameter in home.model.parameters())
    with home.outer_weights(dtype) as outer:
        tied = {name for name in expected.all_tied_weights_keys if name not in outer}
        blocks = tuple(f"{block.name}." for block in subject.blocks)
        assert outer.keys() == {name for name in state if not name.startswith(blocks)} - tied
        assert all(torch.equal(tensor, state[name]) for name, tensor in outer.items())
    assert all(parameter.is_meta for parameter in home.model.parameters())
