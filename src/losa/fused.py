"""The masked low-rank linear on a GPU, fused: beside `losa.adapters`' own way, and taken only where it was measured to be faster.

The first time that a device meets a shape, a step of each is timed there, and the answer is kept in the user's cache: the two
round differently, and a run that is repeated or resumed has to take the same one. LOSA_FUSED=never or =always decides instead.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losa.errors import LosaError
from losa.sparse.gpu import has_triton, interpreted

TILES = {"M": 128, "N": 128, "K": 32}  # of a product: its rows, its columns, a step of what is summed over
WARPS, STAGES = 8, 3
GAIN = 1.05  # so much faster it has to be
ROUNDS = 5
SETTING = "LOSA_FUSED"

log = logging.getLogger("losa.fused")

Compute = Callable[..., Tensor]
_known: dict[str, bool] = {}  # as the cache on disk has them
_choices: dict[tuple[Any, ...], bool] = {}


def choose(present: Compute, *operands: Any) -> Compute:
    """`present`, or `Fused.apply` if that is to be taken for these operands (those of `Fused.forward`).

    Raises LosaError for an unknown value of LOSA_FUSED, and where it says `always` and the kernels refuse.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in ("auto", "always", "never"):
        raise LosaError(f"{SETTING} must be auto, always or never, not {setting!r}")
    x: Tensor = operands[0]
    if setting == "never" or not x.numel():
        return present
    if setting == "always":
        if why := refuses(*operands):
            raise LosaError(f"{SETTING}=always cannot be: {why}")
        return Fused.apply
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return present
    return Fused.apply if _taken(present, *operands) else present


