"""A bounded number of the draws that `make fuzz` goes on with."""

import fuzz_draws
import pytest
import torch

import fastnlp_ops

# Draws take 0.1 to 0.3 s, most of it in the reference.
COUNTS = {"crf": 30, "memm": 10, "global_pointer": 15, "multilabel": 20, "linear_attention": 15, "adafactor": 10}


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("family", COUNTS)
def test_draws(family, part):
    count = COUNTS[family] // 5
    for seed in range(part * count, (part + 1) * count):
        fuzz_draws.run(family, seed)


def test_draws_follow_from_the_seed():
    first, second = (fuzz_draws.draw_crf(fuzz_draws.start("crf", 3)) for _ in range(2))
    assert torch.equal(first.tags, second.tags) and first.emissions.shape == second.emissions.shape
    assert first.emissions.shape != fuzz_draws.draw_crf(fuzz_draws.start("crf", 4)).emissions.shape


def test_baseline_is_another_compilation():
    """Without fused multiply-adds sums are rounded in another way."""
    q, k = torch.randn(2, 1, 64, 2, 64)
    best = fastnlp_ops.global_pointer_scores(q, k)
    before = fuzz_draws.use_baseline(True)
    try:
        plain = fastnlp_ops.global_pointer_scores(q, k)
    finally:
        fuzz_draws.use_baseline(before)
    torch.testing.assert_close(plain, best)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert not torch.equal(plain, best)
    assert torch.equal(fastnlp_ops.global_pointer_scores(q, k), best)
