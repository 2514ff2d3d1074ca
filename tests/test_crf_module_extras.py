"""What fastnlp_ops.CRF has beyond torchcrf.CRF: constraints, marginals, n-best, autocast, compile, export."""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from crf_problems import enumerate_paths
from test_crf_module import MASK, assert_close, enumerated, make_batch, make_crf
from tools import assert_same
from torch import nn

import fastnlp_ops
from fastnlp_ops import CRF

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def constrained(device):
    return CRF(5, labels=list(LABELS), batch_first=True).to(device)


def allowed_paths(steps):
    allowed, starts, ends = fastnlp_ops.transition_mask(LABELS, "BIO")
    paths, _ = enumerate_paths(torch.zeros(steps, 5), torch.zeros(5, 5), None, None)
    fine = starts[paths[:, 0]] & ends[paths[:, -1]]
    for k in range(1, steps):
        fine &= allowed[paths[:, k - 1], paths[:, k]]
    return paths, fine


def test_constraints_in_the_loss(device):
    """The probabilities of the allowed paths sum to 1, and the others have none: true -inf, not -10000."""
    crf = constrained(device)
    paths, fine = allowed_paths(4)
    assert 0 < fine.sum() < len(fine)
    for std in (1.0, 3e4):
        emissions = std * torch.randn(1, 4, 5, device=device)
        log_p = crf(emissions.expand(len(paths), -1, -1), paths.to(device), reduction="none").detach().cpu()
        assert (log_p[~fine] == -math.inf).all()
        assert (log_p[fine] > -math.inf).all()
        # Four float32 additions to scores of four times the largest emission.
        rounding = 4 * torch.finfo(torch.float32).eps * 4 * emissions.abs().max().item()
        assert abs(log_p[fine].double().exp().sum().item() - 1) < 1e-5 + rounding


def test_constraints_in_decoding(device):
    crf = constrained(device)
    _, fine = allowed_paths(4)
    index = torch.tensor([125, 25, 5, 1])
    for std in (1.0, 3e4):
        emissions = std * torch.randn(50, 4, 5, device=device)
        for path in crf.decode(emissions):
            assert fine[(torch.tensor(path) * index).sum()]
    paths, _ = crf.viterbi(emissions, n_best=4)
    for path in paths.cpu().flatten(0, 1):
        assert fine[(path * index).sum()]


def test_constraints_move_with_the_module(device):
    crf = copy.deepcopy(constrained(device)).double()
    emissions = torch.randn(8, 6, 5, device=device, dtype=torch.float64)
    assert_same(crf.viterbi(emissions)[0], constrained_like(crf).viterbi(emissions)[0])


def constrained_like(crf):
    other = constrained(crf.transitions.device).double()
    other.load_state_dict(crf.state_dict())
    return other


def test_gradients_of_banned_parameters(device):
    """Forbidden transitions get gradient exactly 0, so that training leaves them alone."""
    crf = constrained(device)
    allowed, starts, _ = fastnlp_ops.transition_mask(LABELS, "BIO")
    tags = torch.tensor([[0, 1, 2, 0], [3, 4, 4, 1]], device=device)
    crf(torch.randn(2, 4, 5, device=device), tags).backward()
    assert (crf.transitions.grad.cpu()[~allowed] == 0).all()
    assert (crf.start_transitions.grad.cpu()[~starts] == 0).all()
    assert (crf.transitions.grad.cpu()[allowed] != 0).all()


def test_viterbi(device):
    """Tensors on the device, batch first: [B, T] paths whatever the layout of the emissions."""
    crf = make_crf(device)
    emissions, _ = make_batch(device)
    mask = torch.tensor(MASK, device=device)
    paths, scores = crf.viterbi(emissions, mask)
    assert paths.shape == (2, 3)
    assert [[tag for tag in path if tag >= 0] for path in paths.tolist()] == crf.decode(emissions, mask)
    assert_close(scores, torch.stack([score.max() for _, score in enumerated(crf, emissions, mask)]))
    n_paths, n_scores = crf.viterbi(emissions, mask, n_best=3)
    assert_same(n_paths[:, 0], paths)
    for own, (_, score) in zip(n_scores, enumerated(crf, emissions, mask), strict=True):
        assert_close(own, score.sort(descending=True)[0][:3])


