"""bert4torch's GlobalPointer heads and losses as they are, without the rest of bert4torch.

`import bert4torch` brings in transformers, torch4keras and an image library. The heads, the losses and RoPE need torch
alone and one function of those packages, a decorator that keeps a list of classes; here it keeps none.
"""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock


def load() -> SimpleNamespace | None:
    """Its two heads and two losses, or None where bert4torch is not installed."""
    found = importlib.util.find_spec("bert4torch")
    if found is None:
        return None
    (root,) = found.submodule_search_locations
    stand_ins = {name: ModuleType(name) for name in ("bert4torch", "bert4torch.layers", "bert4torch.snippets")}
    stand_ins["bert4torch"].__path__ = [root]
    stand_ins["bert4torch.layers"].__path__ = [f"{root}/layers"]
    stand_ins["bert4torch.snippets"].create_registrar = lambda _: lambda **_: lambda cls: cls
    with mock.patch.dict(sys.modules, stand_ins):  # a later `import bert4torch` finds all of it
        heads = importlib.import_module("bert4torch.layers.global_point")
        losses = importlib.import_module("bert4torch.losses")
    return SimpleNamespace(
        GlobalPointer=heads.GlobalPointer,
        EfficientGlobalPointer=heads.EfficientGlobalPointer,
        DenseLoss=losses.MultilabelCategoricalCrossentropy,
        SparseLoss=losses.SparseMultilabelCategoricalCrossentropy,
    )
