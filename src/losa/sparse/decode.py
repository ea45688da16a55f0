"""The packed format in Triton: the product with a few rows of x, and the dense weight for many.

Imported only where Triton is: see `losa.sparse.gpu`, which calls these. docs/format.md describes what they read.

A program multiplies MANY rows of the weight. A lane takes one byte of the mask, that is eight columns: where its first
value lies is one prefix sum over the lanes' popcounts, and from there on it walks. So neighbouring lanes read values that
lie close together, and the eight columns of x come as one vector, used for all MANY rows. One column a lane instead
costs a popcount a column, of which a GPU does an eighth as many as additions.
"""

import triton
import triton.language as tl


@triton.jit
def _popcount(n):
    """Of 32 bits, unsigned: in this very form LLVM makes one instruction of it."""
    n = n - ((n >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return (n * 0x01010101) >> 24


@triton.jit
def _columns_of_bytes(x, R: tl.constexpr, BYTES: tl.constexpr):
    """[R, 8 BYTES] -> eight of [R, BYTES]: the columns 8 j + i for i from 0 to 7. A lane keeps what it has."""
    even, odd = tl.split(tl.reshape(x, (R, BYTES, 2, 2, 2)))  # split takes the last axis, which is bit 0 of i
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    x0, x4 = tl.split(even0)
    x2, x6 = tl.split(even1)
    x1, x5 = tl.split(odd0)
    x3, x7 = tl.split(odd1)
    return x0, x1, x2, x3, x4, x5, x6, x7


# Masks may lie at any address; were they taken to be aligned, a lane would load four neighbouring bytes, and the lanes'
# values would then lie too far apart for one look into the cache.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mask"])
def multiply(
    x,  # [rows, columns], rows at most R
    values,
    mask,  # [out, width]
    offsets,  # None if all rows keep per_row
    scales,  # [out, groups], one a group of 256 columns, or None
    bias,  # [out], or None
    y,  # [rows, out]
    rows,
    out,
    columns,
    width,
    groups,
    per_row,
    R: tl.constexpr,
    MANY: tl.constexpr,
    BYTES: tl.constexpr,
):
    """y = x W^T + bias, summed in float32."""
    row = tl.program_id(0) * MANY + tl.arange(0, MANY)
    there = row < out
    r = tl.arange(0, R)
    if offsets is not None:
        base = tl.load(offsets + row, mask=there, other=0)
    else:
        base = row * per_row
    bits_at = mask + (row.to(tl.int64) * width)[:, None]
    total = tl.zeros((R, MANY, BYTES), tl.float32)
    for start in range(0, width, BYTES):
        j = start + tl.arange(0, BYTES)
        byte = tl.load(bits_at + j[None, :], mask=there[:, None] & (j < width)[None, :], other=0).to(tl.uint32)
        count = _popcount(byte).to(tl.int32)
        at = base[:, None] + tl.cumsum(count, 1) - count
        base += tl.sum(count, 1)
        column = start * 8 + tl.arange(0, BYTES * 8)
        inside = (r < rows)[:, None] & (column < columns)[None, :]
        xs = _columns_of_bytes(tl.load(x + r[:, None] * columns + column[None, :], mask=inside, other=0), R, BYTES)
        part = total if scales is None else tl.zeros((R, MANY, BYTES), tl.float32)
        for i in tl.static_range(8):
            keep = (byte & (1 << i)) != 0
            value = tl.load(values + at, mask=keep, other=0).to(tl.float32)
            at = tl.where(keep, at + 1, at)
            part += xs[i].to(tl.float32)[:, None, :] * value[None, :, :]
        if scales is None:
            total = part
        else:
            scale_at = scales + (row * groups)[:, None] + (j // 32)[None, :]
            scale = tl.load(scale_at, mask=there[:, None] & (j < width)[None, :], other=0).to(tl.float32)
            total += part * scale[None, :, :]
    result = tl.sum(total, 2)
    if bias is not None:
        result += tl.load(bias + row, mask=there, other=0).to(tl.float32)[None, :]
    store = (r < rows)[:, None] & there[None, :]
    tl.store(y + r[:, None] * out + row[None, :], result.to(y.dtype.element_ty), mask=store)


@triton.jit
def expand(
    values,
    mask,
    offsets,
    scales,
    weight,  # [out, columns]
    out,
    columns,
    width,
    groups,
    per_row,
    MANY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The dense weight, rounded to its type: MANY rows a program, one column a lane."""
    row = tl.program_id(0) * MANY + tl.arange(0, MANY)
    there = row < out
    if offsets is not None:
        base = tl.load(offsets + row, mask=there, other=0)
    else:
        base = row * per_row
    bits_at = mask + (row.to(tl.int64) * width)[:, None]
    weight_at = weight + (row.to(tl.int64) * columns)[:, None]
    for start in range(0, columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = there[:, None] & (column < columns)
        bit = (tl.load(bits_at + column // 8, mask=inside, other=0).to(tl.int32) >> (column % 8)) & 1
        at = base[:, None] + tl.cumsum(bit, 1) - bit
        base += tl.sum(bit, 1)
        value = tl.load(values + at, mask=bit != 0, other=0).to(tl.float32)
        if scales is not None:
            scale = tl.load(scales + (row * groups)[:, None] + column // 256, mask=inside, other=0)
            value *= scale.to(tl.float32)
        tl.store(weight_at + column, value.to(weight.dtype.element_ty), mask=inside)
