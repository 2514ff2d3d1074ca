"""fastnlp_ops.CRF does what torchcrf.CRF promises. Expectations are enumerated."""

import io

import pytest
import torch
from crf_problems import enumerate_paths
from tools import assert_same
from torch import nn

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


@pytest.mark.filterwarnings("ignore:where received a uint8 condition tensor:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
class TestAgainstTorchcrf:
    """Side by side with the real package, where it is installed."""

    def pair(self, batch_first, device):
        torchcrf = pytest.importorskip("torchcrf")
        theirs = torchcrf.CRF(9, batch_first=batch_first).to(device)
        ours = CRF(9, batch_first=batch_first).to(device)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def test_values_and_gradients(self, batch_first, device):
        ours, theirs = self.pair(batch_first, device)
        emissions = torch.randn(17, 17, 9, device=device)
        tags = torch.randint(0, 9, (17, 17), device=device)
        mask = torch.arange(17, device=device) < torch.randint(1, 18, (17, 1), device=device)
        mask = mask if batch_first else mask.T
        for arguments in ((emissions, tags), (emissions, tags, mask)):
            for reduction in ("none", "sum", "mean", "token_mean"):
                value, expected = (crf(*arguments, reduction=reduction) for crf in (ours, theirs))
                assert_close(value, expected, rtol=1e-5, atol=1e-5)  # they sum log-likelihoods of -40 in float32
        value.backward(), expected.backward()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)

    def test_paths(self, batch_first, device):
        """To the bit, ties included: the same numbers are compared in the same order."""
        ours, theirs = self.pair(batch_first, device)
        for draw in (torch.randn, lambda *shape, device: torch.randint(-2, 3, shape, device=device).float()):
            emissions = draw(25, 25, 9, device=device)
            for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                parameter.data = other.data = draw(*other.shape, device=device)
            mask = torch.arange(25, device=device) < torch.randint(1, 26, (25, 1), device=device)
            mask = mask if batch_first else mask.T
            assert ours.decode(emissions) == theirs.decode(emissions)
            assert ours.decode(emissions, mask) == theirs.decode(emissions, mask)
