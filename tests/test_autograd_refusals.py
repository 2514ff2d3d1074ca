"""What has no derivative: integers and spans under torch.func, ops called past the functions, steps in place."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from differentiable import LABELS, MASK, TAGS
from torch.func import grad, jvp, vmap

import fastnlp_ops
from fastnlp_ops import reference

INTEGERS = {
    "crf_viterbi": lambda module, e, t: module.crf_viterbi(e, t)[0],
    "crf_viterbi-n_best": lambda module, e, t: module.crf_viterbi(e, t, n_best=3)[0],
    "memm_viterbi": lambda module, e, t: module.memm_viterbi(e, t)[0],
    "memm_viterbi-n_best": lambda module, e, t: module.memm_viterbi(e, t, n_best=2)[0],
}


@pytest.mark.parametrize("name", INTEGERS)
def test_paths(name, device):
    """Under vmap, and beside gradients and tangents."""
    call = INTEGERS[name]
    emissions, transitions = torch.randn(3, 2, 5, 4, device=device), torch.randn(4, 4, device=device)
    expected = torch.stack([call(reference, e, transitions) for e in emissions])
    assert torch.equal(vmap(lambda e: call(fastnlp_ops, e, transitions))(emissions), expected)

    def with_paths(e):
        return fastnlp_ops.crf_entropy(e, transitions).sum(), call(fastnlp_ops, e, transitions)

    _, paths = grad(with_paths, has_aux=True)(emissions[0])
    assert torch.equal(paths, expected[0])
    _, _, paths = jvp(with_paths, (emissions[0],), (emissions[1],), has_aux=True)
    assert torch.equal(paths, expected[0])


def test_samples(device):
    emissions, transitions = torch.randn(3, 2, 5, 4, device=device), torch.randn(4, 4, device=device)

    def draw(e, num_samples=1):
        return fastnlp_ops.crf_sample(e, transitions, num_samples=num_samples)

    drawn = vmap(draw, randomness="different")(emissions)
    assert drawn.shape == (3, 1, 2, 5) and drawn.min() >= 0 and drawn.max() < 4
    same = vmap(draw, randomness="same")(emissions[:1].expand(3, -1, -1, -1))
    assert torch.equal(same[0], same[1])
    assert grad(lambda e: draw(e).sum() * 0.0 + e.sum())(emissions[0]).eq(1).all()


def test_layers_decode_in_vmap(device):
    crf, memm = fastnlp_ops.CRF(4, batch_first=True).to(device), fastnlp_ops.MEMM(4, batch_first=True).to(device)
    emissions = torch.randn(3, 2, 4, 4, device=device)
    masks = torch.stack([MASK, MASK.flip(0), torch.ones_like(MASK)]).to(device)
    for call in (crf.viterbi, memm.viterbi):
        paths, scores = vmap(call)(emissions, masks)
        for i, sample in enumerate(zip(emissions, masks, strict=True)):
            assert torch.equal(paths[i], call(*sample)[0]) and torch.allclose(scores[i], call(*sample)[1])
    marginals = vmap(crf.marginals)(emissions, masks)
    samples = zip(emissions, masks, strict=True)
    assert torch.allclose(marginals, torch.stack([crf.marginals(*sample) for sample in samples]))
    for layer in (crf, memm):
        with pytest.raises(RuntimeError, match="decode returns Python lists"):
            vmap(layer.decode)(emissions)


def spans(q):
    return fastnlp_ops.global_pointer_decode(q, q.sin())


def test_spans(device):
    """Their number is another in each slice of vmap. Forward mode knows the tangents of their scores."""
    q, tangent = torch.randn(2, 2, 4, 3, 4, dtype=torch.float64, device=device)
    with pytest.raises(
        NotImplementedError, match=r"^global_pointer_decode finds another number of spans in each slice"
    ):
        vmap(lambda x: spans(x[None]))(q)
    (found, scores), (_, slopes) = jvp(spans, (q,), (tangent,))
    expected, changed = spans(q)
    assert torch.equal(found, expected) and torch.allclose(scores, changed)
    h = 1e-6
    for sign in (1, -1):  # the same spans, so that their scores may be subtracted
        assert torch.equal(spans(q + sign * h * tangent)[0], found)
    finite = (spans(q + h * tangent)[1] - spans(q - h * tangent)[1]) / (2 * h)
    assert torch.allclose(slopes, finite, atol=1e-7) and slopes.any()


def test_labels_in_vmap(device):
    """Labels of every slice, checked like those of a call."""
    q, k = torch.randn(2, 2, 4, 2, 4, device=device)
    labels = torch.stack([LABELS, LABELS.flip(0)]).to(device)
    found = vmap(lambda x: fastnlp_ops.global_pointer_loss(q, k, x))(labels)
    assert torch.allclose(found, torch.stack([reference.global_pointer_loss(q, k, x) for x in labels]))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="labels must be"):
            vmap(lambda x: fastnlp_ops.global_pointer_loss(q, k, x))(labels + 9)
        with pytest.raises(ValueError, match="tags must be"):
            vmap(lambda x: fastnlp_ops.crf_log_likelihood(q[..., 0, :], x, q[0, :, 0]))(TAGS[None] + 9)


def op_calls(device):
    """Ops with an input to differentiate by: (op, its arguments)."""
    e, t = torch.randn(2, 4, 3, device=device), torch.randn(3, 3, device=device)
    q, k = torch.randn(2, 2, 4, 2, 4, device=device)
    scoring = (None, None, None, None, True, True, -1, 0.5)
    cells, labels = torch.zeros(0, dtype=torch.int64, device=device), torch.ones(4, 3, device=device)
    ops = torch.ops.fastnlp_ops
    tags = TAGS.to(device)
    return {
        "crf_log_partition": (ops.crf_log_partition, (e, t, None, None, None, None, True)),
        "crf_log_likelihood": (ops.crf_log_likelihood, (e, tags, t, None, None, None, None, True)),
        "crf_viterbi": (ops.crf_viterbi, (e, t, None, None, None, None)),
        "crf_viterbi_n_best": (ops.crf_viterbi_n_best, (e, t, None, None, None, None, 2)),
        "crf_entropy": (ops.crf_entropy, (e, t, None, None, None, None)),
        "memm_log_likelihood": (ops.memm_log_likelihood, (e, tags, t, None, True)),
        "global_pointer_scores": (ops.global_pointer_scores, (q, k, *scoring)),
        "global_pointer_loss": (ops.global_pointer_loss, (q, k, cells, *scoring, True)),
        "global_pointer_divergence": (ops.global_pointer_divergence, (q, k, None, None, k, q, *scoring)),
        "global_pointer_decode": (ops.global_pointer_decode, (q, k, *scoring, 0.0)),
        "multilabel_categorical_crossentropy": (ops.multilabel_categorical_crossentropy, (t, labels[:3] > 0)),
        "sparse_multilabel_categorical_crossentropy": (
            ops.sparse_multilabel_categorical_crossentropy,
            (t, tags[0, :3, None]),
        ),
        "linear_attention": (ops.linear_attention, (q, k, k, *[None] * 7, 1, False, True, 0.5, 1e-6)),
    }


@pytest.mark.parametrize("name", op_calls("cpu"))
def test_ops(name, device):
    """An op that is called past its function: never a tangent of 0, never a gradient of None."""
    op, (x, *others) = op_calls(device)[name]
    sentence = f"^op {name} has no forward-mode derivative: call the function of fastnlp_ops$"
    with pytest.raises(NotImplementedError, match=sentence):
        jvp(lambda x: op(x, *others), (x,), (x,))
    with fw.dual_level(), pytest.raises(NotImplementedError, match=sentence):
        op(fw.make_dual(x, x), *others)
    with fw.dual_level():
        op(x, *others)  # nothing is differentiated
    with pytest.raises(NotImplementedError, match=f"^op {name} is unknown to torch.func: call the function"):
        grad(lambda x: torch.utils._pytree.tree_leaves(op(x, *others))[-1].sum())(x)


def test_linear_attention_step(device):
    q, k, v = torch.randn(3, 2, 4, 2, 4, device=device)
    _, state = fastnlp_ops.linear_attention(q, k, v, return_state=True)
    before = [x.clone() for x in state[:2]]

    def step(q):
        return fastnlp_ops.linear_attention_step(q, k[:, 0], v[:, 0], state)

    with (
        fw.dual_level(),
        pytest.raises(NotImplementedError, match="linear_attention_step has no forward-mode derivative"),
    ):
        step(fw.make_dual(q[:, 0], q[:, 0]))
    calls = (lambda: grad(lambda q: step(q).sum())(q[:, 0]), lambda: vmap(step)(q[None, :, 0]))
    for call in calls:
        with pytest.raises(NotImplementedError, match="linear_attention_step changes its state in place"):
            call()
    assert all(torch.equal(x, y) for x, y in zip(state[:2], before, strict=True))


def test_adafactor(device):
    parameter = torch.nn.Parameter(torch.randn(3, 4, device=device))
    optimizer = fastnlp_ops.Adafactor([parameter])
    before = parameter.detach().clone()
    with fw.dual_level():
        parameter.grad = fw.make_dual(torch.randn_like(before), torch.randn_like(before))
        with pytest.raises(NotImplementedError, match="adafactor has no forward-mode derivative"):
            optimizer.step()
    assert torch.equal(parameter, before)
