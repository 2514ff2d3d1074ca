"""The CRF layer: torchcrf's module, to the letter, over the compiled ops."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, List  # noqa: UP035  (TorchScript reads List and Optional in signatures)

import torch
from torch import Tensor, nn

from fastnlp_ops._crf_constraints import Forbidden, check_paths, forbidden_by
from fastnlp_ops._crf_inputs import log_likelihood, viterbi
from fastnlp_ops._crf_layer import (
    check_ignore_index,
    check_parameters,
    is_concrete,
    mean_over_steps,
    steps_with_tags,
    tag_lists,
)
from fastnlp_ops.crf import crf_marginals
from fastnlp_ops.crf_state_dict import convert_crf_state_dict
from fastnlp_ops.tag_schemes import _label_of_each_tag, transition_mask


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

    Inside a ``transformers.PreTrainedModel``, ``_init_weights(self, module)`` of the model class must call
    ``module.reset_parameters()`` where ``isinstance(module, CRF)``: ``from_pretrained`` leaves uninitialised memory in
    the parameters that a checkpoint lacks. Constraints come from the labels and survive every way of loading.

    Args:
        num_tags (int): number of tags N, at least 1.
        batch_first (bool): emissions are [B, T, N], not [T, B, N]; tags and mask likewise.
        labels (Sequence[str] or Mapping): the label of each tag, also as ``config.id2label``. Where given, transitions
            that the scheme forbids have probability 0.
        scheme (str): how the labels spell spans, see :func:`transition_mask`; "BIO" where labels are given.
        constrain (str): "both": the loss and decoding obey the scheme; a gold path that breaks it has log-likelihood
            -inf, and :meth:`check_tags` names it. "decode": decoding alone obeys it; the loss and the marginals are
            those of a CRF without labels, for windows that begin inside a span.
        ignore_index (int): steps with this tag are not part of the sequence, wherever they are, as -100 in the labels
            of transformers; a mask takes out further steps. A sequence without steps adds 0, and the first step may be
            masked in every method. None: as torchcrf, which asks for a mask that is on at every first step.

    Returns:
        ``crf(emissions, tags, mask=None, reduction="sum")``: log-likelihood, a scalar in float32, or float64 where an
        input is; Tensor[B] with reduction "none". "mean" is over sequences, "token_mean" over valid steps.

    Raises:
        ValueError: for shapes that do not fit, in the words and the order of torchcrf; on CPU also where the first step
            of a sequence is masked, and for a tag outside [0, N) at a valid step; at the first call in training for
            parameters that are NaN.

    Preconditions:
        On CUDA and in compiled code neither the mask nor tags are read by the checks. A masked first step is skipped,
        like any other. The first call in training reads the parameters, and waits for the device that they are on.

    Precision:
        As :func:`crf_log_likelihood` and :func:`crf_viterbi`.

    References:
        Lafferty, McCallum, Pereira: Conditional Random Fields. ICML 2001, section 3.
    """

    ignore_index: int | None
    _forbidden: Forbidden | None

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        *,
        labels: Sequence[str] | Mapping[Any, str] | None = None,
        scheme: str | None = None,
        constrain: str = "both",
        ignore_index: int | None = None,
    ) -> None:
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        if constrain not in ("both", "decode"):
            raise ValueError(f"constrain must be both or decode, got {constrain!r}")
        if labels is None and (scheme is not None or constrain != "both"):
            raise ValueError(f"labels must be given where {'constrain' if scheme is None else 'scheme'} is")
        check_ignore_index(ignore_index)
        names = None if labels is None else _label_of_each_tag(labels)
        if names is not None:
            transition_mask(names, scheme or "BIO")  # raises what it has to say of them
            if len(names) != num_tags:
                raise ValueError(f"labels must name {num_tags} tags, got {len(names)}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.ignore_index = ignore_index
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self._labels: Any = names
        self._scheme = scheme or "BIO"
        self._constrained = labels is not None
        self._constrained_loss = self._constrained and constrain == "both"
        self._forbidden = None  # for TorchScript
        self._seen = False  # whether check_parameters has found them good
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
        if not torch.jit.is_scripting() and self.training and not torch.compiler.is_compiling() and not self._seen:
            self._seen = check_parameters(self)
        ignore_index = self.ignore_index
        if ignore_index is not None:
            self._validate(emissions, tags, mask)
            mask = steps_with_tags(emissions, tags, mask, ignore_index)
        known = reduction in ("none", "sum", "mean", "token_mean")
        if torch.jit.is_scripting() or not known:
            self._validate(emissions, tags, mask)
            if not known:
                raise ValueError(f"invalid reduction: {reduction}")
            result = self._log_likelihood(emissions, tags, mask, reduction)
        else:
            result = self._checked(self._log_likelihood, emissions, tags, mask, reduction)
        if reduction == "mean":
            return result / max(emissions.size(0 if self.batch_first else 1), 1)
        if reduction == "token_mean":
            return mean_over_steps(result, tags, mask)
        return result

    def _log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
        transitions, start, end = self._scores(self._constrained_loss)
        if not self.batch_first:
            emissions, mask = self._batch_first(emissions, mask)
            tags = tags.transpose(0, 1).contiguous()
        return log_likelihood(
            emissions, tags, transitions, start, end, mask, None, reduction != "none", self.ignore_index is None
        )

    @torch.jit.export
    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> List[List[int]]:  # noqa: UP006
        """The best tags of every sequence, as lists of their own lengths. Export and trace :meth:`viterbi` instead."""
        paths, _ = self._best(emissions, mask)
        if torch.jit.is_scripting():
            best: List[List[int]] = []  # noqa: UP006
            for path in paths.cpu():
                tags: List[int] = path[path >= 0].tolist()  # noqa: UP006
                best.append(tags)
            return best
        return tag_lists(paths)

    def _best(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            self._validate(emissions, None, mask)
            return self._decode(emissions, mask)
        with torch.no_grad():
            return self._checked(self._decode, emissions, None, mask)

    def _decode(self, emissions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        transitions, start, end = self._scores(self._constrained)
        e, m = self._batch_first(emissions, mask)
        return viterbi(e, transitions, start, end, m, None, 1, self.ignore_index is None)

    def _checked(self, function: Callable[..., Any], emissions: Tensor, tags: Tensor | None, *others: Any) -> Any:
        """Its result. An error is worded as in torchcrf, where that has one; looked for only after an error."""
        try:
            return function(emissions, *others) if tags is None else function(emissions, tags, *others)
        except (ValueError, IndexError, RuntimeError):
            self._validate(emissions, tags, others[0])
            raise

    @torch.jit.unused
    def viterbi(
        self, emissions: Tensor, mask: Tensor | None = None, n_best: int = 1, *, padding_value: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Paths and scores as tensors on the device of the emissions, batch first; see :func:`crf_viterbi`.

        ``padding_value`` stands at masked steps, and in runners-up that do not exist.
        """
        self._validate(emissions, None, mask)
        e, m = self._batch_first(emissions, mask)
        paths, scores = viterbi(e, *self._scores(self._constrained), m, None, n_best, False)
        return (paths if padding_value == -1 else paths.masked_fill(paths < 0, padding_value)), scores

    @torch.jit.unused
    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """p(y_t = j) in the layout of the emissions, of the model that the loss trains; see :func:`crf_marginals`."""
        self._validate(emissions, None, mask)
        e, m = self._batch_first(emissions, mask)
        result = crf_marginals(e, *self._scores(self._constrained_loss), mask=m)
        return result if self.batch_first else result.transpose(0, 1)

    @torch.jit.unused
    def check_tags(self, tags: Tensor, mask: Tensor | None = None) -> None:
        """Raises ValueError for the first tag that is not in [0, N) or that the scheme forbids where it stands.

        For data sets, before training. Reads the tags, on every device.
        """
        check_paths(tags, mask, self.ignore_index, self.batch_first, self.num_tags, self._labels, self._scheme)

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

    def __prepare_scriptable__(self) -> "CRF":
        """Called by torch.jit.script, which knows tensors but no labels."""
        if self._labels is not None:
            self._forbidden = forbidden_by(self._labels, self._scheme, torch.device("cpu"))
        return self

    def _scores(self, constrained: bool) -> tuple[Tensor, Tensor, Tensor]:
        transitions: Tensor = self.transitions
        start: Tensor = self.start_transitions
        end: Tensor = self.end_transitions
        if constrained:
            if torch.jit.is_scripting():
                table = self._forbidden
                assert table is not None  # TorchScript asks
                forbidden = (table[0].to(start.device), table[1].to(start.device), table[2].to(start.device))
            else:
                forbidden = forbidden_by(self._labels, self._scheme, start.device)
            transitions = transitions.masked_fill(forbidden[0], float("-inf"))
            start = start.masked_fill(forbidden[1], float("-inf"))
            end = end.masked_fill(forbidden[2], float("-inf"))
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
            # Reading a CUDA tensor would wait for the device.
            readable = emissions.device.type == "cpu" and mask.numel() > 0 and self.ignore_index is None
            if not torch.jit.is_scripting():
                readable = readable and is_concrete(mask)
            if readable:
                first = mask[:, 0] if self.batch_first else mask[0]
                if not bool(first.all()):
                    raise ValueError("mask of the first timestep must all be on")

    def _shape(self, tensor: Tensor) -> str:
        return "(" + ", ".join([str(size) for size in tensor.shape]) + ")"
