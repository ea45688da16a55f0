"""Decoding in native code: the logits and the texts of the model's own forward, whatever surrounds its buffers."""

import copy
import ctypes
import inspect
import mmap
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, GATED, tiny
from test_packed_linear import prune, save_packed
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from losa.sparse import cache, cpu, decoding, kernels, native
from losa.sparse.linear import PackedLinear, pack_model, unpack_model
from losa.sparse.packed import pack
from losa.sparse.pages import Pages, _of_a_file, leave
from losa.sparse.steps import WALL

KINDS = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]
FORMS: dict[str, Any] = {"dense": None, "packed": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
TEXT = torch.arange(3, 400, 7)[None, :40]  # long enough for sliding windows, and for the cache to grow
PROMPT = 5


@pytest.fixture(autouse=True)
def small_rooms_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches grow every few tokens, and what nobody has written in them is NaN."""
    room = cache.Store._room

    def poisoned(store: cache.Store, dtype: torch.dtype) -> Tensor:
        return room(store, dtype).fill_(float("nan"))

    monkeypatch.setattr(cache, "ROOM", 3)
    monkeypatch.setattr(cache.Store, "_room", poisoned)
    monkeypatch.setattr(decoding, "_told", set())
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.delenv("LOSA_KERNEL", raising=False)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512-bf16"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each native kernel by name; those with AVX-512 are emulated where this processor lacks it."""
    kind = next(k for k in (cpu.Portable, cpu.AVX2, cpu.AVX512, cpu.AVX512BF16) if k.name == request.param)
    try:
        has = cpu.features(native.library())
    except native.Unavailable as error:
        pytest.skip(str(error))
    if not has.issuperset(kind.needs):
        if "avx512f" not in kind.needs:
            pytest.skip(f"{kind.name} is not emulated, and this processor has no {kind.needs}")
        library: ctypes.CDLL = request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "library", lambda: library)
        monkeypatch.setattr(cpu, "features", lambda _: frozenset(kind.needs))
    cpu.function.cache_clear()
    monkeypatch.setenv("LOSA_KERNEL", kind.name)
    yield kind.name
    cpu.function.cache_clear()


def made(
    kind: str | transformers.PreTrainedModel = "llama", form: str = "dense", dtype: torch.dtype = torch.float32
) -> Any:
    """A tiny model that decodes natively."""
    whole = (tiny(kind) if isinstance(kind, str) else kind).to(dtype).requires_grad_(False)
    if form != "dense":
        assert pack_model(whole, prune(whole), dtype, FORMS[form])
    decoding.attach(whole)
    return whole