def _taken(present: Compute, *operands: Any) -> bool:
    """Whether it is fused, looked up by what costs nothing to compare: this is asked at every product."""
    x, weight, _, a, _, bias, _ = operands
    trained = (x.requires_grad, a.requires_grad, bias is not None and bias.requires_grad, torch.is_grad_enabled())
    held = (weight.shape, weight.stride(), weight.dtype, x.dtype, a.dtype, x.device)
    key = (*held, trained, bias is None, _up(x.numel() // x.shape[-1]), _up(len(a)))
    if (found := _choices.get(key)) is None:
        found = _choices[key] = refuses(*operands) is None and faster(present, *operands)
    return found


def _up(n: int) -> int:
    """To the next power of two: so many tokens, or so high a rank, count as equal."""
    return 1 << (n - 1).bit_length()


def refuses(x: Tensor, weight: Tensor, bits: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, _: float) -> str | None:
    """Why the kernels cannot compute this, None if they can. On a CPU only in Triton's interpreter (TRITON_INTERPRET=1)."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted()):
        return f"the fused linear runs on CUDA, not on {x.device.type}"
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    if any(t is not None and t.dtype not in kinds for t in (x, weight, a, b, bias)):
        return "the fused linear computes in float32, bfloat16 and float16"
    if x.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter multiplies no bfloat16 tiles"
    if not weight.is_contiguous() or not bits.is_contiguous():
        return "the fused linear takes contiguous weights"
    if not has_triton():
        return "Triton is not installed: pip install triton"
    if x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the fused linear needs CUDA compute capability 8.0"
    return None


class Fused(torch.autograd.Function):
    """y = x (M * (W + s B A))^T + b: three products a step, and nothing of the size of the weight beside it.

    x [..., in], weight [out, in], bits uint8 [out, ceil(in / 8)], a [r, in], b [out, r]; the weight is frozen. The effective
    weight is rounded once, to x's type; sums are taken in float32. The gradients of the pair are contracted from float32
    tiles of dy^T x; partial sums of r / 128 of the weight's size each are summed in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bits: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bits, a, b)
        ctx.scaling = scaling
        out, columns = weight.shape
        rows = x.reshape(-1, columns).contiguous()
        y = x.new_empty(*x.shape[:-1], out)  # no view, which a model could not add to in place
        _run("forward", (len(rows), out), (rows, weight, bits), (a, b), (bias, y), len(rows), scaling, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bits, a, b = ctx.saved_tensors
        need_x, _, _, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        out, columns = weight.shape
        dx = da = db = None
        dy = dy.reshape(-1, out).contiguous()
        if need_x:
            dx = dy.new_empty(len(dy), columns)
            _run("backward_x", (len(dy), columns), (dy, weight, bits), (a, b), (dx,), len(dy), ctx.scaling, x.dtype)
            dx = dx.view(x.shape)
        if need_a or need_b:
            rows = x.reshape(-1, columns).contiguous()
            parts_a = a.new_empty((-(-out // TILES["M"]), *a.shape), dtype=torch.float32)
            parts_b = b.new_empty((-(-columns // TILES["N"]), *b.shape), dtype=torch.float32)
            pair, parts = (a, b), (parts_a, parts_b)
            _run("backward_pair", (out, columns), (rows, dy, bits), pair, parts, len(rows), ctx.scaling, x.dtype)
            da, db = parts_a.sum(0).to(a.dtype), parts_b.sum(0).to(b.dtype)
        return dx, None, None, da, db, dy.sum(0) if need_bias else None, None


def _run(
    function: str,
    size: tuple[int, int],
    operands: tuple[Tensor, Tensor, Tensor],
    pair: tuple[Tensor, Tensor],
    results: tuple[Tensor | None, ...],
    tokens: int,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    """Launch a function of losa.fused_kernels on tiles of a matrix of that size. The last operand is the packed mask."""
    from losa import fused_kernels

    a, b = pair[0].contiguous(), pair[1] if pair[1].stride(1) == 1 else pair[1].contiguous()
    rank, columns = a.shape
    out, width = operands[2].shape
    grid = (-(-size[0] // TILES["M"]), -(-size[1] // TILES["N"]))
    precision = "tf32" if dtype == torch.bfloat16 else "ieee"  # of the pair: TF32 has three more bits than bfloat16
    held = max(16, 1 << (rank - 1).bit_length())  # what a product of tiles is wide at least
    sizes = (tokens, out, columns, width, rank, b.stride(0), scaling)
    with torch.cuda.device(a.device if a.is_cuda else -1):
        getattr(fused_kernels, function)[grid](
            *operands,
            a,
            b,
            *results,
            *sizes,
            RANK=held,
            **TILES,
            PRECISION=precision,
            num_warps=WARPS,
            num_stages=STAGES,
        )


# ---------------------------------------------------------------------------------------------------------- the choice


def faster(present: Compute, *operands: Any) -> bool:
    """Whether a step of the fused linear took less time here than one of `present`, by GAIN; measured once a shape and device.

    Tokens and ranks count as equal up to the next power of two. Processes of a machine take what the first of them found.
    """
    x, weight, _, a = operands[:4]
    sizes = [_up(x.numel() // x.shape[-1]), _up(len(a))]
    trained = [isinstance(t, Tensor) and t.requires_grad for t in operands]
    parts = [
        *weight.shape,
        *sizes,
        x.dtype,
        weight.dtype,
        a.dtype,
        trained,
        torch.is_grad_enabled(),
        _machine(x.device),
    ]
    key = " ".join(map(str, parts))
    if key not in _known:
        _known[key] = _remembered(key, lambda: _measure(present, *operands))
    return _known[key]


def _machine(device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__}"


def _remembered(key: str, measure: Callable[[], bool]) -> bool:
    """What the cache says, or what is measured now, under a lock so that one process measures at a time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "losa"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "fused.json", "a+")  # noqa: SIM115
    except OSError as error:
        log.info("%s cannot be written (%s): the fused linear is measured for this process alone", folder, error)
        return measure()
    with file:
        with contextlib.suppress(OSError):  # no locks on this file system: the last to write is remembered
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            known: dict[str, bool] = dict(json.loads(file.read()))
        except (ValueError, TypeError):  # new, or cut short by a kill
            known = {}
        if not isinstance(known.get(key), bool):
            known[key] = measure()
            file.truncate(0)
            file.write(json.dumps(known, indent=1))
        return known[key]


def _measure(present: Compute, *operands: Any) -> bool:
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        for turn in range(-1, ROUNDS):  # the first round compiles, and is checked
            found = {fused: _step(Fused.apply if fused else present, *operands) for fused in (True, False)}
            if turn < 0 and (why := _differ(found[True][1], found[False][1])):
                log.warning("the fused linear is wrong here and not used: %s", why)
                return False
            if turn >= 0:
                for fused, (took, _) in found.items():
                    times[fused].append(took)
    except Exception as error:  # no compiler, no memory, too small a GPU: the present way computes the same
        log.warning("the fused linear cannot be used here: %r", error)
        return False
    ratio = min(times[False]) / min(times[True])
    log.info("the fused linear takes 1/%.2f of the time of three dense products here", ratio)
    return ratio > GAIN


def _step(compute: Compute, *operands: Any) -> tuple[float, list[Tensor]]:
    """Milliseconds of a step forward and, where gradients are wanted, backward; the output and the gradients."""
    own = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in operands]
    wanted = [t for t in own if isinstance(t, Tensor) and t.requires_grad]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t
    ):  # a checkpoint's would not let backward run here
        y = compute(*own)
        gradients = torch.autograd.grad(y, wanted, y.detach()) if y.requires_grad else ()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)), [y.detach(), *gradients]


def _differ(got: list[Tensor], want: list[Tensor]) -> str | None:
    """Which of these is farther from the other way's than rounding explains, None if none is."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        allowed = 1e-3 if w.dtype == got[0].dtype == torch.float32 else 3e-2
        if not float((g.float() - w.float()).norm()) <= allowed * float(w.float().norm()):
            return f"result {i} of output and gradients differs by more than {allowed}"
    return None
