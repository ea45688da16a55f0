"""Packed models through transformers: built without dense weights, the same numbers, saved again bit for bit; damage is an error."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, FUZZ, MODELS, save_tiny, tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from losa import masks, model
from losa.blocks import find_blocks
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.sparse.linear import (
    PackedLinear,
    check_files,
    finish,
    install,
    layouts_in,
    pack_model,
    read_layouts,
    unpack_model,
)
from losa.sparse.packed import check
from losa.widths import named

IDS = torch.arange(24).view(2, 12)
AS_STORED = Recipe(dtype="float32", device="cpu")


def prune(whole: Any, share: float = 0.4) -> dict[str, torch.Tensor]:
    """Random masks on the linears of the blocks, applied; packed, by name. Experts are left alone."""
    generator = torch.Generator().manual_seed(1)
    bits = {}
    for block in find_blocks(whole):
        for name in block.linears:
            try:
                weight = whole.get_submodule(name).weight
            except AttributeError:
                continue
            mask = torch.rand(weight.shape, generator=generator) < share
            weight.data.masked_fill_(~mask, 0)
            bits[name] = masks.pack(mask)
    return bits


def save_packed(
    folder: Path,
    kind: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    values: torch.dtype | None = None,
    shard: str = "50GB",
) -> Any:
    """A packed model in `folder`; returns the dense one with the same zeros."""
    whole = tiny(kind).to(dtype)
    bits = prune(whole)
    dense = copy.deepcopy(whole)
    assert len(pack_model(whole, bits, dtype, values)) == len(bits) > 0
    whole.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return dense.requires_grad_(False)


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save_packed(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("kind", [*MODELS, *ARCHITECTURES])
def test_every_architecture(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded; the logits of the dense model with the same zeros, computed in fp32; saved again, the same tensors."""
    monkeypatch.setenv("LOSA_KERNEL", "reference")
    save_packed(tmp_path / "a", kind, shard="30KB").save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense", dtype=torch.float32)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    loaded = load(tmp_path / "a", dtype=torch.float32)
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == len(layouts_in(loaded.config) or {})
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, dense(IDS).logits)
    load(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="30KB")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
