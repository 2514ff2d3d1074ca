"""The CRF and MEMM layers where no values are: trace, compile, export, fake and meta tensors."""

import io
import re

import pytest
import torch
from tools import assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnlp_ops import CRF, MEMM, _crf_constraints

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
N = len(LABELS)
LAYERS = {
    "CRF": lambda: CRF(N, batch_first=True),
    "time first": lambda: CRF(N),
    "labels": lambda: CRF(N, batch_first=True, labels=LABELS),
    "decode": lambda: CRF(N, batch_first=True, labels=LABELS, constrain="decode"),
    "ignore_index": lambda: CRF(N, batch_first=True, labels=LABELS, ignore_index=-100),
    "MEMM": lambda: MEMM(N, batch_first=True, ignore_index=-100),
}
CALLS = {
    "loss": lambda layer, e, tags, mask: (layer(e, tags, mask, reduction="token_mean"),),
    "rows": lambda layer, e, tags, _: (layer(e, tags, reduction="none"),),
    "viterbi": lambda layer, e, _, mask: layer.viterbi(e, mask),
    "padded": lambda layer, e, _, mask: layer.viterbi(e, mask, 3, padding_value=-100),
    "marginals": lambda layer, e, _, mask: (layer.marginals(e, mask),),
}
CASES = [(layer, call) for layer in LAYERS for call in CALLS if (layer, call) != ("MEMM", "marginals")]
# For what takes a second: every layer, and every call.
SOME = [(layer, call) for layer, call in CASES if layer == "ignore_index" or call in ("loss", "viterbi")]


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """No layer has had its masks made before."""
    monkeypatch.setattr(_crf_constraints, "_MADE", {})


class Model(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, emissions, tags, mask):
        return self.call(self.layer, emissions, tags, mask)


def make(layer, call, device="cpu"):
    return Model(LAYERS[layer](), CALLS[call]).to(device)


def inputs(layer, batch, steps, device="cpu"):
    """Legal paths; masks that are off at some first steps and tags of -100 where the layer takes them."""
    emissions = torch.randn(batch, steps, N, device=device)
    tags = torch.tensor([0, 1, 2], device=device)[torch.arange(steps, device=device) % 3].repeat(batch, 1)
    mask = torch.arange(steps, device=device) < torch.randint(2, steps + 1, (batch, 1), device=device)
    if layer in ("ignore_index", "MEMM"):
        tags[::2, 0] = tags[:, -1] = -100
        tags[::2, 1:3] = torch.tensor([0, 0], device=device)
        mask[1::2, 0] = False
    if layer == "time first":
        emissions, tags, mask = emissions.transpose(0, 1), tags.t(), mask.t()
    return emissions, tags, mask


def assert_equal(results, expected, layer):
    for ours, other in zip(results, expected, strict=True):
        if layer == "MEMM":  # eager decoding takes its normalisers in another order of additions
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
        else:
            assert_same(ours, other)


def gradients(module, model, arguments):
    emissions, *others = arguments
    emissions = emissions.detach().requires_grad_()
    value = module(emissions, *others)[0]
    return torch.autograd.grad(value.sum(), [emissions, *model.parameters()])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(("layer", "call"), CASES)
def test_trace(layer, call, device):
    """The trace is right at other sizes, too, and its gradients are."""
    model = make(layer, call, device)
    traced = torch.jit.trace(model, inputs(layer, 2, 4, device))
    for arguments in (inputs(layer, 2, 4, device), inputs(layer, 5, 7, device)):
        assert_equal(traced(*arguments), model(*arguments), layer)
        if call in ("loss", "rows"):
            assert_equal(gradients(traced, model, arguments), gradients(model, model, arguments), layer)