def test_marginals(device):
    crf = make_crf(device)
    emissions, _ = make_batch(device)
    mask = torch.tensor(MASK, device=device)
    marginals = crf.marginals(emissions, mask)
    assert marginals.shape == emissions.shape
    for b, (paths, score) in enumerate(enumerated(crf, emissions, mask)):
        one_hot = torch.nn.functional.one_hot(paths, 5).double()
        expected = torch.einsum("p,pln->ln", score.softmax(0), one_hot)
        # Probabilities of float32 scores of a few nats.
        assert_close(marginals[: len(expected), b], expected, rtol=0, atol=1e-6)
    assert (marginals[2, 1] == 0).all()


def test_autocast(device):
    """Half-precision emissions under autocast: computed in float32, gradients in the dtypes of the leaves."""
    crf = make_crf(device)
    layer = nn.Linear(8, 5).to(device)
    x = torch.randn(6, 2, 8, device=device)
    tags = torch.randint(0, 5, (6, 2), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        emissions = layer(x)
        assert emissions.dtype == torch.bfloat16
        value = crf(emissions, tags)
        assert crf.decode(emissions) == crf.decode(emissions.float())
    assert value.dtype == torch.float32
    assert_same(value, crf(emissions.float(), tags))
    value.backward()
    assert crf.transitions.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


def test_compile(device):
    """One graph, also with the HF mask and batch-first layout; the same bits as eager."""
    torch._dynamo.reset()
    crf = make_crf(device, batch_first=True)
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
    emissions = torch.randn(3, 6, 5, device=device)
    tags = torch.randint(0, 5, (3, 6), device=device)
    mask = (torch.arange(6, device=device) < torch.tensor([[6], [2], [4]], device=device)).long()
    results = []
    for module in (crf, compiled):
        value = module(emissions, tags, mask, reduction="token_mean")
        results.append([value.detach(), *torch.autograd.grad(value, list(crf.parameters()))])
    for ours, expected in zip(*results, strict=True):
        assert_same(ours, expected)


def test_export(device):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.crf = CRF(5, batch_first=True)

        def forward(self, emissions, mask):
            return self.crf.viterbi(emissions, mask)

    model = Decoder().to(device)
    emissions, mask = torch.randn(3, 6, 5, device=device), torch.ones(3, 6, dtype=torch.int64, device=device)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    shapes = {"emissions": {0: batch, 1: steps}, "mask": {0: batch, 1: steps}}
    program = torch.export.export(model, (emissions, mask), dynamic_shapes=shapes)
    emissions = torch.randn(7, 11, 5, device=device)
    mask = (torch.rand(7, 11, device=device) < 0.6).long()
    mask[:, 0] = 1
    for ours, expected in zip(program.module()(emissions, mask), model(emissions, mask), strict=True):
        assert_same(ours, expected)


def test_pickle_and_deepcopy(device):
    crf = constrained(device)
    file = io.BytesIO()
    torch.save(crf, file)
    file.seek(0)
    emissions = torch.randn(4, 6, 5, device=device)
    expected = crf.decode(emissions)
    assert torch.load(file, weights_only=False).decode(emissions) == expected
    assert copy.deepcopy(crf).decode(emissions) == expected


def test_trains(device):
    """Thirty steps of gradient ascent learn tags that alternate, which no emission tells."""
    crf = make_crf(device, 2, batch_first=True)
    tags = torch.tensor([[0, 1] * 4, [1, 0] * 4], device=device)
    emissions = torch.zeros(2, 8, 2, device=device)
    emissions[0, 0, 0] = emissions[1, 0, 1] = 5
    optimizer = torch.optim.SGD(crf.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        (-crf(emissions, tags, reduction="mean")).backward()
        optimizer.step()
    assert crf.decode(emissions) == tags.tolist()


def test_in_threads(device):
    """Replicas in threads, as DataParallel runs them: no state is shared between calls."""
    crf = make_crf(device)
    batches = [make_batch(device, batch=5) for _ in range(8)]
    expected = [crf(*batch).detach() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for ours, alone in zip(pool.map(lambda batch: crf(*batch).detach(), batches), expected, strict=True):
            assert_same(ours, alone)
