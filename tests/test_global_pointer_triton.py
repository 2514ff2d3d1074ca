"""The Triton kernels, without a GPU: the family's own tests, run through the interpreter against the same reference.

float32 and float64 alone: the interpreter multiplies bfloat16 tiles as integers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent
CASES = (
    "ragged left efficient biased one-f odd relations band_of_pairs mask_zero no_sequence no_token no_label positions"
)
RUNS = {
    "values": ("test_global_pointer.py", f"test_forward and f32 and ({' or '.join(CASES.split())})", 30),
    "gradients": ("test_global_pointer.py", f"test_backward and f32 and ({' or '.join(CASES.split())})", 30),
    "float64": ("test_global_pointer.py", "(test_forward or test_backward) and f64 and (prime or efficient)", 6),
    "decoding": ("test_global_pointer_decode.py", "not compile and not memory", 10),
    "multilabel": ("test_multilabel.py", "(test_forward or test_backward) and f32", 10),
    "bytes of bools": ("test_bools.py", "few and (span or multilabel or attention or decay)", 8),
}


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS)
def test_in_the_interpreter(run, device):
    if device.type != "cpu":
        pytest.skip("on a GPU the tests themselves run these kernels")
    file, selection, least = RUNS[run]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "through_triton", "-p", "no:cacheprovider", "-k", selection]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([*command, str(TESTS / file)], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = int(result.stdout.rsplit(" passed", 1)[0].rsplit(None, 1)[-1].lstrip("="))
    assert passed >= least, f"only {passed} tests were selected"
