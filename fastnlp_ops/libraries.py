"""Where the compiled ops are, for programs that load them without Python."""

from pathlib import Path


def library_path(device: str = "cpu") -> Path:
    """The shared library that holds the ops of a device: what ``dlopen`` takes in a program without Python.

    ``libfastnlp_cpu.so`` registers every op and its CPU kernels, ``libfastnlp_cuda.so``, loaded after it, the CUDA
    kernels that are C++. Both need nothing but libtorch, 2.10 or newer. A program of ``torch.jit`` or of AOTInductor
    runs after that (examples/cpp). The kernels that are Triton are not in a library: on a GPU, AOTInductor packages of
    GlobalPointer, multilabel losses and linear attention need ``fastnlp_ops.export.decompositions()``.

    Equivalent to:
        >>> import torch, fastnlp_ops
        >>> torch.ops.load_library(fastnlp_ops.library_path())  # which `import fastnlp_ops` does

    Args:
        device (str): "cpu" or "cuda".

    Returns:
        pathlib.Path

    Raises:
        ValueError: for another device.
        FileNotFoundError: where the package was built without the library.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    path = Path(__file__).parent / f"libfastnlp_{device}.so"
    if not path.exists():
        raise FileNotFoundError(f"fastnlp_ops was built without {path.name}: see CONTRIBUTING.md, Build")
    return path
