"""bert4torch's heads and losses where they are right, and bugs of the GlobalPointer packages, each as a test of ours.

The docstring says whose bug it is and what went wrong. Where it is bert4torch's, and that is installed, it is shown.
"""

import math

import pytest
import torch
from tools import assert_same

import fastnlp_ops
from benchmarks import bert4torch_heads
from fastnlp_ops import EfficientGlobalPointer, GlobalPointer

INF = math.inf
D, H, d, B, n = 20, 4, 8, 3, 11
PEER = bert4torch_heads.load()
needs_peer = pytest.mark.skipif(PEER is None, reason="bert4torch is not installed: see benchmarks/peers.txt")
both_layers = pytest.mark.parametrize("kind", ["standard", "efficient"])


def make_pair(kind, device, **options):
    """bert4torch's layer and ours with its parameters, in float64."""
    peer = (PEER.EfficientGlobalPointer if kind == "efficient" else PEER.GlobalPointer)(
        D, H, d, RoPE=options.get("rope", True), tril_mask=options.get("tril_mask", True)
    )
    ours = (EfficientGlobalPointer if kind == "efficient" else GlobalPointer)(D, H, d, **options)
    peer, ours = peer.to(device).double(), ours.to(device).double()
    ours.load_peer_state_dict(peer.state_dict(), "bert4torch")
    return peer, ours


def make_batch(device):
    """Hidden states, a right-padded int mask, and labels [B, H, 3, 2]: distinct, valid, none of them (0, 0)."""
    lengths = [n, n - 3, n - 6]
    mask = torch.tensor([[1] * length + [0] * (n - length) for length in lengths], device=device)
    labels = torch.empty(B, H, 3, 2, dtype=torch.int64)
    for b, length in enumerate(lengths):
        cells = torch.triu_indices(length, length).T[1:]
        for h in range(H):
            labels[b, h] = cells[torch.randperm(len(cells))[:3]]
    return torch.randn(B, n, D, device=device, dtype=torch.float64), mask, labels.to(device)


def valid_cells(mask, tril_mask=True):
    valid = (mask[:, :, None] & mask[:, None, :]).bool()
    return (valid.triu() if tril_mask else valid)[:, None].expand(-1, H, -1, -1)


def dense_labels(labels, length=n):
    positive = torch.zeros(*labels.shape[:2], length * length, dtype=torch.int64, device=labels.device)
    return positive.scatter_(2, labels[..., 0] * length + labels[..., 1], 1)


# Where bert4torch is right


@needs_peer
@pytest.mark.parametrize("tril_mask", [True, False])
@pytest.mark.parametrize("rope", [True, False])
@both_layers
def test_bert4torch_scores(kind, rope, tril_mask, device):
    peer, ours = make_pair(kind, device, rope=rope, tril_mask=tril_mask)
    x, mask, _ = make_batch(device)
    theirs, scores = peer(x, mask), ours(x, mask)
    valid = valid_cells(mask, tril_mask)
    # Its cosines are float32 numbers: 1e-7 each.
    torch.testing.assert_close(scores[valid], theirs[valid], rtol=2e-6, atol=2e-6)
    assert (theirs[~valid] < -1e10).all()
    assert_same(scores[~valid], torch.full_like(scores[~valid], -INF))


@needs_peer
@both_layers
def test_bert4torch_position_ids(kind, device):
    """Of float32 numbers; its float64 layer has no rotation for integer positions."""
    peer, ours = make_pair(kind, device)
    peer, ours = peer.float(), ours.float()
    x, mask, _ = make_batch(device)
    position_ids = torch.randint(0, 40, (1, n), device=device)
    theirs = peer(x.float(), mask, position_ids)
    scores = ours(x.float(), mask, position_ids=position_ids.expand(B, n))
    valid = valid_cells(mask)
    torch.testing.assert_close(scores[valid], theirs[valid], rtol=1e-5, atol=1e-5)


