"""The packed linear, put into a model before its weights are read, or in the place of a dense one."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from losa import masks
from losa.errors import LosaError
from losa.loading import PACKED
from losa.patterns import NM
from losa.registry import unknown
from losa.sparse import kernels
from losa.sparse.packed import DTYPES, PAD, SUFFIXES, VERSION, Layout, Packed, check, pack, unpack
from losa.units import dtype_name
from losa.widths import named


class PackedLinear(nn.Module):
    """x [..., in] of float32, bfloat16 or float16 -> x W^T + bias, [..., out], of x's type; W is packed and frozen.

    Its parameters are those of a packed linear in a file (docs/format.md), None where the layout has none. They keep
    their types whatever type the model is converted to; the bias is converted like any other.
    """

    weight: nn.Parameter
    weight_mask: nn.Parameter
    weight_offsets: nn.Parameter | None
    weight_scales: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layout: Layout, bias: nn.Parameter | None, tensors: dict[str, Tensor] | None = None) -> None:
        """tensors: by name, as `Packed.tensors` gives them; None leaves them on the meta device, to be loaded."""
        super().__init__()
        self.in_features, self.out_features, self.nm = layout.in_features, layout.out_features, layout.nm
        shapes = layout.tensors()
        for name in SUFFIXES:
            tensor = tensors.get(name) if tensors is not None else None
            if tensors is None and name in shapes:
                shape, dtype = shapes[name]
                tensor = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self.register_load_state_dict_pre_hook(_check_given)

    @classmethod
    def of(cls, packed: Packed, like: nn.Linear) -> "PackedLinear":
        """In the place of `like`, with its bias."""
        made = cls(packed.layout, like.bias, packed.tensors())
        made.train(like.training)
        return made

    @property
    def packed(self) -> Packed:
        return Packed(self.weight, self.weight_mask, self.weight_offsets, self.weight_scales, self.in_features, self.nm)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.multiply(x, self.packed, self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain linear with the unpacked weight, in the values' type (float32 for int8) unless told otherwise."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(unpack(self.packed, dtype)[0], requires_grad=False)
        made.register_parameter("bias", self.bias)
        return made.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """What .to() and the like go through: devices change, packed tensors' types do not."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if tensor is self.bias or new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        kept = self.packed.kept / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={self.nm or format(kept, '.3f')}, values={self.weight.dtype}"
        )


def _check_given(linear: nn.Module, state: dict[str, Any], prefix: str, local: dict[str, Any], *_: Any) -> None:
    """Raise LosaError for tensors of a state dict that do not belong together, before any of them is in the linear."""
    assert isinstance(linear, PackedLinear)
    layout, tensors = linear.packed.layout, linear.packed.tensors()
    for name, own in tensors.items():
        given = state.get(prefix + name, own)
        if not local.get("assign_to_params_buffers") and not own.is_meta:  # it will be copied
            given = given.to("cpu", own.dtype).contiguous()
        tensors[name] = given
    if not any(tensor.is_meta for tensor in tensors.values()):
        check(Packed.of(tensors, linear.in_features, linear.nm), prefix[:-1], layout)


# ------------------------------------------------------------------------------------------------------- config.json


def describe(layouts: dict[str, Layout]) -> dict[str, Any]:
    """`quantization_config` of a model whose linears of those names are packed."""
    (values,) = {layout.values for layout in layouts.values()}
    return {
        "quant_method": PACKED,
        "format_version": VERSION,
        "values": dtype_name(values),
        "linears": {name: layout.to_json() for name, layout in layouts.items()},
    }


def read_layouts(config: dict[str, Any]) -> dict[str, Layout]:
    """What `describe` wrote. Raises LosaError for another version, and for what it cannot have written."""
    found = config.get("format_version")
    if type(found) is not int or found != VERSION:
        raise LosaError(
            f"the model is packed in format {found!r}, this losa reads {VERSION}: use the losa that made it"
        )
    if (values := DTYPES.get(str(config.get("values")))) is None:
        raise unknown("type of values", config.get("values"), DTYPES)
    linears, layouts = config.get("linears"), {}
    try:
        for name, entry in linears.items():  # type: ignore[union-attr]
            rows, columns = entry["shape"]
            nm = NM(*entry["nm"]) if "nm" in entry else None
            numbers = [rows, columns, *([] if nm is None else [nm.n, nm.m])]
            if any(type(number) is not int or number < 1 for number in numbers) or type(entry["kept"]) is not int:
                raise ValueError(entry)
            if not 0 <= entry["kept"] <= rows * columns or (nm is not None and (columns % nm.m or nm.n > nm.m)):
                raise ValueError(entry)
            layouts[name] = Layout(rows, columns, entry["kept"], values, nm)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LosaError(
            f"config.json does not describe packed linears ({error!r}): the packed model is damaged"
        ) from None
    return layouts