def test_int8(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_KERNEL", "reference")
    save_packed(tmp_path / "packed", kind, values=torch.int8).save_pretrained(tmp_path / "dense")
    loaded, dense = (load(tmp_path / name, dtype=torch.float32) for name in ("packed", "dense"))
    unpacked = copy.deepcopy(loaded)
    unpack_model(unpacked)
    with torch.no_grad():
        found = loaded(IDS).logits
        assert torch.equal(found, unpacked(IDS).logits)
        exact = dense(IDS).logits
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05


def test_the_chosen_kernel_agrees(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOSA_KERNEL", raising=False)
    loaded = load(packed, dtype=torch.float32)
    dense = copy.deepcopy(loaded)
    unpack_model(dense, torch.float32)
    with torch.no_grad():
        found, exact = loaded(IDS).logits, dense(IDS).logits
    assert float((found - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_values_stay_as_stored_whatever_is_computed(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    save_packed(tmp_path, "qwen2", stored)
    loaded = load(tmp_path, dtype=dtype)
    for whole in (loaded, copy.deepcopy(loaded).to(torch.float16), copy.deepcopy(loaded).to("cpu", torch.float32)):
        q = whole.model.layers[0].self_attn.q_proj
        assert q.weight.dtype == stored and q.weight_mask.dtype == torch.uint8 and q.weight_offsets.dtype == torch.int32
        assert q.bias.dtype == whole.dtype and not q.weight.requires_grad
        with torch.no_grad():
            logits = whole(IDS).logits
        assert logits.dtype == whole.dtype and bool(logits.isfinite().all())
        check(q.packed, "it")


def test_generates_what_the_dense_model_does(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_KERNEL", "reference")
    loaded = load(packed, dtype=torch.float32)
    dense = copy.deepcopy(loaded)
    unpack_model(dense, torch.float32)
    made = [whole.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0) for whole in (loaded, dense)]
    assert torch.equal(*made) and made[0].shape[1] > 12


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_whole(packed: Path) -> None:
    """With gradients of what is not packed, and without."""
    loaded = load(packed, dtype=torch.float32)
    dense = copy.deepcopy(loaded)
    unpack_model(dense, torch.float32)
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, loaded(IDS).logits)
    for whole in (compiled, dense):
        whole(IDS, labels=IDS).loss.backward()
    exact = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}
    assert found.keys() == exact.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-6)


def test_base_model(packed: Path) -> None:
    """Whose names have no prefix."""
    base = transformers.AutoModel.from_pretrained(packed, dtype=torch.float32)
    assert isinstance(base.layers[1].mlp.up_proj, PackedLinear)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, load(packed, dtype=torch.float32).model(IDS).last_hidden_state)


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_device_map(packed: Path, place: Any) -> None:
    with torch.no_grad():
        found = load(packed, dtype=torch.float32, device_map=place)(IDS).logits
        torch.testing.assert_close(found.cpu(), load(packed, dtype=torch.float32)(IDS).logits)


def test_offloading_is_refused(packed: Path, tmp_path: Path) -> None:
    """What is offloaded would be multiplied by without having been looked at."""
    place = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.layers.2": "cpu", "lm_head": "cpu"}
    place |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(LosaError, match=r"model\.layers\.1\.\S+ is packed and cannot be offloaded"):
        load(packed, device_map=place, offload_folder=tmp_path / "offloaded")


def test_dequantize(packed: Path) -> None:
    loaded = load(packed, dtype=torch.float32)
    with torch.no_grad():
        before = loaded(IDS).logits
        plain = loaded.dequantize()
        torch.testing.assert_close(plain(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_looked_at_before_it_is_taken(packed: Path, assign: bool) -> None:
    loaded = load(packed)
    state = copy.deepcopy(loaded.state_dict())
    loaded.load_state_dict(copy.deepcopy(state), assign=assign)
    with torch.no_grad():
        before = loaded(IDS).logits
    name = "model.layers.0.mlp.up_proj"
    changes: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
        ("weight_offsets", lambda offsets: offsets + 1, "offsets"),
        ("weight_offsets", lambda offsets: torch.full_like(offsets, 2**31 - 200), "offsets"),
        ("weight", lambda values: values[:-1], r"weight is torch\.\w+ \["),
        ("weight_mask", lambda mask: ~mask, "mask"),
    ]
    for suffix, change, message in changes:
        wrong = f"{name}.{suffix}"
        with pytest.raises(LosaError, match=rf"model\.layers\.0\.mlp\.up_proj: .*{message}"):
            loaded.load_state_dict(state | {wrong: change(state[wrong])}, assign=assign)
        with pytest.raises(LosaError):
            loaded.load_state_dict({wrong: change(state[wrong])}, strict=False, assign=assign)
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, before)


def test_a_loaded_model_can_be_pickled(packed: Path) -> None:
    loaded = load(packed)
    again = pickle.loads(pickle.dumps(loaded))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    state = loaded.state_dict()
    state["model.layers.0.mlp.up_proj.weight_mask"].zero_()
    with pytest.raises(LosaError, match="mask"):
        again.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------- in other processes

PROBE = """
import sys
import transformers
{then}
transformers.utils.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print("raised")
    else:
        print(type(model.model.layers[0].mlp.up_proj).__name__)
assert {losa} == ("losa" in sys.modules)
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("then", "result"), [("", "raised"), ("import losa", "PackedLinear")])
def test_nothing_but_an_error_without_losa(tmp_path: Path, then: str, result: str) -> None:
    save_packed(tmp_path / "floats")
    save_packed(tmp_path / "int8", values=torch.int8)
    found = run(PROBE.format(then=then, losa=bool(then)), tmp_path / "floats", tmp_path / "int8")
    assert found.split() == [result, result]


PEAK = """
import sys, losa, torch, transformers, losa.sparse.linear
from transformers import LlamaForCausalLM

def high():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024

transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])  # imports what loading imports
before = high()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
for parameter in model.parameters():
    parameter.view(torch.uint8).max()  # a mapped file takes memory when it is read