@pytest.mark.parametrize(
    ("layer", "call", "strict"),
    [(*case, False) for case in SOME] + [("ignore_index", "loss", True), ("ignore_index", "marginals", True)],
)
def test_export(layer, call, strict, device):
    """With sizes that vary, cold and from a file."""
    model = make(layer, call, device)
    batch, steps = torch.export.Dim("batch", max=64), torch.export.Dim("steps", min=4, max=64)
    sizes = {0: steps, 1: batch} if layer == "time first" else {0: batch, 1: steps}
    program = torch.export.export(model, inputs(layer, 3, 6, device), dynamic_shapes=(sizes,) * 3, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for arguments in (inputs(layer, 3, 6, device), inputs(layer, 7, 11, device)):
        assert_equal(loaded(*arguments), model(*arguments), layer)


@pytest.mark.parametrize(("layer", "call"), SOME)
def test_compile(layer, call, device):
    """One graph, from the first call on; the same bits, and no second graph once the layer was called eagerly."""
    torch._dynamo.reset()
    model = make(layer, call, device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            arguments = inputs(layer, 3, 6, device)
            assert_equal(compiled(*arguments), model(*arguments), layer)


def test_compiled_layers_of_other_labels(device):
    """They run the same code on the same sizes, and must not share a graph."""
    torch._dynamo.reset()
    emissions, tags, _ = inputs("labels", 3, 6, device)
    for labels, scheme in ((LABELS, "BIO"), (LABELS[::-1], "BIO"), (LABELS, "IOB1"), (None, None)):
        crf = CRF(N, batch_first=True, labels=labels, scheme=scheme).to(device)
        compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
        assert_same(compiled(emissions, tags, reduction="none"), crf(emissions, tags, reduction="none"))


@pytest.mark.parametrize(("layer", "call"), CASES)
def test_fake(layer, call):
    """Memory estimators run models on fake tensors, first and after real ones; nothing of theirs stays in the layer."""
    real = make(layer, call)
    expected = real(*inputs(layer, 3, 6))
    for other, mode in ((None, FakeTensorMode()), (real, FakeTensorMode(allow_non_fake_inputs=True))):
        with mode:
            model = other or Model(LAYERS[layer](), CALLS[call])
            result = model(*inputs(layer, 3, 6))
        assert [(x.shape, x.dtype) for x in result] == [(x.shape, x.dtype) for x in expected]
        assert all(isinstance(x, torch._subclasses.FakeTensor) for x in result)
    for x in real(*inputs(layer, 3, 6)):
        assert type(x) is torch.Tensor


@pytest.mark.parametrize(("layer", "call"), CASES)
def test_meta(layer, call):
    with torch.device("meta"):
        model = make(layer, call, "meta")
        arguments = [x.to("meta") for x in inputs(layer, 3, 6, "cpu")]
    expected = make(layer, call)(*inputs(layer, 3, 6))
    assert [(x.shape, x.dtype) for x in model(*arguments)] == [(x.shape, x.dtype) for x in expected]


SENTENCE = "decode returns Python lists, which no graph holds: export or trace viterbi instead"


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:`torch.jit.trace:DeprecationWarning",
    "ignore:Dynamo does not know how to trace the builtin:UserWarning",
)
@pytest.mark.parametrize("layer", ["CRF", "MEMM"])
def test_decode(layer):
    """Lists cannot be in a graph: a sentence instead of the lists of the example. Compiled, it breaks the graph."""
    model = Model(LAYERS[layer](), lambda layer, e, _, mask: layer.decode(e, mask))
    arguments = inputs("CRF", 3, 6)
    graphs = {
        "export": lambda: torch.export.export(model, arguments),
        "trace": lambda: torch.jit.trace(model, arguments),
        "strict export": lambda: torch.export.export(model, arguments, strict=True),
    }
    for name, graph in graphs.items():
        with pytest.raises(RuntimeError, match=".*" + re.escape(SENTENCE)) as caught:
            graph()
        assert str(caught.value) == SENTENCE or name == "strict export"
    with FakeTensorMode(), pytest.raises(RuntimeError, match=re.escape(SENTENCE)):
        LAYERS[layer]().decode(torch.randn(2, 3, N))
    torch._dynamo.reset()
    assert torch.compile(model, backend="eager")(*arguments) == model(*arguments)
