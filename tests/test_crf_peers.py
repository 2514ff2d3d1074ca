"""Bugs found in other CRF packages, each as a test of ours. The docstring says whose bug it is and what went wrong."""

import itertools
import math

import pytest
import torch
from crf_problems import enumerate_paths, gradients, log_likelihood, log_partition, make_problem
from tools import assert_same

import fastnlp_ops
from fastnlp_ops import CRF, reference

NAN, INF = math.nan, math.inf


def scores_of(problem):
    """Every output of the family that takes (emissions, transitions, start, end)."""
    paths, best = fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout)
    return [
        fastnlp_ops.crf_log_partition(*problem.scores, **problem.layout),
        log_likelihood(fastnlp_ops, problem),
        fastnlp_ops.crf_marginals(*problem.scores, **problem.layout),
        fastnlp_ops.crf_entropy(*problem.scores, **problem.layout),
        paths,
        best,
    ]


def all_gradients(function, problem):
    weights = torch.ones(problem.batch, device=problem.emissions.device)
    return gradients(function, fastnlp_ops, problem, None, weights)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=["int64", "float32"])
def test_pytorch_crf_masks_of_tokenizers(dtype, device):
    """pytorch-crf: RuntimeError for the int64 attention_mask that Hugging Face tokenizers return."""
    crf = CRF(4, batch_first=True).to(device)
    emissions, tags = torch.randn(3, 6, 4, device=device), torch.randint(0, 4, (3, 6), device=device)
    attention_mask = (torch.arange(6, device=device) < torch.tensor([[6], [3], [1]], device=device)).to(dtype)
    assert_same(crf(emissions, tags, attention_mask), crf(emissions, tags, attention_mask.bool()))
    assert crf.decode(emissions, attention_mask) == crf.decode(emissions, attention_mask.bool())
    token_mean = crf(emissions, tags, attention_mask, reduction="token_mean")
    assert_same(token_mean, crf(emissions, tags, attention_mask.bool(), reduction="token_mean"))


@pytest.mark.parametrize("padding", [-1, -100, 4, 1 << 40])
def test_pytorch_crf_tags_in_padding(padding, device):
    """pytorch-crf: -100 in padding is an IndexError, -1 silently the last tag, and on CUDA both kill the process."""
    problem = make_problem(4, 7, 4, device, mask="prefix", poison=False)
    expected = log_likelihood(fastnlp_ops, problem)
    gradient = all_gradients(log_likelihood, problem)
    problem.tags = torch.where(problem.mask, problem.tags, padding)
    assert_same(log_likelihood(fastnlp_ops, problem), expected)
    for ours, clean in zip(all_gradients(log_likelihood, problem), gradient, strict=True):
        assert_same(ours, clean)


def test_pytorch_crf_tag_minus_one(device):
    """pytorch-crf: a tag of -1 at a valid step is silently the last tag."""
    emissions, tags = torch.randn(2, 3, 4, device=device), torch.tensor([[0, 1, 2], [1, -1, 0]], device=device)
    transitions = torch.randn(4, 4, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"^tags must be in \[0, 4\), got tag -1 at sequence 1, step 1$"):
            fastnlp_ops.crf_log_likelihood(emissions, tags, transitions)
    else:
        value = fastnlp_ops.crf_log_likelihood(emissions, tags, transitions)
        assert value.isnan().tolist() == [False, True]


def test_pytorch_crf_holes_in_the_mask(device):
    """pytorch-crf: a mask with holes decodes the wrong positions and can give a positive log-likelihood."""
    crf = CRF(4, batch_first=True).to(device)
    emissions, tags = torch.randn(1, 6, 4, device=device), torch.randint(0, 4, (1, 6), device=device)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]], device=device)
    on = mask[0].bool()
    assert crf(emissions, tags, mask).item() <= 0
    assert_same(crf(emissions, tags, mask), crf(emissions[:, on], tags[:, on]))
    assert crf.decode(emissions, mask) == crf.decode(emissions[:, on])