print(high() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory_of_loading(packed: Path, tmp_path: Path) -> None:
    """At most 1.1 times the packed size above what importing takes."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8
    )
    with torch.device("meta"):
        whole = transformers.LlamaForCausalLM(config)
    whole = whole.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in whole.parameters():
        parameter.data.fill_(0.02)
    dense = sum(parameter.numel() * 2 for parameter in whole.parameters())
    pack_model(whole, prune(whole, 0.3), torch.bfloat16)
    whole.save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert 30e6 < size < 0.39 * dense
    peak = int(run(PEAK, packed, tmp_path / "large"))
    assert 0.9 * size < peak < 1.1 * size


# ------------------------------------------------------------------------------------------------------------- bad input


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json's account of the packed linears."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def put(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors."""
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "packed in format 2, this losa reads 1"),
        (lambda c: c.pop("format_version"), "packed in format None"),
        (lambda c: c.update(format_version=True), "packed in format True"),
        (lambda c: c.update(values="bfloat61"), "unknown type of values 'bfloat61': did you mean 'bfloat16'"),
        (lambda c: c.update(values=["int8"]), "unknown type of values"),
        (lambda c: c.pop("linears"), "does not describe packed linears"),
        (lambda c: c.update(linears=[1]), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(shape=[48]), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(shape=[-48, 32]), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(kept=-5), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(kept=10**12), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(nm=[2]), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(nm=[2, 5]), "does not describe packed linears"),
        (lambda c: c["linears"][UP].update(nm=[10**30, 4]), "does not describe packed linears"),
        (
            lambda c: c["linears"][UP].update(shape=[32, 48]),
            r"packs .*up_proj as \[32, 48\], the model has it as \[48, 32",
        ),
        (
            lambda c: c["linears"][UP].update(kept=100),
            r"up_proj.weight is BF16 .*config.json says BF16 \[164\] \(100 kept and 64 more",
        ),
        (lambda c: c["linears"][UP].update(nm=[2, 4]), "up_proj.weight_offsets, which config.json does not know of"),
        (lambda c: c.update(values="float16"), "weight is BF16 .* config.json says F16"),
        (lambda c: c.update(values="int8"), "weight is BF16 .* config.json says I8"),
        (lambda c: c["linears"].update({"model.norm": c["linears"][UP]}), "packs 'model.norm', which is no linear"),
        (lambda c: c["linears"].update({"": c["linears"][UP]}), "packs '', which is no linear"),
        (lambda c: c["linears"].pop(UP), f"holds {UP}.weight_mask, which config.json does not know of"),
    ],
)
def test_bad_config(packed: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(packed, change)
    with pytest.raises(LosaError, match=message) as caught:
        model.load(str(packed), AS_STORED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{UP}.weight_offsets"].add_(1), f"{UP}: its offsets do not agree"),
        (lambda t: t[f"{UP}.weight_offsets"][3].fill_(2**31 - 1), f"{UP}: its offsets do not agree"),
        (lambda t: t[f"{UP}.weight_mask"][0].fill_(255), f"{UP}: its offsets do not agree"),
        (lambda t: t[f"{UP}.weight"][-1].fill_(1), f"{UP}: what follows"),
        (lambda t: t.pop(f"{UP}.weight_mask"), f"hold no {UP}.weight_mask"),
        (lambda t: t.pop(f"{UP}.weight"), f"hold no {UP}.weight"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].half()}), "is F16 .* config.json says BF16"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-1].clone()}), "config.json says BF16"),
        (lambda t: t.update({f"{UP}.weight_mask": t[f"{UP}.weight_mask"].short()}), "is I16 .* config.json says U8"),
        (lambda t: t.update({f"{UP}.weight_scales": torch.ones(48, 1).bfloat16()}), "does not know of"),
    ],
)
def test_bad_tensors(packed: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    put(packed, change)
    with pytest.raises(LosaError, match=message) as caught:
        model.load(str(packed), AS_STORED)
    assert "\n" not in str(caught.value)
    with pytest.raises(LosaError, match=message):  # not wrapped, whoever loads it
        load(packed)


@pytest.mark.parametrize(("stored", "kind"), [([1], "list"), ("losa-packed (import losa first)", "str")])
def test_a_description_that_is_none(packed: Path, stored: object, kind: str) -> None:
    path = packed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    with pytest.raises(LosaError, match=f"quantization_config is no object but {kind}: download the model again$"):
        model.load(str(packed), AS_STORED)


def test_truncated_file(packed: Path) -> None:
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LosaError, match=r"model\.safetensors is damaged"):
        model.load(str(packed), AS_STORED)
    with pytest.raises(LosaError, match=r"model\.safetensors is damaged"):
        load(packed)