@needs_peer
@pytest.mark.parametrize("loss", ["dense", "sparse"])
@both_layers
def test_bert4torch_losses(kind, loss, device):
    """Both losses and their gradients, for distinct labels at valid cells and scores near 0."""
    peer, ours = make_pair(kind, device)
    x, mask, labels = make_batch(device)
    x.requires_grad_()
    theirs = peer(x, mask).flatten(2)
    if loss == "dense":
        expected = PEER.DenseLoss()(theirs.flatten(0, 1), dense_labels(labels).flatten(0, 1))
        value = ours.loss(x, labels, mask)
    else:
        expected = PEER.SparseLoss()(theirs, labels[..., 0] * n + labels[..., 1])
        value = ours.loss(x, labels, mask, reduction="none")
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)
    weights = torch.rand_like(value)
    (ours_grad,) = torch.autograd.grad((value * weights).sum(), x)
    (theirs_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=2e-6)


@needs_peer
@both_layers
def test_bert4torch_mask_zero(kind, device):
    """Labels padded with zeros: the cell (0, 0) is no label and no negative."""
    peer, ours = make_pair(kind, device)
    x, mask, labels = make_batch(device)
    labels[:, 0, 1:] = 0
    labels[1, 1] = 0
    expected = PEER.SparseLoss(mask_zero=True)(peer(x, mask).flatten(2), labels[..., 0] * n + labels[..., 1])
    value = ours.loss(x, labels, mask, reduction="none", mask_zero=True)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)


@needs_peer
@both_layers
def test_bert4torch_decoding(kind, device):
    """np.where of its scores above 0, as its examples decode."""
    peer, ours = make_pair(kind, device)
    x, mask, _ = make_batch(device)
    theirs = peer(x, mask)
    spans, scores = ours.decode(x, mask)
    assert_same(spans, (theirs > 0).nonzero().contiguous())
    torch.testing.assert_close(scores, theirs[theirs > 0], rtol=2e-6, atol=2e-6)
    assert len(spans) > 50


@needs_peer
@both_layers
def test_r_drop(kind, device):
    """The divergence of two passes with dropout: its sums over bert4torch's dense scores."""
    peer, ours = make_pair(kind, device)
    x, mask, _ = make_batch(device)
    first, second = (torch.nn.functional.dropout(x, 0.3) for _ in range(2))
    a, b = (torch.where(valid_cells(mask), peer(y, mask), 0) for y in (first, second))
    expected = ((a.sigmoid() - b.sigmoid()) * (a - b)).sum((2, 3))
    (q1, k1, start1, end1), (q2, k2, start2, end2) = ours.project(first), ours.project(second)
    biases = {"start_bias1": start1, "end_bias1": end1, "start_bias2": start2, "end_bias2": end2}
    value = fastnlp_ops.global_pointer_divergence(q1, k1, q2, k2, **biases, mask=mask, reduction="none")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert (value > 0).all()


# Where packages are wrong


def peaked(device, s_positive, s_negative=-20.0, length=64, hard=None):
    """(q, k, start_bias, end_bias): scores are s_negative but for the cell (2, 5), and the cell (9, 9) where hard."""
    q, k = torch.zeros(1, length, 1, 2, device=device), torch.zeros(1, length, 1, 2, device=device)
    q[0, 2, 0, 0], k[0, 5, 0, 0] = 1.0, s_positive - s_negative
    if hard is not None:
        q[0, 9, 0, 1], k[0, 9, 0, 1] = 1.0, hard - s_negative
    bias = torch.full((1, length, 1), s_negative / 2, device=device)
    return q, k, bias, bias.clone()


PLAIN = {"rope": False, "tril_mask": False, "scale": 1.0}


