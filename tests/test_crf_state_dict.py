"""Converted parameters give the log-likelihood and the best path that the peer's own scoring gives.

Each peer's scoring is restated here in plain PyTorch as a function of one path, and enumerated.
"""

import itertools

import numpy as np
import pytest
import torch

import fastnlp_ops
from fastnlp_ops.crf_state_dict import convert_crf_state_dict

TAGS, STEPS = 3, 4


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def path_scores(score, tags, steps=STEPS):
    """Every path over `tags` tags, and its score."""
    paths = list(itertools.product(range(tags), repeat=steps))
    return paths, torch.stack([score(path) for path in paths])


def our_scores(state, emissions):
    start, end, transitions = (state[name] for name in ("start_transitions", "end_transitions", "transitions"))

    def score(path):
        total = start[path[0]] + end[path[-1]]
        total = total + sum(emissions[t, tag] for t, tag in enumerate(path))
        return total + sum(transitions[i, j] for i, j in itertools.pairwise(path))

    return path_scores(score, emissions.shape[1], len(emissions))


def assert_same_model(state, emissions, peer_score):
    paths, ours = our_scores(state, emissions)
    _, theirs = path_scores(peer_score, emissions.shape[1], len(emissions))
    torch.testing.assert_close(ours.log_softmax(0), theirs.log_softmax(0))
    assert paths[ours.argmax()] == paths[theirs.argmax()]


def with_ends(emissions, matrix, start, end):
    def score(path):
        total = start[path[0]] + emissions[0, path[0]]
        for t in range(1, len(path)):
            total = total + matrix[path[t - 1], path[t]] + emissions[t, path[t]]
        return total + end[path[-1]]

    return score


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("pytorch-crf", ("transitions", "start_transitions", "end_transitions")),
        ("bert4torch", ("transitions", "start_transitions", "end_transitions")),
        ("TorchCRF", ("trans_matrix", "start_trans", "end_trans")),
        ("fastNLP", ("trans_m", "start_scores", "end_scores")),
        ("allennlp", ("transitions", "start_transitions", "end_transitions")),
    ],
)
def test_layouts_with_vectors(layout, names):
    emissions, matrix, start, end = random(STEPS, TAGS), random(TAGS, TAGS), random(TAGS), random(TAGS)
    for prefix in ("", "model.crf."):
        peer = {prefix + name: value for name, value in zip(names, (matrix, start, end), strict=True)}
        peer["encoder.weight"] = random(2, 2)
        state = convert_crf_state_dict(peer, layout, num_tags=TAGS)
        assert list(state) == ["start_transitions", "end_transitions", "transitions"]
        assert_same_model(state, emissions, with_ends(emissions, matrix, start, end))
        assert all(tensor.data_ptr() not in {value.data_ptr() for value in peer.values()} for tensor in state.values())


@pytest.mark.parametrize(("layout", "name"), [("fastNLP", "trans_m"), ("allennlp", "transitions")])
def test_vectors_that_a_peer_left_away(layout, name):
    emissions, matrix, zeros = random(STEPS, TAGS), random(TAGS, TAGS), torch.zeros(TAGS, dtype=torch.float64)
    state = convert_crf_state_dict({name: matrix}, layout)
    assert_same_model(state, emissions, with_ends(emissions, matrix, zeros, zeros))


@pytest.mark.parametrize("layout", ["fastNLP", "allennlp"])
def test_constraints(layout):
    """The peer's decoder adds its constraints to the scores; its log-likelihood does not see them."""
    emissions, matrix, start, end = random(STEPS, TAGS), random(TAGS, TAGS), random(TAGS), random(TAGS)
    allowed = torch.ones(TAGS + 2, TAGS + 2, dtype=torch.bool)
    allowed[0, 1] = allowed[2, 2] = allowed[TAGS, 0] = allowed[1, TAGS + 1] = False
    ban = (~allowed).double() * -10000
    if layout == "fastNLP":
        peer = {"trans_m": matrix, "start_scores": start, "end_scores": end, "_constrain": ban}
    else:
        peer = {
            "transitions": matrix,
            "start_transitions": start,
            "end_transitions": end,
            "_constraint_mask": allowed.double(),
        }
    free = with_ends(emissions, matrix, start, end)
    assert_same_model(convert_crf_state_dict(peer, layout), emissions, free)
    state = convert_crf_state_dict(peer, layout, constraints=True)
    decoder = with_ends(emissions, matrix + ban[:TAGS, :TAGS], start + ban[TAGS, :TAGS], end + ban[:TAGS, TAGS + 1])
    paths, ours = our_scores(state, emissions)
    _, theirs = path_scores(decoder, TAGS)
    legal = theirs > -5000
    torch.testing.assert_close(ours[legal], theirs[legal])
    assert (~legal).any()
    assert (ours[~legal] == -torch.inf).all()
    assert paths[ours.argmax()] == paths[theirs.argmax()]


@pytest.mark.parametrize("banned", [False, True])
def test_paddlenlp(banned):
    """START is the last tag, STOP the one before it, and both have emissions."""
    width = TAGS + 2
    emissions, matrix = random(STEPS, width), random(width, width)
    if banned:
        matrix[:, -1] = -10000.0  # nothing enters START
        matrix[-2, :] = -10000.0  # nothing leaves STOP

    def score(path):
        chain = [width - 1, *path, width - 2]
        total = sum(emissions[t, tag] for t, tag in enumerate(path))
        return total + sum(matrix[i, j] for i, j in itertools.pairwise(chain))

    assert_same_model(convert_crf_state_dict({"transitions": matrix}, "PaddleNLP"), emissions, score)
    state = convert_crf_state_dict({"transitions": matrix}, "PaddleNLP", num_tags=TAGS)
    assert_same_model(state, emissions[:, :TAGS], score)


