"""The MEMM layer: the loss of bert4keras, layouts, TorchScript."""

import pytest
import torch
from crf_problems import make_problem
from tools import assert_same

import fastnlp_ops


def original_loss(emissions, tags, mask, l_trans, r_trans):
    """The loss of bert4keras' layer from its definition: right-padded batches, low-rank factors, token mean."""

    def direction(e, y, left, right):
        history = torch.einsum("btd,kd->btk", left[y], right)
        history = torch.cat([e[:, :1], history[:, :-1]], dim=1)
        loss = torch.nn.functional.cross_entropy(((e + history) / 2).flatten(0, 1), y.flatten(), reduction="none")
        return (loss * mask.flatten()).sum() / mask.sum()

    lengths = mask.sum(1).long()
    reverse = torch.stack([torch.cat([torch.arange(n).flip(0), torch.arange(n, mask.shape[1])]) for n in lengths])
    backward = emissions.gather(1, reverse[:, :, None].expand_as(emissions)), tags.gather(1, reverse)
    return (direction(emissions, tags, l_trans, r_trans) + direction(*backward, r_trans, l_trans)) / 2


@pytest.mark.parametrize("hidden_dim", [None, 2])
def test_loss_of_bert4keras(hidden_dim):
    layer = fastnlp_ops.MEMM(7, hidden_dim=hidden_dim, batch_first=True).double()
    problem = make_problem(4, 9, 7, dtype=torch.float64, mask="prefix", bounds=False, poison=False)
    problem.mask[:, 0] = True
    matrix = layer.transition_matrix()
    left = matrix if hidden_dim is None else layer.left_transitions
    right = torch.eye(7, dtype=torch.float64) if hidden_dim is None else layer.right_transitions
    expected = original_loss(problem.emissions, problem.tags, problem.mask.double(), left, right)
    ours = -layer(problem.emissions, problem.tags, problem.mask, reduction="token_mean")
    torch.testing.assert_close(ours, expected)
    parameters = list(layer.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layer(batch_first, device):
    layer = fastnlp_ops.MEMM(5, batch_first=batch_first).to(device)
    assert [name for name, _ in layer.named_parameters()] == ["transitions"]
    assert repr(layer) == f"MEMM(num_tags=5{', batch_first=True' if batch_first else ''})"
    problem = make_problem(4, 8, 5, device, mask="holes", bounds=False)
    e, y, mask = problem.emissions, problem.tags, problem.mask
    inputs = (e, y, mask) if batch_first else (e.transpose(0, 1), y.t(), mask.t())
    each = fastnlp_ops.memm_log_likelihood(e, y, layer.transitions, mask=mask)
    assert_same(layer(*inputs, reduction="none"), each)
    assert_same(layer(*inputs), each.sum())
    assert_same(layer(*inputs, reduction="mean"), each.mean())
    assert_same(layer(*inputs, reduction="token_mean"), each.sum() / mask.sum())
    paths, _ = fastnlp_ops.memm_viterbi(e, layer.transitions, mask=mask)
    assert layer.decode(inputs[0], inputs[2]) == [path[on].tolist() for path, on in zip(paths, mask, strict=True)]
    assert_same(layer.viterbi(inputs[0], inputs[2])[0], paths)
    low_rank = fastnlp_ops.MEMM(5, hidden_dim=2, bidirectional=False)
    assert list(low_rank.state_dict()) == ["left_transitions", "right_transitions"]
    assert repr(low_rank) == "MEMM(num_tags=5, hidden_dim=2, bidirectional=False)"


@pytest.mark.parametrize("hidden_dim", [None, 3])
def test_script(hidden_dim, device):
    layer = fastnlp_ops.MEMM(6, hidden_dim=hidden_dim, batch_first=True).to(device)
    scripted = torch.jit.script(layer)
    problem = make_problem(5, 23, 6, device, mask="prefix", bounds=False)
    for mask in (problem.mask, problem.mask.long()):
        value, plain = (m(problem.emissions, problem.tags, mask) for m in (scripted, layer))
        assert_same(value, plain)
        for a, b in zip(*(torch.autograd.grad(x, list(layer.parameters())) for x in (value, plain)), strict=True):
            assert_same(a, b)
        assert scripted.decode(problem.emissions, mask) == layer.decode(problem.emissions, mask)