def test_pytorch_crf_forbidden_pair_in_padding(device):
    """pytorch-crf: -inf for one transition, and that pair only inside padding: -inf * 0 = NaN loss."""
    problem = make_problem(3, 6, 4, device, mask="prefix", poison=False)
    problem.transitions[2, 3] = -INF
    problem.tags[:] = torch.tensor([0, 1, 0, 1, 0, 1], device=device)
    problem.mask[:] = torch.arange(6, device=device) < 2
    problem.tags[:, 2:] = torch.tensor([2, 3, 2, 3], device=device)
    value = log_likelihood(fastnlp_ops, problem)
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in all_gradients(log_likelihood, problem))
    clean = problem.with_scores(*problem.scores)
    clean.tags = problem.tags.clamp(max=1)
    assert_same(value, log_likelihood(fastnlp_ops, clean))


@pytest.mark.parametrize("which", ["column", "row"])
def test_pytorch_crf_unreachable_tag(which, device):
    """pytorch-crf: a tag that nothing may lead to has a finite loss and NaN gradients."""
    problem = make_problem(3, 6, 4, device)
    problem.transitions[(slice(None), 2) if which == "column" else 2] = -INF
    problem.tags[:] = torch.tensor([0, 1, 3, 1, 0, 3], device=device)
    value = log_likelihood(fastnlp_ops, problem)
    assert value.isfinite().all()
    exact = gradients(log_likelihood, reference, problem, torch.float64, torch.ones(3, device=device))
    for ours, right in zip(all_gradients(log_likelihood, problem), exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)  # sums of 15 float32 probabilities
    inner = problem.emissions[:, 1:] if which == "column" else problem.emissions[:, :-1]
    marginals = fastnlp_ops.crf_marginals(*problem.scores)
    assert inner.shape == marginals[:, 1:].shape
    assert (marginals[:, 1:, 2] if which == "column" else marginals[:, :-1, 2]).eq(0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pytorch_crf_values_in_padding(value, device):
    """pytorch-crf, allennlp: NaN or -inf in padded emissions makes the loss and the transition gradients NaN."""
    problem = make_problem(4, 7, 5, device, mask="holes", poison=False)
    expected, expected_gradients = scores_of(problem), all_gradients(log_likelihood, problem)
    problem.emissions[~problem.mask] = value
    for ours, clean in zip(scores_of(problem), expected, strict=True):
        assert_same(ours, clean)
    for ours, clean in zip(all_gradients(log_likelihood, problem), expected_gradients, strict=True):
        assert_same(ours, clean)


@pytest.mark.parametrize("form", ["no step", "all masked", "packed"])
def test_pytorch_crf_empty_sequence(form, device):
    """pytorch-crf: L = 0 is an IndexError. torbi reads index -1. Ours: log Z = 0, an empty path, no gradients."""
    problem = make_problem(3, 0 if form == "no step" else 4, 5, device)
    if form == "all masked":
        problem.mask = torch.zeros(3, 4, dtype=torch.bool, device=device)
    if form == "packed":
        problem.emissions, problem.tags = problem.emissions[0, :0], problem.tags[0, :0]
        problem.cu_seqlens = torch.zeros(4, dtype=torch.int64, device=device)
    partition, likelihood, marginals, entropy, paths, best = scores_of(problem)
    for value in (partition, likelihood, entropy, best):
        assert_same(value, torch.zeros(3, device=device))
    assert (marginals == 0).all()
    assert (paths == -1).all()
    for gradient in all_gradients(log_likelihood, problem):
        assert (gradient == 0).all()


@pytest.mark.parametrize("steps", [128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_pytorch_crf_half_precision(dtype, steps, device):
    """pytorch-crf sums in the dtype of the emissions: at K = 32, L = 512 in bf16 a loss of 2008 where 2642 is right."""
    emissions = torch.randn(1, steps, 32, device=device).to(dtype)
    tags = torch.randint(0, 32, (1, steps), device=device)
    crf = CRF(32, batch_first=True).to(device, dtype)
    loss = -crf(emissions, tags)
    weights = [
        parameter.detach().double() for parameter in (crf.transitions, crf.start_transitions, crf.end_transitions)
    ]
    exact = -reference.crf_log_likelihood(emissions.double(), tags, *weights)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= 1e-6 * exact.item() + 1e-4


def test_paddlenlp_transposed_transitions(device):
    """PaddleNLP: the normaliser reads transitions as [to, from], the gold score as [from, to]; p sums to 0.288."""
    transitions = torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, -1.0], [-0.5, 2.0, 0.7]], device=device)
    paths = torch.tensor(list(itertools.product(range(3), repeat=4)), device=device)
    emissions = torch.randn(1, 4, 3, device=device).expand(len(paths), -1, -1)
    start, end = torch.randn(3, device=device), torch.randn(3, device=device)
    log_p = fastnlp_ops.crf_log_likelihood(emissions, paths, transitions, start, end)
    assert abs(log_p.exp().sum().item() - 1) < 1e-5
    best = fastnlp_ops.crf_viterbi(emissions[:1], transitions, start, end)[0]
    assert_same(best[0], paths[log_p.argmax()])


