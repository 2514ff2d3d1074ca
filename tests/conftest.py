"""Options, fixtures and process-wide settings of the test suite.

`pytest --device cuda` runs the same tests with their tensors on a GPU.
"""

import zlib

import pytest
import torch

# Fills memory that torch hands out uninitialised with NaN, so that reading it shows up in results. warn_only: a few
# torch functions that the references use have no deterministic CUDA form.
torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tensors under test: cpu, cuda, cuda:1 ...")
    parser.addoption("--seed", default=0, type=int, help="another number gives other random inputs to every test")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed(request):
    """Every test draws its own numbers, the same in every run and in any order of tests."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + request.config.getoption("--seed"))


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
