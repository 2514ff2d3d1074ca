"""fastnlp_ops.CRF does what torchcrf.CRF promises, and what it adds. Expectations are enumerated, not copied."""

import copy
import io
import math

import pytest
import torch
from crf_problems import enumerate_paths
from tools import assert_same
from torch import nn

import fastnlp_ops
from fastnlp_ops import CRF

# What torchcrf's own tests ask of float32 log-likelihoods.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-12}

# Right-padded masks of a batch of two, time first, in the dtypes that pytorch-crf takes and those that tokenizers give.
MASK = [[1, 1], [1, 1], [1, 0]]
mask_dtypes = pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32])


def make_crf(device, num_tags=5, batch_first=False):
    return CRF(num_tags, batch_first=batch_first).to(device)


def make_batch(device, num_tags=5, steps=3, batch=2):
    emissions = torch.randn(steps, batch, num_tags, device=device)
    return emissions, torch.randint(0, num_tags, (steps, batch), device=device)


def lengths_of(mask, batch, steps):
    return [steps] * batch if mask is None else (mask != 0).sum(0).tolist()


def enumerated(crf, emissions, mask=None):
    """Per sequence of a time-first batch: all its paths and their scores."""
    steps, batch = emissions.shape[:2]
    for b, length in enumerate(lengths_of(mask, batch, steps)):
        scores = crf.transitions, crf.start_transitions, crf.end_transitions
        yield enumerate_paths(emissions[:length, b].detach(), *(score.detach() for score in scores))


def expected_log_likelihoods(crf, emissions, tags, mask=None):
    result = []
    for b, (paths, score) in enumerate(enumerated(crf, emissions, mask)):
        gold = score[(paths == tags[: paths.shape[1], b]).all(1)]
        result.append(gold.squeeze(0) - torch.logsumexp(score, 0))
    return torch.stack(result)


def expected_paths(crf, emissions, mask=None):
    return [paths[score.argmax()].tolist() for paths, score in enumerated(crf, emissions, mask)]


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), **(tolerance or TOLERANCE))


@pytest.fixture(params=["eager", "scripted"])
def wrap(request):
    """The module as it is, and through TorchScript."""
    return torch.jit.script if request.param == "scripted" else lambda module: module


class TestInit:
    def test_minimal(self):
        crf = CRF(10)
        assert crf.num_tags == 10
        assert not crf.batch_first
        for name, shape in [("start_transitions", (10,)), ("end_transitions", (10,)), ("transitions", (10, 10))]:
            assert isinstance(getattr(crf, name), nn.Parameter)
            assert getattr(crf, name).shape == shape
        assert repr(crf) == "CRF(num_tags=10)"
        assert repr(nn.Sequential(crf)) == "Sequential(\n  (0): CRF(num_tags=10)\n)"

    def test_batch_first(self):
        assert CRF(10, batch_first=True).batch_first
        assert CRF(10, True).batch_first

    @pytest.mark.parametrize("num_tags", [0, -1])
    def test_number_of_tags(self, num_tags):
        with pytest.raises(ValueError) as caught:
            CRF(num_tags)
        assert str(caught.value) == f"invalid number of tags: {num_tags}"

    def test_subclass_repr(self):
        class Tagger(CRF):
            pass

        assert repr(Tagger(4)) == "Tagger(num_tags=4)"

    def test_state_dict(self):
        """The keys of torchcrf in its order, with constraints too, so that checkpoints move both ways."""
        names = ["start_transitions", "end_transitions", "transitions"]
        assert list(CRF(3).state_dict()) == names
        assert [name for name, _ in CRF(3).named_parameters()] == names
        assert list(CRF(3, labels=["O", "B-X", "I-X"]).state_dict()) == names

    def test_initial_values(self):
        """U(-0.1, 0.1), drawn in the order of torchcrf: the same seed gives the same model."""
        torch.manual_seed(5)
        crf = CRF(6)
        torch.manual_seed(5)
        for parameter in (crf.start_transitions, crf.end_transitions, crf.transitions):
            assert_same(parameter.detach(), nn.init.uniform_(torch.empty(parameter.shape), -0.1, 0.1))
        torch.manual_seed(6)
        crf.reset_parameters()
        torch.manual_seed(6)
        assert_same(crf.start_transitions.detach(), nn.init.uniform_(torch.empty(6), -0.1, 0.1))


