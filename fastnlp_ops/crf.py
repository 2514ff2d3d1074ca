"""Linear-chain conditional random fields: log-likelihood, marginals, decoding, sampling, entropy, and the module.

The score of tags y_0 .. y_{L-1} given emissions e is

    score(y) = start[y_0] + sum_k e_k[y_k] + sum_{k>0} T[y_{k-1}, y_k] + end[y_{L-1}],    p(y) = exp(score(y) - log Z)

with log Z = log sum_y exp score(y). What the functions below share:

- Emissions are [B, T, N] with an optional mask [B, T] of any dtype and any pattern, or packed [total, N] with
  ``cu_seqlens`` [B + 1]. A masked step is skipped wherever it is: the chain runs over the steps that remain. What
  stands at a masked step, NaN or a tag of -100, is never read.
- Transitions are [N, N] as [from, to], or [B, T-1, N, N], one matrix for each step that is entered.
- -inf is a legal score and forbids what carries it, in values and in gradients, without NaN.
- Arithmetic is float32, or float64 where a floating input is.
"""

from typing import Any

import torch
from torch import Tensor

from fastnlp_ops._crf_inputs import kernel_inputs, log_likelihood, needs_grad, shape_of, viterbi
from fastnlp_ops._layout import check_dense
from fastnlp_ops._ops import crf as ops


def crf_log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Log Z of every sequence: the logarithm of the summed exponentiated scores of all tag paths.

    alpha_0 = start + e_0,  alpha_k(j) = e_k(j) + log sum_i exp(alpha_{k-1}(i) + T_ij),
    log Z = log sum_j exp(alpha_{L-1}(j) + end(j))

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T = torch.randn(2, 5, 3), torch.randn(3, 3)
        >>> alpha = e[:, 0]
        >>> for k in range(1, 5):
        ...     alpha = e[:, k] + torch.logsumexp(alpha[:, :, None] + T, dim=1)
        >>> torch.allclose(fastnlp_ops.crf_log_partition(e, T), alpha.logsumexp(1), atol=1e-5)
        True

    Args:
        emissions (Tensor[B, T, N] or Tensor[total, N]): scores of the tags in nats; float32, float64, float16 or
            bfloat16, any strides.
        transitions (Tensor[N, N] or Tensor[B, T-1, N, N]): scores [from, to]; matrix t-1 is used to enter step t.
        start_transitions (Tensor[N]): scores of the first tag; None means zeros.
        end_transitions (Tensor[N]): scores of the last tag; None means zeros.
        mask (Tensor[B, T]): bool, integer or float; nonzero steps are part of the sequence. None means all.
        cu_seqlens (Tensor[B + 1]): int32 or int64 offsets of packed sequences, rising from 0 to total.

    Returns:
        Tensor[B]: in float32, or float64 where an input is. 0 for an empty sequence, -inf where no path is possible.

    Raises:
        ValueError: for a shape or a device that does not fit; on CPU for cu_seqlens that do not rise from 0 to total.
        TypeError: for a dtype that is not listed.

    Preconditions:
        On CUDA the values of cu_seqlens are not checked. +inf scores give NaN, in the sequence that reads them.

    Precision:
        Against float64, |error| <= 1e-6 |log Z| + 1e-4 in float32, also for emissions of standard deviation 100 with
        forbidden transitions. Where a path leads by s nats until a forbidden transition kills it, those that it hid
        are known to s times 6e-8: scores of 1e4 cost 6e-4. Deterministic: the same bits for every run and thread count,
        gradients included, and for every batch that a sequence is part of, up to one exception: on CPU, batches of four
        and more take a kernel that rounds differently from that of smaller ones. The backward pass saves as many
        float32 numbers as there are emissions.

    References:
        Lafferty, McCallum, Pereira: Conditional Random Fields. ICML 2001, section 3. Rabiner: A Tutorial on Hidden
        Markov Models. Proc. IEEE 1989, equations (19)-(21). Gradients: forward filtering, backward smoothing; Murphy:
        Machine Learning, 2012, section 17.4.3.
    """
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    save = needs_grad(e, t, start, end)
    value, _ = ops.log_partition(e, t, start, end, mask, cu_seqlens, save)
    return value


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Log p(tags) of every sequence: the score of the given path less log Z, in one kernel. Its negative is the loss.

    log p(y) = score(y) - log Z;  d log p / d e_k(j) = [y_k = j] - p(y_k = j)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T, y = torch.randn(1, 3, 4), torch.randn(4, 4), torch.tensor([[2, 0, 3]])
        >>> score = e[0, 0, 2] + T[2, 0] + e[0, 1, 0] + T[0, 3] + e[0, 2, 3]
        >>> torch.allclose(fastnlp_ops.crf_log_likelihood(e, y, T), score - fastnlp_ops.crf_log_partition(e, T))
        True

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens: as in :func:`crf_log_partition`.
        tags (Tensor[B, T] or Tensor[total]): integers in [0, N) at valid steps, anything at masked ones.

    Returns:
        Tensor[B]: at most 0. -inf where the path is forbidden (gradients are finite) or every path is (gradients 0).

    Raises:
        ValueError: as :func:`crf_log_partition`, and on CPU for a tag outside [0, N) at a valid step.
        TypeError: for a dtype that is not listed.

    Preconditions:
        On CUDA tags are not checked: a tag outside [0, N) at a valid step makes its sequence NaN.

    Precision:
        As :func:`crf_log_partition`; the score of the path is summed in float64. float16 and bfloat16 emissions give
        the value of the same numbers in float32; their gradients are rounded once, to their dtype.

    References:
        Lafferty, McCallum, Pereira: Conditional Random Fields. ICML 2001, section 3.
    """
    return log_likelihood(
        emissions, tags, transitions, start_transitions, end_transitions, mask, cu_seqlens, False, False
    )


