"""Small networks of awkward shapes that the checks train, and their data."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = 7  # divides by nothing that is sharded over


class OddNet(nn.Module):
    """Sizes that divide by no partition size, some smaller than it; a tied, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, 13)
        self.norm = nn.LayerNorm(13)
        self.middle = nn.ModuleList(nn.Linear(13, 13) for _ in range(2))
        self.frozen = nn.Linear(13, 13, bias=False).requires_grad_(False)
        self.unused = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.pair = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(13, WIDTH)
        self.tied = nn.Linear(13, 13, bias=False)
        first = self.middle[0]
        assert isinstance(first, nn.Linear), "made above"
        self.tied.weight = first.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(x))
        for layer in self.middle:
            x = torch.tanh(layer(x))
        x = x + self.frozen(x) + self.tied(x)
        x = x * self.gain + self.pair.sum()
        return (self.head(x) - y).float().pow(2).mean()


class _Late(torch.autograd.Function):
    """Identity that takes its time, forward and backward."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, pause: Callable[[], None]) -> torch.Tensor:
        context.pause = pause
        pause()
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        context.pause()
        return gradient.clone(), None


class LateNet(nn.Module):
    """Many layers of odd sizes, each of which waits before it goes on: see :func:`pause`."""

    def __init__(self, pause: Callable[[], None]) -> None:
        super().__init__()
        self.pause = pause
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([WIDTH, 13, 11, 13, 11, 13, 11, 13, WIDTH]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = _Late.apply(torch.tanh(layer(x)), self.pause)
        return (x - y).float().pow(2).mean()


class Chain(nn.Module):
    """Square layers without biases, of which every byte is accounted for."""

    LAYERS = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(self.LAYERS))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x - y).float().pow(2).mean()


def no_pause() -> None:
    """Do nothing, in place of :func:`pause`, so that no result is late."""


def pause(device: torch.device, rank: int) -> Callable[[], None]:
    """A pause of some tenths of a millisecond. On CUDA, of the current stream, while the host goes on; elsewhere of
    the host, longer on every other rank."""
    if device.type == "cuda":
        return lambda: torch.cuda._sleep(200_000)
    return lambda: time.sleep(2e-4 * (1 + rank % 2))


def batch(
    step: int, micro_step: int, rank: int, dtype: torch.dtype, device: torch.device, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """The data of one rank in one micro-step, the same in every run."""
    generator = torch.Generator().manual_seed(1 + rank + 65536 * (micro_step + 64 * step))
    x, y = (torch.randn(2, width, generator=generator).to(dtype).to(device) for _ in range(2))
    return x, y