class TestForward:
    """Also scripted: torchcrf runs the same tests through torch.jit.script."""

    @mask_dtypes
    def test_with_mask(self, wrap, dtype, device):
        crf = make_crf(device)
        emissions, tags = make_batch(device)
        emissions.requires_grad_()
        mask = torch.tensor(MASK, dtype=dtype, device=device)
        log_likelihood = wrap(crf)(emissions, tags, mask=mask)
        assert log_likelihood.shape == ()
        assert_close(log_likelihood, expected_log_likelihoods(crf, emissions, tags, mask).sum())
        log_likelihood.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in crf.parameters())
        assert (emissions.grad[2, 1] == 0).all()

    def test_without_mask(self, wrap, device):
        crf = make_crf(device)
        emissions, tags = make_batch(device)
        scripted = wrap(crf)
        ones = torch.ones(3, 2, dtype=torch.uint8, device=device)
        assert_close(scripted(emissions, tags), scripted(emissions, tags, mask=ones))
        assert_close(scripted(emissions, tags), expected_log_likelihoods(crf, emissions, tags).sum())

    def test_batch_is_sum_of_sequences(self, wrap, device):
        crf = wrap(make_crf(device))
        emissions, tags = make_batch(device, batch=10)
        single = [crf(emissions[:, b : b + 1], tags[:, b : b + 1]) for b in range(10)]
        assert_close(crf(emissions, tags), sum(single))

    @pytest.mark.parametrize("masked", [False, True])
    def test_reductions(self, wrap, masked, device):
        crf = make_crf(device)
        emissions, tags = make_batch(device)
        mask = torch.tensor(MASK, dtype=torch.uint8, device=device) if masked else None
        expected = expected_log_likelihoods(crf, emissions, tags, mask)
        scripted = wrap(crf)
        none = scripted(emissions, tags, mask=mask, reduction="none")
        assert none.shape == (2,)
        assert_close(none, expected)
        assert_close(scripted(emissions, tags, mask=mask, reduction="sum"), expected.sum())
        assert_close(scripted(emissions, tags, mask=mask, reduction="mean"), expected.mean())
        tokens = 5 if masked else 6
        assert_close(scripted(emissions, tags, mask=mask, reduction="token_mean"), expected.sum() / tokens)

    def test_batch_first(self, wrap, device):
        crf = make_crf(device)
        other = make_crf(device, batch_first=True)
        other.load_state_dict(crf.state_dict())
        emissions, tags = make_batch(device)
        mask = torch.tensor(MASK, dtype=torch.uint8, device=device)
        time_first = wrap(crf)(emissions, tags, mask)
        batch_first = wrap(other)(emissions.transpose(0, 1), tags.transpose(0, 1), mask.transpose(0, 1))
        assert_close(batch_first, time_first)

    def test_requires_grad_of_parameters(self, device):
        """Parameters are plain: they can be written and frozen in place."""
        crf = make_crf(device)
        crf.transitions.requires_grad_(False).copy_(torch.zeros(5, 5))
        emissions, tags = make_batch(device)
        crf(emissions, tags).backward()
        assert crf.transitions.grad is None
        assert crf.start_transitions.grad is not None


# (module arguments, emissions, tags, mask, reduction, sentence), in the order in which torchcrf checks. Shapes are time
# first. Everything after the fault named is wrong as well: an earlier check must speak first, and no tag be read.
PAIR = "the first two dimensions of emissions and {} must match, got (1, 2) and (2, 2)"
ERRORS = {
    "dimension": (3, (1, 2), (2, 2, 2), (9, 9), "no", "emissions must have dimension of 3, got 2"),
    "tags": (10, (1, 2, 3), (2, 2), (9, 9), "no", "expected last dimension of emissions is 10, got 3"),
    "shape": (3, (1, 2, 3), (2, 2), (9, 9), "no", PAIR.format("tags")),
    "mask": (3, (1, 2, 3), (1, 2), (2, 2), "no", PAIR.format("mask")),
    "reduction": (3, (1, 2, 3), (1, 2), None, "no", "invalid reduction: no"),
}


def raised(call):
    """The sentence of the error; TorchScript puts a trace before it and raises its own class."""
    with pytest.raises((ValueError, torch.jit.Error)) as caught:
        call()
    return str(caught.value)


