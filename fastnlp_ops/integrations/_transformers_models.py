"""Which models of transformers can take linear attention: others are refused by name where they are given it."""

import functools
import inspect
import re
import sys
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

NAMES: set[str] = set()  # attention implementations that register() made


def check_model(model: nn.Module) -> None:
    """Raises for a model with a layer that computes attention without asking transformers for the function."""
    for part in model.modules():
        if _has_own(type(part)):  # type: ignore[arg-type]
            _refuse(model, type(part).__name__)


def _refuse(model: nn.Module, culprit: str) -> NoReturn:
    raise ValueError(
        f"{type(model).__name__} cannot use linear attention, for {culprit} computes softmax attention by itself: "
        'take attn_implementation="sdpa" or "eager" for it'
    )


def _check_code(model: PreTrainedModel) -> None:
    """The same before a model's layers are made, by the file that its class is in."""
    for cls in type(model).__mro__:
        code = sys.modules.get(cls.__module__)
        if (
            _foreign(cls)
            and not _asks(code)
            and (found := re.search(r"^class (\w*Attention\w*)\(", _source(code), re.M))
        ):
            _refuse(model, found[1])


def has_attention(model: nn.Module) -> bool:
    """Whether any layer asks transformers for its attention function."""
    layers = (part for part in model.modules() if not isinstance(part, PreTrainedModel))
    return any(_asks(cls) for layer in layers for cls in type(layer).__mro__)


def guard_models() -> None:
    """Makes transformers check models that are given one of NAMES, and keeps the name in their configs.

    transformers itself only asks whether there is such a name. A model that never looks at it would go on with softmax,
    and a saved config would not say which attention the weights were trained with.
    """
    decide = PreTrainedModel.get_correct_attn_implementation
    post_init, change = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation
    if hasattr(post_init, "fastnlp"):
        return

    @functools.wraps(decide)
    def checked_decision(self: PreTrainedModel, name: str | None, *args: Any, **options: Any) -> str:
        if name in NAMES:
            _check_code(self)
        return decide(self, name, *args, **options)

    @functools.wraps(post_init)
    def checked_post_init(self: PreTrainedModel) -> None:
        if self.config._attn_implementation in NAMES:
            check_model(self)
        _remember(self.config)
        post_init(self)

    @functools.wraps(change)
    def checked_change(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **options: Any
    ) -> None:
        for part in _targets(self, attn_implementation):
            check_model(part)
        parts = _models(self)
        if isinstance(attn_implementation, str) and attn_implementation in NAMES:
            for part in parts:  # transformers leaves out classes whose source it cannot read, as those of a notebook
                part.config._attn_implementation = attn_implementation
        else:
            change(self, attn_implementation, *args, **options)
        for part in parts:
            _remember(part.config)

    checked_post_init.fastnlp = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked_decision
    PreTrainedModel.post_init = checked_post_init
    PreTrainedModel.set_attn_implementation = checked_change


def _targets(model: PreTrainedModel, request: str | dict[str, Any]) -> list[PreTrainedModel]:
    """The models in this one that get one of NAMES."""
    if isinstance(request, str):
        return [model] if request in NAMES else []
    named = [key for key, value in request.items() if isinstance(value, str) and value in NAMES]
    configs = [getattr(model.config, key) if key else model.config for key in named]
    return [part for part in _models(model) if any(part.config is config for config in configs)]


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _remember(config: PreTrainedConfig) -> None:
    """Keeps the name where from_pretrained reads it in config.json."""
    if config._attn_implementation in NAMES:
        config.attn_implementation = config._attn_implementation
    elif getattr(config, "attn_implementation", None) in NAMES:
        del config.attn_implementation


@functools.cache
def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


def _asks(code: Any) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _source(code)


def _foreign(cls: type) -> bool:
    return cls.__module__.startswith(("transformers.models.", "transformers_modules."))


@functools.cache
def _has_own(cls: type) -> bool:
    """Whether a class of transformers, or of code from the Hub, is attention that asks for no function."""
    if "Attention" not in cls.__name__ or not _foreign(cls):
        return False
    if not _asks(sys.modules[cls.__module__]):
        return True
    softmax = re.search(r"softmax\(|scaled_dot_product_attention\(", _source(cls), re.IGNORECASE)
    return cls.__name__.endswith("Attention") and softmax is not None and not _asks(cls)
