"""Jobs to train: a stack of layers that only pretends to compute, or a real small GPT.

A :class:`Job` gives every system the same initial weights and every rank the same data, so that losses can
be compared between systems step by step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, ...]


class Job(Protocol):
    """A model and its data."""

    name: str
    micro_steps: int
    micro_batch: int
    optimizer: str
    """``sgd``, under which a gradient of the wrong size shows in the losses, or ``adamw``."""
    bucket_layers: int | None
    """DeepSpeed reduces gradients of so many layers at once; ``None``: its own default."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def compute_s(self) -> float | None:
        """Return the seconds of compute per step on each rank, if they are known beforehand."""

    def model(self) -> nn.Module:
        """Return a new model, with the same weights on each call. Its forward takes a batch and returns the loss."""

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that are gathered one by one, in the order they run."""

    def data(self, rank: int) -> Iterator[Batch]:
        """Yield micro-batches of one rank without end, the same in each call."""

    def settings(self) -> dict[str, Any]:
        """Return the settings to write beside the results."""


def model_bytes(model: nn.Module) -> int:
    """M: bytes of all parameters, tied ones once."""
    return sum(param.numel() * param.element_size() for param in model.parameters())


class _Sleep(torch.autograd.Function):
    """Identity that sleeps as long as the compute that it stands for. Sleeping frees the processor for other ranks and
    for communication threads, as a kernel on a GPU does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        with torch.profiler.record_function("compute forward"):
            time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.profiler.record_function("compute backward"):
            time.sleep(2 * ctx.seconds)
        return grad, None


class EmulatedLinear(nn.Linear):
    """A linear layer that takes ``seconds`` forward and twice as long backward, whatever its size."""

    def __init__(self, width: int, seconds: float, bias: bool) -> None:
        super().__init__(width, width, bias=bias)
        self.seconds = seconds
        nn.init.normal_(self.weight, std=width**-0.5)  # keeps the size of activations from layer to layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, width) -> the same
        # After the product, so that backward sleeps before it has the gradient, as real compute would.
        return _Sleep.apply(super().forward(x), self.seconds)


class EmulatedModel(nn.Module):
    """Layers of ``width`` x ``width`` with residuals. Returns the mean squared error."""

    def __init__(self, layers: int, width: int, seconds: float, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EmulatedLinear(width, seconds, bias) for _ in range(layers))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # (batch, width) twice -> ()
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return F.mse_loss(x, y)


@dataclass(frozen=True)
class EmulatedJob:
    """The job of the emulated measurements: real parameters, gradients and optimizer, pretended compute."""

    hidden: int = 512
    depth: int = 6
    micro_steps: int = 4
    micro_batch: int = 4
    layer_s: float = 0.010
    seed: int = 0
    optimizer: str = "sgd"
    bucket_layers: int | None = 2
    bias: bool = False
    name: str = "emulated"

    @property
    def learning_rate(self) -> float:
        return {"sgd": 1.0, "adamw": 1e-3}[self.optimizer]

    @property
    def compute_s(self) -> float | None:
        return self.micro_steps * self.depth * 3 * self.layer_s

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return EmulatedModel(self.depth, self.hidden, self.layer_s, self.bias)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.layers)

    def data(self, rank: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 + self.seed + rank)
        while True:
            x = torch.randn(self.micro_batch, self.hidden, generator=generator)
            # A target that can be learnt, so that a wrong gradient shows in the loss within a few steps.
            yield x, x.roll(1, dims=1)

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "layers": self.depth, "layer_s": self.layer_s, "bias": self.bias}


@dataclass(frozen=True)
class GPTJob:
    """The byte-level GPT of ``scripts/train_gpt.py``, with compute of its own."""

    hidden: int = 128
    depth: int = 4
    micro_steps: int = 4
    micro_batch: int = 4
    heads: int = 4
    context: int = 64
    seed: int = 0
    optimizer: str = "sgd"
    bucket_layers: int | None = 2
    name: str = "gpt"

    @property
    def learning_rate(self) -> float:
        return {"sgd": 0.1, "adamw": 1e-3}[self.optimizer]

    @property
    def compute_s(self) -> float | None:
        return None

    def model(self) -> nn.Module:
        from train_gpt import GPT

        torch.manual_seed(self.seed)
        return GPT(self.depth, self.hidden, self.heads, self.context)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def data(self, rank: int) -> Iterator[Batch]:
        from train_gpt import batches, load_text

        for tokens in batches(load_text(), self.micro_batch, self.context, seed=1000 + self.seed + rank):
            yield (tokens,)

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "layers": self.depth, "heads": self.heads, "context": self.context}
