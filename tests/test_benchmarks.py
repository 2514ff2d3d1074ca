"""The benchmark harness itself: what it refuses, writes, resumes and counts. No time is asserted."""

import csv
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import gpu, harness, measure, plots, report
from benchmarks.harness import Case, Goal, Outcome, Results, Work

WHERE = {"device": "test", "torch": "2", "triton": "", "commit": "abc", "date": "2020-01-02"}
QUIET = Console(quiet=True)


def squares(wrong=()):
    """A family whose op is x * x; the value of a provider named in `wrong` is off by that factor."""
    factors = dict(wrong)

    def provider(name):
        def make(case, x):
            def run():
                x.grad = None
                value = (x * x).sum()
                value.backward()
                return value

            def outputs(value):
                return {"value": value.double() * factors.get(name, 1.0), "dx": x.grad.double()}

            return Work(run, outputs, [x])

        return make

    def truth(case, x):
        wide = x.detach().double()
        return {"value": ((wide**2).sum(), 1e-5), "dx": (2 * wide, 1e-5)}

    def make_inputs(shape, dtype, device, ragged):
        return torch.randn(shape, requires_grad=True)

    def floor(case, x, ceilings):
        return 1e-6

    providers = {harness.OURS: provider(harness.OURS), "peer": provider("peer"), "elsewhere": None}
    return SimpleNamespace(PROVIDERS=providers, make_inputs=make_inputs, truth=truth, floor=floor)


def outcome_of(family):
    case = Case("square", "forward+backward", (4, 8), tuple(family.PROVIDERS))
    return next(harness.run_case(family, case, "cpu", [1], 0.001, {1: measure.Ceilings("cpu", 1)}))


@pytest.fixture(autouse=True)
def same_threads():
    """run_case sets the thread count; the next test finds the old one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_right_providers_are_timed():
    outcome = outcome_of(squares())
    assert set(outcome.rounds) == {harness.OURS, "peer"}
    assert outcome.absent == ["elsewhere"]
    assert not outcome.wrong
    assert outcome.ratio("peer") > 0


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_gate_refuses_a_wrong_provider(factor):
    outcome = outcome_of(squares({"peer": factor}))
    assert "value is off by" in outcome.wrong["peer"]
    assert {row["provider"] for row in harness.rows(outcome, WHERE)} == {harness.OURS, "floor"}
    assert [line[4] for line in report.times([outcome]).lines if line[3] == "peer"] == ["WRONG"]


def test_slack_is_for_peers_alone():
    family = squares({"peer": 1 + 5e-5, harness.OURS: 1 + 5e-5})
    family.PEER_SLACK = 10
    assert set(outcome_of(family).wrong) == {harness.OURS}


def test_a_provider_that_raises_is_wrong_not_the_end():
    def broken(case, x):
        return 1 / 0

    family = squares()
    family.PROVIDERS["peer"] = broken
    assert outcome_of(family).wrong == {"peer": "ZeroDivisionError: division by zero"}


def test_gate_names_what_is_missing_or_misshapen():
    truth = {"value": (torch.zeros(2, dtype=torch.float64), 1e-5)}
    assert harness.gate({}, truth) == "value is missing"
    assert harness.gate({"value": torch.zeros(3)}, truth) == "value has shape (3,), expected (2,)"
    assert harness.gate({"value": torch.zeros(2)}, truth) is None


def test_rows_have_the_columns(tmp_path):
    path = tmp_path / "deep" / "test.csv"
    outcome = outcome_of(squares())
    for _ in range(2):
        harness.append_rows(path, harness.rows(outcome, WHERE))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    header = "op,provider,pass,shape,dtype,threads,ms_p20,ms_p50,ms_p80,peak_mib,device,torch,triton,commit,date"
    assert path.read_text().splitlines()[0] == header
    assert len(rows) == 2 * 5  # two providers with times and saved bytes, and the floor; appended twice
    ours, floor = rows[0], rows[4]
    assert ",".join(ours.values()).startswith("square,fastnlp_ops,forward+backward,4x8,float32,1,")
    assert float(ours["ms_p20"]) <= float(ours["ms_p50"]) <= float(ours["ms_p80"])
    assert floor["provider"] == "floor"
    assert float(floor["ms_p50"]) == pytest.approx(1e-3)


def test_percentiles():
    assert harness.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.0, 5.0)
    assert harness.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratio_is_the_median_of_pairs():
    """A machine that is slow for a round slows both of that round's times, and moves no ratio."""
    case = Case("op", "forward", (1,), (harness.OURS, "peer"))
    rounds = {harness.OURS: [[1.0], [1.0], [9.0]], "peer": [[5.0], [5.0], [45.0]]}
    assert Outcome(case, 1, rounds=rounds).ratio("peer") == 5.0