@pytest.mark.parametrize("value", [-INF, NAN, torch.finfo(torch.float32).min])
def test_paddle_argmax_of_nothing(value, device):
    """Paddle: the argmax over scores that are all -inf, lowest() or NaN is -1, and the gather after it out of bounds.

    genbmm's is -1 from -1e9 down, and an all-forbidden input aborts Paddle's CPU op.
    """
    emissions = torch.full((2, 5, 6), value, device=device)
    emissions[1] = torch.randn(5, 6)
    transitions = torch.randn(6, 6, device=device)
    paths, scores = fastnlp_ops.crf_viterbi(emissions, transitions)
    assert ((paths >= 0) & (paths < 6)).all()
    alone = fastnlp_ops.crf_viterbi(emissions[1:], transitions)
    assert_same(paths[1:], alone[0])
    assert_same(scores[1:], alone[1])
    n_paths, _ = fastnlp_ops.crf_viterbi(emissions, transitions, n_best=3)
    assert ((n_paths >= -1) & (n_paths < 6)).all()
    samples = fastnlp_ops.crf_sample(emissions, transitions, num_samples=4)
    assert ((samples >= -1) & (samples < 6)).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padding", [False, True])
def test_inputs_are_unchanged(batch, padding, device):
    """fastNLP's decoder writes into the caller's logits; partial-crf at B = 1 and torbi.from_probabilities likewise."""
    problem = make_problem(batch, 6, 4, device, mask="left" if padding else None)
    problem.transitions[1, 2] = -INF
    before = [None if value is None else value.clone() for value in vars(problem).values()]
    scores_of(problem)
    all_gradients(log_likelihood, problem)
    fastnlp_ops.crf_viterbi(*problem.scores, **problem.layout, n_best=3)
    fastnlp_ops.crf_sample(*problem.scores, **problem.layout)
    emissions, *rest = problem.scores
    fastnlp_ops.crf_partial_log_likelihood(emissions, problem.allowed, *rest, **problem.layout)
    for value, old in zip(vars(problem).values(), before, strict=True):
        assert (value is None) == (old is None)
        if value is not None:
            assert_same(value, old)


def test_partial_crf_batch_of_one(device):
    """pytorch-partial-crf: the same sequence has loss 1.20 in a batch of one and 6.36 in a batch of two."""
    problem = make_problem(1, 6, 4, device)
    twice = problem.with_scores(problem.emissions.repeat(2, 1, 1), *problem.scores[1:])
    twice.tags, twice.allowed = problem.tags.repeat(2, 1), problem.allowed.repeat(2, 1, 1)
    for one, two in zip(scores_of(problem), scores_of(twice), strict=True):
        assert_same(two, torch.cat([one, one]))
    emissions, *rest = twice.scores
    partial = fastnlp_ops.crf_partial_log_likelihood(emissions, twice.allowed, *rest)
    alone = fastnlp_ops.crf_partial_log_likelihood(emissions[:1], problem.allowed, *rest)
    assert_same(partial, torch.cat([alone, alone]))


def test_partial_crf_zero_end_transitions(device):
    """pytorch-partial-crf: an end transition of exactly 0 counts as impossible (loss 105)."""
    problem = make_problem(3, 5, 4, device)
    zeros = torch.zeros(4, device=device)
    with_zeros = problem.with_scores(problem.emissions, problem.transitions, zeros, zeros)
    without = problem.with_scores(problem.emissions, problem.transitions, None, None)
    for ours, expected in zip(scores_of(with_zeros), scores_of(without), strict=True):
        assert_same(ours, expected)
    allowed = torch.ones(3, 5, 4, dtype=torch.bool, device=device)
    assert_same(
        fastnlp_ops.crf_partial_log_likelihood(problem.emissions, allowed, problem.transitions, zeros, zeros), zeros[:3]
    )


