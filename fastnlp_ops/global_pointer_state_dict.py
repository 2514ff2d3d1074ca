"""Parameters of other packages' GlobalPointer layers in the layout of ours."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class _Layout(NamedTuple):
    dense: str | None  # the layer of the standard form; None: the peer has no such form
    efficient: tuple[str, str] | None  # the projection and the biases of the efficient form
    in_out: bool = False  # kernels are [in, out]
    halves: bool = False  # queries before keys, where ours alternate
    channels: Literal["end start", "start end", "ends starts"] = "end start"  # of each head, or block after block
    from_hidden: bool = False  # biases are made from the hidden states


_LAYOUTS = {
    "bert4keras": _Layout("dense", ("p_dense", "q_dense"), in_out=True),
    "bert4torch": _Layout("dense", ("p_dense", "q_dense"), halves=True, channels="start end"),
    "gaohongkui": _Layout("dense", None),
    "xhw205": _Layout("dense", ("dense_1", "dense_2"), from_hidden=True),
    "JunnYu": _Layout("dense", ("dense1", "dense2")),
    "PaddleNLP": _Layout(None, ("dense1", "dense2"), in_out=True),
    "ark-nlp": _Layout("dense", ("dense_1", "dense_2"), halves=True, channels="ends starts"),
}


def convert_global_pointer_state_dict(
    state_dict: Mapping[str, Any],
    layout: str,
    *,
    efficient: bool = False,
    use_bias: bool = True,
    prefix: str = "",
) -> dict[str, Tensor]:
    """State dict for :class:`GlobalPointer` or :class:`EfficientGlobalPointer` out of another package's parameters.

    =========== ============ ================== ========== =========== =============================================
    layout      standard     efficient          kernels    q and k     biases of head h in the efficient form
    =========== ============ ================== ========== =========== =============================================
    bert4keras  ``dense``    ``p_dense``,       [in, out]  alternate   end, start
                             ``q_dense``
    bert4torch  ``dense``    ``p_dense``,       [out, in]  halves      start, end
                             ``q_dense``
    gaohongkui  ``dense``                       [out, in]
    xhw205      ``dense``    ``dense_1``,       [out, in]  alternate   end, start; made from the hidden states:
                             ``dense_2``                               EfficientGlobalPointer(bias_from_hidden=True)
    JunnYu      ``dense``    ``dense1``,        [out, in]  alternate   end, start
                             ``dense2``
    PaddleNLP                ``dense1``,        [in, out]  alternate   end, start
                             ``dense2``
    ark-nlp     ``dense``    ``dense_1``,       [out, in]  halves      all ends, then all starts
                             ``dense_2``
    =========== ============ ================== ========== =========== =============================================

    Keys are the layer's name with ``weight`` or ``bias`` behind it (bert4keras: ``kernel``, "p_dense/kernel:0" will do)
    in a state dict of the layer or of a model around it ("entity_output.dense1.weight"). PaddleNLP's ``GlobalPointer``
    is the efficient form. Keras numbers its layers: give a dict of the arrays under the names above.

    All of them mean the same rotation and the same 1/sqrt(d), two old ones aside that no conversion can make up for:
    bert4torch before March 2023 rotated along the heads, ark-nlp before it used ``repeat_interleave`` tiled sines and
    cosines across pairs; ``rope=False`` models of theirs are as any. Whether a model has RoPE, how many heads its
    channels are split into, and whether it scores spans that end before they start, stands in no state dict.

    Args:
        state_dict (mapping of str to Tensor or array): the peer's parameters, or those of a model around them.
        layout (str): name of the peer, see above.
        efficient (bool): the layer is of the efficient form.
        use_bias (bool): the linear layers have biases.
        prefix (str): only keys that begin with it are looked at; for models with several such layers.

    Returns:
        dict: ``dense.weight`` and ``dense.bias``; of the efficient form also ``bias_dense.weight`` and
        ``bias_dense.bias``. New tensors.

    Raises:
        ValueError: unknown layout, a form that the peer does not have, a missing or doubtful key, a bias where use_bias
            is false, a shape that is not the layout's.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    spec = _LAYOUTS[layout]
    if not efficient:
        if spec.dense is None:
            raise ValueError(f"layout {layout} has no standard form: its GlobalPointer is the efficient one")
        weight, bias = _linear(state_dict, spec.dense, layout, use_bias, prefix)
        return _named("dense", weight, bias)
    if spec.efficient is None:
        raise ValueError(f"layout {layout} has no efficient form")
    projection, biases = spec.efficient
    weight, bias = _linear(state_dict, projection, layout, use_bias, prefix)
    if weight.shape[0] % 2:
        raise ValueError(f"{projection} must have an even number of outputs, got {weight.shape[0]}")
    bias_weight, bias_bias = _linear(state_dict, biases, layout, use_bias, prefix)
    if bias_weight.shape[0] % 2:
        raise ValueError(f"{biases} must have an even number of outputs, got {bias_weight.shape[0]}")
    inputs = weight.shape[1 if spec.from_hidden else 0]
    if bias_weight.shape[1] != inputs:
        raise ValueError(f"{biases} must have {inputs} inputs, got {bias_weight.shape[1]}")
    if spec.halves:
        weight, bias = _alternate(weight), None if bias is None else _alternate(bias)
        bias_weight = _alternate(bias_weight.t()).t()
    if spec.channels == "start end":
        swap = torch.arange(len(bias_weight), device=bias_weight.device) ^ 1
        bias_weight, bias_bias = bias_weight[swap], None if bias_bias is None else bias_bias[swap]
    if spec.channels == "ends starts":
        bias_weight, bias_bias = _alternate(bias_weight), None if bias_bias is None else _alternate(bias_bias)
    return _named("dense", weight, bias) | _named("bias_dense", bias_weight, bias_bias)


