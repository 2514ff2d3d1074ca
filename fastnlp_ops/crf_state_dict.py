"""Parameters of other packages' linear-chain CRFs in the layout of :class:`fastnlp_ops.CRF`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Layout(NamedTuple):
    transitions: str
    start: str | None = None
    end: str | None = None
    constraints: str | None = None  # [K + 2, K + 2]: row K is the start, column K + 1 the end
    start_tag: int | None = None  # START and STOP are tags of their own, and have rows in transitions
    stop_tag: int | None = None
    to_from: bool = False  # transitions[to, from]


_LAYOUTS = {
    "pytorch-crf": _Layout("transitions", "start_transitions", "end_transitions"),
    "bert4torch": _Layout("transitions", "start_transitions", "end_transitions"),
    "TorchCRF": _Layout("trans_matrix", "start_trans", "end_trans"),
    "fastNLP": _Layout("trans_m", "start_scores", "end_scores", constraints="_constrain"),
    "allennlp": _Layout("transitions", "start_transitions", "end_transitions", constraints="_constraint_mask"),
    "PaddleNLP": _Layout("transitions", start_tag=-1, stop_tag=-2),
    "flair": _Layout("transitions", start_tag=-2, stop_tag=-1, to_from=True),
    "bert4keras": _Layout("trans"),
}
# fastNLP and allennlp leave start and end away where include_start_end_trans(itions) is false.
_OPTIONAL_ENDS = ("fastNLP", "allennlp")


def convert_crf_state_dict(
    state_dict: Mapping[str, Any],
    layout: str,
    *,
    num_tags: int | None = None,
    constraints: bool = False,
    lr_multiplier: float = 1.0,
) -> dict[str, Tensor]:
    """State dict for :class:`fastnlp_ops.CRF` out of another package's parameters.

    ============ ===================================================================================================
    layout       keys and meaning
    ============ ===================================================================================================
    pytorch-crf  ``transitions[from, to], start_transitions, end_transitions``
    bert4torch   as pytorch-crf (the class returns the negative log-likelihood)
    TorchCRF     ``trans_matrix[from, to], start_trans, end_trans``
    fastNLP      ``trans_m[from, to]``, optional ``start_scores, end_scores``; ``_constrain`` (0 or -1e4), in decoding
    allennlp     ``transitions[from, to]``, optional ``start_transitions, end_transitions``; ``_constraint_mask``
                 (1 or 0), in decoding
    PaddleNLP    ``transitions[from, to]`` with tags of their own for START (-1) and STOP (-2)
    flair        ``transitions[to, from]`` with tags of their own for START (-2) and STOP (-1)
    bert4keras   ``trans[from, to]``, stored divided by the layer's ``lr_multiplier``; no start, no end
    ============ ===================================================================================================

    Keys may carry the prefix of the module that they belong to ("crf.transitions", "crf/trans:0").

    Where START and STOP are tags (PaddleNLP, flair), the peer's emissions have a column for each of them, and its
    normaliser runs through them too. A CRF over all K + 2 tags is the peer's model exactly; a CRF over the K real tags
    (``num_tags=K``, without the two columns of the emissions) is the same model with both banned inside a sequence.

    PaddleNLP's own loss adds up ``transitions[to, from]`` in the normaliser and ``transitions[from, to]`` in the gold
    score and in its decoder; here they are [from, to] in both.

    Args:
        state_dict (mapping of str to Tensor or array): the peer's parameters, or those of a model around them.
        layout (str): name of the peer, see above.
        num_tags (int): tags of the CRF that the result is for; None: as many as the peer's matrix has.
        constraints (bool): fastNLP and allennlp obey their constraints in decoding only, so that the log-likelihood
            does not know them. False leaves them out; True writes them as -inf, which gives the peer's decoding, and
            a log-likelihood among the allowed sequences.
        lr_multiplier (float): bert4keras: the layer's ``lr_multiplier``.

    Returns:
        dict: ``start_transitions`` [N], ``end_transitions`` [N], ``transitions`` [N, N]; new tensors.

    Raises:
        ValueError: unknown layout, missing key, a shape that is not the layout's, an option of another layout.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    if lr_multiplier != 1.0 and layout != "bert4keras":
        raise ValueError(f"lr_multiplier is an option of layout bert4keras, got layout {layout!r}")
    spec = _LAYOUTS[layout]
    if constraints and spec.constraints is None:
        raise ValueError(f"constraints are an option of layouts fastNLP and allennlp, got layout {layout!r}")

    matrix = _entry(state_dict, spec.transitions, layout)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{spec.transitions} must be a square matrix, got shape {tuple(matrix.shape)}")
    transitions = matrix.t() if spec.to_from else matrix * lr_multiplier
    tags = matrix.shape[0]
    if spec.start_tag is not None and spec.stop_tag is not None:
        if tags < 3:
            raise ValueError(f"{spec.transitions} must have START, STOP and a tag, got shape {tuple(matrix.shape)}")
        start, end = transitions[spec.start_tag], transitions[:, spec.stop_tag]
        if num_tags == tags - 2:
            tags, transitions, start, end = num_tags, transitions[:-2, :-2], start[:-2], end[:-2]
    else:
        start = _vector(state_dict, spec.start, layout, transitions)
        end = _vector(state_dict, spec.end, layout, transitions)
    if num_tags is not None and num_tags != tags:
        raise ValueError(f"{spec.transitions} must be of {num_tags} tags, got shape {tuple(matrix.shape)}")
    result = {"start_transitions": start.clone(), "end_transitions": end.clone(), "transitions": transitions.clone()}
    result = {name: tensor.contiguous() for name, tensor in result.items()}
    if constraints and spec.constraints is not None:
        table = _entry(state_dict, spec.constraints, layout)
        if table.shape != (tags + 2, tags + 2):
            raise ValueError(f"{spec.constraints} must be [{tags + 2}, {tags + 2}], got shape {tuple(table.shape)}")
        banned = table < 0 if layout == "fastNLP" else table == 0
        result["transitions"][banned[:tags, :tags]] = -torch.inf
        result["start_transitions"][banned[tags, :tags]] = -torch.inf
        result["end_transitions"][banned[:tags, tags + 1]] = -torch.inf
    return result


def _keys(state_dict: Mapping[str, Any], name: str) -> list[str]:
    """The keys `name`, `<module>.<name>` and, in Keras, `<layer>/<name>:0`."""
    return [key for key in state_dict if key.removesuffix(":0").replace("/", ".").split(".")[-1] == name]


def _entry(state_dict: Mapping[str, Any], name: str, layout: str) -> Tensor:
    found = _keys(state_dict, name)
    if not found:
        raise ValueError(f"state_dict of layout {layout} must have the key {name!r}, got {', '.join(state_dict)}")
    if len(found) > 1:
        raise ValueError(f"state_dict of layout {layout} must have one key {name!r}, got {', '.join(found)}")
    return torch.as_tensor(state_dict[found[0]]).detach()


def _vector(state_dict: Mapping[str, Any], name: str | None, layout: str, transitions: Tensor) -> Tensor:
    """A start or end vector; zeros where the layout, or this state dict of it, has none."""
    if name is None or (layout in _OPTIONAL_ENDS and not _keys(state_dict, name)):
        return transitions.new_zeros(transitions.shape[0])
    vector = _entry(state_dict, name, layout)
    if vector.shape != transitions.shape[:1]:
        raise ValueError(f"{name} must be [{transitions.shape[0]}], got shape {tuple(vector.shape)}")
    return vector
