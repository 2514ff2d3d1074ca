"""The Triton kernels of linear attention, without a GPU: the family's own tests, run through the interpreter.

Segments are of 64 tokens there (tests/through_triton.py): longer texts are split, shorter ones take one kernel.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parent
# Some layouts for each map, so that each is met once: all of them take the interpreter ten minutes.
CASES = (
    "odd-elu odd_both-relu odd-identity odd_both-elu left-exp holes-elu holes_both-softmax cross-elu grouped-cosine "
    "grouped_both-exp sums-exp sums_both-relu packed-elu packed_both-exp packed_cross-softmax packed_state-exp "
    "gate_state-cosine gate_packed-elu gate_sums-identity decay-elu state-exp state_both-softmax one-elu "
    "no_sequence-elu no_token-exp no_key-softmax no_query-exp no_packed-elu"
)
ANY = f"({' or '.join(CASES.split())})"
RUNS = {
    "values": ("test_linear_attention.py", f"test_forward and f32 and {ANY}", 28),
    "gradients": ("test_linear_attention.py", f"test_backward and not test_backward_of_some and f32 and {ANY}", 28),
    "float64": ("test_linear_attention.py", "(test_forward or test_backward) and f64 and (gate-elu or left-exp)", 4),
    "maxima": ("test_linear_attention_adversarial.py", "maxima_that_move and exp and (rising or (late and causal))", 3),
    "numbers": ("test_linear_attention_adversarial.py", "bad_numbers and elu+1 and nan and causal", 3),
    "steps": (
        "test_linear_attention_step.py",
        "(steps_are and wide and (elu+1 or exp)) or (steps_with_decay and cosine) or (maxima and exp) or in_place",
        8,
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS)
def test_in_the_interpreter(run, device):
    if device.type != "cpu":
        pytest.skip("on a GPU the tests themselves run these kernels")
    file, selection, least = RUNS[run]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "through_triton", "-p", "no:cacheprovider", "-k", selection]
    command += ["-W", "ignore::RuntimeWarning"]  # of NumPy, where a GPU computes with infinities in silence
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([*command, str(TESTS / file)], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = int(result.stdout.rsplit(" passed", 1)[0].rsplit(None, 1)[-1].lstrip("="))
    assert passed >= least, f"only {passed} tests were selected"


class TooLarge:
    """Launched like a kernel, on a GPU that is too small for it."""

    def __getitem__(self, grid):
        def launch(**arguments):
            raise triton.OutOfResources(135168, 101376, "shared memory")

        return launch


def test_a_gpu_with_little_memory():
    from fastnlp_ops._triton.linear_attention_call import Call
    from fastnlp_ops._triton.linear_attention_tiles import ELU

    x = torch.zeros(1, 2, 1, 256)
    call = Call(x, x, x, *[None] * 7, ELU.value, False, True, 1.0, 1e-6)
    sentence = (
        "linear_attention of 256 and 256 channels in torch.float32 needs 135168 bytes of shared memory, this GPU has "
        "101376; bfloat16 needs less"
    )
    with pytest.raises(RuntimeError) as caught:
        call._launch(TooLarge(), 2, None, 64, False, q_ptr=x)
    assert str(caught.value) == sentence