def test_allennlp_soft_ban(device):
    """allennlp forbids with -10000: an emission of 3e4 breaks the ban. Ours is -inf."""
    crf = CRF(3, labels=["O", "B-X", "I-X"], batch_first=True).to(device)
    emissions = torch.zeros(1, 3, 3, device=device)
    emissions[0, :, 2] = 3e4
    emissions[0, 1, 1] = 1.0
    assert crf.decode(emissions) == [[1, 2, 2]]
    assert crf(emissions, torch.tensor([[2, 2, 2]], device=device)).item() == -INF
    # The only path with probability; scores of 6e4 are float32 numbers with a spacing of 4e-3.
    assert abs(crf(emissions, torch.tensor([[1, 2, 2]], device=device)).item()) <= 4e-3


def test_allennlp_forbidden_emission(device):
    """allennlp: an emission of -inf at a valid step makes everything NaN. Ours: the tag has probability 0 there."""
    problem = make_problem(2, 5, 4, device)
    problem.emissions[:, 2, :3] = -INF
    problem.tags[:, 2] = 3
    partition, likelihood, marginals, entropy, paths, _ = scores_of(problem)
    assert partition.isfinite().all()
    assert likelihood.isfinite().all()
    assert entropy.isfinite().all()
    assert_same(marginals[:, 2, :3], torch.zeros(2, 3, device=device))
    assert (paths[:, 2] == 3).all()
    assert all(gradient.isfinite().all() for gradient in all_gradients(log_likelihood, problem))


def test_allennlp_loss_and_decoding_agree_on_holes(device):
    """allennlp: decoding compacts a mask with holes, the loss does not. Here the best path is the likeliest."""
    problem = make_problem(1, 7, 3, device)
    problem.mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1]], device=device).bool()
    best, _ = fastnlp_ops.crf_viterbi(*problem.scores, mask=problem.mask)
    paths, _ = enumerate_paths(problem.emissions[0, :4], problem.transitions, None, None)
    tags = torch.zeros(len(paths), 7, dtype=torch.int64, device=device)
    tags[:, problem.mask[0]] = paths
    emissions, *rest = problem.scores
    mask = problem.mask.expand(len(paths), -1)
    log_p = fastnlp_ops.crf_log_likelihood(emissions.expand(len(paths), -1, -1), tags, *rest, mask=mask)
    assert_same(best[problem.mask], paths[log_p.argmax()])
    assert abs(log_p.exp().sum().item() - 1) < 1e-5


@pytest.mark.parametrize("n_best", [2, 3, 10, 100])
def test_bert4torch_n_best(n_best, device):
    """bert4torch: n >= 2 raises, n above the number of tags raises. Here 3 tags and 3 steps: 27 paths, then none."""
    problem = make_problem(2, 3, 3, device)
    paths, scores = fastnlp_ops.crf_viterbi(*problem.scores, n_best=n_best)
    assert paths.shape == (2, n_best, 3)
    for b in range(2):
        every, score = enumerate_paths(problem.emissions[b], *problem.scores[1:])
        best = score.argsort(descending=True)[:n_best]
        assert_same(paths[b, : len(best)], every[best])
        torch.testing.assert_close(scores[b, : len(best)].double(), score[best], rtol=1e-6, atol=1e-6)
        assert (paths[b, 27:] == -1).all()
        assert (scores[b, 27:] == -INF).all()


