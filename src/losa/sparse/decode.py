"""The packed format in Triton: the product with a few rows of x, and the dense weight for many.

Imported only where Triton is: see `losa.sparse.gpu`, which calls these. docs/format.md describes what they read.

A program multiplies MANY rows of the weight, 1024 columns a step: four tiles of 32 bytes of mask, of which a lane takes one
of each. Where its values lie is one prefix sum over the lanes' popcounts, of all four tiles in one integer. Four columns
at a time it loads the four values from there on, which are all it can need, and sorts them into their columns, with
zeros where nothing is kept. So no column costs a popcount, an address or a branch of its own.

PTX: whether it sorts by NVIDIA's byte permutation, two columns of values of two bytes at once, four of one byte; which
permutation it is, the lanes hold for each other. Triton knows of neither, and its interpreter cannot run them: there, on
GPUs of AMD's, and for values of four bytes, columns are sorted one by one, by selection.
"""

import triton
import triton.language as tl


@triton.jit
def _popcount(n, PTX: tl.constexpr):
    """Of uint32. What is written out is one instruction for a byte, and eight for half of one."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [n], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        n = n - ((n >> 1) & 0x55555555)
        n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
        n = (n + (n >> 4)) & 0x0F0F0F0F
        return ((n * 0x01010101) >> 24) & 0xFF


@triton.jit
def _permute(low, high, selectors):
    """uint32 of four of the eight bytes of `high` and `low`: byte i is the one that bits 4 i to 4 i + 2 count from the lowest."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selectors], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _places(bits):
    """Of four bits, uint32 of four bytes: how many of the bits below each are set, and 3 where it is not; and 1 there, else 0."""
    each = (bits * 0x00204081) & 0x01010101
    return (each * 0x01010100) | ((each ^ 0x01010101) * 3), each ^ 0x01010101


@triton.jit
def _of_two_bytes(bits):
    """Selectors that sort a window of four values of two bytes into four columns: 16 bits for columns 0 and 1, 16 for 2 and 3.

    The fourth value goes where nothing is kept: it has to be zero unless all four are.
    """
    places, _ = _places(bits)
    return places * 0x22 + 0x10101010


@triton.jit
def _of_one_byte(bits):
    """Selectors that sort a window of four values of one byte into four columns; the fifth byte is a zero."""
    places, gone = _places(bits)
    places = (places & ((gone ^ 0x01010101) * 0xFF)) | (gone * 4)
    places |= places >> 4
    return (places & 0xFF) | ((places >> 8) & 0xFF00)


@triton.jit
def _window(at, BITS: tl.constexpr):
    """The bits of the value at each of these addresses, as uint32."""
    value = tl.load(at)
    return value.to(tl.uint8 if BITS == 8 else tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _four(at, bits, selectors, PTX: tl.constexpr):
    """The weights of four columns, float32, of which `bits` are kept: those at the addresses `at` and behind.

    selectors: with PTX, those for bits of n at place n of a tile's last axis.
    """
    kind: tl.constexpr = at.dtype.element_ty
    if PTX and kind.primitive_bitwidth == 16:
        w0, w1, w2, w3 = _window(at, 16), _window(at + 1, 16), _window(at + 2, 16), _window(at + 3, 16)
        low, high = _permute(w0, w1, 0x5410), w2 + w3 * (((bits + 1) & 16) << 12)
        chosen = tl.gather(selectors, bits.to(tl.int32), 1)
        first, second = _permute(low, high, chosen), _permute(low, high, chosen >> 16)
        return _low(first, kind), _high(first, kind), _low(second, kind), _high(second, kind)
    elif PTX and kind.primitive_bitwidth == 8:
        w0, w1, w2, w3 = _window(at, 8), _window(at + 1, 8), _window(at + 2, 8), _window(at + 3, 8)
        window = _permute(_permute(w0, w1, 0x1140), _permute(w2, w3, 0x1140), 0x5410)
        made = _permute(window, tl.zeros_like(window), tl.gather(selectors, bits.to(tl.int32), 1))
        made = made.to(tl.int32, bitcast=True)
        return (
            ((made << 24) >> 24).to(tl.float32),
            ((made << 16) >> 24).to(tl.float32),
            ((made << 8) >> 24).to(tl.float32),
            (made >> 24).to(tl.float32),
        )
    else:
        w0, w1 = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)
        w2, w3 = tl.load(at + 2).to(tl.float32), tl.load(at + 3).to(tl.float32)
        b0, b1, b2, b3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
        v0 = tl.where(b0, w0, 0.0)  # and then, where it was taken, the window moves on by one
        w0, w1, w2 = tl.where(b0, w1, w0), tl.where(b0, w2, w1), tl.where(b0, w3, w2)
        v1 = tl.where(b1, w0, 0.0)
        w0, w1 = tl.where(b1, w1, w0), tl.where(b1, w2, w1)
        return v0, v1, tl.where(b2, w0, 0.0), tl.where(b3, tl.where(b2, w1, w0), 0.0)


