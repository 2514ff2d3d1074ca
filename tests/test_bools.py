"""The bytes of bool tensors. Any byte but 0 is True, as torch reads it: a view of uint8, or memory from elsewhere, may
hold any of them.
"""

import pytest
import torch

import fastnlp_ops

B, T, N = 5, 37, 6


def graded(*values):
    """Differentiable values, and their gradients by all of the inputs that they were made of."""
    *inputs, value = values
    gradients = torch.autograd.grad(value.double().sin().sum(), inputs, materialize_grads=True)
    return [value.detach(), *gradients]


def draw(*shape):
    return torch.randn(shape).requires_grad_()


def crf(function):
    def call(mask):
        emissions, transitions = draw(B, T, N), draw(N, N)
        return graded(emissions, transitions, function(emissions, transitions, mask=mask))

    return call


def log_likelihood(emissions, transitions, mask):
    tags = torch.randint(0, N, emissions.shape[:2])
    return fastnlp_ops.crf_log_likelihood(emissions, tags, transitions, mask=mask)


def partial(mask):
    emissions, transitions = draw(B, T, N), draw(N, N)
    allowed = mask[..., None].expand(B, T, N).contiguous()
    value = fastnlp_ops.crf_partial_log_likelihood(emissions, allowed, transitions, mask=mask)
    return graded(emissions, transitions, value)


def paths(mask):
    scores = draw(B, T, N).detach(), draw(N, N).detach()
    generator = torch.Generator().manual_seed(1)
    return [
        *fastnlp_ops.crf_viterbi(*scores, mask=mask),
        *fastnlp_ops.crf_viterbi(*scores, mask=mask, n_best=3),
        fastnlp_ops.crf_sample(*scores, mask=mask, generator=generator),
    ]


def layer(mask):
    torch.manual_seed(2)
    crf = fastnlp_ops.CRF(N, batch_first=True)
    mask = mask.clone()
    mask.view(torch.uint8)[:, 0] = 255
    emissions = draw(B, T, N)
    loss = -crf(emissions, torch.randint(0, N, (B, T)), mask, reduction="token_mean")
    decoded = [torch.tensor(path) for path in crf.decode(emissions, mask)]
    return [*graded(emissions, crf.transitions, loss), *decoded]


def memm(mask):
    emissions, transitions, tags = draw(B, T, N), draw(N, N), torch.randint(0, N, (B, T))
    value = fastnlp_ops.memm_log_likelihood(emissions, tags, transitions, mask=mask)
    best = fastnlp_ops.memm_viterbi(emissions.detach(), transitions.detach(), mask=mask)
    return [*graded(emissions, transitions, value), *best]


def spans(function):
    def call(mask):
        q, k = draw(B, T, 2, 8), draw(B, T, 2, 8)
        return graded(q, k, function(q, k, mask))

    return call


def span_loss(q, k, mask):
    labels = torch.randint(0, T, (B, 2, 3, 2)).sort(-1).values
    return fastnlp_ops.global_pointer_loss(q, k, labels, mask=mask, reduction="none")


def span_scores(q, k, mask):
    scores = fastnlp_ops.global_pointer_scores(q, k, mask=mask)
    return torch.where(scores == -torch.inf, 0, scores)


def span_divergence(q, k, mask):
    return fastnlp_ops.global_pointer_divergence(q, k, k, q, mask=mask, reduction="none")


def span_decode(mask):
    q, k = draw(B, T, 2, 8).detach(), draw(B, T, 2, 8).detach()
    return fastnlp_ops.global_pointer_decode(q, k, mask=mask, nested=False)


def multilabel(labels):
    scores = draw(B, T)
    value = fastnlp_ops.multilabel_categorical_crossentropy(scores, labels, reduction="none")
    return graded(scores, value)


def attention(causal, **options):
    def call(mask):
        q, k, v = draw(B, T, 2, 8), draw(B, T, 2, 8), draw(B, T, 2, 8)
        out = fastnlp_ops.linear_attention(q, k, v, causal=causal, key_padding_mask=mask, **options)
        return graded(q, k, v, out)

    return call


def attention_layer(mask):
    torch.manual_seed(3)
    layer = fastnlp_ops.LinearAttention(8, 2, batch_first=True)
    padding = mask.clone()
    padding[:, 0] = False
    x = draw(B, T, 8)
    return graded(x, layer(x, x, x, key_padding_mask=padding)[0])


def spans_of_tags(mask):
    tags = torch.randint(0, 3, (B, T))
    found = fastnlp_ops.tags_to_spans(tags, ["O", "B-X", "I-X"], "BIO", mask=mask)
    return [
        torch.tensor([(b, *(x for x in span if isinstance(x, int))) for b, spans in enumerate(found) for span in spans])
    ]


CALLS = {
    "log_partition": crf(fastnlp_ops.crf_log_partition),
    "log_likelihood": crf(log_likelihood),
    "marginals": crf(fastnlp_ops.crf_marginals),
    "entropy": crf(fastnlp_ops.crf_entropy),
    "partial": partial,
    "paths": paths,
    "CRF": layer,
    "memm": memm,
    "span scores": spans(span_scores),
    "span loss": spans(span_loss),
    "span divergence": spans(span_divergence),
    "span decode": span_decode,
    "multilabel": multilabel,
    "attention": attention(False),
    "causal attention": attention(True),
    "decay": attention(True, log_decay=torch.full((2,), -0.1)),
    "LinearAttention": attention_layer,
    "tags_to_spans": spans_of_tags,
}


@pytest.mark.parametrize("size", ["few", "many"])
@pytest.mark.parametrize("call", CALLS)
def test_any_byte_but_zero_is_true(call, size):
    """Bytes from 2 to 255 instead of 1; `many`: all that a length that adds them up would run over."""
    on = torch.rand(B, T) < 0.7 if size == "few" else torch.ones(B, T, dtype=torch.bool)
    odd = torch.where(on, torch.randint(2, 256, (B, T)), 0).to(torch.uint8).view(torch.bool)
    results = []
    for mask in (on, odd):
        torch.manual_seed(0)
        results.append(CALLS[call](mask))
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own.nan_to_num(), expected.nan_to_num())