class TestErrors:
    @pytest.mark.parametrize("case", ERRORS)
    def test_forward(self, wrap, case, device):
        num_tags, emissions, tags, mask, reduction, sentence = ERRORS[case]
        # Tags that no model has: they must not be looked at before the arguments are found good.
        tags = torch.full(tags, 1 << 40, device=device)
        mask = None if mask is None else torch.ones(mask, dtype=torch.uint8, device=device)
        crf = wrap(make_crf(device, num_tags))
        message = raised(lambda: crf(torch.randn(emissions, device=device), tags, mask, reduction))
        assert sentence in message
        if isinstance(crf, CRF):
            assert message == sentence

    @pytest.mark.parametrize("case", ["dimension", "tags", "mask"])
    def test_decode(self, wrap, case, device):
        num_tags, emissions, _, mask, _, sentence = ERRORS[case]
        crf = wrap(make_crf(device, num_tags))
        mask = torch.ones(mask, dtype=torch.uint8, device=device)
        assert sentence in raised(lambda: crf.decode(torch.randn(emissions, device=device), mask))

    @pytest.mark.parametrize("batch_first", [False, True])
    @mask_dtypes
    def test_first_step(self, wrap, batch_first, dtype, device):
        if device.type != "cpu":
            pytest.skip("a mask on a GPU is not read")
        crf = wrap(make_crf(device, 3, batch_first))
        mask = torch.tensor([[0, 1], [1, 1]], dtype=dtype)  # wrong in time-first and in batch-first reading
        emissions = torch.randn(2, 2, 3)
        sentence = "mask of the first timestep must all be on"
        assert sentence in raised(lambda: crf(emissions, torch.full((2, 2), 7), mask, "no"))
        assert sentence in raised(lambda: crf.decode(emissions, mask))

    def test_constructor(self):
        with pytest.raises(ValueError, match=r"^labels must name 2 tags, got 3$"):
            CRF(2, labels=["O", "B-X", "I-X"])
        with pytest.raises(ValueError, match=r"^labels must be given where scheme is$"):
            CRF(2, scheme="BIO")
        with pytest.raises(TypeError):
            CRF(3, False, ["O", "B-X", "I-X"])


class TestDecode:
    @mask_dtypes
    def test_with_mask(self, wrap, dtype, device):
        crf = make_crf(device)
        emissions, _ = make_batch(device)
        mask = torch.tensor(MASK, dtype=dtype, device=device)
        best = wrap(crf).decode(emissions, mask=mask)
        assert best == expected_paths(crf, emissions, mask)
        assert [len(path) for path in best] == [3, 2]

    def test_without_mask(self, wrap, device):
        crf = make_crf(device)
        emissions, _ = make_batch(device)
        best = wrap(crf).decode(emissions)
        assert best == expected_paths(crf, emissions)
        assert type(best) is list
        assert all(type(path) is list and all(type(tag) is int for tag in path) for path in best)

    def test_batch_is_its_sequences(self, wrap, device):
        crf = wrap(make_crf(device))
        emissions, _ = make_batch(device, batch=10)
        assert crf.decode(emissions) == [crf.decode(emissions[:, b : b + 1])[0] for b in range(10)]

    def test_batch_first(self, wrap, device):
        crf = make_crf(device)
        other = make_crf(device, batch_first=True)
        other.load_state_dict(crf.state_dict())
        emissions, _ = make_batch(device)
        assert wrap(other).decode(emissions.transpose(0, 1)) == wrap(crf).decode(emissions)

    def test_empty_batch(self, device):
        assert make_crf(device).decode(torch.randn(4, 0, 5, device=device)) == []

    def test_training_graph(self, device):
        """Decoding of emissions on a graph, and tie-breaking towards the lowest tag."""
        crf = make_crf(device)
        emissions = torch.randn(3, 2, 5, device=device, requires_grad=True) * 2
        assert crf.decode(emissions) == expected_paths(crf, emissions)
        nn.init.zeros_(crf.transitions), nn.init.zeros_(crf.start_transitions), nn.init.zeros_(crf.end_transitions)
        assert crf.decode(torch.zeros(4, 2, 5, device=device)) == [[0] * 4] * 2


class TestTorchScript:
    def test_methods(self, device):
        scripted = torch.jit.script(make_crf(device))
        assert hasattr(scripted, "decode")
        assert [name for name, _ in scripted.named_parameters()] == [
            "start_transitions",
            "end_transitions",
            "transitions",
        ]

    def test_equals_eager(self, device):
        """Value, gradients and paths to the bit."""
        crf = make_crf(device, 7)
        emissions, tags = make_batch(device, 7, 9, 4)
        mask = torch.arange(9, device=device)[:, None] < torch.tensor([9, 4, 1, 7], device=device)
        scripted = torch.jit.script(crf)
        results = []
        for module in (crf, scripted):
            leaf = emissions.clone().requires_grad_()
            value = module(leaf, tags, mask, "token_mean")
            results.append([value.detach(), *torch.autograd.grad(value, [leaf, *crf.parameters()])])
        for ours, expected in zip(*results, strict=True):
            assert_same(ours, expected)
        assert scripted.decode(emissions, mask) == crf.decode(emissions, mask)

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_saved(self, device):
        """A scripted module survives a file, constraints included."""
        crf = CRF(3, labels=["O", "B-X", "I-X"]).to(device)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(crf), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        emissions, tags = make_batch(device, 3, 6, 4)
        assert_same(loaded(emissions, tags, reduction="none"), crf(emissions, tags, reduction="none"))
        assert loaded.decode(emissions) == crf.decode(emissions)

    def test_inside_a_model(self, device):
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.scores = nn.Linear(6, 4)
                self.crf = CRF(4, batch_first=True)

            def forward(self, x, tags):
                return -self.crf(self.scores(x), tags, reduction="mean")

        model = Tagger().to(device)
        x, tags = torch.randn(3, 5, 6, device=device), torch.randint(0, 4, (3, 5), device=device)
        assert_close(torch.jit.script(model)(x, tags), model(x, tags))


