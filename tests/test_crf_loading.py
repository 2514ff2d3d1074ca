"""Constraints of a CRF with labels after every way of loading it, and parameters that nobody initialised."""

import copy
import io
import math
import pickle

import pytest
import torch
from tools import assert_same
from torch import nn

import fastnlp_ops
from fastnlp_ops import CRF, MEMM, _crf_constraints

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
N = len(LABELS)


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """No layer has had its masks made before."""
    monkeypatch.setattr(_crf_constraints, "_MADE", {})


def make():
    return CRF(N, batch_first=True, labels=LABELS)


def fill(crf, state):
    """Memory that nobody initialised, as a loader that knows the parameters alone fills it."""
    crf.load_state_dict(state)
    return crf


def saved(crf, save, load):
    file = io.BytesIO()
    save(crf, file)
    file.seek(0)
    return load(file)


def on_meta(crf):
    with torch.device("meta"):
        return make()


def emptied(crf):
    """Meta device, to_empty and reset_parameters: other parameters, which are as good."""
    empty = on_meta(crf).to_empty(device=crf.transitions.device)
    empty.reset_parameters()
    return empty


def assigned(crf):
    empty = on_meta(crf)
    empty.load_state_dict(crf.state_dict(), assign=True)
    return empty


def loaded_to_meta(crf):
    """A module read on the meta device, as big models are, then filled."""
    empty = saved(crf, torch.save, lambda file: torch.load(file, weights_only=False, map_location="meta"))
    return fill(empty.to_empty(device=crf.transitions.device), crf.state_dict())


def under_device(crf):
    with torch.device(crf.transitions.device):
        return fill(make(), crf.state_dict())


def first_called_in(context):
    def way(crf):
        other = fill(make().to(crf.transitions.device), crf.state_dict())
        with context():
            other.decode(torch.randn(1, 3, N, device=crf.transitions.device))
        return other

    return way


def first_called_in_transform(crf):
    other = fill(make().to(crf.transitions.device), crf.state_dict())

    def total(transitions):
        scores = other._scores(True)[0] + transitions
        return scores.masked_fill(scores == -math.inf, 0).sum()

    forbidden = torch.func.grad(total)(crf.transitions.detach()) == 0
    assert_same(forbidden, ~fastnlp_ops.transition_mask(LABELS)[0].to(forbidden.device))
    return other


def from_peer(crf):
    """A checkpoint of torchcrf has the same keys, and knows no constraints."""
    torchcrf = pytest.importorskip("torchcrf")
    peer = torchcrf.CRF(N)
    peer.load_state_dict(crf.state_dict())
    return fill(make(), peer.state_dict())


WAYS = {
    "made": lambda crf: crf,
    "deepcopy": copy.deepcopy,
    "pickle": lambda crf: pickle.loads(pickle.dumps(crf)),
    "torch.save": lambda crf: saved(crf, torch.save, lambda file: torch.load(file, weights_only=False)),
    "load_state_dict": lambda crf: fill(make(), crf.state_dict()),
    "load_state_dict(assign=True)": assigned,
    "to_empty, reset_parameters": emptied,
    "to_empty, load_state_dict": lambda crf: fill(
        copy.deepcopy(crf).to("meta").to_empty(device=crf.transitions.device), crf.state_dict()
    ),
    "torch.load(map_location=meta)": loaded_to_meta,
    "with torch.device": under_device,
    "double": lambda crf: crf.double(),
    "half": lambda crf: crf.half(),
    "bfloat16": lambda crf: crf.to(torch.bfloat16),
    "half and back": lambda crf: crf.half().float(),
    "first called in inference_mode": first_called_in(torch.inference_mode),
    "first called in no_grad": first_called_in(torch.no_grad),
    "first called in torch.func.grad": first_called_in_transform,
    "peer": from_peer,
}


