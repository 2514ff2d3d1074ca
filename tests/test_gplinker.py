"""gplinker_decode against the naive loops. Numbers are small integers, so that scores are the same to the bit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tools import assert_same

import fastnlp_ops
from benchmarks import measure
from fastnlp_ops import gplinker, reference

NAN, INF = math.nan, math.inf

CASES = {
    "aligned": {"B": 4, "n": 16, "R": 8, "spans": 8},
    "ragged": {"B": 5, "n": 13, "R": 3, "spans": 6, "mask": "holes"},
    "prime": {"B": 2, "n": 11, "R": 7, "d": 3, "spans": 9, "mask": "left"},
    "one": {"B": 1, "n": 1, "R": 1, "d": 1, "spans": 2},
    "empty batch": {"B": 0, "n": 6, "R": 2, "spans": 0},
    "no tokens": {"B": 2, "n": 0, "R": 2, "spans": 0},
    "long": {"B": 1, "n": 200, "R": 5, "spans": 40},
    "dense": {"B": 2, "n": 6, "R": 2, "spans": 60},
}
# Of the head scores and of the tail scores: one pair of projections for each relation, or one and biases.
FORMS = {"standard": (False, False), "efficient": (True, True), "mixed": (False, True)}


@dataclasses.dataclass
class Problem:
    """Arguments of one call."""

    spans: torch.Tensor
    projections: list[torch.Tensor]
    options: dict[str, torch.Tensor | float | None]

    def decode(self, package, **options):
        return package.gplinker_decode(self.spans, *self.projections, **(self.options | options))


def whole(*shape):
    return torch.randint(-2, 3, shape).float()


def make_spans(B, n, count):
    """Spans in no order, some of them twice, some that end before they begin."""
    rows = B * count if n else 0
    columns = torch.randint(max(1, B), (rows,)), torch.randint(2, (rows,)), *torch.randint(max(1, n), (2, rows))
    return torch.stack(columns, 1)


def make_mask(kind, B, n):
    if kind is None:
        return None
    if kind == "left":
        return torch.arange(n) >= torch.randint(n, (B, 1))
    return torch.rand(B, n) < 0.7


def make_problem(device="cpu", B=3, n=12, R=4, d=16, spans=6, mask=None, form="standard", dtype=torch.float32):
    projections, options = [], {"mask": make_mask(mask, B, n)}
    for name, efficient in zip(("head", "tail"), FORMS[form], strict=True):
        projections += [whole(B, n, 1 if efficient else R, d) for _ in range(2)]
        if efficient:
            options |= {f"{name}_{end}_bias": whole(B, n, R) for end in ("start", "end")}
    projections = [x.to(device, dtype) for x in projections]
    options = {
        name: x if x is None else x.to(device) if name == "mask" else x.to(device, dtype) for name, x in options.items()
    }
    return Problem(make_spans(B, n, spans).to(device), projections, options)


def assert_decodes(problem, **options):
    """Equal to the reference, sorted, each triple once; returns the triples."""
    triples, scores = problem.decode(fastnlp_ops, **options)
    expected, expected_scores = problem.decode(reference, **options)
    assert_same(triples, expected, "triples")
    assert_same(scores, expected_scores, "scores")
    assert sorted(set(map(tuple, triples.tolist()))) == list(map(tuple, triples.tolist()))
    return triples


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, form, device):
    found = assert_decodes(make_problem(device, form=form, **CASES[case]))
    if case in ("aligned", "long", "dense"):
        assert len(found) > 0


@pytest.mark.parametrize("numbers", [1, 37, 500])
@pytest.mark.parametrize("form", FORMS)
def test_a_few_numbers_at_a_time(numbers, form, device, monkeypatch):
    """The bound on memory cuts the batch into groups of sequences, and the pairs of spans into parts."""
    problem = make_problem(device, B=4, n=9, spans=20, mask="holes", form=form)
    expected = problem.decode(fastnlp_ops)
    assert len(expected[0]) > 0
    monkeypatch.setattr(gplinker, "_NUMBERS", numbers)
    for ours, whole_batch in zip(problem.decode(fastnlp_ops), expected, strict=True):
        assert_same(ours, whole_batch)


@pytest.mark.parametrize("threshold", [-INF, -1.25, 0.0, 0.5, INF])
def test_threshold(threshold, device):
    """Scores are multiples of 1/4, many are equal to the threshold: those do not count."""
    problem = make_problem(device)
    found = assert_decodes(problem, threshold=threshold)
    pairs = {
        (b, *s, *o)
        for b, r, *s in problem.spans.tolist()
        for c, q, *o in problem.spans.tolist()
        if (b, r, q) == (c, 0, 1)
    }
    if threshold == -INF:
        assert len(found) == 4 * len(pairs)
    if threshold == INF:
        assert len(found) == 0


@pytest.mark.parametrize("scale", [None, 1.0, -0.5, 0.0])
def test_scale(scale, device):
    assert_decodes(make_problem(device, form="mixed"), scale=scale)


def test_head_sizes_of_their_own(device):
    """The default scale is that of each layer."""
    problem = make_problem(device, d=16)
    problem.projections[2:] = [x[..., :4] for x in problem.projections[2:]]
    assert_decodes(problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_layouts(dtype, device):
    """Half precision is computed in float32, strides may be any, spans int32."""
    problem = make_problem(device, form="mixed", dtype=dtype)
    problem.spans = problem.spans.int()
    assert problem.decode(fastnlp_ops)[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = assert_decodes(problem)
    problem.projections = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in problem.projections]
    problem.options["mask"] = torch.ones(1, 1, dtype=dtype, device=device).expand(3, 12)
    assert_same(assert_decodes(problem), expected)


def test_scores_of_half_precision_do_not_overflow(device):
    problem = make_problem(device, dtype=torch.float16)
    problem.projections = [torch.full_like(x, 200) for x in problem.projections]
    _, scores = problem.decode(fastnlp_ops)
    assert (scores == 200 * 200 * 4).all()


def test_autocast(device):
    """Dot products stay in float32: those of numbers near 1000 differ in bfloat16."""
    problem = make_problem(device)
    problem.projections = [x + 1000 for x in problem.projections]
    expected = problem.decode(fastnlp_ops)
    with torch.autocast(device.type, torch.bfloat16):
        for ours, outside in zip(problem.decode(fastnlp_ops), expected, strict=True):
            assert_same(ours, outside)


def test_inputs_are_unchanged_and_no_graph_is_kept(device):
    problem = make_problem(device, form="efficient", mask="holes")
    for x in problem.projections:
        x.requires_grad_()
    tensors = [problem.spans, *problem.projections, *problem.options.values()]
    before = [x.detach().clone() for x in tensors]
    triples, scores = problem.decode(fastnlp_ops)
    assert not triples.requires_grad
    assert not scores.requires_grad
    for x, old in zip(tensors, before, strict=True):
        assert_same(x.detach(), old)


def test_repeatable(device, threads):
    problem = make_problem(device, B=6, n=30, R=9, spans=30)
    expected = problem.decode(fastnlp_ops)
    for count in (1, 2, 3):
        threads(count)
        for ours, first in zip(problem.decode(fastnlp_ops), expected, strict=True):
            assert_same(ours, first)


# The hostile ones


@pytest.mark.parametrize("kind", ["none", "subjects", "objects", "in other sequences"])
def test_no_pairs(kind, device):
    problem = make_problem(device, B=4)
    role, even = problem.spans[:, 1], problem.spans[:, 0] % 2
    keep = {"none": role < 0, "subjects": role == 0, "objects": role == 1, "in other sequences": role == even}[kind]
    problem.spans = problem.spans[keep]
    assert len(problem.spans) > 0 or kind == "none"
    triples, scores = problem.decode(fastnlp_ops, threshold=-INF)
    assert_same(triples, torch.empty(0, 6, dtype=torch.int64, device=device))
    assert_same(scores, torch.empty(0, device=device))


def test_relation_to_itself(device):
    """A span that is subject and object may stand in a relation to itself."""
    problem = make_problem(device, B=1)
    problem.spans = torch.tensor([[0, 0, 2, 5], [0, 1, 2, 5]], device=device)
    assert_decodes(problem, threshold=-INF)
    triples, _ = problem.decode(fastnlp_ops, threshold=-INF)
    assert triples.tolist() == [[0, 2, 5, relation, 2, 5] for relation in range(4)]


def test_duplicates_count_once(device):
    problem = make_problem(device)
    expected = assert_decodes(problem)
    problem.spans = problem.spans.repeat(3, 1)[torch.randperm(3 * len(problem.spans))]
    assert_same(assert_decodes(problem), expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("form", ["standard", "efficient"])
def test_masked_tokens_are_not_read(form, value, device):
    """What stands at a masked token, NaN included, changes nothing, in whatever dtype the mask is."""
    problem = make_problem(device, n=10, spans=15, mask="holes", form=form)
    expected = assert_decodes(problem)
    assert 0 < len(expected) < len(problem.decode(fastnlp_ops, mask=None)[0])
    off = ~problem.options["mask"]
    for x in (*problem.projections, *[b for name, b in problem.options.items() if name != "mask"]):
        x[off] = value
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16):
        assert_same(problem.decode(fastnlp_ops, mask=problem.options["mask"].to(dtype))[0], expected)


def test_nan_is_above_nothing(device):
    """A token of NaN takes away the triples that read it, and no others."""
    problem = make_problem(device)
    before = problem.decode(fastnlp_ops, threshold=-INF)[0]
    b, token = before[0, :2].tolist()
    problem.projections[0][b, token] = NAN  # head_q is read at the first tokens of subjects
    after = assert_decodes(problem, threshold=-INF)
    assert_same(after, before[(before[:, 0] != b) | (before[:, 1] != token)])
    assert len(after) < len(before)


def flood(n, R, d, share):
    """One sequence in which `share` of all spans are subjects, and of all spans objects."""
    cells = torch.triu_indices(n, n).T
    roles = [cells[torch.rand(len(cells)) < share] for _ in range(2)]
    spans = [torch.cat([torch.tensor([[0, role]]).expand(len(x), 2), x], 1) for role, x in enumerate(roles)]
    return Problem(torch.cat(spans), [torch.randn(1, n, R, d) for _ in range(4)], {})


@pytest.mark.parametrize(("n", "threshold"), [(48, 0.0), (80, 1.5), (80, 9.0)])
def test_untrained_model_in_bounded_memory(n, threshold, monkeypatch):
    """A quarter of all spans are subjects, a quarter objects: scores of all pairs are never held.

    Those are 105 MB for 80 tokens, where few count, or none; 14 MB for 48, where a quarter does: the result is 45 MB.
    """
    monkeypatch.setattr(gplinker, "_NUMBERS", 1 << 18)
    problem = flood(n, R=40, d=16, share=0.25)
    found = []

    def run():
        found[:] = problem.decode(fastnlp_ops, threshold=threshold)

    # The smaller of two: after thousands of other tests the process's own pages may move in between.
    peak = min(measure.peak_bytes(run, "cpu") for _ in range(2))
    # The layers have 256,000 scores each between 80 tokens, and a byte for each: 2.6 MB. The rest is how memory is cut.
    assert peak < 3 * sum(x.nbytes for x in found) + 20e6
    subjects, objects = (problem.spans[problem.spans[:, 1] == role][:, 2:] for role in (0, 1))
    every, above = len(subjects) * len(objects) * 40, 0
    assert every > (2e7 if n == 80 else 3e6)
    for relation in range(40):
        head, tail = (
            q[0, :, relation] @ k[0, :, relation].T / 4 for q, k in (problem.projections[:2], problem.projections[2:])
        )
        score = torch.minimum(head[subjects[:, :1], objects[:, 0]], tail[subjects[:, 1:], objects[:, 1]])
        above += (score > threshold).sum().item()
    # Sums of 16 products in another order: a score may fall on the other side of the threshold.
    assert abs(len(found[0]) - above) <= 1e-5 * every


def test_untrained_model_is_as_the_loops(device):
    problem = flood(n=10, R=3, d=4, share=0.5)
    problem.projections = [x.round().to(device) for x in problem.projections]
    problem.spans = problem.spans.to(device)
    assert len(assert_decodes(problem)) > 100


def test_a_whole_model(device):
    """Entities from their layer, relations from theirs: what numpy finds in the dense scores of all three."""
    entity = fastnlp_ops.GlobalPointer(6, 2, 4).to(device)
    head, tail = (fastnlp_ops.EfficientGlobalPointer(6, 3, 4, rope=False, tril_mask=False).to(device) for _ in range(2))
    x, mask = torch.randn(2, 9, 6, device=device), torch.ones(2, 9, device=device)
    mask[1, :3] = 0
    spans, _ = entity.decode(x, mask)
    (hq, hk, hs, he), (tq, tk, ts, te) = head.project(x), tail.project(x)
    biases = {"head_start_bias": hs, "head_end_bias": he, "tail_start_bias": ts, "tail_end_bias": te}
    triples, scores = fastnlp_ops.gplinker_decode(spans, hq, hk, tq, tk, **biases, mask=mask)
    entities, heads, tails = (layer(x, mask).detach().cpu().numpy() for layer in (entity, head, tail))
    expected = []
    for b in range(2):
        for s, e in zip(*np.where(entities[b, 0] > 0), strict=True):
            for r in range(3):
                expected += [
                    (b, s, e, r, i, j)
                    for i, j in zip(*np.where(entities[b, 1] > 0), strict=True)
                    if heads[b, r, s, i] > 0 and tails[b, r, e, j] > 0
                ]
    assert len(expected) > 0
    assert triples.tolist() == [list(map(int, row)) for row in expected]
    assert (scores > 0).all()


TOKENS = (2, 5, 3, 4)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"spans": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "spans must be [M, 4], got shape (3, 3)"),
        ({"spans": torch.zeros(1, 4)}, TypeError, "spans must be integers, got torch.float32"),
        (
            {"spans": torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1]])},
            ValueError,
            "spans must be (b, role, start, end) below (2, 2, 5, 5), got (0, 2, 1, 1)",
        ),
        (
            {"spans": torch.tensor([[0, 0, 1, 5]])},
            ValueError,
            "spans must be (b, role, start, end) below (2, 2, 5, 5), got (0, 0, 1, 5)",
        ),
        (
            {"spans": torch.tensor([[0, 0, -1, 2]])},
            ValueError,
            "spans must be (b, role, start, end) below (2, 2, 5, 5), got (0, 0, -1, 2)",
        ),
        ({"head_q": torch.zeros(2, 5, 3)}, ValueError, "head_q must be [B, n, H, d], got shape (2, 5, 3)"),
        (
            {"head_k": torch.zeros(2, 5, 3, 2)},
            ValueError,
            "head_k must be [B, n, H, d] = (2, 5, 3, 4), got shape (2, 5, 3, 2)",
        ),
        (
            {"tail_k": torch.zeros(TOKENS).int()},
            TypeError,
            "tail_k must be float32, float64, float16 or bfloat16, got torch.int32",
        ),
        (
            {"tail_q": torch.zeros(2, 5, 2, 4), "tail_k": torch.zeros(2, 5, 2, 4)},
            ValueError,
            "tail_q and head_q must score the same tokens and relations, got (B, n, R) = (2, 5, 2) and (2, 5, 3)",
        ),
        (
            {"tail_start_bias": torch.zeros(2, 5, 3)},
            ValueError,
            "tail_start_bias and tail_end_bias must be given together",
        ),
        (
            {"head_start_bias": torch.zeros(2, 5, 2), "head_end_bias": torch.zeros(2, 5, 2)},
            ValueError,
            "head_start_bias must be [B, n, H] = (2, 5, 3), got shape (2, 5, 2)",
        ),
        ({"mask": torch.ones(2, 4)}, ValueError, "mask must be [B, n] = (2, 5), got shape (2, 4)"),
        (
            {"tail_q": torch.zeros(TOKENS, device="meta"), "tail_k": torch.zeros(TOKENS, device="meta")},
            ValueError,
            "tail_q must be on the device of head_q, cpu, got meta",
        ),
    ],
)
def test_errors(changed, error, sentence):
    arguments = {name: torch.zeros(TOKENS) for name in ("head_q", "head_k", "tail_q", "tail_k")}
    arguments["spans"] = torch.zeros(0, 4, dtype=torch.int64)
    with pytest.raises(error) as caught:
        fastnlp_ops.gplinker_decode(**(arguments | changed))
    assert str(caught.value) == sentence
