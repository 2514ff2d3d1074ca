"""Which cells of a tile are labels. The op takes them as `cells`: sorted keys ((b * H + h) * n + start) * n + end, and
-1 - key for a cell that takes no part in the loss; these come first.

The labels of a block of starts stand side by side, so one search for each (b, h, block) finds where they begin and end:
most blocks have none, and a tile of theirs asks no more. Within a block every start searches its own few.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lower_bound(cells_ptr, low, high, key, steps):
    """The first index from `low` on, below `high`, whose cell is not below `key`; `high` where there is none."""
    while steps > 0:
        middle = (low + high) // 2
        below = tl.load(cells_ptr + middle, mask=low < high, other=0) < key
        below = below & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        steps = steps // 2
    return low


@triton.jit(do_not_specialize=("count", "rows", "blocks", "n"))
def global_pointer_label_ranges_kernel(
    cells_ptr, ranges_ptr, count, rows, blocks, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """ranges [2, rows, blocks, 2]: of the labels, and of the cells that take no part, where a block's begin and end."""
    index = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    row = index // blocks
    start = (index % blocks) * BLOCK
    first = (row * n + start) * n
    end = (row * n + tl.minimum(start + BLOCK, n)) * n
    low = tl.zeros_like(index)
    high = low + count
    for kind in tl.static_range(2):
        target = ranges_ptr + (kind * rows * blocks + index) * 2
        if kind == 0:
            begins = _lower_bound(cells_ptr, low, high, first, count)
            ends = _lower_bound(cells_ptr, low, high, end, count)
        else:
            begins = _lower_bound(cells_ptr, low, high, -end, count)
            ends = _lower_bound(cells_ptr, low, high, -first, count)
        there = index < rows * blocks
        tl.store(target, begins, mask=there)
        tl.store(target + 1, ends, mask=there)


@triton.jit
def label_range(ranges_ptr, place, places, APART: tl.constexpr):
    """Where the labels (APART: the cells that take no part) of a block of starts begin and end in `cells`."""
    if APART:
        place += places
    ranges_ptr += place * 2
    return tl.load(ranges_ptr), tl.load(ranges_ptr + 1)


@triton.jit
def take_listed(
    scores, cells_ptr, begin, end, row, starts, ends, first_end, n, STARTS_NEAR: tl.constexpr, APART: tl.constexpr
):
    """The scores [near, far] of a tile without those of cells[begin:end], -inf there; and these alone, inf elsewhere.

    row: b * H + h. starts, ends: the tokens of the tile's rows and columns. first_end: the first of `ends`.
    """
    token = (row * n + starts) * n
    low_key = token + first_end
    high_key = token + tl.minimum(first_end + ends.shape[0], n)
    if APART:
        low_key, high_key = -high_key, -low_key
    low = tl.zeros_like(token) + begin
    index = _lower_bound(cells_ptr, low, tl.zeros_like(token) + end, low_key, end - begin)
    taken = tl.full(scores.shape, float("inf"), scores.dtype)
    cell = tl.load(cells_ptr + index, mask=index < end, other=0)
    here = (index < end) & (cell < high_key)
    while tl.max(here.to(tl.int32), 0) > 0:  # as often as the row with the most labels in this tile has labels
        if APART:
            column = -1 - cell - token
        else:
            column = cell - token
        column = tl.where(here, column, -1).to(tl.int32)
        if STARTS_NEAR:
            match = column[:, None] == ends[None, :]
        else:
            match = column[None, :] == ends[:, None]
        match = match & (scores != float("-inf"))  # not valid, or taken before
        taken = tl.where(match, scores, taken)
        scores = tl.where(match, float("-inf"), scores)
        index += 1
        cell = tl.load(cells_ptr + index, mask=index < end, other=0)
        here = (index < end) & (cell < high_key)
    return scores, taken


def label_ranges(cells: Tensor, rows: int, blocks: int, n: int, block: int) -> Tensor:
    """For `label_range`: int64 [2, rows, blocks, 2]."""
    ranges = torch.empty(2, rows, blocks, 2, dtype=torch.int64, device=cells.device)
    grid = (triton.cdiv(rows * blocks, 128),)
    global_pointer_label_ranges_kernel[grid](
        cells, ranges, cells.numel(), rows, blocks, n, BLOCK=block, CHUNK=128, num_warps=4, enable_fp_fusion=True
    )
    return ranges
