"""`pytest benchmarks`: the quick cases of every family under pytest-benchmark. Correctness is asserted, times never."""

import pytest

from benchmarks.harness import families, gate

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.filterwarnings("ignore")  # peers call torch in ways it has deprecated

CASES = [
    pytest.param(family, case, provider, id=f"{name}-{case.pass_name}-{case.label}-{provider}".replace(" ", "_"))
    for name, family in families().items()
    for case in family.cases("cpu", quick=True)
    for provider in case.providers
]


@pytest.mark.parametrize(("family", "case", "provider"), CASES)
def test_speed(benchmark, family, case, provider):
    make = family.PROVIDERS[provider]
    if make is None:
        pytest.skip(f"{provider} is not installed")
    inputs = family.make_inputs(case.shape, case.dtype, "cpu", case.ragged)
    work = make(case, inputs)
    assert gate(work.outputs(work.run()), family.truth(case, inputs)) is None
    benchmark.group = f"{case.op}, {case.pass_name}, {case.label}"
    benchmark(work.run)