def test_interleave_takes_turns():
    order = []
    rounds = measure.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 0.0)
    assert len(rounds["a"]) == len(rounds["b"]) == 3
    turns = "".join(order[6:])  # behind three calls each to estimate
    assert turns == ("a" * measure.MOST_CALLS + "b" * measure.MOST_CALLS) * 3


def peak_of(call):
    """In a process of its own: in this one threads of other tests may grow meanwhile."""
    code = f"import torch; from benchmarks import measure; print(measure.peak_bytes(lambda: {call}, 'cpu'))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)


def test_memory():
    x = torch.randn(1024, requires_grad=True)
    assert peak_of("torch.ones(1000, 1000)") == pytest.approx(4e6, rel=0.01)
    # exp saves its result, sin its argument, which is the same storage; the product saves sin's result and x, an input.
    assert measure.saved_bytes(lambda: (x.exp().sin() * x).sum(), [x]) == 2 * 4096


def test_memory_beside_torch():
    """Kernels allocate their scratch by themselves: 32 MB that torch's allocator never sees."""
    if not measure.grown_bytes(lambda: torch.ones(1_000_000)):
        pytest.skip("this kernel does not tell how large a process was")
    assert peak_of("bytearray(32_000_000)") == pytest.approx(32e6, rel=0.05)


def test_ceilings():
    found = measure.Ceilings("cpu", 1)
    assert 1e-7 < found.copy_s(1e6) < 1e-1
    assert 1e-7 < found.fma_s(1e6) < 1e-1


def test_crf_floor_counts_bytes_and_multiply_adds():
    crf = pytest.importorskip("benchmarks.bench_crf")
    inputs = crf.make_inputs((2, 5, 3), "float32", "cpu")
    bytes_alone = SimpleNamespace(device="cpu", copy_s=float, fma_s=bool)
    products_alone = SimpleNamespace(device="cpu", copy_s=bool, fma_s=float)
    train, lists = (Case("", name, (2, 5, 3), ()) for name in (crf.TRAIN, crf.LISTS))
    # 10 tokens: 12 bytes of emissions read, 12 of gradients written, 8 of tags; 8 steps of 9 multiply-adds, three times
    assert crf.floor(train, inputs, bytes_alone) == 10 * (12 + 12 + 8)
    assert crf.floor(train, inputs, products_alone) == 3 * 8 * 9
    assert crf.floor(lists, inputs, bytes_alone) == 10 * (12 + 8)
    assert crf.floor(lists, inputs, products_alone) == 8 * 9


@pytest.mark.filterwarnings("ignore")  # peers call torch in ways it has deprecated
@pytest.mark.parametrize("ragged", [False, True])
def test_crf_providers_agree_with_float64(ragged):
    crf = pytest.importorskip("benchmarks.bench_crf")
    for pass_name in (crf.TRAIN, crf.LISTS, crf.TENSORS, crf.MARGINALS):
        case = Case("op", pass_name, (3, 12, 5), (), ragged=ragged)
        inputs = crf.make_inputs(case.shape, case.dtype, "cpu", ragged)
        truth = crf.truth(case, inputs)
        for name, make in crf.PROVIDERS.items():
            without = {crf.MARGINALS: (crf.PEER, crf.LINEAR), crf.LISTS: (crf.LINEAR,), crf.TENSORS: (crf.LINEAR,)}
            if make and name not in without.get(pass_name, ()):
                work = make(case, inputs)
                assert harness.gate(work.outputs(work.run()), truth) is None, (name, pass_name)