def test_flair():
    """START is the one before the last tag, STOP the last, rows are where a step goes."""
    width = TAGS + 2
    emissions, matrix = random(STEPS, width), random(width, width)
    matrix[-2, :] = -10000.0
    matrix[:, -1] = -10000.0

    def score(path):
        total, previous = 0.0, width - 2
        for t, tag in enumerate(path):
            total, previous = total + emissions[t, tag] + matrix[tag, previous], tag
        return total + matrix[width - 1, previous]

    peer = {"crf.transitions": matrix, "linear.weight": random(width, 2)}
    state = convert_crf_state_dict(peer, "flair")
    assert_same_model(state, emissions, score)
    dropped = convert_crf_state_dict(peer, "flair", num_tags=TAGS)
    assert_same_model(dropped, emissions[:, :TAGS], score)
    # The bans of START and STOP inside a sequence make the two the same model, log Z included.
    keep, drop = our_scores(state, emissions)[1].logsumexp(0), our_scores(dropped, emissions[:, :TAGS])[1].logsumexp(0)
    torch.testing.assert_close(keep, drop)


@pytest.mark.parametrize("lr_multiplier", [1.0, 100.0])
def test_bert4keras(lr_multiplier):
    emissions, weight = random(STEPS, TAGS), random(TAGS, TAGS) / lr_multiplier

    def score(path):
        one_hot = torch.nn.functional.one_hot(torch.tensor(path), TAGS).double()
        point = torch.einsum("ni,ni->", one_hot, emissions)
        return point + torch.einsum("ni,ij,nj->", one_hot[:-1], lr_multiplier * weight, one_hot[1:])

    for peer in ({"trans": weight}, {"conditional_random_field_1/trans:0": weight.numpy()}):
        state = convert_crf_state_dict(peer, "bert4keras", lr_multiplier=lr_multiplier)
        assert_same_model(state, emissions, score)


def test_dtype_and_device_are_kept():
    peer = {"transitions": np.zeros((2, 2), np.float32), "start_transitions": torch.zeros(2), "end_transitions": [0, 0]}
    state = convert_crf_state_dict(peer, "pytorch-crf")
    assert state["transitions"].dtype == torch.float32
    assert not state["transitions"].requires_grad


@pytest.mark.parametrize(
    ("peer", "options", "sentence"),
    [
        (
            {},
            {"layout": "kaldi"},
            (
                "layout must be one of pytorch-crf, bert4torch, TorchCRF, fastNLP, allennlp, PaddleNLP, flair, "
                "bert4keras, got 'kaldi'"
            ),
        ),
        (
            {"transitions": (2, 2)},
            {"layout": "TorchCRF"},
            "state_dict of layout TorchCRF must have the key 'trans_matrix', got transitions",
        ),
        (
            {"transitions": (2, 2), "start_transitions": (2,)},
            {"layout": "pytorch-crf"},
            "state_dict of layout pytorch-crf must have the key 'end_transitions', got transitions, start_transitions",
        ),
        (
            {"a.transitions": (2, 2), "b.transitions": (2, 2)},
            {"layout": "flair"},
            "state_dict of layout flair must have one key 'transitions', got a.transitions, b.transitions",
        ),
        ({"trans": (2, 3)}, {"layout": "bert4keras"}, "trans must be a square matrix, got shape (2, 3)"),
        (
            {"transitions": (2, 2)},
            {"layout": "PaddleNLP"},
            "transitions must have START, STOP and a tag, got shape (2, 2)",
        ),
        (
            {"transitions": (5, 5)},
            {"layout": "flair", "num_tags": 4},
            "transitions must be of 4 tags, got shape (5, 5)",
        ),
        (
            {"trans_matrix": (2, 2), "start_trans": (3,), "end_trans": (2,)},
            {"layout": "TorchCRF"},
            "start_trans must be [2], got shape (3,)",
        ),
        (
            {"trans_m": (2, 2), "_constrain": (2, 2)},
            {"layout": "fastNLP", "constraints": True},
            "_constrain must be [4, 4], got shape (2, 2)",
        ),
        (
            {"trans_m": (2, 2)},
            {"layout": "fastNLP", "constraints": True},
            "state_dict of layout fastNLP must have the key '_constrain', got trans_m",
        ),
        (
            {"trans": (2, 2)},
            {"layout": "bert4keras", "constraints": True},
            "constraints are an option of layouts fastNLP and allennlp, got layout 'bert4keras'",
        ),
        (
            {"transitions": (2, 2)},
            {"layout": "flair", "lr_multiplier": 2.0},
            "lr_multiplier is an option of layout bert4keras, got layout 'flair'",
        ),
    ],
)
def test_errors(peer, options, sentence):
    with pytest.raises(ValueError) as error:
        convert_crf_state_dict({name: torch.zeros(shape) for name, shape in peer.items()}, **options)
    assert str(error.value) == sentence


def test_module_takes_a_peers_parameters():
    source, target = fastnlp_ops.CRF(4), fastnlp_ops.CRF(4)
    state = {
        "crf.trans_matrix": source.transitions.detach(),
        "crf.start_trans": source.start_transitions.detach(),
        "crf.end_trans": source.end_transitions.detach(),
    }
    target.load_peer_state_dict(state, "TorchCRF")
    for ours, expected in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, expected)
