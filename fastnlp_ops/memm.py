"""Maximum-entropy Markov models: step-wise softmax taggers that see the tag before (and behind) them."""

from typing import List  # noqa: UP035  (TorchScript reads List in annotations of variables)

import torch
from torch import Tensor, nn

from fastnlp_ops._crf_inputs import check_tags, kernel_inputs, shape_of
from fastnlp_ops._crf_layer import (
    check_ignore_index,
    check_parameters,
    is_concrete,
    mean_over_steps,
    steps_with_tags,
    tag_lists,
)
from fastnlp_ops._ops import crf as crf_ops
from fastnlp_ops._ops import memm as ops


def memm_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    bidirectional: bool = True,
) -> Tensor:
    r"""Log-probability of tag sequences under a maximum-entropy Markov model, summed over the steps of each sequence.

    .. math::
        \log p(y) = \sum_k \log \mathrm{softmax}\big((e_k + T[y_{k-1}]) / 2\big)[y_k], \qquad
        \text{at } k = 0 \text{: } \log \mathrm{softmax}(e_0)[y_0]

    bidirectional: the mean of this and of the same for the reversed sequence with the transposed T.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> e, T, y = torch.randn(2, 5, 3), torch.randn(3, 3), torch.randint(3, (2, 5))
        >>> logits = torch.cat([e[:, :1], (e[:, 1:] + T[y[:, :-1]]) / 2], dim=1)
        >>> log_p = logits.log_softmax(-1).gather(-1, y[:, :, None]).sum((1, 2))
        >>> torch.allclose(fastnlp_ops.memm_log_likelihood(e, y, T, bidirectional=False), log_p, atol=1e-5)
        True

    Args:
        emissions (Tensor[B, T, N]): scores of the tags; float32, float64, float16 or bfloat16.
        tags (Tensor[B, T]): integers in [0, N).
        transitions (Tensor[N, N]): [from, to].
        mask (Tensor[B, T]): steps that count, any dtype, any pattern; None: all. The neighbour of a step is the next
            step that counts; other steps are never read, whatever they hold.
        bidirectional (bool): mean of both directions.

    Returns:
        Tensor[B]: in float32, or float64 where an input is. 0 for a sequence without steps; -inf where a tag is
        impossible, or where all tags of a step are.

    Raises:
        ValueError: for a shape or a device that does not fit, and on CPU for a tag outside [0, N) where the mask is on.
        TypeError: for a dtype that is not listed.

    Preconditions:
        On CUDA a tag outside of [0, N) is not an error: the sequence's result and gradients are NaN.

    Precision:
        float32 (float64 where an input is) with float64 sums over steps. Bitwise repeatable, with any number of
        threads. Differentiable to any order and in forward mode, beyond the first through the plain PyTorch
        reference.

    References:
        McCallum, Freitag and Pereira, "Maximum Entropy Markov Models for Information Extraction and Segmentation"
        (ICML 2000). The mean of the two scores and the two directions: Su, bert4keras (2020),
        https://kexue.fm/archives/7213.
    """
    return _log_likelihood(emissions, tags, transitions, mask, bidirectional)


