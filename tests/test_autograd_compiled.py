"""torch.func inside of compiled functions, and a transformers model that recomputes its activations."""

import functools

import pytest
import torch
from differentiable import CASES, draw
from tools import assert_same
from torch.func import grad, jvp, vmap

import fastnlp_ops


def samples(call, x, *others):
    """Gradients of each of two samples along the first dimension of the first leaf."""
    return vmap(grad(lambda one: call(one, *others).sin().sum()))(torch.stack([x, x.cos()]))


TRANSFORMS = {
    "grad": lambda call, *leaves: grad(lambda *x: call(*x).sin().sum())(*leaves),
    "samples": samples,
    "jvp": lambda call, *leaves: jvp(call, leaves, tuple(x.cos() for x in leaves))[1],
}


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("crf_log_likelihood", "samples"),
        ("crf_marginals", "grad"),
        ("memm_log_likelihood", "jvp"),
        ("global_pointer_loss-biased", "grad"),
        ("multilabel-sparse", "jvp"),
        ("linear_attention-elu+1-causal", "samples"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script, of torch's own tables for jvp
def test_compile(name, transform, device):
    torch._dynamo.reset()
    case = CASES[name]
    leaves = draw(case, device, requires_grad=False)
    run = functools.partial(TRANSFORMS[transform], functools.partial(case.call, fastnlp_ops))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*leaves), run(*leaves), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_llama_checkpointed(use_reentrant, device):
    """A step with gradient checkpointing on gives the gradients of one without, to the bit."""
    transformers = pytest.importorskip("transformers")
    from fastnlp_ops.integrations.transformers import register

    register()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastnlp_linear").to(device)
    ids = torch.randint(20, (2, 6), device=device)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()(ids, labels=ids).loss.backward()
        found.append([x.grad.clone() for x in model.parameters()])
    assert all(x.any() for x in found[0])
    for own, plain in zip(*found, strict=True):
        assert_same(own, plain)
