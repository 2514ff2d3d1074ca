"""The exponential and the logarithm of csrc/cpu/simd.h against float64, over the whole range of their arguments."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = r"""
#include <cstdio>
#include "cpu/simd.h"
using namespace fastnlp;

// Errors in units in the last place of the exact result, at every 16th float of a range (consecutive bit patterns).
template <class F, class G>
double worst(float first, float last, F approximate, G exact) {
  double most = 0;
  for (uint32_t bits = to_bits(first); bits <= to_bits(last); bits += 16 * 8) {
    float x[8], y[8];
    for (int l = 0; l < 8; ++l) x[l] = from_bits(bits + 16 * l);
    store(y, approximate(load(x)));
    for (int l = 0; l < 8; ++l) {
      const double truth = exact(static_cast<double>(x[l]));
      const float near = static_cast<float>(truth);
      const double unit = std::fabs(static_cast<double>(std::nextafterf(near, INFINITY)) - near);
      const double error = std::fabs(y[l] - truth) / unit;
      if (!(error <= most)) most = error;
    }
  }
  return most;
}

int main() {
  const auto exponential_of = [](Simd<float>::V x) { return exponential(x); };
  const auto logarithm_of = [](Simd<float>::V x) { return logarithm(x); };
  const auto exp = [](double x) { return std::exp(x); };
  const auto log = [](double x) { return std::log(x); };
  std::printf("%g %g %g %g\n", worst(1e-6f, 88.0f, exponential_of, exp), worst(-1e-6f, -87.2f, exponential_of, exp),
              worst(1e-37f, 0.99f, logarithm_of, log), worst(1.01f, 3e38f, logarithm_of, log));
  const float strange[8] = {NAN, -INFINITY, -87.4f, -1e30f, 0.0f, -0.0f, -NAN, -88.0f};
  float y[8];
  store(y, exponential(load(strange)));
  for (float value : y) std::printf("%g ", value == value ? value : 9.0f);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3"])
def test_exponential_and_logarithm(architecture, tmp_path, device):
    if architecture == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no AVX2")
    source, program = tmp_path / "simd.cpp", tmp_path / "simd"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O3", f"-march={architecture}", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"]
    subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    errors, values = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    # Half a unit is lost by rounding alone.
    assert all(0.5 <= float(error) <= 1.01 for error in errors.split()), errors
    assert values.split() == ["9", "0", "0", "0", "1", "1", "9", "0"]
