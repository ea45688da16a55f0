"""Packed weights against a loop, their sizes, and what becomes of tensors that were tampered with."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from losa import masks
from losa.errors import LosaError
from losa.patterns import NM
from losa.sparse.packed import DTYPES, FLOATS, GROUP, PAD, SUFFIXES, Packed, check, pack, unpack

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, NaN and the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(INTEGERS[a.itemsize]), b.contiguous().view(INTEGERS[b.itemsize]))


def sparse(rows: int, columns: int, share: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with zeros, and its mask; some kept weights are zero, with either sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = -0.0
    mask = torch.rand(rows, columns, generator=generator) < share
    return torch.where(mask, weight, 0.0).to(dtype), mask


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.sampled_from(FLOATS),
    st.integers(0, 9),
)
def test_floats_come_back_bit_for_bit(rows: int, columns: int, share: float, dtype: torch.dtype, seed: int) -> None:
    weight, mask = sparse(rows, columns, share, dtype, seed)
    packed = pack(weight, mask)
    check(packed, "it", packed.layout)
    back, kept = unpack(packed)
    assert same(back, weight) and torch.equal(kept, mask)
    # as docs/format.md says, weight by weight
    values, starts, bits = [], [0], torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            if mask[i, j]:
                values.append(weight[i, j])
                bits[i, j // 8] += 2 ** (j % 8)
        starts.append(len(values))
    assert same(packed.values, torch.stack([*values, *torch.zeros(PAD, dtype=dtype)]))
    assert torch.equal(packed.mask, bits)
    if packed.offsets is None:
        assert packed.nm is not None and starts == [i * packed.nm.n * columns // packed.nm.m for i in range(rows + 1)]
    else:
        assert packed.offsets.tolist() == starts and packed.offsets.dtype == torch.int32
    assert sum(t.numel() * t.itemsize for t in packed.tensors().values()) == packed.layout.bytes


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 600), st.sampled_from([1e-42, 1e-38, 1e-3, 1.0, 1e30]), st.integers(0, 9))
def test_int8_is_within_half_a_step(rows: int, columns: int, scale: float, seed: int) -> None:
    weight, mask = sparse(rows, columns, 0.5, torch.float32, seed)
    weight *= scale
    packed = pack(weight, mask, torch.int8)
    check(packed, "it", packed.layout)
    assert packed.scales is not None and int(packed.values.short().abs().max()) <= 127
    step = packed.scales.double().repeat_interleave(GROUP, dim=1)[:, :columns]
    groups = torch.nn.functional.pad(weight, (0, -columns % GROUP)).view(rows, -1, GROUP).double()
    largest = groups.abs().amax(dim=2)
    if scale >= 1e-30:  # below, scales have fewer bits, or none
        assert bool((packed.scales.double() * 127 >= largest * (1 - 1e-6)).all())  # none is cut off
        assert bool((packed.scales.double() * 127 <= largest * (1 + 2**-7)).all())  # no step is wasted
    back, kept = unpack(packed)
    assert torch.equal(kept, mask) and not bool(back[~mask].any())
    allowed = torch.where(step > 0, step * (0.5 + 1e-5), 1e-43)  # w / scale is rounded in float32 before it is to q
    assert bool(((back.double() - weight.double()).abs() <= allowed).all())


def test_int8_of_the_smallest_weights() -> None:
    """Scales are rounded up to the least bfloat16, 2^-133; only what float32 divides to zero has none."""
    for weight, scale, q in (
        ([1e-39, 5e-40], 2.0**-133, [11, 5]),
        ([2e-43, 0], 2.0**-133, [0, 0]),
        ([8e-44, 0], 0, [0, 0]),
    ):
        packed = pack(torch.tensor([weight]), torch.ones(1, 2, dtype=torch.bool), torch.int8)
        assert packed.scales is not None
        assert packed.scales.tolist() == [[scale]] and packed.values[:2].tolist() == q


def test_int8_refuses_what_is_no_number() -> None:
    weight = torch.tensor([[1.0, 2.0]])
    for value in (float("inf"), float("nan"), 3.4e38):
        with pytest.raises(LosaError, match="NaN, infinity or beyond"):
            pack(weight * value, weight != 0, torch.int8)
    with pytest.raises(LosaError, match="cannot be packed"):
        pack(weight.double(), weight != 0)


@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 4), NM(3, 8), NM(1, 3), NM(5, 12), NM(4, 16)])
def test_nm_needs_no_offsets(nm: NM) -> None:
    weight = torch.randn(6, 48)
    mask = masks.choose(weight.abs(), None, nm, "row")
    packed = pack(weight.masked_fill(~mask, 0), mask)
    assert packed.offsets is None and packed.nm == nm
    check(packed, "it", packed.layout)
    assert same(unpack(packed)[0], weight.masked_fill(~mask, 0))
    moved = mask.clone()
    moved[3] = moved[3].sort().values  # as many, elsewhere
    with pytest.raises(LosaError, match=f"its mask does not keep {nm}"):
        check(dataclasses.replace(packed, mask=masks.pack(moved)), "it")


@pytest.mark.parametrize(("values", "bound"), [(torch.bfloat16, 0.37), (torch.int8, 0.22)])
def test_size_on_disk_at_70_percent(tmp_path: Path, values: torch.dtype, bound: float) -> None:
    weight = torch.randn(2048, 2048).bfloat16()
    mask = masks.choose(weight.abs(), None, 0.7, "row")
    mask[0] = mask[0].flip(0)  # not all rows alike, so that the smallest form is not taken
    mask[1, mask[1].nonzero()[0]] = False
    packed = pack(weight, mask, values)
    assert packed.offsets is not None
    save_file({"dense": weight}, tmp_path / "dense")
    save_file(packed.tensors(), tmp_path / "packed")
    share = (tmp_path / "packed").stat().st_size / (tmp_path / "dense").stat().st_size
    assert 0.9 * bound < share <= bound


@pytest.mark.parametrize("values", [None, torch.int8])
@pytest.mark.parametrize("nm", [False, True])
@settings(max_examples=100 * FUZZ, deadline=None)
@given(data=st.data())
def test_tampered_tensors_are_refused_or_whole(values: torch.dtype | None, nm: bool, data: st.DataObject) -> None:
    weight, mask = sparse(5, 24, 0.4, torch.bfloat16)
    if nm:
        mask = masks.choose(weight.abs(), None, NM(2, 4), "row")
    good = pack(weight, mask, values)
    tensors = good.tensors()
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name] = tampered(tensors[name], data)
    parts = (tensors.get(name) for name in SUFFIXES)
    bad = Packed(*parts, 24, good.nm)  # type: ignore[arg-type]
    try:
        check(bad, "it", good.layout)
    except LosaError as error:
        assert str(error).startswith("it: ") and "\n" not in str(error)
        return
    # it passed: then mask, offsets and values belong together, and unpacking and packing again gives the same
    back, kept = unpack(bad)
    again = pack(back, kept)
    assert torch.equal(again.mask, bad.mask) and again.nm == bad.nm and again.kept == bad.kept
    assert (again.offsets is None) == (bad.offsets is None)
    assert again.offsets is None or bad.offsets is None or torch.equal(again.offsets, bad.offsets)
    if values is None:
        assert same(again.values, bad.values)
    else:
        assert bool(back.isfinite().all())


def tampered(tensor: Tensor, data: st.DataObject) -> Tensor:
    """A byte changed, ends cut or longer, another type or shape, entries swapped."""
    if not tensor.numel():
        return tensor
    raw = tensor.contiguous().view(torch.uint8).flatten().clone()
    kind = data.draw(st.sampled_from(["byte", "bit", "cut", "longer", "type", "shape", "swap"]))
    place = data.draw(st.integers(0, max(0, len(raw) - 1)))
    if kind in ("byte", "bit"):
        raw[place] = (
            data.draw(st.integers(0, 255)) if kind == "byte" else int(raw[place]) ^ 1 << data.draw(st.integers(0, 7))
        )
        return raw.view(tensor.dtype).view(tensor.shape)
    if kind == "cut":
        return tensor[: place % (len(tensor) + 1)].clone()
    if kind == "longer":
        return torch.cat([tensor, tensor[-1:]])
    if kind == "type":
        return tensor.to(data.draw(st.sampled_from([*DTYPES.values(), torch.int32, torch.int64, torch.uint8])))
    if kind == "shape":
        return tensor.reshape(1, -1)
    order = torch.tensor(data.draw(st.permutations(range(len(tensor)))))
    return tensor[order]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_offsets", lambda t: t.index_fill(0, torch.tensor([2]), 10**6), "its offsets do not agree"),
        ("weight_offsets", lambda t: t.index_fill(0, torch.tensor([2]), -1), "its offsets do not agree"),
        ("weight_offsets", lambda t: t.sort(descending=True).values, "its offsets do not agree"),
        ("weight_offsets", lambda t: t[:-1], r"weight_offsets is torch.int32 \[5\], not torch.int32 \[6\]"),
        ("weight_mask", lambda t: t ^ 1, "its offsets do not agree"),
        ("weight_mask", lambda t: t | 128, "spare bits"),
        ("weight", lambda t: t[:-1], "weight is torch.bfloat16"),
        ("weight", lambda t: t.index_fill(0, torch.tensor([len(t) - 1]), 1), "what follows the last value"),
        ("weight", lambda t: t.half(), "weight is torch.float16"),
    ],
)
def test_damage_is_named(name: str, change: object, message: str) -> None:
    weight, mask = sparse(5, 21, 0.4, torch.bfloat16)
    good = pack(weight, mask)
    tensors = good.tensors()
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    bad = Packed(tensors["weight"], tensors["weight_mask"], tensors["weight_offsets"], None, 21)
    with pytest.raises(LosaError, match=f"model.x: {message}"):
        check(bad, "model.x", good.layout)


@pytest.mark.parametrize("name", ["values", "mask", "offsets", "scales"])
def test_what_kernels_cannot_read_through_pointers_is_refused(name: str) -> None:
    weight, mask = sparse(5, 600, 0.4, torch.float32)
    packed = pack(weight, mask, torch.int8)
    part = getattr(packed, name)
    strided = torch.stack([part, part], dim=-1)[..., 0]
    assert torch.equal(strided, part)
    with pytest.raises(LosaError, match=r"it: weight\w* is a view with strides .*: copy it"):
        check(dataclasses.replace(packed, **{name: strided}), "it", packed.layout)
    with pytest.raises(
        LosaError, match=r"it: weight\w* is on \w+, the values on \w+: a packed linear lies on one device"
    ):
        check(dataclasses.replace(packed, **{name: part.to("meta")}), "it", packed.layout)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_scales_are_numbers(scale: float) -> None:
    packed = pack(*sparse(3, 9, 0.5, torch.float32), torch.int8)
    assert packed.scales is not None
    with pytest.raises(LosaError, match="scale"):
        check(dataclasses.replace(packed, scales=torch.full_like(packed.scales, scale)), "it", packed.layout)
