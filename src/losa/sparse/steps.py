"""A model's decoding as a table of steps for the native library (csrc/steps.h): what is computed where, from which weights."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import LosaError
from losa.sparse import cpu, kernels
from losa.sparse.linear import PackedLinear
from losa.sparse.packed import GROUP, pack
from losa.sparse.pages import Pages, leave

EMBED, NORM, PLACE, MULTIPLY, ADD, GATE, ATTEND = range(7)  # enum Does in csrc/steps.h
FLOATS = 0  # enum Form in csrc/product.h
CPU = torch.device("cpu")
COLUMNS = 64  # what buffers are padded to
COUNTER = 9 * 64  # bytes of a struct Counter in csrc/steps.h
WALL = 64  # floats of NaN between buffers: what reads beyond one is found out


class Linear(ctypes.Structure):
    """struct Linear in csrc/steps.h."""

    _fields_ = (
        ("weight", cpu.Matrix),
        *((name, ctypes.c_void_p) for name in ("bias", "x", "scales", "y")),
        ("bias_type", ctypes.c_int32),
    )


class Step(ctypes.Structure):
    """struct Step in csrc/steps.h."""

    _fields_ = (
        ("does", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("linear", Linear * 3),
        *((name, ctypes.c_void_p) for name in ("x", "y", "weight", "table")),
        ("n", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "query_norm", "key_norm")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window", "layer")),
        ("scaling", ctypes.c_float),
    )


class Plan(ctypes.Structure):
    """struct Plan in csrc/steps.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("steps", "counters")),
        *((name, ctypes.c_int64) for name in ("count", "token", "slot")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("layer_size", "capacity")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "visible", "scores")),
        ("threads", ctypes.c_int32),
        ("cache_type", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Attention:
    """The heads of one block."""

    heads: int
    kv_heads: int
    dim: int
    window: int  # tokens that are attended to, 0 for all


class Table:
    """The steps of one token through a model of the Llama family, and what they work on.

    `whole`: see losa.sparse.decoding, which has looked at it. Its weights are moved into pages of the table's; the
    model's parameters then are those. Steps read the parameters where they are: what is written into them counts.
    """

    def __init__(self, whole: Any, heads: list[Attention]) -> None:
        self.kernel = kernel_of(whole)
        self.heads, self.dtype = heads, whole.dtype
        self.steps: list[Step] = []
        self._kept: list[Any] = []  # what the steps point to
        self._summed: list[tuple[cpu.Matrix, Tensor]] = []
        with torch.no_grad():
            _move([module for module in whole.modules() if isinstance(module, nn.Linear | PackedLinear)])
            self._build(whole.model, whole.lm_head)
        self._array = (Step * len(self.steps))(*self.steps)
        self.counters = torch.zeros(len(self.steps) * COUNTER // 8, dtype=torch.int64)
        self.plan = Plan(ctypes.addressof(self._array), self.counters.data_ptr(), len(self.steps))
        self.plan.cache_type = cpu.TYPES[self.dtype]

    def _build(self, base: Any, head: nn.Module) -> None:
        table = base.embed_tokens.weight
        width = table.shape[1]
        most = max(h.heads * h.dim for h in self.heads)
        kv = max(h.kv_heads * h.dim for h in self.heads)
        middle = max(layer.mlp.gate_proj.out_features for layer in base.layers)
        self.hidden, self.normed = self._buffer(width), self._buffer(width)
        query, key, value = self._buffer(most), self._buffer(kv), self._buffer(kv)
        attended, gated = self._buffer(most), self._buffer(middle)
        self.logits = self._buffer(head.out_features)  # type: ignore[arg-type]
        self._add(EMBED, y=self.hidden, table=table, n=width, type=cpu.TYPES[table.dtype])
        for index, (layer, heads) in enumerate(zip(base.layers, self.heads, strict=True)):
            attention, mlp = layer.self_attn, layer.mlp
            self._norm(layer.input_layernorm, self.hidden, self.normed)
            into = [(attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)]
            self._multiply(MULTIPLY, self.normed, into)
            norms = [norm for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if norm]
            self._add(
                ATTEND,
                y=attended,
                query=query,
                key=key,
                value=value,
                query_norm=norms[0].weight if norms else None,
                key_norm=norms[1].weight if norms else None,
                type=cpu.TYPES[norms[0].weight.dtype] if norms else 0,
                epsilon=norms[0].variance_epsilon if norms else 0,
                heads=heads.heads,
                kv_heads=heads.kv_heads,
                dim=heads.dim,
                window=heads.window,
                layer=index,
                scaling=attention.scaling,
            )
            self._multiply(ADD, attended[: heads.heads * heads.dim], [(attention.o_proj, self.hidden)])
            self._norm(layer.post_attention_layernorm, self.hidden, self.normed)
            self._multiply(GATE, self.normed, [(mlp.gate_proj, gated), (mlp.up_proj, gated)])
            self._multiply(ADD, gated[: mlp.gate_proj.out_features], [(mlp.down_proj, self.hidden)])
        self._norm(base.norm, self.hidden, self.normed)
        self._multiply(MULTIPLY, self.normed, [(head, self.logits)])

    def run(self) -> Tensor:
        """Walk through the plan as it stands, by torch's threads. Returns the logits, float32 [vocabulary], until the next run."""
        self.plan.threads = torch.get_num_threads()
        cpu.function(f"losa_decode_{self.kernel.symbol}")(ctypes.byref(self.plan))
        return self.logits

    def sum_up(self) -> None:
        """Add up int8 values as they are now, for the kernel that wants their sums. It takes about as long as a token."""
        for matrix, sums in self._summed:
            cpu.function("losa_sums")(ctypes.byref(matrix), sums.data_ptr(), torch.get_num_threads())

    def _add(self, does: int, linears: tuple[Linear, ...] = (), **fields: Any) -> None:
        step = Step(does=does, count=len(linears))
        for i, linear in enumerate(linears):
            step.linear[i] = linear
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = self._at(value)
            setattr(step, name, value)
        self.steps.append(step)

    def _norm(self, module: Any, x: Tensor, y: Tensor) -> None:
        weight = module.weight
        fields = {"n": len(weight), "type": cpu.TYPES[weight.dtype], "epsilon": module.variance_epsilon}
        self._add(NORM, x=x, y=y, weight=weight, **fields)

    def _multiply(self, does: int, x: Tensor, into: list[tuple[Any, Tensor]]) -> None:
        """A step that multiplies x by linears, and before it those that bring x into the forms that these ask for."""
        made = []
        placed: dict[int, tuple[int, int]] = {}
        for module, y in into:
            linear = Linear(self._matrix(module), None, x.data_ptr(), None, y.data_ptr())
            if module.bias is not None:
                linear.bias, linear.bias_type = self._at(module.bias), cpu.TYPES[module.bias.dtype]
            form = cpu.function(f"losa_form_{self.kernel.symbol}")(ctypes.byref(linear.weight))
            if form != FLOATS:
                if form not in placed:
                    placed[form] = self._place(x, linear, module.in_features)
                linear.x, linear.scales = placed[form]
            made.append(linear)
        self._add(does, tuple(made))

    def _matrix(self, linear: Any) -> cpu.Matrix:
        if not isinstance(linear, PackedLinear):
            out, columns = linear.weight.shape
            dense: dict[str, int] = {"per_row": columns, "type": cpu.TYPES[linear.weight.dtype]}
            return cpu.Matrix(self._at(linear.weight), out=out, columns=columns, **dense)
        self._kept += [tensor.detach() for tensor in linear.parameters()]
        made = cpu.matrix(linear.packed)
        if self.kernel.summed and linear.packed.scales is not None:
            sums = torch.empty(linear.packed.scales.shape, dtype=torch.int16)
            made.sums = self._at(sums)
            self._summed.append((made, sums))
        return made

    def _place(self, x: Tensor, linear: Linear, columns: int) -> tuple[int, int]:
        to = self._buffer(columns)  # four bytes a column, of which some forms need two
        scales = self._buffer(-(-columns // GROUP))
        linear.x, linear.scales = to.data_ptr(), scales.data_ptr()
        self._add(PLACE, (linear,), x=x, n=columns)
        return to.data_ptr(), scales.data_ptr()

    def _buffer(self, size: int) -> Tensor:
        """Zeros, up to a multiple of COLUMNS of them, walls of NaN around."""
        room = torch.full((-(-size // COLUMNS) * COLUMNS + 2 * WALL,), float("nan"))
        room[WALL:-WALL] = 0
        self._kept.append(room)
        return room[WALL : WALL + size]

    def _at(self, tensor: Tensor) -> int:
        """Where it is, and stays while the table lives."""
        self._kept.append(tensor.detach())
        return tensor.data_ptr()


def kernel_of(whole: Any) -> cpu.Native:
    """The one native kernel that multiplies by all weights of a model. Raises LosaError, why there is none."""
    packs = [module.packed for module in whole.modules() if isinstance(module, PackedLinear)]
    if not packs:  # a dense model: the kernel for weights of its type
        packs = [pack(torch.ones(1, 8, dtype=whole.dtype), torch.ones(1, 8, dtype=torch.bool))]
    found = {kernel.name: kernel for kernel in (kernels.choose(p, whole.dtype, CPU).kernel for p in packs)}
    if len(found) > 1:
        raise LosaError(f"its linears take several kernels: {', '.join(sorted(found))}")
    ((name, kernel),) = found.items()
    if not isinstance(kernel, cpu.Native):
        raise LosaError(f"kernel {name!r}, which multiplies its weights, is not native")
    return kernel


def _move(linears: list[Any]) -> None:
    """Move the weights of linears into pages, where their parameters then are."""
    weights = {id(p): p for linear in linears for p in linear.parameters(recurse=False) if p is not linear.bias}
    pages = Pages([p.nbytes for p in weights.values()])
    for parameter in weights.values():
        moved = pages.put(parameter.data)
        leave(parameter.data)
        parameter.data = moved