def layouts_in(config: Any) -> dict[str, Layout] | None:
    """The packed linears of a model with this configuration, None if it is not packed."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not isinstance(stored, dict):  # of a loaded model
        stored = stored.to_dict()
    return read_layouts(stored) if isinstance(stored, dict) and stored.get("quant_method") == PACKED else None


# ------------------------------------------------------------------------------------------------- before and after loading


def install(whole: nn.Module, layouts: dict[str, Layout]) -> None:
    """Put packed linears, without weights, in the place of a model's. Raises LosaError where the model has no such linear."""
    for full, layout in layouts.items():
        name, old = named(whole, full)
        if not isinstance(old, nn.Linear):
            raise LosaError(f"config.json packs {full!r}, which is no linear of {type(whole).__name__}")
        if list(old.weight.shape) != [layout.out_features, layout.in_features]:
            shape = [layout.out_features, layout.in_features]
            raise LosaError(f"config.json packs {full} as {shape}, the model has it as {list(old.weight.shape)}")
        whole.set_submodule(name, PackedLinear(layout, old.bias).train(old.training))


def check_files(files: list[str] | None, layouts: dict[str, Layout]) -> None:
    """Raise LosaError unless the safetensors files hold just the tensors of the layouts; reads headers only."""
    from safetensors import SafetensorError, safe_open

    if not files:
        raise LosaError("a packed model is loaded from its files, not from a state dict")
    wanted = {f"{name}.{suffix}": what for name, layout in layouts.items() for suffix, what in layout.tensors().items()}
    short = {full.partition(".")[2]: full for full in wanted}  # base models are saved without the head's prefix
    seen = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                pieces = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                headers = {key: (list(piece.get_shape()), piece.get_dtype()) for key, piece in pieces.items()}
        except (SafetensorError, OSError) as error:
            raise LosaError(f"{path} is damaged ({error}): download the model again") from None
        for key, (shape, dtype) in headers.items():
            full = key if key in wanted else short.get(key)
            if full is not None:
                seen.add(full)
                right = (wanted[full][0], STORED[wanted[full][1]])
                if (shape, dtype) != right:
                    what = f" ({right[0][0] - PAD} kept and {PAD} more)" if full.endswith(".weight") else ""
                    raise LosaError(f"{path}: {key} is {dtype} {shape}, config.json says {right[1]} {right[0]}{what}")
            elif key.rpartition(".")[2] in SUFFIXES[1:]:
                raise LosaError(f"{path} holds {key}, which config.json does not know of")
    if missing := wanted.keys() - seen:
        raise LosaError(f"the model's files hold no {min(missing)}: the packed model is incomplete")


STORED = {  # safetensors' names
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
}


def part_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter of that name is one of those that transformers names so."""
    return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns)


def fix_types(whole: Any, expected: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give every dense parameter the type it should have. Raises LosaError for one of another shape.

    transformers does so itself from 5.23 on; before, it leaves what it renames as stored, and looks at no shape, in models
    that are not plain.
    """
    wide = [name for kind in ("", "_strict") for name in getattr(whole, f"_keep_in_fp32_modules{kind}", None) or ()]
    packed = {id(p) for module in whole.modules() if isinstance(module, PackedLinear) for p in module.parameters()}
    for name, parameter in whole.named_parameters():
        if name not in expected or id(parameter) in packed:
            continue
        shape, dtype = expected[name]
        if parameter.shape != shape:
            raise LosaError(f"{name} is {list(parameter.shape)}, the model wants {list(shape)}")
        if parameter.dtype != dtype and not part_of(name, wide):
            parameter.data = parameter.data.to(dtype)


def finish(whole: nn.Module, layouts: dict[str, Layout]) -> None:
    """Freeze the packed linears of a model that was loaded. Raises LosaError for the first that is not what it should be.

    Nor may it be elsewhere (offloaded): what is not looked at now could be multiplied by later.
    """
    for full, layout in layouts.items():
        linear: Any = named(whole, full)[1]
        if linear.weight.is_meta:
            raise LosaError(f"{full} is packed and cannot be offloaded: let device_map keep it on a device")
        for name in SUFFIXES:
            if (parameter := getattr(linear, name)) is not None:
                parameter.requires_grad_(False)
        check(linear.packed, full, layout)


@torch.no_grad()
def pack_model(
    whole: Any, bits: dict[str, Tensor], stored: torch.dtype, values: torch.dtype | None = None
) -> dict[str, PackedLinear]:
    """Put packed linears in the place of those of `bits` (packed masks by name), in place, and configure the model so.

    stored: the type the model is saved in, in which the values are kept unless `values` is int8. What is no nn.Linear
    (experts), or would be no smaller, stays dense. Returns those that were packed.
    """
    made: dict[str, PackedLinear] = {}
    for name, mask in bits.items():
        found: Any = named(whole, name)[1]
        if isinstance(found, nn.Linear):
            kept = masks.unpack(mask, found.in_features)
            packed = pack(found.weight.to(stored), kept, values)
            if packed.layout.bytes < found.weight.numel() * stored.itemsize:
                made[name] = PackedLinear.of(packed, found)
                whole.set_submodule(name, made[name])
    if made:
        from losa.sparse import decoding  # which knows packed linears

        whole.config.quantization_config = describe({name: linear.packed.layout for name, linear in made.items()})
        decoding.attach(whole)
    return made


def unpack_model(whole: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put dense linears in the place of a model's packed ones."""
    for name, module in list(whole.named_modules()):
        if isinstance(module, PackedLinear):
            whole.set_submodule(name, module.dense(dtype))