class TestBeyond:
    LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")

    def constrained(self, device):
        return CRF(5, labels=list(self.LABELS), batch_first=True).to(device)

    def allowed_paths(self, steps):
        allowed, starts, ends = fastnlp_ops.transition_mask(self.LABELS, "BIO")
        paths, _ = enumerate_paths(torch.zeros(steps, 5), torch.zeros(5, 5), None, None)
        fine = starts[paths[:, 0]] & ends[paths[:, -1]]
        for k in range(1, steps):
            fine &= allowed[paths[:, k - 1], paths[:, k]]
        return paths, fine

    def test_constraints_in_the_loss(self, device):
        """The probabilities of the allowed paths sum to 1, and the others have none: true -inf, not -10000."""
        crf = self.constrained(device)
        paths, fine = self.allowed_paths(4)
        assert 0 < fine.sum() < len(fine)
        for std in (1.0, 3e4):
            emissions = std * torch.randn(1, 4, 5, device=device)
            log_p = crf(emissions.expand(len(paths), -1, -1), paths.to(device), reduction="none").detach().cpu()
            assert (log_p[~fine] == -math.inf).all()
            assert (log_p[fine] > -math.inf).all()
            # Four float32 additions to scores of four times the largest emission.
            rounding = 4 * torch.finfo(torch.float32).eps * 4 * emissions.abs().max().item()
            assert abs(log_p[fine].double().exp().sum().item() - 1) < 1e-5 + rounding

    def test_constraints_in_decoding(self, device):
        crf = self.constrained(device)
        _, fine = self.allowed_paths(4)
        index = torch.tensor([125, 25, 5, 1])
        for std in (1.0, 3e4):
            emissions = std * torch.randn(50, 4, 5, device=device)
            for path in crf.decode(emissions):
                assert fine[(torch.tensor(path) * index).sum()]
        paths, _ = crf.viterbi(emissions, n_best=4)
        for path in paths.cpu().flatten(0, 1):
            assert fine[(path * index).sum()]

    def test_constraints_move_with_the_module(self, device):
        crf = copy.deepcopy(self.constrained(device)).double()
        emissions = torch.randn(8, 6, 5, device=device, dtype=torch.float64)
        assert_same(crf.viterbi(emissions)[0], self.constrained_like(crf).viterbi(emissions)[0])

    def constrained_like(self, crf):
        other = self.constrained(crf.transitions.device).double()
        other.load_state_dict(crf.state_dict())
        return other

    def test_gradients_of_banned_parameters(self, device):
        """Forbidden transitions get gradient exactly 0, so that training leaves them alone."""
        crf = self.constrained(device)
        allowed, starts, _ = fastnlp_ops.transition_mask(self.LABELS, "BIO")
        tags = torch.tensor([[0, 1, 2, 0], [3, 4, 4, 1]], device=device)
        crf(torch.randn(2, 4, 5, device=device), tags).backward()
        assert (crf.transitions.grad.cpu()[~allowed] == 0).all()
        assert (crf.start_transitions.grad.cpu()[~starts] == 0).all()
        assert (crf.transitions.grad.cpu()[allowed] != 0).all()

    def test_viterbi(self, device):
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

    def test_marginals(self, device):
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

    def test_autocast(self, device):
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

    def test_compile(self, device):
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

    def test_export(self, device):
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

    def test_pickle_and_deepcopy(self, device):
        crf = self.constrained(device)
        file = io.BytesIO()
        torch.save(crf, file)
        file.seek(0)
        emissions = torch.randn(4, 6, 5, device=device)
        expected = crf.decode(emissions)
        assert torch.load(file, weights_only=False).decode(emissions) == expected
        assert copy.deepcopy(crf).decode(emissions) == expected

    def test_trains(self, device):
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

    def test_in_threads(self, device):
        """Replicas in threads, as DataParallel runs them: no state is shared between calls."""
        from concurrent.futures import ThreadPoolExecutor

        crf = make_crf(device)
        batches = [make_batch(device, batch=5) for _ in range(8)]
        expected = [crf(*batch).detach() for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            for ours, alone in zip(pool.map(lambda batch: crf(*batch).detach(), batches), expected, strict=True):
                assert_same(ours, alone)