def assert_constrained(crf):
    """Loss, gradients and paths are those of the functions, given -inf where the scheme forbids."""
    device, dtype = crf.transitions.device, crf.transitions.dtype
    emissions, tags = torch.randn(6, 5, N, device=device), torch.zeros(6, 5, dtype=torch.int64, device=device)
    tags[0] = torch.tensor([0, 1, 2, 2, 3])
    tags[1, 1] = 2  # I-PER after O
    tags[2, 0] = 4  # I-LOC first
    allowed = [x.to(device) for x in fastnlp_ops.transition_mask(LABELS, "BIO")]
    parameters = (crf.transitions, crf.start_transitions, crf.end_transitions)
    scores = [p.masked_fill(~on, -math.inf) for p, on in zip(parameters, allowed, strict=True)]
    value = crf(emissions, tags, reduction="none")
    assert_same(value, fastnlp_ops.crf_log_likelihood(emissions, tags, *scores))
    assert (value == -math.inf).tolist() == [False, True, True, False, False, False]
    value[[0, 3, 4, 5]].sum().backward()
    assert (crf.transitions.grad[~allowed[0]] == 0).all()
    assert (crf.start_transitions.grad[~allowed[1]] == 0).all()
    assert crf.transitions.grad[allowed[0]].isfinite().all()
    assert_same(crf.viterbi(emissions)[0], fastnlp_ops.crf_viterbi(emissions, *scores)[0])
    assert crf.decode(emissions) == crf.viterbi(emissions)[0].tolist()
    assert_same(crf.marginals(emissions), fastnlp_ops.crf_marginals(emissions, *scores))
    assert list(crf.state_dict()) == ["start_transitions", "end_transitions", "transitions"]
    assert list(crf.buffers()) == []
    assert crf.transitions.dtype == dtype


@pytest.mark.parametrize("way", WAYS)
def test_constraints(way, device):
    if way == "peer" and device.type != "cpu":
        pytest.skip("the peer's checkpoint is on the CPU")
    assert_constrained(WAYS[way](make().to(device)))


