"""Programs with symbolic sizes: every function exported, compiled, with fake tensors, and in onnxruntime."""

import contextlib
import doctest
import io
import re

import pytest
import torch
from export_programs import PROGRAMS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastnlp_ops
from fastnlp_ops import __main__ as report

SIZES = [(5, 9), (1, 1), (2, 20)]
each_program = pytest.mark.parametrize("name", PROGRAMS)


def assert_equal(program, found, expected):
    for own, other in zip(found, expected, strict=True):
        if program.random:
            assert own.shape == other.shape and own.dtype == other.dtype
        else:
            torch.testing.assert_close(own, other)


@each_program
def test_fake_tensors(name):
    program = PROGRAMS[name]
    with torch.no_grad():
        real = program.module()(*program.inputs(3, 7))
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        fake = program.module()(*program.inputs(3, 7))
    for own, other in zip(fake, real, strict=True):
        assert own.dtype == other.dtype and own.dim() == other.dim()
        assert all(size == found for size, found in zip(own.shape, other.shape, strict=True) if isinstance(size, int))


@each_program
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch.onnx's own
def test_export(name):
    """At other sizes: the program, its decomposition, and that in onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = PROGRAMS[name]
    with torch.no_grad():
        module = program.module().eval()
        graph = torch.export.export(module, program.inputs(6, 7), dynamic_shapes=(program.axes(),))
        drawn = [program.inputs(*sizes) for sizes in SIZES]
        for inputs in drawn:
            assert_equal(program, graph.module()(*inputs), module(*inputs))
        table = fastnlp_ops.export.decompositions()
        if program.packed:
            with pytest.raises(NotImplementedError, match=r"packed sequences \(cu_seqlens\) have no form in export"):
                graph.run_decompositions(table)
            return
        graph = graph.run_decompositions(table)
        assert not [node for node in graph.graph.nodes if "fastnlp_ops" in str(node.target)]
        assert_equal(program, graph.module()(*drawn[0]), module(*drawn[0]))
        buffer = io.BytesIO()
        torch.onnx.export(graph, dynamo=True, verbose=False).save(buffer)
        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        for inputs in drawn:
            found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
            assert_equal(program, [torch.from_numpy(x) for x in found], module(*inputs))