def _alternate(x: Tensor) -> Tensor:
    """Rows a0 a1 .. b0 b1 .. as a0 b0 a1 b1 .."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _named(name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    tensors = {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _linear(
    state_dict: Mapping[str, Any], name: str, layout: str, use_bias: bool, prefix: str
) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of the layer `name`."""
    kernel = f"{name}.kernel" if layout == "bert4keras" else f"{name}.weight"
    weight = _entry(state_dict, kernel, layout, prefix)
    if weight.dim() != 2:
        raise ValueError(f"{kernel} must be a matrix, got shape {tuple(weight.shape)}")
    if _LAYOUTS[layout].in_out:
        weight = weight.t()
    bias = _entry(state_dict, f"{name}.bias", layout, prefix) if use_bias else None
    if not use_bias and (found := _keys(state_dict, f"{name}.bias", prefix)):
        raise ValueError(f"state_dict must have no key {name}.bias where use_bias is false, got {found[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}.bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    return weight, bias


def _keys(state_dict: Mapping[str, Any], name: str, prefix: str) -> list[str]:
    """The key prefix + `name`, or else those that are `name` of some module behind the prefix."""
    prefix = prefix.replace("/", ".")
    plain = {key: key.removesuffix(":0").replace("/", ".") for key in state_dict}
    exact = [key for key in plain if plain[key] == prefix + name]
    return exact or [key for key in plain if plain[key].startswith(prefix) and plain[key].endswith("." + name)]


def _entry(state_dict: Mapping[str, Any], name: str, layout: str, prefix: str) -> Tensor:
    found = _keys(state_dict, name, prefix)
    if len(found) == 1:
        return torch.as_tensor(state_dict[found[0]]).detach()
    got = found or list(state_dict)
    listed = ", ".join(got[:8]) + (f" and {len(got) - 8} more" if len(got) > 8 else "")
    behind = f" behind {prefix!r}" if prefix else ""
    raise ValueError(f"state_dict of layout {layout} must have one key {name!r}{behind}, got {listed}")
