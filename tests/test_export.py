"""Programs with symbolic sizes: every function exported, compiled, with fake tensors, and in onnxruntime."""

import doctest
import io
import itertools
import re

import pytest
import torch
from export_programs import PROGRAMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastnlp_ops
from fastnlp_ops import __main__ as report

SIZES = [(5, 9), (1, 1), (2, 20)]
# An export takes torch.onnx a second whatever it holds: programs of a kind are one.
GROUPS = {
    "chain": ["log_partition", "marginals", "log_likelihood", "partial", "entropy", "sample"],
    "paths": ["viterbi", "n_best", "own_matrices", "own_matrices_marginals", "own_matrices_n_best"],
    "chain_layers": ["CRF", "MEMM", "memm", "memm_viterbi"],
    "scores": ["scores", "scores_of_pairs", "scores_shared", "positions", "divergence", "multilabel"],
    "losses": ["GlobalPointer", "GlobalPointer.loss", "EfficientGlobalPointer.loss", "sparse_multilabel"],
    "spans": ["decode", "decode_shared", "decode_flat", "decode_top_k"],
    "padded_spans": ["decode_max_spans", "GlobalPointer.decode", "EfficientGlobalPointer.decode"],
    "bidirectional": [name for name in PROGRAMS if name.startswith("attention_")],
    "causal": [name for name in PROGRAMS if name.startswith("causal_")],
    "steps": [name for name in PROGRAMS if name.startswith("step_")],
    "attention_layers": [name for name in PROGRAMS if name.startswith("LinearAttention")],
}
QUICK = ("paths", "padded_spans", "steps")
OF_TORCH = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
PACKED = [name for name, program in PROGRAMS.items() if program.packed]


class Group(torch.nn.Module):
    """Programs one after the other, each with its own inputs."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.programs = torch.nn.ModuleList(PROGRAMS[name].module() for name in names).eval()
        self.counts = [len(x) for x in self.each_inputs(2, 3)]

    def each_inputs(self, *sizes):
        return [PROGRAMS[name].inputs(*sizes) for name in self.names]

    def inputs(self, *sizes):
        return tuple(x for inputs in self.each_inputs(*sizes) for x in inputs)

    def forward(self, *inputs):
        inputs = iter(inputs)
        found = [run(*itertools.islice(inputs, n)) for run, n in zip(self.programs, self.counts, strict=True)]
        return tuple(x for results in found for x in results)

    def export(self):
        axes = tuple(x for name in self.names for x in PROGRAMS[name].axes())
        return torch.export.export(self, self.inputs(6, 7), dynamic_shapes=(axes,))

    def check(self, found, inputs):
        """Against our ops, program by program."""
        found, inputs = iter(found), iter(inputs)
        for name, run, n in zip(self.names, self.programs, self.counts, strict=True):
            for own in run(*itertools.islice(inputs, n)):
                other = next(found)
                if PROGRAMS[name].random:
                    assert own.shape == other.shape and own.dtype == other.dtype, name
                else:
                    near = {"rtol": 1e-5, "atol": PROGRAMS[name].error}
                    torch.testing.assert_close(other, own, msg=lambda text, name=name: f"{name}: {text}", **near)
        assert next(found, None) is None


def test_every_program_is_in_a_group():
    assert sorted(PACKED + [name for names in GROUPS.values() for name in names]) == sorted(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_fake_tensors(name):
    program = PROGRAMS[name]
    with torch.no_grad():
        real = program.module()(*program.inputs(3, 7))
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        fake = program.module()(*program.inputs(3, 7))
    for own, other in zip(fake, real, strict=True):
        assert own.dtype == other.dtype and own.dim() == other.dim()
        assert all(size == found for size, found in zip(own.shape, other.shape, strict=True) if isinstance(size, int))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in GROUPS]
)
@OF_TORCH
def test_export(name):
    """At other sizes: the program, its decomposition, and that in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        group = Group(GROUPS[name])
        program = group.export()
        drawn = [group.inputs(*sizes) for sizes in SIZES]
        for inputs in drawn:
            group.check(program.module()(*inputs), inputs)
        program = program.run_decompositions(fastnlp_ops.export.decompositions())
        assert not [node for node in program.graph.nodes if "fastnlp_ops" in str(node.target)]
        group.check(program.module()(*drawn[0]), drawn[0])
        buffer = io.BytesIO()
        torch.onnx.export(program, dynamo=True, verbose=False).save(buffer)
        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        for inputs in drawn:
            found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
            group.check([torch.from_numpy(x) for x in found], inputs)


def test_export_packed():
    """Sequences in one row are exported, and have no decomposition."""
    with torch.no_grad():
        group = Group(PACKED)
        program = group.export()
        for sizes in ((5, 9), (3, 4)):
            inputs = group.inputs(*sizes)
            group.check(program.module()(*inputs), inputs)
        with pytest.raises(NotImplementedError, match=r"packed sequences \(cu_seqlens\) have no form in export"):
            program.run_decompositions(fastnlp_ops.export.decompositions())


def test_table_is_whole():
    """Every op that a program of inference can hold has a form."""
    table = {str(op).removesuffix(".default").replace(".", "::") for op in fastnlp_ops.export.decompositions()}
    without = [op for op in report.ops() if op not in table]
    assert not [op for op in without if not re.search(r"backward$|_$|linear_attention_step$", op)]


@OF_TORCH
def test_doctest():
    assert doctest.testmod(fastnlp_ops.export).failed == 0
