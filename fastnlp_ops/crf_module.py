"""The CRF layer: torchcrf's module, to the letter, over the compiled ops."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, List  # noqa: UP035  (TorchScript reads List and Optional in signatures)

import torch
from torch import Tensor, nn

from fastnlp_ops import _host
from fastnlp_ops._crf_inputs import log_likelihood, viterbi
from fastnlp_ops.crf import crf_marginals
from fastnlp_ops.crf_state_dict import convert_crf_state_dict
from fastnlp_ops.tag_schemes import transition_mask


class CRF(nn.Module):
    """Linear-chain conditional random field; a drop-in for ``torchcrf.CRF``.

    Same parameters in the same order (``start_transitions``, ``end_transitions``, ``transitions``, drawn from
    U(-0.1, 0.1)), same methods, same errors, same TorchScript support; ``forward`` returns the log-likelihood, not the
    loss.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> crf = fastnlp_ops.CRF(3, batch_first=True)
        >>> e, tags = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
        >>> arguments = (crf.transitions, crf.start_transitions, crf.end_transitions)
        >>> torch.allclose(crf(e, tags), fastnlp_ops.crf_log_likelihood(e, tags, *arguments).sum())
        True

    Args:
        num_tags (int): number of tags N, at least 1.
        batch_first (bool): emissions are [B, T, N], not [T, B, N]; tags and mask likewise.
        labels (Sequence[str]): the label of each tag. Where given, transitions that the scheme forbids have
            probability 0, in the loss and in decoding.
        scheme (str): how the labels spell spans, see :func:`transition_mask`; "BIO" where labels are given.

    Returns:
        ``crf(emissions, tags, mask=None, reduction="sum")``: log-likelihood, a scalar in float32 (float64 for float64
        emissions), or Tensor[B] with reduction "none". "mean" is over sequences, "token_mean" over valid steps.

    Raises:
        ValueError: for shapes that do not fit, in the words and the order of torchcrf; on CPU also where the first step
            of a sequence is masked, and for a tag outside [0, N) at a valid step.

    Preconditions:
        On CUDA neither the mask nor tags are read by the checks. A masked first step is skipped, like any other.

    Precision:
        As :func:`crf_log_likelihood` and :func:`crf_viterbi`.

    References:
        Lafferty, McCallum, Pereira: Conditional Random Fields. ICML 2001, section 3.
    """

    _forbidden: Tensor | None
    _forbidden_starts: Tensor | None
    _forbidden_ends: Tensor | None

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        *,
        labels: Sequence[str] | None = None,
        scheme: str | None = None,
    ) -> None:
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        if labels is None and scheme is not None:
            raise ValueError("labels must be given where scheme is")
        if labels is not None and len(labels) != num_tags:
            raise ValueError(f"labels must name {num_tags} tags, got {len(labels)}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        # Not in the state dict: a checkpoint of torchcrf has no such entries.
        self.register_buffer("_forbidden", None, persistent=False)
        self.register_buffer("_forbidden_starts", None, persistent=False)
        self.register_buffer("_forbidden_ends", None, persistent=False)
        self._constrained = labels is not None  # a buffer takes longer to look up
        if labels is not None:
            allowed, starts, ends = transition_mask(labels, scheme or "BIO")
            self._forbidden, self._forbidden_starts, self._forbidden_ends = ~allowed, ~starts, ~ends
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters from U(-0.1, 0.1)."""
        nn.init.uniform_(self.start_transitions, -0.1, 0.1)
        nn.init.uniform_(self.end_transitions, -0.1, 0.1)
        nn.init.uniform_(self.transitions, -0.1, 0.1)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}(num_tags={self.num_tags})"

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """Log-likelihood of the tags under the model."""
        known = reduction in ("none", "sum", "mean", "token_mean")
        if torch.jit.is_scripting() or not known:
            self._validate(emissions, tags, mask)
            if not known:
                raise ValueError(f"invalid reduction: {reduction}")
            result = self._log_likelihood(emissions, tags, mask, reduction)
        else:
            result = self._checked(self._log_likelihood, emissions, tags, mask, reduction)
        if reduction == "mean":
            return result / emissions.size(0 if self.batch_first else 1)
        if reduction == "token_mean":
            return result / tags.numel() if mask is None else result / (mask != 0).sum()
        return result

    def _log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
        transitions, start, end = self._scores()
        if not self.batch_first:
            emissions, mask = self._batch_first(emissions, mask)
            tags = tags.transpose(0, 1).contiguous()
        return log_likelihood(emissions, tags, transitions, start, end, mask, None, reduction != "none", True)

    @torch.jit.export
    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> List[List[int]]:  # noqa: UP006
        """The best tags of every sequence, as lists of their own lengths."""
        paths, _ = self._best(emissions, mask)
        if torch.jit.is_scripting():
            best: List[List[int]] = []  # noqa: UP006
            for path in paths.cpu():
                tags: List[int] = path[path >= 0].tolist()  # noqa: UP006
                best.append(tags)
            return best
        return _host.paths_to_lists(paths.cpu().numpy())

    def _best(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            self._validate(emissions, None, mask)
            return self._decode(emissions, mask)
        with torch.no_grad():
            return self._checked(self._decode, emissions, None, mask)

    def _decode(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        transitions, start, end = self._scores()
        e, m = self._batch_first(emissions, mask)
        return viterbi(e, transitions, start, end, m, None, 1, True)

    def _checked(self, function: Callable[..., Any], emissions: Tensor, tags: Tensor | None, *others: Any) -> Any:
        """Its result. An error is worded as in torchcrf, where that has one; looked for only after an error."""
        try:
            return function(emissions, *others) if tags is None else function(emissions, tags, *others)
        except (ValueError, IndexError):
            self._validate(emissions, tags, others[0])
            raise

    @torch.jit.unused
    def viterbi(self, emissions: Tensor, mask: Tensor | None = None, n_best: int = 1) -> tuple[Tensor, Tensor]:
        """Paths and scores as tensors on the device of the emissions, batch first; see :func:`crf_viterbi`."""
        self._validate(emissions, None, mask)
        e, m = self._batch_first(emissions, mask)
        return viterbi(e, *self._scores(), m, None, n_best, False)

    @torch.jit.unused
    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """p(y_t = j) in the layout of the emissions; see :func:`crf_marginals`."""
        self._validate(emissions, None, mask)
        e, m = self._batch_first(emissions, mask)
        result = crf_marginals(e, *self._scores(), mask=m)
        return result if self.batch_first else result.transpose(0, 1)

    @torch.jit.unused
    def load_peer_state_dict(
        self,
        state_dict: Mapping[str, Any],
        layout: str,
        *,
        constraints: bool = False,
        lr_multiplier: float = 1.0,
    ) -> None:
        """Takes the parameters of another package's CRF; layouts and arguments: :func:`convert_crf_state_dict`."""
        converted = convert_crf_state_dict(
            state_dict, layout, num_tags=self.num_tags, constraints=constraints, lr_multiplier=lr_multiplier
        )
        self.load_state_dict(converted)

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        transitions: Tensor = self.transitions
        start: Tensor = self.start_transitions
        end: Tensor = self.end_transitions
        if self._constrained:
            forbidden, forbidden_starts, forbidden_ends = self._forbidden, self._forbidden_starts, self._forbidden_ends
            # TorchScript asks
            assert forbidden is not None and forbidden_starts is not None and forbidden_ends is not None
            transitions = transitions.masked_fill(forbidden, float("-inf"))
            start = start.masked_fill(forbidden_starts, float("-inf"))
            end = end.masked_fill(forbidden_ends, float("-inf"))
        return transitions, start, end

    def _batch_first(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.batch_first:
            return emissions, mask
        return emissions.transpose(0, 1), None if mask is None else mask.transpose(0, 1)

    def _validate(self, emissions: Tensor, tags: Tensor | None, mask: Tensor | None) -> None:
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        if emissions.size(2) != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {emissions.size(2)}")
        if tags is not None and tags.shape != emissions.shape[:2]:
            raise ValueError(
                "the first two dimensions of emissions and tags must match, "
                f"got ({emissions.size(0)}, {emissions.size(1)}) and {self._shape(tags)}"
            )
        if mask is not None:
            if mask.shape != emissions.shape[:2]:
                raise ValueError(
                    "the first two dimensions of emissions and mask must match, "
                    f"got ({emissions.size(0)}, {emissions.size(1)}) and {self._shape(mask)}"
                )
            # Reading a CUDA tensor would wait for the device, and tracing has no values to read.
            if emissions.device.type == "cpu" and mask.numel() > 0 and not torch.compiler.is_compiling():
                first = mask[:, 0] if self.batch_first else mask[0]
                if not bool(first.all()):
                    raise ValueError("mask of the first timestep must all be on")

    def _shape(self, tensor: Tensor) -> str:
        return "(" + ", ".join([str(size) for size in tensor.shape]) + ")"