def test_torch_struct_one_tag(device):
    """torch-struct: one tag is a math domain error. Ours: log Z is the score of the only path."""
    problem = make_problem(3, 5, 1, device, mask="prefix")
    partition, likelihood, marginals, entropy, paths, best = scores_of(problem)
    # Two sums of five terms, in different orders.
    torch.testing.assert_close(partition, best, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(likelihood, torch.zeros(3, device=device), rtol=0, atol=1e-6)
    assert_same(entropy, torch.zeros(3, device=device))
    assert_same(marginals[..., 0], problem.mask.float())
    assert_same(paths, problem.mask.long() - 1)


def test_torch_struct_longest_sequence_shorter_than_t(device):
    """torch-struct: the longest length below T is an AssertionError; flair wants lengths sorted. Neither here."""
    problem = make_problem(4, 9, 5, device)
    problem.mask = torch.arange(9, device=device) < torch.tensor([[3], [6], [1], [5]], device=device)
    cut = problem.with_scores(problem.emissions[:, :6], *problem.scores[1:])
    cut.mask, cut.tags = problem.mask[:, :6], problem.tags[:, :6]
    whole, short = scores_of(problem), scores_of(cut)
    for index in (0, 1, 3, 5):
        assert_same(whole[index], short[index])
    assert_same(whole[2][:, :6], short[2])
    assert_same(whole[4][:, :6], short[4])
    assert (whole[4][:, 6:] == -1).all()


@pytest.mark.parametrize("N", [5, 33, 40, 65, 100])
def test_lightseq_ties(N, device):
    """LightSeq, torbi: lanes take strides of 32 tags and the first lane wins. Ours: the lowest of the tied tags."""
    emissions = torch.zeros(3, 6, N, device=device)
    emissions[1, :, [N - 1, N // 2]] = 1.0
    emissions[2] = torch.randint(0, 2, (6, N)).float()
    paths, _ = fastnlp_ops.crf_viterbi(emissions, torch.zeros(N, N, device=device))
    assert (paths[0] == 0).all()
    assert (paths[1] == N // 2).all()
    assert_same(paths[2], emissions[2].argmax(1) if device.type == "cpu" else emissions[2].cpu().argmax(1).to(device))
    transitions = torch.randint(-1, 2, (N, N)).float().to(device)
    expected = reference.crf_viterbi(emissions.double(), transitions.double())
    ours = fastnlp_ops.crf_viterbi(emissions, transitions)
    assert_same(ours[0], expected[0])
    assert_same(ours[1].double(), expected[1])


@pytest.mark.parametrize("function", [log_partition, log_likelihood], ids=lambda function: function.__name__)
def test_crf_cuda_upstream_gradient(function, device):
    """crf_cuda multiplies by the mean of the upstream gradient: right only where every sequence has the same one."""
    problem = make_problem(4, 6, 5, device)
    weights = torch.tensor([2.0, 0.0, -3.0, 0.5], device=device)
    together = gradients(function, fastnlp_ops, problem, None, weights)
    parameters = [torch.zeros_like(gradient, dtype=torch.float64) for gradient in together[1:]]
    for b in range(4):
        alone = problem.with_scores(problem.emissions[[b] * 4], *problem.scores[1:])
        alone.tags = problem.tags[[b] * 4]
        single = gradients(function, fastnlp_ops, alone, None, weights[b] * torch.tensor([1.0, 0, 0, 0], device=device))
        assert_same(together[0][b], single[0][0])
        for total, gradient in zip(parameters, single[1:], strict=True):
            total += gradient.double()
    for gradient, total in zip(together[1:], parameters, strict=True):
        # Four float32 numbers of at most ten, added.
        torch.testing.assert_close(gradient.double(), total, rtol=1e-6, atol=4e-6)


def test_flair_marginals_are_probabilities(device):
    """flair calls the softmax of Viterbi scores a confidence. Marginals sum to 1 and agree with sampled frequencies."""
    problem = make_problem(1, 4, 3, device)
    marginals = fastnlp_ops.crf_marginals(*problem.scores)
    assert (marginals.sum(-1) - 1).abs().max() < 1e-5
    samples = fastnlp_ops.crf_sample(*problem.scores, num_samples=20000)[:, 0]
    frequency = torch.nn.functional.one_hot(samples, 3).double().mean(0)
    # Five standard deviations of the share of 20000 draws, at most 0.018.
    assert (frequency - marginals[0]).abs().max() < 0.018


def test_likelihood_is_never_positive(device):
    """allennlp, PaddleNLP (behind relu), flash-semicrf: negative losses. Peaked models are where rounding shows."""
    for std in (1.0, 10.0, 1000.0):
        problem = make_problem(16, 30, 6, device, std=std)
        best, _ = fastnlp_ops.crf_viterbi(*problem.scores)
        emissions, *rest = problem.scores
        value = fastnlp_ops.crf_log_likelihood(emissions, best, *rest)
        # Rounding of two sums of 30 terms, the difference of which is 0 for a peaked model.
        assert value.max().item() <= 4 * torch.finfo(torch.float32).eps * 30 * emissions.abs().max().item()
