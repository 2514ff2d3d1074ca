"""From losses of rows to the result that `reduction` asks for."""

from torch import Tensor


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum", "batchmean"):
        raise ValueError(f"reduction must be none, mean, sum or batchmean, got {reduction}")


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """Rows [B, ...] as they are, their mean, their sum, or the mean over B of sums. The mean of no rows is 0."""
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    count = rows.numel() if reduction == "mean" or rows.dim() == 0 else rows.shape[0]
    return total / max(1, count)
