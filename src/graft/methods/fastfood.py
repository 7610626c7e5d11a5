"""Fastfood: a random projection of a short vector into a tensor, from a seed alone (Le et al. 2013, arXiv 1408.3060).

    P x = (H G Pi H B x)[:D] / sqrt(LL sum(G^2) D / LL),   LL = 2^ceil(log2 D),   x (d) padded with zeros to LL

H is the unnormalized Walsh-Hadamard transform, B random signs, Pi a random permutation, G random normal values; the
divisor makes |P x| about |x|. If d is more than LL, the first LL coordinates alone are used.

B, Pi and G are made by a generator of our own (splitmix64 on counters, keyed by SHA-256), in integers alone: the same
on every platform and with every version of torch. G is the sum of 16 random bytes, centred: normal in its first three
moments, its fourth 2.5 % short; logarithms and cosines would differ in their last digits from machine to machine.

Shape legend: D values of a tensor, L padded to LL, d coordinates.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

GENERATOR = 1
"""The version of the generator; a file that names another cannot be read."""
STEP, MIX_1, MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
BYTES, PAIRS = 0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF
CHUNK = 2**22
"""Values that are drawn at once, so that the generator needs little memory of its own."""


def key_of(seed: int, name: str, stream: str) -> int:
    """A 64-bit key, from -2^63: the same for the same seed, name of a tensor, and use."""
    digest = hashlib.sha256(f"graft {GENERATOR}/{seed}/{stream}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def words(key: int, start: int, count: int, device: Any = None) -> Tensor:
    """Values number `start` to `start + count` of splitmix64 from the state `key`: 64 random bits each, as int64."""
    z = torch.arange(start + 1, start + count + 1, device=device) * STEP + key
    z = (z ^ _right(z, 30)) * MIX_1
    z = (z ^ _right(z, 27)) * MIX_2
    return z ^ _right(z, 31)


def signs(key: int, count: int, device: Any = None) -> Tensor:
    """Random +1 and -1, as int8."""
    return 1 - 2 * (words(key, 0, count, device) < 0).to(torch.int8)


def bells(key: int, count: int, device: Any = None) -> Tensor:
    """Random values with a bell curve around 0 and variance 87,380, as int16: 16 bytes each, less their mean."""
    out = torch.empty(count, dtype=torch.int16, device=device)
    for at in range(0, count, CHUNK):
        size = min(CHUNK, count - at)
        z = words(key, 2 * at, 2 * size, device)
        z = (z & BYTES) + (_right(z, 8) & BYTES)  # four sums of two bytes
        z = z.view(size, 2).sum(-1)
        z = (z & PAIRS) + (_right(z, 16) & PAIRS)
        out[at : at + size] = ((z & 0xFFFFFFFF) + (z >> 32) - 16 * 255 // 2).to(torch.int16)
    return out


def permutation(key: int, count: int, device: Any = None) -> Tensor:
    """A random permutation of 0 to count - 1, as int32: the order of random words."""
    return torch.sort(words(key, 0, count, device), stable=True).indices.to(torch.int32)


def walsh_hadamard(x_L: Tensor) -> Tensor:
    """The unnormalized Walsh-Hadamard transform H x of a vector whose length is a power of two, in L log L steps."""
    rows = 2 ** ((x_L.numel().bit_length() - 1) // 2)
    half = _columns(x_L.view(rows, -1)).T.contiguous()  # H is a Kronecker product: each half in long runs of memory
    return _columns(half).T.reshape(-1)


class Projection(nn.Module):
    """P of one tensor of `numel` values, for a vector of `size` coordinates. Its buffers are made of the seed again."""

    sign: Tensor
    order: Tensor
    bell: Tensor

    def __init__(self, seed: int, name: str, numel: int, size: int, device: Any = None) -> None:
        super().__init__()
        self.numel = numel
        length = 2 ** math.ceil(math.log2(numel))
        made = {
            "sign": (signs, min(size, length), torch.int8),
            "order": (permutation, length, torch.int32),
            "bell": (bells, length, torch.int16),
        }
        self.short = 2 ** math.ceil(math.log2(min(size, length)))
        meta = torch.device(device or "cpu").type == "meta"
        for use, (draw, count, dtype) in made.items():
            key, empty = key_of(seed, name, use), torch.empty(count if meta else 0, dtype=dtype, device=device)
            self.register_buffer(use, empty if meta else draw(key, count, device), persistent=False)
        squares = 1 if meta else int(self.bell.long().square().sum())
        self.factor = 1 / math.sqrt(squares * numel)

    def forward(self, vector_d: Tensor) -> Tensor:
        """P x, (D), for x (d); in fp32 at least, for it sums many values."""
        wide = vector_d if vector_d.dtype == torch.float64 else vector_d.float()
        return _Fastfood.apply(wide, self)


class _Fastfood(torch.autograd.Function):
    """P x and, backwards, the transpose: the graph keeps nothing but the seed's own buffers."""

    @staticmethod
    def forward(ctx: Any, vector_d: Tensor, made: Projection) -> Tensor:
        ctx.made, ctx.size = made, vector_d.numel()
        used = made.sign.numel()
        x = vector_d.new_zeros(made.short)
        x[:used] = vector_d[:used] * made.sign
        # Behind the coordinates all is zero, so that H repeats the transform of the short vector.
        x_L = walsh_hadamard(x).repeat(made.order.numel() // made.short)
        return walsh_hadamard(x_L[made.order] * made.bell)[: made.numel] * made.factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        made: Projection = ctx.made
        used = made.sign.numel()
        g_L = grads[0].new_zeros(made.order.numel())
        g_L[: made.numel] = grads[0] * made.factor
        g_L = walsh_hadamard(g_L) * made.bell
        g_L = torch.empty_like(g_L).index_copy_(0, made.order.long(), g_L)
        grad_d = grads[0].new_zeros(ctx.size)
        grad_d[:used] = walsh_hadamard(g_L.view(-1, made.short).sum(0))[:used] * made.sign
        return grad_d, None


def _columns(x_AB: Tensor) -> Tensor:
    """The transform of each column."""
    now, then, half = x_AB, torch.empty_like(x_AB), 1
    while half < x_AB.shape[0]:
        old_K2HB, new_K2HB = (each.view(-1, 2, half, x_AB.shape[1]) for each in (now, then))
        torch.add(old_K2HB[:, 0], old_K2HB[:, 1], out=new_K2HB[:, 0])
        torch.sub(old_K2HB[:, 0], old_K2HB[:, 1], out=new_K2HB[:, 1])
        now, then = then, torch.empty_like(x_AB) if now is x_AB else now
        half *= 2
    return now


def _right(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros, as of an unsigned number."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
