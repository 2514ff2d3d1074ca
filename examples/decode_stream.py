"""Train a small causal model on the standard library's source, and let it write: a token takes as long at the end of a
long text as at its beginning, and the memory does not grow. Softmax attention does the same beside it.

python examples/decode_stream.py                     a minute of training, 8192 bytes of Python-like text, a picture
python examples/decode_stream.py --prompt "class "   another beginning
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import before_torch  # noqa: F401

# isort: split
import torch
from files import check_writable
from picture import save_stream
from python_corpus import library_paths
from screen import Screen, progress, run, seed
from sentences import InputError
from stream_model import SoftmaxAttention, StreamModel, memory_size
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)

BATCH_SIZE = 16
LENGTH = 256  # bytes of a training text
LEARNING_RATE = 4e-3
TEMPERATURE = 0.6
INDENT = b"    "  # one byte to the model, for a model of a minute does not count spaces
SHOWN = 1500  # bytes of the text that are printed
CHECKED = 1024  # bytes whose scores are compared with a pass over the whole text
# Both are float32, in another order of operations: scores of about 10 came up to 2e-5 apart.
TOLERANCE = 1e-3


@dataclass
class Size:
    files: int  # of the standard library
    seconds: float
    tokens: int


FULL = Size(files=400, seconds=60, tokens=8192)
QUICK = Size(files=30, seconds=4, tokens=512)


@dataclass
class Stream:
    """How decoding went, token by token."""

    name: str
    seconds: list[float]
    memory: list[int]  # bytes

    def milliseconds(self, first: int, last: int) -> float:
        """The median over these tokens."""
        return 1000 * torch.tensor(self.seconds[first:last]).median().item()


def read_library(seed: int, files: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and those of every tenth file to test on."""
    texts = [path.read_bytes().replace(INDENT, b"\t") for path in library_paths(random.Random(seed))[:files]]
    parts = b"".join(t for i, t in enumerate(texts) if i % 10), b"".join(texts[::10])
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    if min(len(train), len(test)) <= LENGTH:
        raise InputError(f"the standard library has too little source: {len(train)} and {len(test)} bytes")
    return train, test


def draw(text: Tensor) -> Tensor:
    """[B, LENGTH + 1] of it, from anywhere."""
    starts = torch.randint(len(text) - LENGTH, (BATCH_SIZE, 1))
    return text[starts + torch.arange(LENGTH + 1)].long()


def loss_of(model: StreamModel, batch: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(model: StreamModel, text: Tensor, seconds: float, screen: Screen) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses: list[float] = []
    begin = time.perf_counter()
    with progress(screen) as bar:
        task = bar.add_task("training, seconds", total=round(seconds), note="")
        while (passed := time.perf_counter() - begin) < seconds or not losses:
            # The rate rises over 20 steps and falls to nothing when the time is over.
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (len(losses) + 1) / 20) * (1 - min(1, passed / seconds))
            loss = loss_of(model, draw(text))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.update(task, completed=round(passed), note=f"{len(losses)} steps, {losses[-1]:.3f} nats per byte")
        bar.update(task, completed=round(seconds))
    return losses


@torch.no_grad()
def decode(
    model: StreamModel, prompt: Tensor, tokens: int, given: Tensor | None, name: str, screen: Screen
) -> tuple[Tensor, Tensor, Stream]:
    """The text [T] that the model writes, or reads where one is given, the scores behind each of its first tokens, and
    how long each took.
    """
    scores, remembered = model.prefill(prompt[None])
    row, written, kept = scores[:, -1], [], []
    stream = Stream(name, [], [])
    with progress(screen) as bar:
        task = bar.add_task(name, total=tokens, note="")
        for i in range(tokens):
            begin = time.perf_counter()
            token = (row / TEMPERATURE).softmax(-1).multinomial(1)[:, 0] if given is None else given[i : i + 1]
            row = model.step(token, remembered)
            stream.seconds.append(time.perf_counter() - begin)
            stream.memory.append(sum(memory_size(memory) for memory in remembered[1:]))
            written.append(token)
            if i < CHECKED:
                kept.append(row)
            if i % 64 == 0:
                bar.update(task, completed=i, note=f"{stream.milliseconds(-64, i + 1):.2f} ms per token")
        bar.update(task, completed=tokens)
    return torch.cat(written), torch.cat(kept), stream


def train_and_decode(args: argparse.Namespace, screen: Screen) -> int:
    size = QUICK if args.quick else FULL
    seconds = size.seconds if args.seconds is None else args.seconds
    tokens = size.tokens if args.tokens is None else args.tokens
    if not 0 < seconds < math.inf or tokens < 2:
        raise InputError(f"--seconds must be above 0 and --tokens at least 2, got {seconds} and {tokens}")
    if not args.prompt:
        raise InputError("--prompt must have at least one character")
    picture = args.output / "decode_stream.png"
    check_writable(picture)
    torch.manual_seed(args.seed)
    text, held_out = read_library(args.seed, size.files)
    model = StreamModel()
    parameters = sum(p.numel() for p in model.parameters())
    screen.print(f"{len(text)} bytes of source to train on, {len(held_out)} to test on; {parameters} parameters")
    losses = train(model, text, seconds, screen)
    with torch.no_grad():
        tested = sum(loss_of(model, draw(held_out)).item() for _ in range(8)) / 8
    screen.print(f"held-out text: {tested:.3f} nats per byte after {len(losses)} steps\n")

    prompt = torch.tensor(list(os.fsencode(args.prompt)))
    written, scores, linear = decode(model, prompt, tokens, None, "linear attention", screen)
    shown = bytes(written[:SHOWN].tolist()).replace(b"\t", INDENT).decode(errors="replace")
    screen.print(args.prompt + shown, style="cyan")

    # The twin has the same parameters; what it would say with them is nothing, how long it takes is the question.
    twin = StreamModel(SoftmaxAttention)
    twin.load_state_dict(model.state_dict())
    for block in twin.blocks:
        block.attention.room = len(prompt) + tokens
    _, _, softmax = decode(twin, prompt, tokens, written, "softmax attention", screen)

    last = max(1, tokens // 8)
    for stream in (linear, softmax):
        first_ms, last_ms = stream.milliseconds(0, last), stream.milliseconds(tokens - last, tokens)
        screen.print(
            f"{stream.name}: {first_ms:.3f} ms per token in the first {last}, {last_ms:.3f} in the last {last}; "
            f"memory {stream.memory[0] / 1024:.0f} to {stream.memory[-1] / 1024:.0f} KiB"
        )
    save_stream(picture, losses, [linear, softmax])
    with torch.no_grad():
        whole = model(torch.cat([prompt, written[: len(scores)]])[None])[0, len(prompt) :]
    difference = (whole - scores).abs().max().item()
    screen.print(
        f"scores of {len(scores)} tokens, one by one and in one pass, differ by at most {difference:.1e} (tolerance "
        f"{TOLERANCE:.0e})\npicture: {picture}"
    )
    if difference <= TOLERANCE:
        return 0
    print("decode_stream: token by token the model says something else than in one pass", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="def ", help='what the text begins with (default: "def ")')
    parser.add_argument("--seconds", type=float, help=f"of training (default: {FULL.seconds})")
    parser.add_argument("--tokens", type=int, help=f"bytes to write (default: {FULL.tokens})")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the picture (default: out)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that everything works")
    return run("decode_stream", parser, argv, train_and_decode)


if __name__ == "__main__":
    sys.exit(main())