def test_peer_loads_ours():
    torchcrf = pytest.importorskip("torchcrf")
    crf, peer = make(), torchcrf.CRF(N)
    peer.load_state_dict(crf.state_dict(), strict=True)
    assert_same(peer.transitions.detach(), crf.transitions.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_script_after_loading(device):
    """TorchScript, too, takes the constraints from the labels; the scripted module survives a file."""
    crf = emptied(make().to(device))
    scripted = torch.jit.script(crf)
    emissions = torch.randn(6, 5, N, device=device)
    tags = crf.viterbi(emissions)[0]
    tags[0] = 2  # I-PER first
    for module in (scripted, saved(scripted, torch.jit.save, torch.jit.load)):
        assert module.decode(emissions) == crf.decode(emissions)
        assert_same(module(emissions, tags, reduction="none"), crf(emissions, tags, reduction="none"))
    assert_constrained(crf)
    assert_constrained(copy.deepcopy(crf))


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_sharded(tmp_path):
    """FSDP2 with meta initialisation: fully_shard, to_empty, reset_parameters."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(4, N)
            self.crf = CRF(N, batch_first=True, labels=LABELS)

        def forward(self, x, tags):
            emissions = self.scores(x)
            return self.crf(emissions, tags, reduction="none"), self.crf.viterbi(emissions)[0]

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Tagger()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        for module in (model.scores, model.crf):
            module.reset_parameters()
        x, tags = torch.randn(3, 4, 4), torch.tensor([[0, 0, 1, 2], [0, 2, 0, 0], [2, 2, 0, 0]])
        value, paths = model(x, tags)
        assert (value == -math.inf).tolist() == [False, True, True]
        value[0].backward()
        plain = Tagger()
        plain.load_state_dict({name: p.full_tensor() for name, p in model.state_dict().items()})
        expected, expected_paths = plain(x, tags)
        assert_same(value.detach(), expected.detach())
        assert_same(paths, expected_paths)
    finally:
        dist.destroy_process_group()


# A model over transformers.


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(**sizes, vocab_size=20, id2label=dict(enumerate(LABELS)))

    class BertCrf(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config, add_pooling_layer=False)
            self.scores = nn.Linear(config.hidden_size, config.num_labels)
            self.crf = CRF(config.num_labels, batch_first=True, labels=config.id2label, ignore_index=-100)
            self.memm = MEMM(config.num_labels, batch_first=True, ignore_index=-100)
            self.post_init()

        def forward(self, input_ids, labels):
            emissions = self.scores(self.bert(input_ids).last_hidden_state)
            return -self.crf(emissions, labels, reduction="token_mean") - self.memm(emissions, labels)

    class Initialised(BertCrf):
        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, (CRF, MEMM)):
                module.reset_parameters()

    encoder = transformers.BertModel(config, add_pooling_layer=False)
    return encoder, BertCrf, Initialised, config


def train(model):
    labels = torch.tensor([[-100, 1, 2, -100, 0], [-100, -100, 3, 4, -100]])
    loss = model.train()(torch.randint(20, (2, 5)), labels)
    loss.backward()
    return loss


def test_from_pretrained(bert, tmp_path):
    """What save_pretrained wrote comes back with its constraints, and the labels come from the config's JSON."""
    _, _, Initialised, config = bert
    model = Initialised(config)
    model.save_pretrained(tmp_path)
    loaded = Initialised.from_pretrained(tmp_path)
    for ours, expected in zip(loaded.parameters(), model.parameters(), strict=True):
        assert_same(ours.detach(), expected.detach())
    other = make()
    other.load_state_dict(loaded.crf.state_dict())
    for emissions in torch.randn(20, 1, 6, N):
        assert loaded.crf.decode(emissions) == other.decode(emissions)
    loaded.crf.ignore_index = None
    assert_constrained(loaded.crf)


def test_from_the_checkpoint_of_an_encoder(bert, tmp_path):
    """Fine-tuning: the encoder is loaded, the CRF is drawn from U(-0.1, 0.1) as if it had been made."""
    encoder, _, Initialised, _ = bert
    encoder.save_pretrained(tmp_path)
    model = Initialised.from_pretrained(tmp_path, id2label=dict(enumerate(LABELS)))
    assert_same(model.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)
    for parameter in model.crf.parameters():
        assert parameter.abs().max() <= 0.1
        assert parameter.std() > 0.01
    assert model.memm.transitions.std() > 0.1
    assert train(model).isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_without_init_weights(bert, tmp_path):
    """The model class forgot _init_weights: a sentence with the remedy instead of a loss of NaN."""
    encoder, BertCrf, _, _ = bert
    encoder.save_pretrained(tmp_path)
    model = BertCrf.from_pretrained(tmp_path, id2label=dict(enumerate(LABELS)))
    with pytest.raises(ValueError, match=r"^start_transitions of CRF must be initialised, got NaN.*_init_weights"):
        train(model)
    model.crf.reset_parameters()
    with pytest.raises(ValueError, match=r"^transitions of MEMM must be initialised, got NaN.*reset_parameters\(\)"):
        train(model)
    model.memm.reset_parameters()
    assert train(model).isfinite()


# Parameters that are NaN.


@pytest.mark.parametrize("kind", [CRF, MEMM])
def test_nan_parameters(kind, device):
    layer = kind(3, batch_first=True).to(device)
    emissions, tags = torch.randn(2, 4, 3, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    with torch.no_grad():
        layer.transitions[0, 1] = math.nan
    for _ in range(2):  # once more: a refused call leaves nothing behind
        with pytest.raises(ValueError, match=rf"^transitions of {kind.__name__} must be initialised, got NaN"):
            layer(emissions, tags)
    assert layer.eval()(emissions, tags).isnan()  # evaluation shows what is there
    with torch.no_grad():
        layer.transitions[0, 1] = -math.inf  # forbidden by hand, not a fault
    assert layer.train()(emissions, tags).isfinite()


def test_nan_parameters_are_looked_for_once(device, monkeypatch):
    """No step after the first pays for it, and a compiled or transformed call has no values to look at."""
    looked = []
    isnan = torch.Tensor.isnan
    monkeypatch.setattr(torch.Tensor, "isnan", lambda x: looked.append(x) or isnan(x))
    crf = make().to(device)
    emissions, tags = torch.randn(2, 4, N, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    torch._dynamo.reset()
    torch.compile(crf, fullgraph=True, backend="aot_eager")(emissions, tags)
    assert looked == []
    for _ in range(3):
        crf(emissions, tags).backward()
    assert len(looked) == 3
