"""Bad calls of the CRF functions, and the exact sentences that they get."""

import pytest
import torch
from crf_problems import log_likelihood, make_problem

import fastnlp_ops


def good_arguments(device):
    problem = make_problem(2, 3, 4, device)
    return {
        "emissions": problem.emissions,
        "tags": problem.tags,
        "allowed_tags": problem.allowed,
        "transitions": problem.transitions,
        "start_transitions": problem.start,
        "end_transitions": problem.end,
        "mask": None,
        "cu_seqlens": None,
    }


PADDED = [
    (ValueError, {"emissions": torch.randn(4, 7)}, "emissions must be [B, T, N], got shape (4, 7)"),
    (ValueError, {"emissions": torch.randn(2, 3, 0)}, "emissions must have at least one tag, got shape (2, 3, 0)"),
    (
        ValueError,
        {"cu_seqlens": torch.tensor([0, 3])},
        "emissions must be [total, N], got shape (2, 3, 4)",
    ),
    (
        TypeError,
        {"emissions": torch.ones(2, 3, 4, dtype=torch.int64)},
        "emissions must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    (
        ValueError,
        {"transitions": torch.randn(4, 5)},
        "transitions must be [N, N] or [B, T-1, N, N] with N = 4, got shape (4, 5)",
    ),
    (
        ValueError,
        {"transitions": torch.randn(2, 3, 4, 4)},
        "transitions must be [N, N] or [B, T-1, N, N] with N = 4, got shape (2, 3, 4, 4)",
    ),
    (ValueError, {"start_transitions": torch.randn(3)}, "start_transitions must be [N] with N = 4, got shape (3,)"),
    (ValueError, {"end_transitions": torch.randn(4, 1)}, "end_transitions must be [N] with N = 4, got shape (4, 1)"),
    (
        TypeError,
        {"end_transitions": torch.zeros(4, dtype=torch.int64)},
        "end_transitions must be floating point, got torch.int64",
    ),
    (ValueError, {"mask": torch.ones(3, 2)}, "mask must be [B, T] = (2, 3), got shape (3, 2)"),
    (
        TypeError,
        {"mask": torch.ones(2, 3, dtype=torch.complex64)},
        "mask must be bool, integer or floating point, got torch.complex64",
    ),
]
PACKED = [
    (
        ValueError,
        {"transitions": torch.randn(2, 2, 4, 4)},
        "transitions must be [N, N] with N = 4, got shape (2, 2, 4, 4)",
    ),
    (ValueError, {"mask": torch.ones(6)}, "mask must be None where cu_seqlens is given"),
    (ValueError, {"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens must be [B + 1], got shape (1, 2)"),
    (ValueError, {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "cu_seqlens must be [B + 1], got shape (0,)"),
    (TypeError, {"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be int32 or int64, got torch.float32"),
]
CALLS = {
    "crf_log_partition": (),
    "crf_log_likelihood": ("tags",),
    "crf_partial_log_likelihood": ("allowed_tags",),
    "crf_marginals": (),
    "crf_viterbi": (),
    "crf_sample": (),
    "crf_entropy": (),
}


def assert_raises(error, sentence, function, arguments, **options):
    with pytest.raises(error) as caught:
        getattr(fastnlp_ops, function)(
            arguments["emissions"],
            *(arguments[name] for name in CALLS[function]),
            *(arguments[name] for name in ("transitions", "start_transitions", "end_transitions")),
            mask=arguments["mask"],
            cu_seqlens=arguments["cu_seqlens"],
            **options,
        )
    assert str(caught.value) == sentence


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("number", range(len(PADDED)))
def test_errors(function, number, device):
    error, bad, sentence = PADDED[number]
    arguments = good_arguments(device) | {name: value.to(device) for name, value in bad.items()}
    if "emissions" in bad:  # the check of allowed tags comes first
        arguments["allowed_tags"] = torch.ones_like(arguments["emissions"], dtype=torch.bool)
    assert_raises(error, sentence, function, arguments)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("number", range(len(PACKED)))
def test_errors_of_packed(function, number, device):
    error, bad, sentence = PACKED[number]
    arguments = good_arguments(device)
    arguments |= {name: arguments[name].flatten(0, 1) for name in ("emissions", "tags", "allowed_tags")}
    arguments |= {"cu_seqlens": torch.tensor([0, 2, 6], device=device)}
    arguments |= {name: value.to(device) for name, value in bad.items()}
    assert_raises(error, sentence, function, arguments)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("offsets", [[0, 5], [1, 6], [0, 7, 6], [0, -1, 6]], ids=str)
def test_errors_of_offsets(function, offsets, device):
    if device.type != "cpu":
        pytest.skip("values on a GPU are not read")
    arguments = good_arguments(device)
    arguments |= {name: arguments[name].flatten(0, 1) for name in ("emissions", "tags", "allowed_tags")}
    arguments |= {"cu_seqlens": torch.tensor(offsets)}
    sentence = "cu_seqlens must rise from 0 to the number of rows of emissions, 6"
    assert_raises(ValueError, sentence, function, arguments)


def test_errors_of_tags(device):
    def check(error, sentence, tags):
        assert_raises(error, sentence, "crf_log_likelihood", good_arguments(device) | {"tags": tags.to(device)})

    check(ValueError, "tags must be [B, T] = (2, 3), got shape (2, 4)", torch.zeros(2, 4, dtype=torch.int64))
    check(TypeError, "tags must be integers, got torch.float32", torch.zeros(2, 3))
    check(TypeError, "tags must be integers, got torch.bool", torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("tag", [-100, -1, 4, 9, 2**40])
def test_errors_of_tag_values(tag, device):
    """Out of range at a valid step: an error on the CPU; on a GPU, where nothing reads values, NaN in that sequence."""
    problem, leaves = make_problem(4, 5, 4, device, mask="left").leaves()
    problem.mask[2, 3] = True
    problem.tags = problem.tags.clamp(min=0).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(tag))
    if device.type == "cpu":
        with pytest.raises(ValueError) as caught:
            log_likelihood(fastnlp_ops, problem)
        assert str(caught.value) == f"tags must be in [0, 4), got tag {tag} at sequence 2, step 3"
    else:
        value = log_likelihood(fastnlp_ops, problem)
        assert value.isnan().tolist() == [False, False, True, False]
        (demissions,) = torch.autograd.grad(value.sum(), leaves[:1])
        assert demissions[[0, 1, 3]].isfinite().all()
        assert demissions[2, 3].isnan().all()


def test_errors_of_options(device):
    arguments = good_arguments(device)
    assert_raises(ValueError, "n_best must be at least 1, got 0", "crf_viterbi", arguments, n_best=0)
    assert_raises(ValueError, "num_samples must be at least 0, got -1", "crf_sample", arguments, num_samples=-1)
    bad = arguments | {"allowed_tags": torch.ones(2, 3, 5, dtype=torch.bool, device=device)}
    sentence = "allowed_tags must be (2, 3, 4) as emissions, got shape (2, 3, 5)"
    assert_raises(ValueError, sentence, "crf_partial_log_likelihood", bad)


@pytest.mark.parametrize(
    "name", ["transitions", "start_transitions", "end_transitions", "tags", "mask", "allowed_tags"]
)
def test_errors_of_devices(name, device):
    arguments = good_arguments(device)
    function = {"tags": "crf_log_likelihood", "allowed_tags": "crf_partial_log_likelihood"}.get(
        name, "crf_log_partition"
    )
    value = torch.ones(2, 3, dtype=torch.bool) if name == "mask" else arguments[name]
    sentence = f"{name} must be on the device of emissions, {arguments['emissions'].device}, got meta"
    assert_raises(ValueError, sentence, function, arguments | {name: value.to("meta")})


def test_empty_emissions_may_have_any_strides(device):
    """contiguous() gives an empty tensor as it is, so the ops must take it."""
    emissions = torch.randn(0, 7, 3, 2, device=device)[..., 0]
    tensors = (emissions, torch.randn(3, 3, device=device), None, None, None, None)
    paths, scores = torch.ops.fastnlp_ops.crf_viterbi(*tensors)
    assert paths.shape == (0, 7) and scores.shape == (0,)
    value, _ = torch.ops.fastnlp_ops.crf_log_partition(*tensors, True)
    assert value.shape == (0,)


@pytest.mark.parametrize("n_best", [10**14, 2**62])
def test_errors_of_memory(n_best):
    """What cannot be allocated gets a sentence in torch's words."""
    emissions, transitions = torch.randn(1, 3, 2), torch.randn(2, 2)
    shape = f"shape (1, {n_best}, 3) in Long"
    with pytest.raises(RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory") as caught:
        fastnlp_ops.crf_viterbi(emissions, transitions, n_best=n_best)
    assert shape in str(caught.value)