@pytest.mark.parametrize("ragged", [False, True])
def test_crf_closed_form_is_the_reference(ragged):
    crf = pytest.importorskip("benchmarks.bench_crf")
    case = Case("op", crf.TRAIN, (4, 9, 5), (), ragged=ragged)
    inputs = crf.make_inputs(case.shape, case.dtype, "cpu", ragged)
    wide = [value.detach().double() for value in (inputs.emissions, *inputs[-3:])]
    on = torch.arange(9) < inputs.lengths[:, None]
    found = crf.closed_form(wide[0], inputs.tags, *wide[1:], on)
    for value, (expected, _) in zip(found, crf.truth(case, inputs).values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


CELLS = {"multilabel": (5, 300), "global_pointer": (2, 40, 3, 8), "linear_attention": (2, 128, 3, 8)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CELLS)
def test_cell_providers_agree_with_float64(name):
    """Every pass of every provider but the compiled one, whose compiler takes half a minute each time."""
    family = pytest.importorskip(f"benchmarks.bench_{name}")
    passes = {case.pass_name: case for case in family.cases("cpu", quick=False)}
    for case in passes.values():
        for ragged in (False, True):
            inputs = family.make_inputs(CELLS[name], "float32", "cpu", ragged)
            truth = family.truth(case, inputs)
            for provider in set(case.providers) - {family.COMPILED}:
                if make := family.PROVIDERS[provider]:
                    work = make(case, inputs)
                    assert harness.gate(work.outputs(work.run()), truth) is None, (case.pass_name, provider, ragged)


@pytest.mark.parametrize("pass_name", ["forward+backward", "Efficient forward+backward"])
def test_global_pointer_closed_form_is_the_reference(pass_name):
    proof = pytest.importorskip("benchmarks.proof_global_pointer")
    bench = pytest.importorskip("benchmarks.bench_global_pointer")
    inputs = bench.make_inputs((3, 20, 2, 6), "float64", "cpu", ragged=True)
    case = Case("global_pointer_loss", pass_name, inputs.shape, ())
    work = bench.PROVIDERS["reference"](case, inputs)
    found = work.outputs(work.run())
    for value, expected in zip(proof.closed_form(inputs, pass_name), found.values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_global_pointer_spans_are_judged():
    bench = pytest.importorskip("benchmarks.bench_global_pointer")
    case = Case("global_pointer_decode", bench.QUARTER, (2, 20, 2, 8), ())
    inputs = bench.make_inputs(case.shape, "float32", "cpu")
    truth = bench.truth(case, inputs)
    spans = bench.PROVIDERS["reference"](case, inputs).run()
    below = torch.tensor([[0, 0, 5, 2]])  # ends before it starts: its score is -inf
    for wrong in (spans[1:], spans.flip(0), torch.cat([spans[:1], spans]), torch.cat([below, spans])):
        assert "is off by" in harness.gate(bench.span_errors(inputs, bench.QUARTER, wrong), truth)
    assert harness.gate(bench.span_errors(inputs, bench.QUARTER, spans), truth) is None


def test_global_pointer_floor_counts_cells():
    bench = pytest.importorskip("benchmarks.bench_global_pointer")
    inputs = bench.make_inputs((2, 5, 3, 4), "float32", "cpu")
    bytes_alone = SimpleNamespace(device="cpu", copy_s=float, fma_s=lambda *_: 0.0)
    products_alone = SimpleNamespace(device="cpu", copy_s=bool, fma_s=lambda count, *_: float(count))
    wanted = {  # 2 sequences of 15 cells and 5 tokens; 3 heads of 4 channels of q and of k
        bench.FORWARD: (2 * 5 * 3 * 8 * 4, 30 * 3 * (4 + 10)),
        bench.TRAIN: (3 * 2 * 5 * 3 * 8 * 4, 30 * 3 * (3 * 4 + 10)),
        bench.DECODE: (2 * 5 * 3 * 8 * 4, 30 * 3 * 4),
        bench.EFFICIENT_TRAIN: (3 * 2 * 5 * (8 + 6) * 4, 30 * (3 * (4 + 3) + 10)),
    }
    for pass_name, (nbytes, products) in wanted.items():
        case = Case(bench.OPS[pass_name], pass_name, inputs.shape, ())
        assert bench.floor(case, inputs, bytes_alone) == nbytes
        assert bench.floor(case, inputs, products_alone) == products


def test_linear_attention_by_hand_is_the_reference():
    proof = pytest.importorskip("benchmarks.proof_linear_attention")
    bench = pytest.importorskip("benchmarks.bench_linear_attention")
    for pass_name in (bench.CAUSAL_TRAIN, bench.BOTH_TRAIN):
        inputs = bench.make_inputs((2, 128, 3, 8), "float64", "cpu", ragged=True)
        work = bench.PROVIDERS["reference"](Case("linear_attention", pass_name, inputs.shape, ()), inputs)
        for name, distance in work.outputs(work.run()).items():
            # eps is added by hand, and a bound in the reference
            assert distance < 1e-6, (pass_name, name)
    assert proof.relative(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)) == 0.5


def test_linear_attention_floor_counts_tokens():
    bench = pytest.importorskip("benchmarks.bench_linear_attention")
    inputs = bench.make_inputs((2, 64, 3, 4), "float32", "cpu")
    bytes_alone = SimpleNamespace(device="cpu", copy_s=float, fma_s=lambda *_: 0.0)
    products_alone = SimpleNamespace(device="cpu", copy_s=bool, fma_s=lambda count, *_: float(count))
    tokens = 2 * 64 * 3
    wanted = {
        bench.CAUSAL: (4 * tokens * 16, tokens * (2 * 16 + 10 * 2 * 4)),
        bench.BOTH_TRAIN: (12 * tokens * 16, tokens * (6 * 16 + 2 * 10 * 2 * 4)),
        bench.DECODE: (2 * 6 * 4 * 5 * 4, 2 * 6 * 16),
    }
    for pass_name, (nbytes, products) in wanted.items():
        case = Case("linear_attention", pass_name, inputs.shape, ())
        assert bench.floor(case, inputs, bytes_alone) == nbytes
        assert bench.floor(case, inputs, products_alone) == products


def test_goals():
    goal = Goal("speed", "cpu", lambda results: results.ratio("forward", "4x8", "peer"), at_least=3)
    case = Case("op", "forward", (4, 8), ())
    results = Results([Outcome(case, 1, rounds={harness.OURS: [[1.0]], "peer": [[4.0]]})])
    assert report.goal_line(goal, results) == ("speed", ">= 3x", "4.00x", "met")
    assert report.goal_line(goal._replace(at_least=5), results)[-1] == "MISSED"
    assert report.goal_line(goal, Results())[-1] == "not measured"


def test_pictures(tmp_path):
    rows = harness.rows(outcome_of(squares()), WHERE)
    paths = plots.draw(rows, tmp_path, "test")
    assert [path.name for path in paths] == ["test-time.png", "test-memory.png", "test-floor.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_device_slug():
    slug = harness.device_slug("cpu")
    assert slug.endswith("-cores")
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


# The GPU proof, without a GPU


def fake_part(name, code, **more):
    return gpu.Part(name, 30, [sys.executable, "-c", code], **more)


def test_parts_resume(tmp_path):
    count, state_path = tmp_path / "count", tmp_path / "state.json"
    parts = [
        fake_part("one", f"open({str(count)!r}, 'a').write('x'); print('good')"),
        fake_part("two", "raise SystemExit('bad')"),
    ]
    for _ in range(2):
        state = gpu.run_parts(parts, state_path, "commit", tmp_path, {}, 60, QUIET)
    assert count.read_text() == "x"  # passed, so not run again; the failed one was
    assert {name: part["status"] for name, part in state["parts"].items()} == {"one": "passed", "two": "failed"}
    assert state["parts"]["two"]["last"] == "bad"
    assert (tmp_path / "log.txt").read_text().count("=== two") == 2
    gpu.run_parts(parts[:1], state_path, "another commit", tmp_path, {}, 60, QUIET)
    assert count.read_text() == "xx"


def test_parts_stop_in_time(tmp_path):
    part = fake_part("slow", "import time; print('begun', flush=True); time.sleep(60)")
    result = gpu.run_part(part, tmp_path, {}, tmp_path / "log.txt", 3.0, QUIET)
    assert (result["status"], result["last"]) == ("cut off", "begun")
    state = gpu.run_parts([part], tmp_path / "state.json", "commit", tmp_path, {}, 5, QUIET)
    assert state["parts"] == {}  # less than 20 seconds are left, so it is not started


def test_parts_need_their_word(tmp_path):
    """A sanitizer that exits 0 without its summary has checked nothing."""
    part = fake_part("memcheck", "print('SUMMARY: 3 errors')", must_say="SUMMARY: 0 errors")
    assert gpu.run_part(part, tmp_path, {}, tmp_path / "log.txt", 30, QUIET)["status"] == "failed"
    missing = gpu.Part("memcheck", 30, ["no-such-sanitizer"])
    result = gpu.run_part(missing, tmp_path, {}, tmp_path / "log.txt", 30, QUIET)
    assert (result["status"], result["last"]) == ("failed", "no-such-sanitizer: No such file or directory")


def test_parts_find_every_family():
    parts = gpu.parts(Path("out"), "commit")
    benches = [f"bench-{family}" for family in harness.family_names()]
    assert [part.name for part in parts] == ["tests", "memcheck", "racecheck", *benches]


def test_stage_holds_the_wheel_and_not_the_checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    for name in ("fastnlp_ops/crf.py", "tests/test_crf.py", "build/left.txt", ".git/left.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("checkout")
    (root / "dist").mkdir()
    with zipfile.ZipFile(root / "dist" / "fastnlp_ops-1-py3-none-any.whl", "w") as archive:
        archive.writestr("fastnlp_ops/crf.py", "wheel")
    monkeypatch.setattr(gpu, "ROOT", root)
    monkeypatch.setattr(gpu, "WORK", root / "build" / "gpu")
    stage, environment = gpu.set_stage(gpu.find_wheel(None), None)
    assert (stage / "fastnlp_ops/crf.py").read_text() == "wheel"
    assert (stage / "tests/test_crf.py").read_text() == "checkout"
    assert not (stage / "build").exists()
    assert not (stage / ".git").exists()
    assert environment["PYTHONPATH"].startswith(str(stage))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_gpu_proof_without_cuda():
    command = [sys.executable, "-m", "benchmarks", "gpu"]
    result = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "")
    assert result.stdout == "The GPU proof needs a CUDA device, and torch finds none on this machine.\n"
