"""losa export: there and back bit for bit, models from elsewhere, nothing half-written; compress --format packed is the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Killed, changed, files, save_tiny, tiny, tokenizer
from safetensors.torch import load_file, save_file
from test_packed_linear import prune, put, save_packed, tensors

from losa import checkpoint, compress, masks, model
from losa.blocks import find_blocks
from losa.cli import main
from losa.errors import LosaError
from losa.export import load_masks
from losa.inspection import inspect
from losa.recipe import Recipe
from losa.sparse import convert as module
from losa.sparse.convert import convert
from losa.sparse.linear import pack_model


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].view(torch.uint8).equal(b[name].view(torch.uint8)) for name in a
    )


def save_pruned(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, ours: bool = True) -> Path:
    """A dense model with zeros, with masks.safetensors or, as from elsewhere, without."""
    whole = tiny(kind).to(dtype)
    bits = prune(whole)
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if ours:
        save_file(bits, folder / "masks.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama-tied", "opt", "qwen2"])
def test_there_and_back(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    dense = save_pruned(tmp_path / "dense", kind, dtype)
    found = convert(dense, tmp_path / "packed", "packed")
    assert found["packed"] == found["linears"] == len(load_masks(dense))
    assert found["bytes"] < found["bytes_before"] == checkpoint.weight_bytes(dense)
    assert not (tmp_path / "packed" / "masks.safetensors").exists()
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert equal(tensors(dense), tensors(tmp_path / "back"))
    assert equal(load_masks(dense), load_masks(tmp_path / "packed"))
    assert equal(load_masks(dense), load_masks(tmp_path / "back"))
    left = {"model.safetensors", "masks.safetensors"}  # metadata aside, which transformers writes in its own words
    before, after = files(dense), files(tmp_path / "back")
    assert before.keys() | {"README.md"} == after.keys() and all(before[n] == after[n] for n in before if n not in left)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_mask_is_the_truth(tmp_path: Path) -> None:
    """A kept weight that is zero stays kept."""
    dense = save_pruned(tmp_path / "dense")
    name = "model.layers.0.mlp.up_proj"
    bits = load_masks(dense)
    bits[name][5] = 255
    save_file(bits, dense / "masks.safetensors")
    convert(dense, tmp_path / "packed", "packed")
    assert bool((load_masks(tmp_path / "packed")[name][5] == 255).all())
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert equal(tensors(dense), tensors(tmp_path / "back"))
    assert equal(load_masks(dense), load_masks(tmp_path / "back"))


def test_from_elsewhere_by_its_zeros(tmp_path: Path) -> None:
    """Only what gets smaller is packed; a zero with a sign comes back."""
    dense = save_pruned(tmp_path / "dense", ours=False)
    found = load_file(dense / "model.safetensors")
    found["model.layers.0.mlp.up_proj.weight"][0, :9] = -0.0
    found["model.layers.0.mlp.down_proj.weight"].fill_(1)
    save_file(found, dense / "model.safetensors", {"format": "pt"})
    said = convert(dense, tmp_path / "packed", "packed")
    assert said["packed"] == said["linears"] - 1
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert equal(tensors(dense), tensors(tmp_path / "back"))
    assert inspect(dense)["zeros"] == inspect(tmp_path / "packed")["zeros"]


def test_strays_of_other_tools(tmp_path: Path) -> None:
    """What a dense model ignores is not taken for a part of a packed linear."""
    dense = save_pruned(tmp_path / "dense")
    whole = load_file(dense / "model.safetensors")
    strays = {f"model.layers.{i}.self_attn.q_proj.weight_mask": torch.ones(3) for i in (0, 1)}
    save_file(strays | whole, dense / "model.safetensors", {"format": "pt"})
    convert(dense, tmp_path / "packed", "packed")
    assert equal(load_masks(dense), load_masks(tmp_path / "packed"))
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert equal(whole, tensors(tmp_path / "back"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_int8_and_back(tmp_path: Path) -> None:
    dense = save_pruned(tmp_path / "dense")
    convert(dense, tmp_path / "floats", "packed")
    first = convert(dense, tmp_path / "a", "packed", "int8")
    second = convert(tmp_path / "floats", tmp_path / "b", "packed", "int8")
    assert equal(tensors(tmp_path / "a"), tensors(tmp_path / "b")) and first["bytes"] == second["bytes"]
    convert(tmp_path / "a", tmp_path / "back", "dense")
    before, after = tensors(dense), tensors(tmp_path / "back")
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        assert float((after[name] - weight).float().norm()) < 0.02 * float(weight.float().norm())
    assert equal(load_masks(dense), load_masks(tmp_path / "back"))


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_packed_head(tmp_path: Path, kind: str) -> None:
    """What is packed outside the blocks is made dense, or int8, as well; a head that was tied is another weight by then."""
    whole, packed = tiny(kind).to(torch.bfloat16), tmp_path / "packed"
    mask = torch.rand(whole.lm_head.weight.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    pack_model(whole, prune(whole) | {"lm_head": masks.pack(mask)}, torch.bfloat16)
    whole.save_pretrained(packed)
    convert(packed, tmp_path / "dense", "dense")
    convert(packed, tmp_path / "int8", "packed", "int8")
    head = whole.lm_head.dense().weight
    assert torch.equal(tensors(tmp_path / "dense")["lm_head.weight"], head)
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert torch.equal(load(tmp_path / "dense").lm_head.weight, head)
    assert load(tmp_path / "int8").lm_head.weight.dtype == torch.int8
    assert equal(load_masks(packed), load_masks(tmp_path / "dense"))


def test_experts_stay_dense(tmp_path: Path, small: Recipe) -> None:
    source = save_tiny(tmp_path / "moe", "mixtral")
    compress(str(source), changed(small, steps=1, recovery="none"), tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", "packed")
    bits, left = load_masks(tmp_path / "dense"), load_file(tmp_path / "packed" / "masks.safetensors")
    assert left and all(".experts." in name for name in left) and equal(bits, load_masks(tmp_path / "packed"))
    assert inspect(tmp_path / "packed")["zeros"] == inspect(tmp_path / "dense")["zeros"]
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert equal(tensors(tmp_path / "dense"), tensors(tmp_path / "back"))
    assert equal(bits, load_masks(tmp_path / "back"))


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the files, in and out."""
    dense = save_pruned(tmp_path / "dense")
    monkeypatch.setattr(module, "SHARD", 20_000)
    convert(dense, tmp_path / "packed", "packed")
    paths = sorted((tmp_path / "packed").glob("model-*.safetensors"))
    assert len(paths) >= 4
    for held in map(load_file, paths):
        assert len(held) == 1 or sum(t.numel() * t.itemsize for t in held.values()) <= 20_000
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    monkeypatch.setattr(module, "SHARD", 10**9)
    convert(tmp_path / "packed", tmp_path / "back", "dense")
    assert equal(tensors(dense), tensors(tmp_path / "back"))


