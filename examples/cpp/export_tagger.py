"""Writes a tagger for main.cpp, as a package of AOTInductor and as TorchScript, with a batch; prints its tags."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fastnlp_ops


class Tagger(nn.Module):
    """Hidden states [B, T, 8] and a mask [B, T] to the best tags [B, T], -1 where masked."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 5)
        self.crf = fastnlp_ops.CRF(5, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tags as a tensor: lists, which crf.decode gives, are of no fixed size."""
        crf = self.crf
        scores = (crf.transitions, crf.start_transitions, crf.end_transitions)
        paths, _ = fastnlp_ops.crf_viterbi(self.project(x), *scores, mask=mask)
        return paths


def main(folder: Path) -> None:
    """Writes tagger.pt2, tagger.pt and inputs.pt."""
    torch.manual_seed(0)
    tagger, x = Tagger().eval(), torch.randn(3, 7, 8)
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    with torch.no_grad():
        program = torch.export.export(tagger, (x, mask), dynamic_shapes=({0: B, 1: T}, {0: B, 1: T}))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "tagger.pt2"))
        torch.jit.trace(tagger, (x, mask)).save(folder / "tagger.pt")
        longer = torch.randn(2, 11, 8), torch.arange(11) < torch.tensor([[11], [6]])
        torch.save(list(longer), folder / "inputs.pt")
        print(tagger(*longer).tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