def crf_marginals(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """p(y_t = j) for every step and tag: how sure the model is of each tag, given the whole sequence.

    p(y_t = j) = d log Z / d e_t(j)

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T = torch.randn(2, 5, 3, requires_grad=True), torch.randn(3, 3)
        >>> expected, = torch.autograd.grad(fastnlp_ops.reference.crf_log_partition(e, T).sum(), e)
        >>> torch.allclose(fastnlp_ops.crf_marginals(e, T), expected, atol=1e-5)
        True

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens: as in :func:`crf_log_partition`.

    Returns:
        Tensor[B, T, N] or Tensor[total, N]: probabilities that sum to 1 at valid steps; 0 at masked steps and where
        every path is forbidden.

    Raises:
        ValueError: for a shape or a device that does not fit.
        TypeError: for a dtype that is not listed.

    Precision:
        Sums are 1 to 1e-5 in float32. Differentiable; derivatives go through the plain-PyTorch reference.

    References:
        Rabiner: A Tutorial on Hidden Markov Models. Proc. IEEE 1989, equation (27).
    """
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    e = e.to(t.dtype)
    with torch.no_grad():
        value, messages = ops.log_partition(e, t, start, end, mask, cu_seqlens, True)
    found = ops.log_partition_backward(torch.ones_like(value), messages, e, t, start, end, mask, cu_seqlens, False)
    marginals: Tensor = found[0]
    return marginals


def crf_viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    n_best: int = 1,
) -> tuple[Tensor, Tensor]:
    """The best tag path of every sequence and its score, or the n best.

    delta_k(j) = max_i ((delta_{k-1}(i) + T_ij) + e_k(j)), followed backwards; ties go to the lowest tag

    Equivalent to:
        >>> import itertools, torch, fastnlp_ops
        >>> e, T = torch.randn(1, 4, 3), torch.randn(3, 3)
        >>> score = lambda y: sum(e[0, t, j] for t, j in enumerate(y)) + sum(T[i, j] for i, j in zip(y, y[1:]))
        >>> best = max(itertools.product(range(3), repeat=4), key=score)
        >>> fastnlp_ops.crf_viterbi(e, T)[0].tolist() == [list(best)]
        True

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens: as in :func:`crf_log_partition`.
        n_best (int): number of paths, at least 1.

    Returns:
        (paths, scores): int64 Tensor[B, T] (Tensor[total]), -1 at masked steps, and Tensor[B]. With n_best > 1
        Tensor[B, n, T] (Tensor[n, total]) and Tensor[B, n], best first; a runner-up that does not exist or is forbidden
        has tags -1 and score -inf.

    Raises:
        ValueError: for a shape or a device that does not fit, or n_best < 1.
        TypeError: for a dtype that is not listed.

    Precision:
        Scores are summed in float32 (float64 where an input is) in the order of pytorch-crf: its paths, also
        on ties. Scores are differentiable: the gradient counts the entries on the path.

    References:
        Viterbi: Error bounds for convolutional codes. IEEE Trans. Inf. Theory 1967. Rabiner 1989, equations (32)-(35).
    """
    return viterbi(emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens, n_best, False)