@triton.jit
def _low(pair, kind: tl.constexpr):
    """The lower half of uint32, a value of type `kind`, as float32: of bfloat16 by a shift."""
    if kind == tl.bfloat16:
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return (pair & 0xFFFF).to(tl.uint16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _high(pair, kind: tl.constexpr):
    """The upper half."""
    if kind == tl.bfloat16:
        return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.uint16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _columns_of_bytes(x, R: tl.constexpr):
    """[R, 256] -> eight of [R, 32]: the columns 8 j + i for i from 0 to 7. Of one warp, a lane keeps what it has."""
    even, odd = tl.split(tl.reshape(x, (R, 32, 2, 2, 2)))  # split takes the last axis, which is bit 0 of i
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    x0, x4 = tl.split(even0)
    x2, x6 = tl.split(even1)
    x1, x5 = tl.split(odd0)
    x3, x7 = tl.split(odd1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _bytes(bits_at, j, there, width):
    """Bytes `j` of some rows' masks as uint32, 0 where there are none."""
    return tl.load(bits_at + j[None, :], mask=there[:, None] & (j < width)[None, :], other=0).to(tl.uint32)


# Masks may lie at any address; were they taken to be aligned, a lane would load four neighbouring bytes, and the lanes'
# values would then lie too far apart for one look into the cache.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["mask"])
def multiply(
    x,  # [rows, columns], rows at most R
    values,  # with padding: up to four behind the last are read
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
    TILES: tl.constexpr,  # that there are of a row, at most 4
    PTX: tl.constexpr,
):
    """y = x W^T + bias, summed in float32."""
    row = tl.program_id(0) * MANY + tl.arange(0, MANY)
    there = row < out
    r = tl.arange(0, R)
    if offsets is not None:
        base = tl.load(offsets + row, mask=there, other=0)
    else:
        base = tl.where(there, row * per_row, 0)
    bits_at = mask + (row.to(tl.int64) * width)[:, None]
    lane = tl.arange(0, 32)
    selectors = ((lane & 15)[None, :] + tl.zeros((MANY, 32), tl.int32)).to(tl.uint32)
    if PTX:
        selectors = _of_one_byte(selectors) if values.dtype.element_ty == tl.int8 else _of_two_bytes(selectors)
    total = tl.zeros((R, MANY, 32), tl.float32)
    for start in range(0, width, 128):
        j = start + lane
        bytes0, bytes1 = _bytes(bits_at, j, there, width), _bytes(bits_at, j + 32, there, width)
        bytes2, bytes3 = _bytes(bits_at, j + 64, there, width), _bytes(bits_at, j + 96, there, width)
        tiles = (bytes0, bytes1, bytes2, bytes3)
        # a byte a tile: before a lane there are at most 31 x 8
        counts = _popcount(bytes0, PTX) | (_popcount(bytes1, PTX) << 8)
        counts |= (_popcount(bytes2, PTX) << 16) | (_popcount(bytes3, PTX) << 24)
        before = tl.cumsum(counts, 1) - counts
        for t in tl.static_range(TILES):
            byte = tiles[t]
            at = base[:, None] + ((before >> (8 * t)) & 0xFF).to(tl.int32)
            base += tl.sum(((counts >> (8 * t)) & 0xFF).to(tl.int32), 1)
            column = start * 8 + t * 256 + tl.arange(0, 256)
            inside = (r < rows)[:, None] & (column < columns)[None, :]
            xs = _columns_of_bytes(tl.load(x + r[:, None] * columns + column[None, :], mask=inside, other=0), R)
            part = total if scales is None else tl.zeros((R, MANY, 32), tl.float32)
            for half in tl.static_range(2):
                bits = (byte >> (4 * half)) & 15
                weights = _four(values + at, bits, selectors, PTX)
                for i in tl.static_range(4):
                    part += xs[4 * half + i].to(tl.float32)[:, None, :] * weights[i][None, :, :]
                if half == 0:
                    at += _popcount(bits, PTX).to(tl.int32)
            if scales is None:
                total = part
            else:
                group = start // 32 + t
                scale = tl.load(scales + row * groups + group, mask=there & (group < groups), other=0).to(tl.float32)
                total += part * scale[None, :, None]
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