def memm_viterbi(
    emissions: Tensor,
    transitions: Tensor,
    *,
    mask: Tensor | None = None,
    bidirectional: bool = True,
    n_best: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Most likely tag sequences of a maximum-entropy Markov model, exactly.

    A forward step scores e_k[y_k] / 2 + T[y_{k-1}, y_k] / 2 - Z_k(y_{k-1}) with
    Z_k(i) = log sum_j exp((e_k[j] + T[i, j]) / 2). The normaliser depends on the tag of step k-1 alone, so it can be
    charged to the emissions of that step; what is left is a linear chain, and :func:`crf_viterbi` decodes it. For the
    reversed direction the normaliser log sum_i exp((e_k[i] + T[i, j]) / 2) is charged to step k+1, where the tag j is.
    Bidirectional decoding maximises the mean of both, which is what :func:`memm_log_likelihood` returns.

    Args:
        emissions (Tensor[B, T, N]): scores of the tags; float32, float64, float16 or bfloat16.
        transitions (Tensor[N, N]): [from, to].
        mask (Tensor[B, T]): steps that count, see :func:`memm_log_likelihood`.
        bidirectional (bool): mean of both directions.
        n_best (int): number of sequences.

    Returns:
        (Tensor, Tensor): paths int64 [B, T], -1 at masked steps, and their log-likelihoods [B], without gradients;
        [B, n, T] and [B, n] where n_best > 1, best first, -1 and -inf where there are fewer sequences.

    Raises:
        ValueError: for a shape or a device that does not fit, and n_best below 1.
        TypeError: for a dtype that is not listed.

    Precision:
        float32 (float64 where an input is). Ties go to the lowest tag.

    References:
        As :func:`memm_log_likelihood`. The derivation in full: fastnlp_ops/reference/memm.py.
    """
    return _viterbi(emissions, transitions, mask, bidirectional, n_best)


class MEMM(nn.Module):
    """Maximum-entropy Markov model layer: a cheaper stand-in for a CRF layer, trained without a recursion over time.

    The model and the loss of bert4keras' ``MaximumEntropyMarkovModel``: its loss is
    ``-memm(emissions, tags, mask, reduction="token_mean")``; its weights ``trans`` (``l_trans``, ``r_trans``), times
    its ``lr_multiplier``, are ``transitions`` (``left_transitions``, ``right_transitions``). Decoding, which bert4keras
    has not, is exact.

    Args:
        num_tags (int): number of tags N.
        hidden_dim (int): None for a full transition matrix [from, to]; H for the product of ``left_transitions`` [N, H]
            and the transpose of ``right_transitions`` [N, H].
        bidirectional (bool): tag from both ends and take the mean.
        batch_first (bool): emissions are [B, T, N] instead of [T, B, N], tags and mask likewise.
        ignore_index (int): steps with this tag do not count, as -100 in the labels of transformers.

    Raises:
        ValueError: num_tags or hidden_dim below 1; at the first call in training for parameters that are NaN.

    Preconditions:
        The first call in training reads the parameters, and waits for the device that they are on. Inside a
        ``transformers.PreTrainedModel``, ``_init_weights`` must call ``reset_parameters``, as for :class:`CRF`.

    References:
        As :func:`memm_log_likelihood`.
    """

    __constants__ = ("batch_first", "bidirectional", "num_tags")
    ignore_index: int | None

    def __init__(
        self,
        num_tags: int,
        *,
        hidden_dim: int | None = None,
        bidirectional: bool = True,
        batch_first: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        if num_tags < 1:
            raise ValueError(f"num_tags must be at least 1, got {num_tags}")
        if hidden_dim is not None and hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        check_ignore_index(ignore_index)
        super().__init__()
        self.num_tags = num_tags
        self.hidden_dim = hidden_dim
        self.bidirectional = bidirectional
        self.batch_first = batch_first
        self.ignore_index = ignore_index
        self._seen = False  # whether check_parameters has found them good
        full = hidden_dim is None
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags)) if full else None
        self.left_transitions = None if full else nn.Parameter(torch.empty(num_tags, hidden_dim or 0))
        self.right_transitions = None if full else nn.Parameter(torch.empty(num_tags, hidden_dim or 0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform values, as in bert4keras."""
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def extra_repr(self) -> str:
        parts = [f"num_tags={self.num_tags}"]
        if self.hidden_dim is not None:
            parts.append(f"hidden_dim={self.hidden_dim}")
        if not self.bidirectional:
            parts.append("bidirectional=False")
        if self.batch_first:
            parts.append("batch_first=True")
        if self.ignore_index is not None:
            parts.append(f"ignore_index={self.ignore_index}")
        return ", ".join(parts)

    def transition_matrix(self) -> Tensor:
        """The scores [from, to], Tensor[N, N]."""
        if self.transitions is not None:
            return self.transitions
        if self.left_transitions is not None and self.right_transitions is not None:
            return self.left_transitions @ self.right_transitions.t()
        raise ValueError("the layer has no transitions")

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Log-likelihood of tag sequences (not the loss: minimise its negative).

        Args:
            emissions (Tensor[T, B, N]): scores of the tags ([B, T, N] where batch_first).
            tags (Tensor[T, B]): gold tags.
            mask (Tensor[T, B]): steps that count, any dtype, any pattern; None: all.
            reduction (str): "none": Tensor[B]; "sum"; "mean" over sequences; "token_mean" over the steps that count.

        Returns:
            Tensor: a scalar, or [B] where reduction is "none".

        Raises:
            ValueError: as :func:`memm_log_likelihood`; an unknown reduction.
        """
        if reduction not in ("none", "sum", "mean", "token_mean"):
            raise ValueError(f"invalid reduction: {reduction}")
        if not torch.jit.is_scripting() and self.training and not torch.compiler.is_compiling() and not self._seen:
            self._seen = check_parameters(self)
        ignore_index = self.ignore_index
        if ignore_index is not None:
            mask = steps_with_tags(emissions, tags, mask, ignore_index)
        e, m = self._batch_first(emissions, mask)
        if not self.batch_first and tags.dim() == 2:
            tags = tags.t()
        value = _log_likelihood(e, tags, self.transition_matrix(), m, self.bidirectional)
        if reduction == "none":
            return value
        if reduction == "sum":
            return value.sum()
        if reduction == "mean":
            return value.sum() / max(value.numel(), 1)
        return mean_over_steps(value.sum(), tags, mask)

    @torch.jit.export
    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> List[List[int]]:  # noqa: UP006
        """Most likely tag sequences as lists, one tag for each step that counts. Export and trace :meth:`viterbi`."""
        e, m = self._batch_first(emissions, mask)
        paths, _ = _viterbi(e, self.transition_matrix(), m, self.bidirectional, 1)
        if torch.jit.is_scripting():
            best: List[List[int]] = []  # noqa: UP006
            for path in paths.cpu():
                tags: List[int] = path[path >= 0].tolist()  # noqa: UP006
                best.append(tags)
            return best
        return tag_lists(paths)

    @torch.jit.unused
    def viterbi(
        self, emissions: Tensor, mask: Tensor | None = None, n_best: int = 1, *, padding_value: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Paths and log-likelihoods as tensors, batch first, on the emissions' device; see :func:`memm_viterbi`.

        ``padding_value`` stands at masked steps, and in runners-up that do not exist.
        """
        e, m = self._batch_first(emissions, mask)
        paths, scores = _viterbi(e, self.transition_matrix(), m, self.bidirectional, n_best)
        return (paths if padding_value == -1 else paths.masked_fill(paths < 0, padding_value)), scores

    def _batch_first(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if emissions.dim() != 3 or emissions.size(2) != self.num_tags:
            axes = f"[B, T, {self.num_tags}]" if self.batch_first else f"[T, B, {self.num_tags}]"
            sizes = ", ".join([str(size) for size in emissions.shape])
            raise ValueError(f"emissions must be {axes}, got shape ({sizes})")
        if self.batch_first:
            return emissions, mask
        return emissions.transpose(0, 1), mask.t() if mask is not None and mask.dim() == 2 else mask


# TorchScript takes no keyword-only arguments: the layer calls these two.


def _log_likelihood(
    emissions: Tensor, tags: Tensor, transitions: Tensor, mask: Tensor | None, bidirectional: bool
) -> Tensor:
    e, matrix, on = _inputs(emissions, transitions, mask)
    if not torch.jit.is_scripting():
        check_tags(tags, emissions)
        return ops.log_likelihood(e, tags.to(torch.int64).contiguous(), matrix, on, bidirectional)
    return torch.ops.fastnlp_ops.memm_log_likelihood(e, tags.to(torch.int64).contiguous(), matrix, on, bidirectional)


def _viterbi(
    emissions: Tensor, transitions: Tensor, mask: Tensor | None, bidirectional: bool, n_best: int
) -> tuple[Tensor, Tensor]:
    if n_best < 1:
        raise ValueError(f"n_best must be at least 1, got {n_best}")
    with torch.no_grad():
        e, matrix, on = _inputs(emissions, transitions, mask)
        e = e.to(matrix.dtype)
        if on is None:
            on = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
        before, behind = _neighbours(on)
        chain = _chain(e, matrix, before, behind)
        if bidirectional:
            chain = (chain + _chain(e, matrix.t(), behind, before)) / 2
        if not torch.jit.is_scripting():
            if n_best == 1:
                return crf_ops.viterbi(chain, matrix / 2, None, None, on, None)
            return crf_ops.viterbi_n_best(chain, matrix / 2, None, None, on, None, n_best)
        if n_best == 1:
            return torch.ops.fastnlp_ops.crf_viterbi(chain, matrix / 2, None, None, on, None)
        return torch.ops.fastnlp_ops.crf_viterbi_n_best(chain, matrix / 2, None, None, on, None, n_best)


def _inputs(emissions: Tensor, transitions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if transitions.dim() != 2 and not torch.jit.is_scripting():
        raise ValueError(f"transitions must be [N, N], got {shape_of(transitions)}")
    e, matrix, _, _, on, _ = kernel_inputs(emissions, transitions, None, None, mask, None)
    return e, matrix, on


def _neighbours(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the valid step before and behind every step, [B, T]; -1 where there is none."""
    B, T = mask.shape
    steps = torch.arange(T, device=mask.device).expand(B, T)
    before = torch.where(mask, steps, -1).cummax(1)[0]
    behind = torch.where(mask, steps, T).flip(1).cummin(1)[0].flip(1)
    none = torch.full((B, 1), -1, dtype=torch.long, device=mask.device)
    before = torch.cat([none, before], 1)[:, :T]
    behind = torch.cat([behind, none], 1)[:, 1:]
    return before, torch.where(behind == T, -1, behind)


def _normaliser(e: Tensor, matrix: Tensor) -> Tensor:
    """Sum over j of exp((e[..., j] + matrix[i, j]) / 2) in the log domain, [B, T, N] over i."""
    N = e.size(2)
    readable = e.device.type == "cpu"
    if not torch.jit.is_scripting():
        readable = readable and is_concrete(e)
    if readable:
        # One float64 product. It is right unless a sum is so small that terms of it may have vanished, which asks for
        # scores some 1300 nats apart, or -inf; looking at the sums would make the host wait for a GPU.
        rows, columns = e.double() / 2, matrix.double() / 2
        row_top, column_top = _finite(rows.amax(2, keepdim=True)), _finite(columns.amax(1))
        sums = (rows - row_top).exp() @ (columns - column_top[:, None]).exp().t()
        if not bool((sums < 1e-290).any()):
            return (sums.log() + row_top + column_top).to(e.dtype)
    limit = 1 << 22  # elements of the temporary: 16 MiB in float32
    flat = e.reshape(-1, N, 1) / 2  # [B * T, j, 1]
    table = matrix.t() / 2  # [j, i]
    if flat.numel() * N <= limit:
        return torch.logsumexp(flat + table, [1]).reshape(e.shape)
    parts = [torch.logsumexp(part + table, [1]) for part in flat.split(max(1, limit // (N * N)))]
    return torch.cat(parts).reshape(e.shape)


def _finite(top: Tensor) -> Tensor:
    """Maxima to shift by: where everything is -inf, nothing needs a shift."""
    return torch.where(top == -torch.inf, 0.0, top)


def _chain(e: Tensor, matrix: Tensor, given: Tensor, payer: Tensor) -> Tensor:
    """Emissions of the linear chain of one direction.

    `given` is the step whose tag a step sees, `payer` the step that sees its tag; the normaliser of the latter is
    charged here. Where that is -inf, no tag can follow.
    """
    alone = (given < 0)[:, :, None]
    paid = (payer >= 0)[:, :, None]
    charge = _normaliser(e, matrix).gather(1, payer.clamp(min=0)[:, :, None].expand(e.shape))
    first = e - torch.logsumexp(e, [2], keepdim=True)
    score = torch.where(alone, first, e / 2) - torch.where(paid, charge, 0.0)
    # An impossible step: -inf - -inf above.
    stuck = (alone & (e == -torch.inf)) | (paid & (charge == -torch.inf))
    return torch.where(stuck, -torch.inf, score)