@pytest.mark.parametrize("s_positive", [5.0, 12.0, 16.0, 20.0, 30.0, 60.0, 100.0])
def test_sparse_loss_of_a_confident_label(s_positive, device):
    """bert4keras, bert4torch, JunnYu, PaddleNLP, xhw205, SMCCE: log(clip(1 - exp(b - a), eps)).

    With one label at s and 4095 negatives at -20 the loss is 8e-6 + e^-s. At s = 12 bert4torch's is -0.07, at 16
    -0.12, at 30 +13.9; PaddleNLP's eps of 0.1 gives 2.7 at s = 5. And where the clip holds, the gradient at the label
    is +1: it pushes the label down, and leaves every negative alone.
    """
    q, k, start, end = peaked(device, s_positive)
    for x in (q, k):
        x.requires_grad_()
    label = torch.tensor([[0, 0, 2, 5]], device=device)
    loss = fastnlp_ops.global_pointer_loss(q, k, label, start_bias=start, end_bias=end, **PLAIN)
    exact = math.log1p(4095 * math.exp(-20)) + math.log1p(math.exp(-s_positive))
    assert abs(loss.item() - exact) <= 1e-6
    assert loss >= 0
    (dq,) = torch.autograd.grad(loss, q)
    # dL/ds at the label is -e^-s / (1 + e^-s), and q's gradient there is k times that.
    slope = -math.exp(-s_positive) / (1 + math.exp(-s_positive))
    assert dq[0, 2, 0, 0] / (s_positive + 20) == pytest.approx(slope, rel=1e-5, abs=1e-20)
    if PEER is not None and s_positive in (16.0, 30.0):
        row = torch.full((1, 4096), -20.0)
        row[0, 2 * 64 + 5] = s_positive
        row.requires_grad_()
        theirs = PEER.SparseLoss()(row, torch.tensor([[2 * 64 + 5]])).sum()
        assert theirs < 0 if s_positive == 16 else theirs > 10
        (gradient,) = torch.autograd.grad(theirs, row)
        assert gradient[0, 2 * 64 + 5] > 0.5


def test_sparse_loss_hears_a_hard_negative(device):
    """The same packages: with confident labels a negative at +2 gets gradient 0. It is 0.88 with none, and stays."""
    q, k, start, end = peaked(device, 25.0, hard=2.0)
    k.requires_grad_()
    label = torch.tensor([[0, 0, 2, 5]], device=device)
    loss = fastnlp_ops.global_pointer_loss(q, k, label, start_bias=start, end_bias=end, **PLAIN)
    (dk,) = torch.autograd.grad(loss, k)
    assert dk[0, 9, 0, 1].item() == pytest.approx(math.exp(2) / (1 + math.exp(2)), rel=1e-4)
    if PEER is not None:
        row = torch.full((1, 4096), -20.0)
        row[0, 2 * 64 + 5], row[0, 9 * 64 + 9] = 25.0, 2.0
        row.requires_grad_()
        (gradient,) = torch.autograd.grad(PEER.SparseLoss()(row, torch.tensor([[133]])).sum(), row)
        assert gradient[0, 9 * 64 + 9] < 1e-6


@pytest.mark.parametrize("score", [100.0, 1000.0])
def test_scores_that_overflow_exp(score, device):
    """PaddleNLP's criterion takes exp without its maximum: inf from s = 89 on."""
    for label, exact in (([0, 0, 2, 5], 0.0), ([0, 0, 1, 1], score + 20)):
        q, k, start, end = peaked(device, score)
        rows = torch.tensor([label], device=device)
        loss = fastnlp_ops.global_pointer_loss(q, k, rows, start_bias=start, end_bias=end, **PLAIN)
        assert loss.item() == pytest.approx(exact, rel=1e-6, abs=1e-5)


