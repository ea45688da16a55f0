"""The masked low-rank linear in Triton: the effective weight M * (W + s B A) is built tile by tile inside each product.

Imported only where Triton is: see `losa.fused`, which calls these. Nothing of the size of the weight is written: forward and
dx build its tiles where they multiply; the gradient of the weight is a tile that is contracted with A and B at once.
"""

import triton
import triton.language as tl


@triton.jit
def _keep(bits, n, k, out, columns, width):
    """Whether the mask keeps, [N, K]; False outside the weight."""
    inside = (n < out)[:, None] & (k < columns)[None, :]
    byte = tl.load(bits + n.to(tl.int64)[:, None] * width + (k // 8)[None, :], mask=inside, other=0).to(tl.int32)
    return ((byte >> (k % 8)[None, :]) & 1) != 0


@triton.jit
def _a(a, k, columns, rank, RANK: tl.constexpr):
    """A's columns k, float32 [RANK, K]."""
    r = tl.arange(0, RANK)
    inside = (r < rank)[:, None] & (k < columns)[None, :]
    return tl.load(a + r[:, None] * columns + k[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _b(b, n, out, rank, stride_b, RANK: tl.constexpr):
    """B's rows n, float32 [N, RANK]."""
    r = tl.arange(0, RANK)
    inside = (n < out)[:, None] & (r < rank)[None, :]
    return tl.load(b + n[:, None] * stride_b + r[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _effective(
    weight, bits, a, b, n, k, out, columns, width, rank, stride_b, scaling, RANK: tl.constexpr, PRECISION: tl.constexpr
):
    """M * (W + s B A) at rows n and columns k, float32 [N, K]; zero outside."""
    inside = (n < out)[:, None] & (k < columns)[None, :]
    held = tl.load(weight + n.to(tl.int64)[:, None] * columns + k[None, :], mask=inside, other=0).to(tl.float32)
    pair = tl.dot(_b(b, n, out, rank, stride_b, RANK), _a(a, k, columns, rank, RANK), input_precision=PRECISION)
    return tl.where(_keep(bits, n, k, out, columns, width), held + scaling * pair, 0.0)


@triton.jit
def _rows(x, m, k, tokens, columns):
    """x [tokens, columns] at rows m and columns k, [M, K]; zero outside."""
    inside = (m < tokens)[:, None] & (k < columns)[None, :]
    return tl.load(x + m.to(tl.int64)[:, None] * columns + k[None, :], mask=inside, other=0)


@triton.jit
def _write(y, m, k, tokens, columns, tile):
    inside = (m < tokens)[:, None] & (k < columns)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * columns + k[None, :], tile.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rank"])
def forward(
    x,  # [tokens, columns]
    weight,  # [out, columns]
    bits,  # [out, width]
    a,  # [rank, columns]
    b,  # [out, rank], its rows stride_b apart
    bias,  # [out], or None
    y,  # [tokens, out]
    tokens,
    out,
    columns,
    width,
    rank,
    stride_b,
    scaling,
    RANK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x E^T + bias."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        tile = _effective(weight, bits, a, b, n, k, out, columns, width, rank, stride_b, scaling, RANK, PRECISION)
        factor = _rows(x, m, k, tokens, columns)
        total = tl.dot(factor, tl.trans(tile.to(factor.dtype)), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + n, mask=n < out, other=0).to(tl.float32)[None, :]
    _write(y, m, n, tokens, out, total)


@triton.jit(do_not_specialize=["tokens", "rank"])
def backward_x(
    dy,  # [tokens, out]
    weight,
    bits,
    a,
    b,
    dx,  # [tokens, columns]
    tokens,
    out,
    columns,
    width,
    rank,
    stride_b,
    scaling,
    RANK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = dy E; a program has N columns of dx and goes over the rows of E in steps of K."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, out, K):
        k = start + tl.arange(0, K)
        tile = _effective(weight, bits, a, b, k, n, out, columns, width, rank, stride_b, scaling, RANK, PRECISION)
        factor = _rows(dy, m, k, tokens, out)
        total = tl.dot(factor, tile.to(factor.dtype), total, input_precision=PRECISION)
    _write(dx, m, n, tokens, columns, total)


@triton.jit(do_not_specialize=["tokens", "rank"])
def backward_pair(
    x,
    dy,
    bits,
    a,
    b,
    da,  # [programs along out, rank, columns], to be summed over the first
    db,  # [programs along columns, out, rank]
    tokens,
    out,
    columns,
    width,
    rank,
    stride_b,
    scaling,
    RANK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dA = s B^T (M * G) and dB = s (M * G) A^T, of G = dy^T x one tile [M, N] a program; tokens in steps of K."""
    n = tl.program_id(0) * M + tl.arange(0, M)
    c = tl.program_id(1) * N + tl.arange(0, N)
    tile = tl.zeros((M, N), tl.float32)
    for start in range(0, tokens, K):
        t = start + tl.arange(0, K)
        tile = tl.dot(
            tl.trans(_rows(dy, t, n, tokens, out)), _rows(x, t, c, tokens, columns), tile, input_precision=PRECISION
        )
    tile = tl.where(_keep(bits, n, c, out, columns, width), tile * scaling, 0.0)
    part_a = tl.dot(tl.trans(_b(b, n, out, rank, stride_b, RANK)), tile, input_precision=PRECISION)
    part_b = tl.dot(tile, tl.trans(_a(a, c, columns, rank, RANK)), input_precision=PRECISION)
    r = tl.arange(0, RANK)
    _write(da + tl.program_id(0).to(tl.int64) * rank * columns, r, c, rank, columns, part_a)
    _write(db + tl.program_id(1).to(tl.int64) * rank * out, n, r, out, rank, part_b)