def crf_sample(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent draws of tag paths from p(y).

    y_{L-1} ~ exp(alpha_{L-1} + end), then y_{k-1} ~ exp(alpha_{k-1}(i) + T[i, y_k]) backwards

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T = torch.randn(1, 1, 3), torch.randn(3, 3)
        >>> drawn = fastnlp_ops.crf_sample(e, T, num_samples=10000, generator=torch.Generator().manual_seed(0))
        >>> frequency = torch.bincount(drawn.flatten(), minlength=3) / 10000
        >>> torch.allclose(frequency, e[0, 0].softmax(0), atol=0.03)
        True

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens: as in :func:`crf_log_partition`.
        num_samples (int): number of draws, at least 0.
        generator (torch.Generator): source of randomness on the device of emissions; None means the default one.

    Returns:
        int64 Tensor[num_samples, B, T] (Tensor[num_samples, total]), -1 at masked steps. Not differentiable.

    Raises:
        ValueError: for a shape or a device that does not fit, or num_samples < 0.
        TypeError: for a dtype that is not listed.

    Precision:
        A tag of probability 0 is never drawn. The same generator state gives the same paths for every thread count.

    References:
        Scott: Bayesian Methods for Hidden Markov Models. JASA 2002, section 2.2.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must be at least 0, got {num_samples}")
    with torch.no_grad():
        e, t, start, end, mask, cu_seqlens = kernel_inputs(
            emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
        )
        shape = (num_samples, *e.shape[:-1])
        # With an argument `generator`, None or not, torch.rand takes no symbolic sizes.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        uniforms = torch.rand(shape, device=e.device, dtype=torch.float32, **source)
        drawn: Tensor = ops.sample(e, t, start, end, mask, cu_seqlens, uniforms)
    return drawn


def crf_entropy(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Entropy of p(y) in nats: 0 where one path has all the probability, L log N where all are alike.

    H_k(j) = sum_i P(i|j) (H_{k-1}(i) - log P(i|j)), summed as positive terms; never log Z less a mean that cancels it

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T = torch.randn(1, 1, 3), torch.randn(3, 3)
        >>> p = e[0, 0].softmax(0)
        >>> torch.allclose(fastnlp_ops.crf_entropy(e, T), -(p * p.log()).sum(), atol=1e-5)
        True

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens: as in :func:`crf_log_partition`.

    Returns:
        Tensor[B]: at least 0; 0 for an empty sequence and where every path is forbidden.

    Raises:
        ValueError: for a shape or a device that does not fit.
        TypeError: for a dtype that is not listed.

    Precision:
        |error| <= 1e-5 L against float64. Differentiable; derivatives go through the plain-PyTorch reference.

    References:
        Hernando, Crespi, Cybenko: Efficient Computation of the Hidden Markov Model Entropy for a Given Observation
        Sequence. IEEE Trans. Inf. Theory 2005, section III.
    """
    e, t, start, end, mask, cu_seqlens = kernel_inputs(
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens
    )
    entropy: Tensor = ops.entropy(e, t, start, end, mask, cu_seqlens)
    return entropy


def crf_partial_log_likelihood(
    emissions: Tensor,
    allowed_tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Log of the probability that every step takes one of its allowed tags: training on partial or fuzzy labels.

    log Z of the allowed paths - log Z

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T = torch.randn(2, 5, 3), torch.randn(3, 3)
        >>> allowed = torch.rand(2, 5, 3) < 0.8
        >>> allowed[..., 0] = True
        >>> some = fastnlp_ops.crf_log_partition(e.masked_fill(~allowed, -torch.inf), T)
        >>> expected = some - fastnlp_ops.crf_log_partition(e, T)
        >>> torch.allclose(fastnlp_ops.crf_partial_log_likelihood(e, allowed, T), expected)
        True

    Args:
        emissions, transitions, start_transitions, end_transitions, mask, cu_seqlens: as in :func:`crf_log_partition`.
        allowed_tags (Tensor of the shape of emissions): bool or integer; nonzero where the step may take the tag. One
            allowed tag is a label, all allowed tags are no label.

    Returns:
        Tensor[B]: at most 0 up to rounding; -inf where no allowed path is possible (gradients are finite).

    Raises:
        ValueError: for a shape or a device that does not fit.
        TypeError: for a dtype that is not listed.

    Precision:
        As :func:`crf_log_partition`, twice.

    References:
        Tsuboi, Kashima, Mori, Oda, Matsumoto: Training Conditional Random Fields Using Incomplete Annotations. COLING
        2008, equation (3).
    """
    check_dense("emissions", emissions)
    check_dense("allowed_tags", allowed_tags)
    if allowed_tags.shape != emissions.shape:
        raise ValueError(f"allowed_tags must be {tuple(emissions.shape)} as emissions, got {shape_of(allowed_tags)}")
    if allowed_tags.device != emissions.device:
        raise ValueError(
            f"allowed_tags must be on the device of emissions, {emissions.device}, got {allowed_tags.device}"
        )
    if emissions.dtype in (torch.float16, torch.bfloat16):
        emissions = emissions.float()  # so that the two gradients of the emissions are rounded once, as a sum
    scores = (transitions, start_transitions, end_transitions)
    total = crf_log_partition(emissions, *scores, mask=mask, cu_seqlens=cu_seqlens)
    allowed = emissions.masked_fill(allowed_tags == 0, -torch.inf)
    some = crf_log_partition(allowed, *scores, mask=mask, cu_seqlens=cu_seqlens)
    return torch.where(total == -torch.inf, total, some - total)  # not NaN where both are -inf