def test_killed_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_pruned(tmp_path / "dense")

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_copy_rest", die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # what is killed clears nothing away
        with pytest.raises(Killed):
            convert(dense, tmp_path / "packed", "packed")
    assert not (tmp_path / "packed").exists() and (tmp_path / ".packed.exporting").exists()
    (tmp_path / ".packed.exporting" / "folder").mkdir()
    convert(dense, tmp_path / "packed", "packed")
    assert not (tmp_path / ".packed.exporting").exists()
    convert(dense, tmp_path / "again", "packed")
    assert files(tmp_path / "packed") == files(tmp_path / "again")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_pruned(tmp_path / "dense")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_bytes", full)
    with pytest.raises(LosaError, match=r"packed' cannot be written: No space left on device$"):
        convert(dense, tmp_path / "packed", "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_bad_input(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, new = save_pruned(tmp_path / "dense"), tmp_path / "new"
    packed = tmp_path / "packed"
    assert main(["export", str(dense), "--output", str(packed), "--format", "packed"]) == 0
    assert "21 of 21 linears packed" in capsys.readouterr().out
    assert "did you mean 'packed'" in refused(capsys, dense, "--output", new, "--format", "pakced")
    assert "did you mean 'int8'" in refused(capsys, dense, "--output", new, "--format", "packed", "--values", "int9")
    assert "--format" in refused(capsys, dense, "--output", new)
    assert "is dense already" in refused(capsys, dense, "--output", new, "--format", "dense")
    assert "of packed models" in refused(capsys, packed, "--output", new, "--format", "dense", "--values", "int8")
    assert "packed already, with bfloat16" in refused(capsys, packed, "--output", new, "--format", "packed")
    assert "exists" in refused(capsys, dense, "--output", packed, "--format", "packed")
    assert "does not exist" in refused(capsys, tmp_path / "no" / "where", "--output", new, "--format", "packed")
    assert "no linear has zeros enough" in refused(capsys, llama, "--output", new, "--format", "packed")
    (dense / "adapter").mkdir()
    assert "PEFT" in refused(capsys, dense, "--output", new, "--format", "packed")
    (dense / "adapter").rmdir()
    found = load_file(dense / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight"].fill_(1)
    save_file(found, dense / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj: weights that" in refused(capsys, dense, "--output", new, "--format", "packed")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "stored as 'gptq'" in refused(capsys, dense, "--output", new, "--format", "packed")
    found = load_file(packed / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight_offsets"][4] += 1
    save_file(found, packed / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj: its offsets" in refused(capsys, packed, "--output", new, "--format", "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"foo.weight_mask": torch.zeros(3)}), "holds foo.weight_mask, which config.json does not"),
        (
            lambda t: t.pop("model.embed_tokens.weight"),
            r"incomplete: 1 are missing, such as model\.embed_tokens\.weight",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(7, 32)}),
            r"embed_tokens\.weight is \[7, 32\], the model wants \[2048, 32\]: download the model again$",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"norm\.weight is \[7\], the model wants \[32\]"),
    ],
)
def test_what_does_not_load_is_not_exported(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    """Nor is it written half; the line is that of loading."""
    save_packed(tmp_path / "packed")
    put(tmp_path / "packed", change)
    with pytest.raises(LosaError, match=message):
        convert(tmp_path / "packed", tmp_path / "dense", "dense")
    with pytest.raises(LosaError, match=message):
        model.load(str(tmp_path / "packed"), Recipe(dtype="float32", device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_an_odd_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_packed(tmp_path / "packed", shard="30KB")
    index = tmp_path / "packed" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    places = told["weight_map"]
    for text, message in (
        ("[" * 200_000, "is not an index of weights"),
        (json.dumps(told | {"weight_map": {}}), "is not an index of weights"),
        (json.dumps({"weight_map": places}), "is not an index of weights"),
        (
            json.dumps(told | {"weight_map": places | {next(iter(places)): "a" * 5000}}),
            "names a file that cannot be (File name too long)",
        ),
    ):
        index.write_text(text)
        assert message in refused(capsys, tmp_path / "packed", "--output", tmp_path / "new", "--format", "dense")


def test_output_is_a_link(tmp_path: Path) -> None:
    dense = save_pruned(tmp_path / "dense")
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        (tmp_path / f"to-{name}").symlink_to(name)
        convert(dense, tmp_path / f"to-{name}", "packed")
        assert (tmp_path / f"to-{name}").is_symlink() and (tmp_path / name / "config.json").is_file()


def test_output_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty folder would do, but not the one that the shell stands in."""
    dense, here = save_pruned(tmp_path / "dense"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in (".", here):
        assert "exists: name a new folder" in refused(capsys, dense, "--output", name, "--format", "packed")
    assert "cannot be written: File name too long" in refused(
        capsys, dense, "--output", "a" * 300, "--format", "packed"
    )


def test_a_stripped_description(tmp_path: Path) -> None:
    """The packed weights are then of odd shapes, and it is said why."""
    save_packed(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    message = (
        r"do not fit its config\.json: .* the model wants .*: they are packed, and config\.json has lost its quant"
    )
    with pytest.raises(LosaError, match=message):
        model.load(str(tmp_path / "packed"), Recipe(dtype="float32", device="cpu"))
    with pytest.raises(LosaError, match=message):
        convert(tmp_path / "packed", tmp_path / "again", "packed")


# ------------------------------------------------------------------------------------------------------- losa compress


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_compress_packed_is_compress_then_export(tmp_path: Path, llama: Path, small: Recipe, pattern: str) -> None:
    recipe = changed(small, pattern=pattern)
    made = {form: compress(str(llama), changed(recipe, format=form), tmp_path / form) for form in ("dense", "packed")}
    convert(tmp_path / "dense", tmp_path / "exported", "packed")
    assert equal(tensors(tmp_path / "packed"), tensors(tmp_path / "exported"))
    offsets = [name for name in tensors(tmp_path / "packed") if name.endswith("offsets")]
    assert bool(offsets) == (pattern == "unstructured")
    for name in ("dense", "sparse"):
        before, after = made["dense"].measurements[name], made["packed"].measurements[name]
        assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-5)
    assert made["packed"].measurements["sparse"]["loads"] == "transformers, after import losa"
    assert equal(load_masks(tmp_path / "dense"), load_masks(tmp_path / "packed"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    state = made["packed"].model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda bits: bits[0].clone(),
            r"masks\.safetensors is damaged: .*up_proj is torch\.uint8 \[4\], a packed mask is",
        ),
        (lambda bits: bits.short(), r"is torch\.int16 \[48, 4\], a packed mask is torch\.uint8 \[out, in / 8\]"),
        (lambda bits: bits[1:].clone(), r"up_proj: the mask in '.*dense' does not fit its weight \[48, 32\]"),
        (lambda bits: bits[:, 1:].clone(), "does not fit its weight"),
    ],
)
def test_masks_that_are_none(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    dense, name = save_pruned(tmp_path / "dense"), "model.layers.0.mlp.up_proj"
    bits = load_masks(dense)
    save_file(bits | {name: change(bits[name])}, dense / "masks.safetensors")
    with pytest.raises(LosaError, match=message) as caught:
        convert(dense, tmp_path / "packed", "packed")
    assert "\n" not in str(caught.value) and not (tmp_path / "packed").exists()


def test_inspect_misses_a_mask(tmp_path: Path, llama: Path, small: Recipe) -> None:
    compress(str(llama), changed(small, steps=1, recovery="none", eval_data=""), tmp_path / "out")
    bits = load_masks(tmp_path / "out")
    del bits["model.layers.1.mlp.up_proj"]
    save_file(bits, tmp_path / "out" / "masks.safetensors")
    with pytest.raises(LosaError, match=r"model\.layers\.1\.mlp\.up_proj has no mask"):
        inspect(tmp_path / "out")


def test_a_damaged_losa_json(
    tmp_path: Path, llama: Path, small: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is found before any weight is written; with --resume, too."""
    recipe = changed(small, steps=1, recovery="none", eval_data="")
    dense, new = tmp_path / "dense", tmp_path / "new"
    compress(str(llama), recipe, dense)
    capsys.readouterr()
    whole = json.loads((dense / "losa.json").read_text())
    monkeypatch.setattr(module._Writer, "add", lambda *_: pytest.fail("a weight was written"))
    recipes, measured = whole["recipe"], whole["measurements"]
    for told, message in (
        ("{", "JSONDecodeError: "),
        ("[" * 200_000, "RecursionError: "),
        ("{}", "KeyError: 'format'"),
        ("[]", "TypeError: "),
        ('"format"', "TypeError: "),
        (json.dumps({"format": 1}), "KeyError: 'command'"),
        (json.dumps(whole | {"history": {}}), "TypeError: history is no list"),
        (json.dumps(whole | {"history": []}), "TypeError: history is no list of steps with ranks"),
        (json.dumps(whole | {"history": [{"step": 1}]}), "KeyError: 'ranks'"),
        (json.dumps(whole | {"measurements": {"dense": {}}}), "KeyError: 'sparse'"),
        (json.dumps(whole | {"measurements": measured | {"dense": 3}}), "TypeError: measurements hold"),
        (json.dumps(whole | {"recipe": {}}), "KeyError: "),
        (json.dumps(whole | {"recipe": recipes | {"sparsity": "much"}}), "ValueError: "),
    ):
        (dense / "losa.json").write_text(told)
        assert f"losa.json is damaged ({message}" in refused(capsys, dense, "--output", new, "--format", "packed")
    (dense / "losa.json").write_text("{")
    with pytest.raises(LosaError, match=r"losa\.json is damaged"):
        compress(str(llama), recipe, dense, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_int8_is_measured_as_it_is_saved(
    tmp_path: Path, llama: Path, small: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = changed(small, format="packed", values="int8")
    made = compress(str(llama), recipe, tmp_path / "out")
    arguments = ["--data", small.eval_data, "--tokens", "500", "--dtype", "float32", "--device", "cpu", "--json"]
    assert main(["evaluate", str(tmp_path / "out"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert found == pytest.approx(made.measurements["sparse"]["perplexity"], rel=1e-6)
    again = compress(str(llama), recipe, tmp_path / "out", resume=True)  # finished: read back
    assert again.measurements == made.measurements
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "packed with int8 values, " in capsys.readouterr().out
    looked = inspect(tmp_path / "out")
    assert looked["sparsity"] == pytest.approx(made.measurements["sparse"]["sparsity"], abs=0.01)
    assert looked["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": "int8"}, "values int8 are of packed models"),
        ({"format": "packed", "sparsity": 0.05}, "at least 0.1 with format packed"),
        ({"format": "packed", "recovery": "lora", "steps": 1}, "keeps its pairs apart"),
        ({"format": "packed", "pattern": "structured"}, "leave format dense"),
        ({"format": "pack"}, "did you mean 'packed'"),
        ({"format": "packed", "values": "int4"}, "did you mean 'int8'"),
    ],
)
def test_what_cannot_be_packed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LosaError, match=message):
        Recipe(**settings)


def test_demo_model_int8_perplexity(tmp_path: Path) -> None:
    """The built-in model, 60% by magnitude in each row: packed floats cost nothing, int8 less than 1%."""
    from losa import data, evaluate

    whole = model.load("demo", Recipe(dtype="bfloat16", device="cpu"))
    bits = {}
    for block in find_blocks(whole):
        for name, linear in block.linears.items():
            mask = masks.choose(linear.weight.abs(), None, 0.6, "row")
            linear.weight.data.masked_fill_(~mask, 0)
            bits[name] = masks.pack(mask)
    whole.save_pretrained(tmp_path / "dense")
    save_file(bits, tmp_path / "dense" / "masks.safetensors")
    convert(tmp_path / "dense", tmp_path / "packed", "packed")
    convert(tmp_path / "dense", tmp_path / "int8", "packed", "int8")
    loader = model.load_tokenizer("demo", whole.config)
    tokens = data.evaluation_tokens("demo:test", loader)[:2048]
    found = {
        name: evaluate.perplexity(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32), tokens, 512
        )
        for name in ("dense", "packed", "int8")
    }
    assert found["packed"] == pytest.approx(found["dense"], rel=1e-5)
    assert found["int8"] == pytest.approx(found["dense"], rel=0.01) and found["int8"] != found["packed"]