def plain(whole: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same model, dense, with its own forward."""
    other = copy.deepcopy(whole)
    other.__dict__.pop("forward", None)
    unpack_model(other, torch.float32)
    return other.to(dtype)


@torch.no_grad()
def stepped(whole: Any, text: Tensor = TEXT, **options: Any) -> Tensor:
    """Logits behind each token from PROMPT on, float64, fed one by one."""
    past = DynamicCache(config=whole.config)
    whole(input_ids=text[:, :PROMPT], past_key_values=past, use_cache=True)
    found = [
        whole(input_ids=text[:, i : i + 1], past_key_values=past, use_cache=True, **options).logits
        for i in range(PROMPT, text.shape[1])
    ]
    assert past.get_seq_length() == text.shape[1]
    return torch.cat(found, dim=1).double()


@torch.no_grad()
def wanted(whole: Any, text: Tensor = TEXT) -> Tensor:
    found: Tensor = plain(whole)(input_ids=text).logits[:, PROMPT:]
    return found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def written(whole: Any, prompt: Tensor = TEXT[:, :PROMPT], count: int = 30, **options: Any) -> Tensor:
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    ids: Tensor = whole.generate(prompt, max_new_tokens=count, **options)
    return ids


# ------------------------------------------------------------------------------------------------------------ right?


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_float32(kernel: str, kind: str, form: str) -> None:
    whole = made(kind, form)
    if kernel == "avx512-bf16" and form in ("dense", "packed"):  # values in float32
        assert "avx512-bf16" in str(decoding.refusal(whole))
        return
    found = stepped(whole)
    assert whole.forward.tokens == found.shape[1]
    fixed = kernel == "avx512-bf16" and form == "int8"  # multiply activations in 16 bits
    assert error(found, wanted(whole)) < (1e-4 if fixed else 2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_in_bfloat16(kernel: str, kind: str, form: str) -> None:
    """No further from the exact ones than the model's own forward is."""
    whole = made(kind, form, torch.bfloat16)
    exact = wanted(whole)
    found = stepped(whole)
    assert whole.forward.tokens == exact.shape[1]
    assert error(found, exact) < 1.1 * error(stepped(plain(whole, torch.bfloat16)), exact) < 0.05


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_the_models_own_forward_writes(kind: str, form: str) -> None:
    whole = made(kind, form)
    own = plain(whole, torch.float32)
    assert torch.equal(written(whole), written(own))
    assert whole.forward.tokens == 29  # the first comes from the prompt
    torch.manual_seed(0)
    drawn = written(whole, do_sample=True, temperature=0.7, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(drawn, written(own, do_sample=True, temperature=0.7, top_k=20))
    assert not torch.equal(drawn, written(own))


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_a_bit(kernel: str, form: str) -> None:
    whole = made("llama", form, torch.bfloat16)
    found = []
    for threads in (1, 2, 11):
        torch.set_num_threads(threads)
        found.append(stepped(whole))
    torch.set_num_threads(1)
    assert whole.forward.tokens == 3 * found[0].shape[1]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_biases_everywhere_and_uneven_widths(kernel: str) -> None:
    config = transformers.LlamaConfig(
        **GATED | {"hidden_size": 36, "intermediate_size": 77, "vocab_size": 101, "head_dim": 6},
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config).eval()
    for parameter in whole.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    wide = kernel == "avx512-bf16"
    whole = made(whole, "packed", torch.bfloat16 if wide else torch.float32)
    text = TEXT % 101
    found = stepped(whole, text)
    assert whole.forward.tokens and error(found, wanted(whole, text)) < (0.03 if wide else 2e-6)


@pytest.mark.parametrize("dense", ["up_proj", "k_proj", "lm_head"])
def test_dense_beside_packed(kernel: str, dense: str) -> None:
    whole = made("qwen2", "int8", torch.bfloat16 if kernel == "avx512-bf16" else torch.float32)
    for name, module in list(whole.named_modules()):
        if name.endswith(dense) and isinstance(module, PackedLinear):
            whole.set_submodule(name, module.dense(whole.dtype))
    found = stepped(whole)
    assert whole.forward.tokens and error(found, wanted(whole)) < (0.03 if kernel == "avx512-bf16" else 2e-6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_kinds_of_rotary_embedding(rope: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(**GATED, rope_parameters=rope | {"rope_theta": 10000.0})
    whole = made(transformers.LlamaForCausalLM(config).eval())
    assert error(stepped(whole), wanted(whole)) < 2e-6 and whole.forward.tokens


def test_buffers_are_not_overrun() -> None:
    whole = made("qwen3", "int8")
    stepped(whole)
    walls = [room for room in whole.forward._table._kept if isinstance(room, Tensor) and bool(room.isnan().any())]
    assert len(walls) > 5
    table = whole.forward._table
    # bytes, which as floats may be anything
    fixed = {step.linear[0].x for step in table.steps if step.linear[0].scales}
    assert bool(fixed) == table.kernel.summed
    for room in walls:
        assert bool(room[:WALL].isnan().all() and room[-WALL:].isnan().all())
        assert room[WALL:].data_ptr() in fixed or bool(room[WALL:-WALL].isfinite().all())


def test_sums_of_groups() -> None:
    mask = torch.rand(7, 600) < 0.4
    mask[3] = False
    packed = pack(torch.randn(7, 600), mask, torch.int8)
    values = torch.zeros(7, 600, dtype=torch.int64).masked_scatter_(mask, packed.values.long())
    sums = torch.stack([values[:, begin : begin + 256].sum(dim=1) for begin in (0, 256, 512)], dim=1)
    for threads in (1, 3):
        found = torch.full((7, 3), 99, dtype=torch.int16)
        cpu.function("losa_sums")(ctypes.byref(cpu.matrix(packed)), found.data_ptr(), threads)
        assert torch.equal(found.long(), sums)


# ----------------------------------------------------------------------------------------------------- caches, masks


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_places_that_are_not_attended_to(kind: str) -> None:
    whole = made(kind)
    mask = torch.ones(1, PROMPT, dtype=torch.long)
    mask[0, :2] = 0
    ids = written(whole, attention_mask=mask)
    assert whole.forward.tokens == 29
    assert torch.equal(ids, written(plain(whole, torch.float32), attention_mask=mask))
    assert not torch.equal(ids, written(whole))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@torch.no_grad()
def test_the_cache_is_an_ordinary_one(kind: str) -> None:
    """Prompts, several tokens at once, and copies: native steps and the model's own forward take turns on it."""
    whole = made(kind)
    exact = plain(whole)(input_ids=TEXT).logits

    def feed(past: Any, begin: int, end: int) -> Any:
        found = whole(input_ids=TEXT[:, begin:end], past_key_values=past, use_cache=True).logits
        assert error(found.double(), exact[:, begin:end]) < 2e-6
        return past

    past = feed(feed(DynamicCache(config=whole.config), 0, 4), 4, 5)
    other = copy.deepcopy(past)
    for i in range(5, 9):
        feed(past, i, i + 1)
    feed(past, 9, 12)  # its own forward
    feed(past, 12, 13)
    feed(other, 5, 6)
    feed(past, 13, 14)  # in turns
    feed(other, 6, 7)
    assert whole.forward.tokens == 1 + 4 + 4
    if kind == "llama":
        past.crop(-3)
        feed(past, 11, 12)
        assert past.get_seq_length() == 12


@torch.no_grad()
def test_positions_that_are_given() -> None:
    whole = made()
    past = DynamicCache(config=whole.config)
    own = plain(whole)
    whole(input_ids=TEXT[:, :PROMPT], past_key_values=past)
    positions = torch.cat([torch.arange(PROMPT), torch.tensor([300])])[None]  # beyond the first table of angles
    found = whole(input_ids=TEXT[:, PROMPT : PROMPT + 1], past_key_values=past, position_ids=positions[:, -1:]).logits
    exact = own(input_ids=TEXT[:, : PROMPT + 1], position_ids=positions).logits[:, -1:]
    assert whole.forward.tokens == 1 and error(found.double(), exact) < 2e-6


# ------------------------------------------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
)
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    whole = made()
    found, exact = (written(model, count=4, **options) for model in (whole, plain(whole, torch.float32)))
    if isinstance(found, Tensor):
        assert torch.equal(found, exact)
    else:
        assert torch.equal(found.sequences, exact.sequences) and len(found.hidden_states) == 4  # type: ignore[attr-defined]
    assert whole.forward.tokens == 0


def test_calls_it_does_not_take() -> None:
    whole = made()
    past = DynamicCache(config=whole.config)
    one = TEXT[:, :1]
    whole(one, past_key_values=past)
    whole(input_ids=one, past_key_values=past)  # with gradients
    with torch.no_grad():
        whole(input_ids=one, past_key_values=past, labels=one)
        whole(inputs_embeds=whole.model.embed_tokens(one), past_key_values=past)
        whole(input_ids=one, past_key_values=past, attention_mask=torch.ones(1, 1, 1, 5))
        assert isinstance(whole(input_ids=one, past_key_values=past, return_dict=False), tuple)
        whole.train()(input_ids=one, past_key_values=past)
        whole.eval()
        assert whole.forward.tokens == 0 and past.get_seq_length() == 7
        with pytest.raises(IndexError):
            whole(input_ids=torch.tensor([[5000]]), past_key_values=past)
        whole(input_ids=one, past_key_values=past)
    assert whole.forward.tokens == 1


@pytest.mark.parametrize("kind", ["opt", *ARCHITECTURES])
def test_refused_architectures_are_named(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = made(kind)
    own = plain(whole, torch.float32)
    assert torch.equal(written(whole, count=5), written(own, count=5)) and whole.forward.tokens == 0
    name = type(whole).__name__
    assert f"{name} is decoded by its own, slower forward: {name} is none of LlamaForCausalLM" in caplog.text
    assert len(caplog.records) == 1


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(whole: Any) -> str:
        return str(decoding.refusal(whole))

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**GATED, rope_parameters=dynamic)
    assert "'dynamic' changes with the length" in why(transformers.LlamaForCausalLM(config))
    gelu = transformers.LlamaConfig(**GATED, hidden_act="gelu")
    assert "block 0 has GELUActivation between its products" in why(transformers.LlamaForCausalLM(gelu))
    assert "computes in torch.float16" in why(tiny().half())
    whole = tiny()
    handle = whole.model.layers[1].register_forward_hook(lambda *_: None)
    assert why(whole) == "model.layers.1 has hooks"
    handle.remove()
    whole.model.layers[2].mlp.up_proj = nn.Sequential(nn.Linear(32, 48))
    assert why(whole) == "up_proj of block 2 is a Sequential"
    monkeypatch.setenv("LOSA_KERNEL", "reference")
    assert "kernel 'reference', which multiplies its weights, is not native" in why(tiny())


def test_without_a_native_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> Any:
        raise native.Unavailable("no compiler")

    monkeypatch.setattr(native, "library", gone)
    monkeypatch.setattr(kernels, "_told", {"reference"})
    whole = made(form="packed")
    assert written(whole).shape[1] == PROMPT + 30 and whole.forward.tokens == 0
    assert "is decoded by its own, slower forward: kernel 'reference'" in caplog.text


def test_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made()
    monkeypatch.setenv(decoding.SWITCH, "ordinary")
    written(whole)
    assert whole.forward.tokens == 0


@torch.no_grad()
def test_follows_packed_values_from_text_to_text(kernel: str) -> None:
    """Their sums are what one kernel keeps a copy of."""
    whole = made("llama", "int8")
    before = stepped(whole)
    for linear in (whole.model.layers[0].mlp.up_proj, whole.model.layers[2].self_attn.v_proj):
        linear.weight.data.clamp_(min=-20)
        found = stepped(whole)
        assert error(found, wanted(whole)) < (1e-4 if kernel == "avx512-bf16" else 2e-6) < 1e-3 < error(found, before)
        before = found
    assert whole.forward.tokens == 3 * found.shape[1]


def test_is_copied_and_pickled_with_its_model() -> None:
    whole = made("llama", "packed")
    text = written(whole)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(written(other), text) and other.forward.tokens == 29
        assert other.forward._whole() is other
    assert whole.forward.tokens == 29
    assert (
        list(inspect.signature(whole.forward).parameters)
        == list(inspect.signature(transformers.LlamaForCausalLM.forward).parameters)[1:]
    )


def test_saves_the_same_after_decoding(tmp_path: Path) -> None:
    save_packed(tmp_path / "packed", "llama-tied")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    written(loaded)
    assert loaded.forward.tokens == 29
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_pages_are_huge_where_the_system_has_them() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this system has no huge pages")
    placed = Pages([2**23]).put(torch.ones(2**21))
    place, found = placed.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            found = begin <= place < end
            assert not found or line.split()[1] == "rw-p"  # shared memory has them on few systems only
        elif found and line.startswith("VmFlags:"):  # whether there are any just now depends on the memory that is free
            assert "hg" in line.split()
            return
    pytest.fail("the memory is not mapped")


def test_pages() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.randn(2, 64).bfloat16(), torch.empty(0)]
    pages = Pages([t.nbytes for t in tensors])
    placed = [pages.put(t) for t in tensors[:3]]
    assert all(torch.equal(old, new) for old, new in zip(tensors[:3], placed, strict=True))
    assert all(new.data_ptr() % 64 == 0 for new in placed)
    assert len({t.untyped_storage().data_ptr() for t in placed}) == 3


def test_memory_of_files_is_left(tmp_path: Path) -> None:
    """What was read of a mapped file is no longer in memory, and is still there; other memory is not touched."""
    held = torch.arange(2**20)
    (tmp_path / "file").write_bytes(held.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=2**20, dtype=torch.int64)
    assert torch.equal(mapped, held)
    place = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    assert _of_a_file(place, place + 2**20) and not _of_a_file(held.data_ptr(), held.data_ptr() + 8)
    for tensor in (mapped, held, torch.zeros(0)):
        leave(tensor)
    assert torch.equal(mapped, held)
