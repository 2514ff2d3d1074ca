"""What the tests of all families share: layouts of memory, equality to the bit, and the error rule."""

import math

import torch


def strided(tensor):
    """The same values with a gap behind every element, so that no dimension has stride 1."""
    return torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]


def reversed_strides(tensor):
    """The same values, laid out with the first dimension innermost, as [L, B, N] data seen as [B, L, N]."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def assert_same(actual, expected, what="result"):
    """Equal to the bit, NaN equal to NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    differs = (actual != expected) & ~((actual != actual) & (expected != expected))
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} differs at {int(differs.sum())} of {differs.numel()} places, first at {index}: "
            f"{actual[index].item()!r}, expected {expected[index].item()!r}"
        )


def moved(x):
    """The numbers of x, each moved by up to one unit in the last place of float32: inputs that float32 hardly tells
    apart. What moves a float64 result is the least error that arithmetic in float32 can have.
    """
    return x * (1 + torch.finfo(torch.float32).eps * (2 * torch.rand_like(x) - 1))


def rounding_level(reference, exact):
    """Largest error of the reference, in units of its largest value (at least 1), where both are finite."""
    finite = exact.isfinite() & reference.isfinite()
    if not finite.any():
        return 0.0
    error = torch.where(finite, (reference.detach().double() - exact).abs(), 0).max().item()
    return error / max(1.0, torch.where(finite, exact.abs(), 0).max().item())


def floor_of(call, inputs, narrow=()):
    """The rounding level of what `call` makes of float64 `inputs` that float32 hardly tells apart. The reference may be
    right by luck where one path or one class has all the weight; a kernel may then be as far off as its inputs are
    rounded. Four times what three draws show, and twice that of `narrow`, the reference in float32: of thousands of
    problems some are unlucky.
    """
    exact = call(*inputs)
    others = [call(*(None if x is None else moved(x) for x in inputs)) for _ in range(3)]
    most = max(rounding_level(*pair) for other in others for pair in zip(other, exact, strict=True))
    return max([4 * most, *(2 * rounding_level(*pair) for pair in zip(narrow, exact, strict=False))])


def sum_of(count, results):
    """`terms` of results that are sums of `count` numbers in float32, one after the other: sqrt(count) roundings."""
    sizes = [torch.where(x.isfinite(), x, 0).abs().max().item() for x in results if x.numel()]
    return count**0.5 * max([1.0, *sizes])


def assert_within_budget(actual, reference, exact, what="result", level=0.0, terms=0.0):
    """max|actual - exact| <= 2 max|reference - exact| + eps, and -inf, inf and NaN in the same places.

    `reference` is the plain PyTorch result in float32, `exact` that in float64: the kernel may be twice as far from the
    truth as PyTorch is. A float64 kernel has no higher truth to stand before, `exact` is as far off as it is: there the
    float32 error of the reference is scaled to float64 and taken 32 times. (Roundings of two dtypes are independent
    draws; up to 6 times was seen. One float32 operation inside a float64 kernel would cost 2^29 times.)
    `level`: the rounding level of the whole call where a result is so small that its own may be luck.
    `terms`: the largest number of a sum that cancels: the result is rounded as that is, however small it is itself.
    eps is 4 units in the last place of the largest value: the reference may be exact by luck, while a kernel with
    another order of operations rounds its few last operations (sum, logarithm, difference) anew.
    """
    assert reference.dtype == torch.float32, f"{what}: the reference must be taken in float32, got {reference.dtype}"
    assert exact.dtype == torch.float64, f"{what}: the truth must be taken in float64, got {exact.dtype}"
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    wide = actual.detach().double()
    exact = exact.detach()
    exact = torch.where(exact.abs() > torch.finfo(actual.dtype).max, exact * math.inf, exact)  # what it cannot hold
    finite = exact.isfinite()
    assert_same(torch.where(finite, 0, wide), torch.where(finite, 0, exact), f"non-finite places of {what}")
    error = torch.where(finite, (wide - exact).abs(), 0)
    assert error.isfinite().all(), f"{what} is not finite at {error.isfinite().logical_not().nonzero()[0].tolist()}"
    size = max(1.0, torch.where(finite, exact.abs(), 0).max().item())
    reference_error = max(level, rounding_level(reference, exact)) * size
    precision = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        reference_error *= 16 * precision / torch.finfo(torch.float32).eps
    budget = 2 * reference_error + 4 * precision * max(size, terms)
    worst = error.argmax().item()
    if not error.flatten()[worst] <= budget:
        index = tuple(i.item() for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{what} is off by {error[index].item():.3g} at {index}, allowed is {budget:.3g}: kernel "
            f"{actual[index].item():.17g}, reference {reference[index].item():.9g}, float64 {exact[index].item():.17g}"
        )
