"""A causal model of bytes, with linear attention or, as its twin, with softmax attention and a cache of all keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)

from fastnlp_ops import LinearAttention

WIDTH = 128
HEADS = 4
LAYERS = 2
BYTES = 256
WINDOW = 6  # bytes that a position sees without attention: sums have no order, neighbours need one
BUCKETS = 1 << 12  # for the last byte, the last two, ..., the last six
FACTORS = torch.tensor([1_000_003**i % (1 << 31) for i in range(WINDOW)])  # of a hash: any large odd numbers do


class SoftmaxAttention(nn.MultiheadAttention):
    """The same parameters and the same three ways to call it, for comparison."""

    room = 0  # tokens that the cache of keys and values holds at most

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, T, 3 E]
        q, k, v = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return q, k, v  # [B, H, T, D]

    def prefill(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        q, k, v = self.project(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        cache = [k.shape[2], *(y.new_empty((*y.shape[:2], self.room, y.shape[3])) for y in (k, v))]
        for own, new in zip(cache[1:], (k, v), strict=True):
            own[:, :, : cache[0]] = new
        return self.out_proj(out.transpose(1, 2).flatten(2)), cache

    def step(self, x: Tensor, cache: list[Any]) -> Tensor:
        q, k, v = self.project(x[:, None])
        length, keys, values = cache
        keys[:, :, length], values[:, :, length] = k[:, :, 0], v[:, :, 0]
        cache[0] += 1
        out = F.scaled_dot_product_attention(q, keys[:, :, : cache[0]], values[:, :, : cache[0]])
        return self.out_proj(out.flatten(1))


def memory_size(memory: Any) -> int:
    """Bytes of a layer's memory that are in use."""
    if isinstance(memory, list):
        return sum(y[:, :, : memory[0]].nbytes for y in memory[1:])
    return sum(y.nbytes for y in memory if y is not None)


class Block(nn.Module):
    def __init__(self, attention: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = attention(WIDTH, HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        mixed, memory = self.attention.prefill(self.norms[0](x))
        x = x + mixed
        return x + self.feed_forward(self.norms[1](x)), memory

    def step(self, x: Tensor, memory: Any) -> Tensor:
        x = x + self.attention.step(self.norms[0](x), memory)
        return x + self.feed_forward(self.norms[1](x))


class StreamModel(nn.Module):
    """Scores of the next byte [B, T, 256]; `prefill` reads a text, `step` goes on by one byte."""

    def __init__(self, attention: type[nn.MultiheadAttention] = LinearAttention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WINDOW * BUCKETS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)  # small: what was never seen is to say little
        self.blocks = nn.ModuleList(Block(attention) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, BYTES)

    def embed(self, windows: Tensor) -> Tensor:
        """[..., WINDOW] bytes, the last is the current one, to [..., WIDTH]."""
        ends = (windows.flip(-1) * FACTORS).cumsum(-1) % BUCKETS  # of one byte, of two, ...
        return self.embedding(ends + BUCKETS * torch.arange(WINDOW)).sum(-2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens)[0]

    def prefill(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        """Scores, and what is remembered: the last bytes, and the memory of each layer."""
        windows = F.pad(tokens, (WINDOW - 1, 0)).unfold(1, WINDOW, 1)
        x = self.embed(windows)
        remembered = [windows[:, -1]]
        for block in self.blocks:
            x, memory = block.prefill(x)
            remembered.append(memory)
        return self.output(self.norm(x)), remembered

    @torch.no_grad()
    def step(self, token: Tensor, remembered: list[Any]) -> Tensor:
        """Scores [B, 256] behind one more byte [B]."""
        remembered[0] = torch.cat([remembered[0][:, 1:], token[:, None]], 1)
        x = self.embed(remembered[0])
        for block, memory in zip(self.blocks, remembered[1:], strict=True):
            x = block.step(x, memory)
        return self.output(self.norm(x))