def test_duplicate_labels(device):
    """bert4torch, bert4keras: a label that is listed twice is subtracted twice (6.54 becomes 5.67)."""
    x, mask, labels = make_batch(device)
    layer = GlobalPointer(D, H, d).to(device).double()
    twice = torch.cat([labels, labels[:, :, :2]], 2)
    assert_same(layer.loss(x, twice, mask), layer.loss(x, labels, mask))
    if PEER is not None:
        scores = layer(x, mask).flatten(2)
        once, more = (PEER.SparseLoss()(scores, y[..., 0] * n + y[..., 1]).mean() for y in (labels, twice))
        assert abs(once - more) > 0.01


def test_label_behind_the_last_cell(device):
    """bert4torch: the index n * n is the virtual class, silently. Ours: end = n is out of range, and is said to be."""
    x, mask, labels = make_batch("cpu")
    labels[1, 2, 0] = torch.tensor([n - 1, n])
    layer = GlobalPointer(D, H, d).double()
    with pytest.raises(ValueError, match=r"\(1, 2, 10, 11\)"):
        layer.loss(x, labels, mask)
    if PEER is not None:
        virtual = torch.full((B, H, 1), n * n)
        assert PEER.SparseLoss()(layer(x, mask).flatten(2), virtual).isfinite().all()


def test_labels_of_long_texts(device):
    """bert4torch, bert4keras: i * n + j in float32 names the wrong cell from n = 4097 on."""
    length = 5000
    assert int(torch.tensor(4998.0) * length + 4999) != 4998 * length + 4999
    q = torch.zeros(1, length, 1, 2, device=device)
    start, end = (torch.full((1, length, 1), -15.0, device=device) for _ in range(2))
    start[0, 4998], end[0, 4999] = 9.0, 9.0  # the label scores 18, its row and column -6, all others -30
    labels = torch.tensor([[0, 0, 4998, 4999]], device=device)
    loss = fastnlp_ops.global_pointer_loss(q, q, labels, start_bias=start, end_bias=end, **PLAIN)
    exact = math.log1p(2 * 4999 * math.exp(-6) + 4999**2 * math.exp(-30))
    assert loss.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("where", ["below the diagonal", "in padding"])
@both_layers
def test_label_at_a_cell_that_is_not_valid(kind, where, device):
    """bert4torch's dense loss: inf or 1.25e11, and NaN gradients. Ours: such a label takes no part."""
    x, mask, labels = make_batch(device)
    x.requires_grad_()
    layer = (EfficientGlobalPointer if kind == "efficient" else GlobalPointer)(D, H, d).to(device).double()
    expected = layer.loss(x, labels, mask)
    wrong = torch.tensor([3, 1] if where == "below the diagonal" else [2, n - 1], device=device)
    more = torch.cat([labels, wrong.expand(B, H, 1, 2)], 2)
    if where == "in padding":
        more[0, :, 3] = -1  # the first text is not padded
    loss = layer.loss(x, more, mask)
    assert_same(loss, expected)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()
    if PEER is not None:
        peer, ours = make_pair(kind, device)
        theirs = PEER.DenseLoss()(peer(x, mask).flatten(2), dense_labels(more.clamp(min=0)))
        assert theirs > 1e9
        assert ours.loss(x, more, mask) < 100


def test_soft_labels(device):
    """bert4torch and the other torch ports: (1 - 2 t) s - t 1e12 is wrong between 0 and 1, and NaN at a masked cell."""
    scores = torch.randn(5, 12, device=device, dtype=torch.float64)
    soft = torch.rand(5, 12, device=device, dtype=torch.float64)
    terms = [(soft * (-scores).exp()).sum(1), ((1 - soft) * scores.exp()).sum(1)]
    exact = sum(torch.log1p(term) for term in terms).mean()
    torch.testing.assert_close(fastnlp_ops.multilabel_categorical_crossentropy(scores, soft), exact)
    masked = torch.cat([scores, torch.full((5, 2), -INF, device=device)], 1)
    more = torch.cat([soft, torch.tensor([[0.5, 1.0]], device=device).expand(5, 2)], 1)
    torch.testing.assert_close(fastnlp_ops.multilabel_categorical_crossentropy(masked, more), exact)
    if PEER is not None:
        assert abs(PEER.DenseLoss()(scores, soft) - exact) > 0.5
        assert not PEER.DenseLoss()(masked, more).isfinite()