def test_a_missing_shard(tmp_path: Path) -> None:
    save_packed(tmp_path, shard="30KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(LosaError, match="model-00002"):
        model.load(str(tmp_path), AS_STORED)


def test_no_files(packed: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(packed)
    with pytest.raises(LosaError, match="from its files"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors(packed))


def test_a_packed_model_is_not_pruned(packed: Path, small: Recipe) -> None:
    from losa import compress

    for source in (str(packed), load(packed, dtype=torch.float32)):
        with pytest.raises(LosaError, match="is packed: losa export"):
            compress(source, small, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    save_packed(folder, values=torch.int8)
    return folder


@settings(max_examples=150 * FUZZ, deadline=None)
@given(data=st.data())
def test_tampered_files_are_refused_or_whole(fuzzed: Path, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in, in the header or anywhere, of the weights or config.json.

    By the steps of loading that are losa's own: around them, `model.load` makes one line of whatever is raised.
    """
    name = data.draw(st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]))
    raw = bytearray((fuzzed / name).read_bytes())
    header = int.from_bytes(raw[:8], "little") + 8 if name != "config.json" else len(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, data.draw(st.sampled_from([8, header, len(raw)]))))
        kind = data.draw(st.sampled_from(["set", "set", "set", "cut", "insert", "copy", "end"]))
        if kind == "set":
            raw[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del raw[place : place + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "copy":
            raw[place : place + 40] = raw[place // 2 : place // 2 + 40]
        else:
            del raw[place:]
    (fuzzed / f"tampered-{name}").write_bytes(bytes(raw))
    files = {
        file: fuzzed / (f"tampered-{file}" if file == name else file) for file in ("config.json", "model.safetensors")
    }
    try:
        config = json.loads(files["config.json"].read_bytes())
    except (ValueError, RecursionError):  # said by transformers
        return
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    refused_or_whole(stored if isinstance(stored, dict) else {}, files["model.safetensors"])


ENTRIES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 100) | st.just(2**70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "kept", "nm"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=100 * FUZZ, deadline=None)
@given(data=st.data())
def test_tampered_descriptions_are_refused_or_whole(fuzzed: Path, data: st.DataObject) -> None:
    """Valid JSON in the place of any part of what config.json says."""
    stored = json.loads((fuzzed / "config.json").read_text())["quantization_config"]
    inside, path = stored, data.draw(st.sampled_from([("values",), ("linears",), (UP,), (UP, "shape"), (UP, "kept")]))
    for key in ("linears", *path[:-1]) if UP in path else ():
        inside = inside[key]
    key = data.draw(st.sampled_from([path[-1], path[-1], "nm", "x"]))
    inside[key] = data.draw(ENTRIES)
    refused_or_whole(stored, fuzzed / "model.safetensors")


def refused_or_whole(stored: dict[str, Any], path: Path) -> None:
    """What loading does with config.json's account and the file: nothing but a LosaError, or packed linears that pass."""
    whole: Any = model.skeleton(tiny().config)
    try:
        layouts = read_layouts(stored)
        install(whole, layouts)
        check_files([str(path)], layouts)
        held = load_file(path)
        for name in layouts:
            linear = named(whole, name)[1]
            for suffix in dict(linear.named_parameters(recurse=False)):
                key = f"{name}.{suffix}"
                setattr(linear, suffix, torch.nn.Parameter(held[key if key in held else key.partition(".")[2]], False))
        finish(whole, layouts)
    except LosaError as error:
        assert "\n" not in str(error)
        return
    for name, layout in layouts.items():
        check(named(whole, name)[1].packed, name, layout)


def test_dense_models_are_none_of_ours(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert layouts_in(transformers.AutoConfig.from_pretrained(tmp_path)) is None
