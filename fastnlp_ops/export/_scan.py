"""Loops over time as one node of a graph, whatever the number of steps."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch._higher_order_ops.scan import scan_op


def scan(
    step: Callable[..., tuple[Tensor, ...]],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    *,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """The last carry, then what each step gave beside it, stacked: (*carry, *y) = step(*carry, *x, *constants).

    The steps are those of dimension 0 of xs; with `reverse` the last one comes first. `step` reads its arguments alone,
    and none of its results is one of them.
    """
    if reverse:
        xs = [x.flip(0) for x in xs]
    found = scan_op(step, list(carry), list(xs), tuple(constants))
    last, stacked = found[: len(carry)], found[len(carry) :]
    return (*last, *(y.flip(0) for y in stacked)) if reverse else (*last, *stacked)