def test_left_padding(device):
    """gaohongkui, xhw205's raw form: only ends are masked, and with left padding 84 cells keep their scores."""
    layer = GlobalPointer(D, H, d).to(device)
    x = torch.randn(1, n, D, device=device)
    mask = torch.tensor([[0] * 4 + [1] * (n - 4)], device=device)
    padded, alone = layer(x, mask), layer(x[:, 4:])
    torch.testing.assert_close(padded[:, :, 4:, 4:], alone, rtol=1e-5, atol=1e-5)
    assert (padded[:, :, :4] == -INF).all()
    assert (padded[:, :, :, :4] == -INF).all()
    assert (layer.decode(x, mask)[0][:, 2:] >= 4).all()


def test_bool_mask(device):
    """bert4torch, gaohongkui, JunnYu: "Subtraction, the `-` operator, with a bool tensor is not supported"."""
    layer, (x, mask, _) = GlobalPointer(D, H, d).to(device).double(), make_batch(device)
    expected = layer(x, mask)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16):
        assert_same(layer(x, mask.to(dtype)), expected)
    if PEER is not None:
        with pytest.raises(RuntimeError, match="bool"):
            make_pair("standard", device)[0](x, mask.bool())


def test_half_precision_does_not_overflow(device):
    """bert4torch, gaohongkui, xhw205, JunnYu divide by sqrt(d) after the dot: q = k = 40 with d = 64 is inf."""
    q = torch.full((1, 3, 2, 64), 40.0, device=device, dtype=torch.float16)
    scores = fastnlp_ops.global_pointer_scores(q, q, rope=False, tril_mask=False)
    assert_same(scores, torch.full((1, 2, 3, 3), 12800.0, device=device, dtype=torch.float16))


def test_rope_behind_token_512(device):
    """JunnYu, PaddleNLP: a table of 512 positions, and an error behind it."""
    layer = GlobalPointer(D, 1, d).to(device)
    x = torch.randn(1, 1024, D, device=device)
    scores, far = layer(x), torch.arange(1000, 1024, device=device)[None] + 100_000
    # A score knows how far apart its ends are, not where they stand.
    torch.testing.assert_close(layer(x[:, 1000:]), scores[:, :, 1000:, 1000:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[:, 1000:], position_ids=far), scores[:, :, 1000:, 1000:], rtol=1e-5, atol=1e-5)


def test_rope_of_half_precision(device):
    """bert4torch rounds sines and cosines to the dtype of q: in bfloat16 the angle is off by 0.004. Ours are not."""
    q, k = torch.randn(2, 1, 300, 2, 64, device=device).bfloat16()
    exact = fastnlp_ops.reference.global_pointer_scores(q.double(), k.double(), tril_mask=False)
    scores = fastnlp_ops.global_pointer_scores(q, k, tril_mask=False).double()
    # One rounding of a score to bfloat16: half of 2^-7 of it.
    assert ((scores - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@needs_peer
def test_efficient_checkpoint_of_another_package():
    """bert4torch's docstring: its efficient layer and bert4keras' "are no different". Loaded as such, scores are wrong.

    Of equal shapes, in another order; load_state_dict accepts them in silence and is off by up to 13.7.
    """
    peer, ours = make_pair("efficient", "cpu")
    x, mask, _ = make_batch("cpu")
    valid = valid_cells(mask)
    right = ours(x, mask)[valid]
    renamed = {key.replace("p_dense", "dense1").replace("q_dense", "dense2"): v for key, v in peer.state_dict().items()}
    ours.load_peer_state_dict(renamed, "JunnYu")
    assert (ours(x, mask)[valid] - right).abs().max() > 0.1
