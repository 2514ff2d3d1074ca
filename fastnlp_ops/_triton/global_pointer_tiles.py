"""What the GlobalPointer kernels do alike inside a tile.

Rows are starts, columns are ends, and tiles are square. One axis of a tile is called near and the other far: a program
of a gradient holds a near block and walks along the far ones, so that dq (near: starts) and dk (near: ends) are one
kernel. Elsewhere near are the starts.
"""

import triton
import triton.language as tl

# Sizes that must not become part of what is compiled, a 1 least of all.
SIZES = (
    "n",
    "padded",
    "batch",
    "heads",
    "shared_heads",
    "groups",
    "blocks",
    "tiles",
    "width",
    "max_span_length",
)


@triton.jit
def place(inner, groups, shared_heads, GROUP: tl.constexpr):
    """What a program works on: its index below `inner`, group of heads, pair of q and k, sequence and first head."""
    index = tl.program_id(0) % inner
    rest = tl.program_id(0) // inner
    group = rest % groups
    pair = (rest // groups).to(tl.int64)
    return index, group, pair, pair // shared_heads, pair % shared_heads + group * GROUP


@triton.jit
def place_of_tile(tile, blocks, width, TRIL: tl.constexpr, BAND: tl.constexpr):
    """The start and the end block of a tile. The end block is not below `blocks` where there is no such tile."""
    row = tile // width
    column = tile % width
    if BAND:
        if not TRIL:
            column -= width // 2
        end = row + column
        end = tl.where(end < 0, blocks, end)
    elif TRIL:  # the first row of blocks has as many tiles as the last lacks: two rows share one of `blocks` + 1
        mirrored = column >= blocks - row
        end = tl.where(mirrored, column - 1, row + column)
        end = tl.where(mirrored & (2 * row + 1 == blocks), blocks, end)
        row = tl.where(mirrored, blocks - 1 - row, row)
    else:
        end = column
    return row, end


@triton.jit
def counts(start, end, blocks, extents_ptr, b, n, BLOCK: tl.constexpr):
    """Whether a tile is there and within the sequence's tokens."""
    first, last = load_extent(extents_ptr, b, n)
    reached = (start * BLOCK <= last) & (end * BLOCK <= last) & (end < blocks)
    return reached & ((start + 1) * BLOCK > first) & ((end + 1) * BLOCK > first)


@triton.jit
def load_extent(extents_ptr, b, n):
    if extents_ptr is None:
        return tl.full((), 0, tl.int32), n - 1 + tl.full((), 0, tl.int32)
    else:
        return tl.load(extents_ptr + b * 2), tl.load(extents_ptr + b * 2 + 1)


@triton.jit
def far_blocks(
    near,
    extents_ptr,
    b,
    n,
    max_span_length,
    START: tl.constexpr,
    TRIL: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first and one past the last far block that may share a valid cell with block `near`."""
    first, last = load_extent(extents_ptr, b, n)
    low = near * BLOCK
    high = low + BLOCK - 1
    empty = (low > last) | (high < first)
    if TRIL:
        if START:
            first = tl.maximum(first, low)
        else:
            last = tl.minimum(last, high)
    if BAND:
        first = tl.maximum(first, low - max_span_length + 1)
        last = tl.minimum(last, high + max_span_length - 1)
    begin = first // BLOCK
    end = (last + BLOCK) // BLOCK  # last may be -1, and -1 // BLOCK is 0 here
    return begin, tl.where(empty, begin, end)


@triton.jit
def tokens(block, b, mask_ptr, n, BLOCK: tl.constexpr):
    """The tokens of a block, and which of them count."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    there = index < n
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + b * n + index, mask=there, other=0) != 0)
    return index, there


@triton.jit
def valid_cells(
    near, near_there, far, far_there, max_span_length, START: tl.constexpr, TRIL: tl.constexpr, BAND: tl.constexpr
):
    """bool [near, far]"""
    valid = near_there[:, None] & far_there[None, :]
    if START:
        length = far[None, :] - near[:, None]  # end - start
    else:
        length = near[:, None] - far[None, :]
    if TRIL:
        valid = valid & (length >= 0)
    if BAND:
        valid = valid & (length < max_span_length) & (length > -max_span_length)
    return valid


@triton.jit
def load_block(x_ptr, block, first, BLOCK: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    """[BLOCK, CHANNELS] from channel `first` on, of what was prepared for a sequence and head."""
    x_ptr += (
        tl.full((), BLOCK * D, tl.int64) * block + first
    )  # 64 bits to get to a tile, 32 within it: half the registers
    return tl.load(x_ptr + tl.arange(0, BLOCK)[:, None] * D + tl.arange(0, CHANNELS)[None, :])


@triton.jit
def dot_product(x, y, scale, PRECISION: tl.constexpr):
    """scale * x . y [near, far], in the compute type."""
    products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return products * tl.full((), scale, products.dtype)


@triton.jit
def dot_products(
    near_ptr,
    near_block,
    far_ptr,
    far_block,
    scale,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same of two blocks in memory, DEPTH channels at a time."""
    dtype: tl.constexpr = tl.float64 if near_ptr.dtype.element_ty == tl.float64 else tl.float32
    products = tl.zeros([BLOCK, BLOCK], dtype)
    for first in range(0, D, DEPTH):
        x = load_block(near_ptr, near_block, first, BLOCK, D, DEPTH)
        y = load_block(far_ptr, far_block, first, BLOCK, D, DEPTH)
        products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)
    return products * tl.full((), scale, dtype)


@triton.jit
def _load_bias(bias_ptr, b, block, there, h, n, heads, BLOCK: tl.constexpr):
    bias_ptr += (b * n + block * BLOCK) * heads + h
    return tl.load(bias_ptr + tl.arange(0, BLOCK) * heads, mask=there, other=0.0)


@triton.jit
def with_biases(
    products,
    near_bias_ptr,
    far_bias_ptr,
    b,
    near_block,
    near_there,
    far_block,
    far_there,
    h,
    n,
    heads,
    BLOCK: tl.constexpr,
):
    """Scores of a head from the products that heads may share. Biases of masked tokens are not read."""
    if near_bias_ptr is None:
        return products
    else:
        near_bias = _load_bias(near_bias_ptr, b, near_block, near_there, h, n, heads, BLOCK).to(products.dtype)
        far_bias = _load_bias(far_bias_ptr, b, far_block, far_there, h, n, heads, BLOCK).to(products.dtype)
        return products + near_bias[:, None] + far_bias[None, :]
