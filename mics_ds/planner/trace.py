"""A :class:`Model` from an ``nn.Module`` or an HF configuration.

A module on the meta device has shapes and no data. Running it there costs nothing, and tells the order in which its
submodules run, their operations (torch's own counter) and what autograd keeps for the backward pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import MicsPlanError
from .model import Block, Model, Unit, read_hf_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Inputs = Sequence[Any] | Mapping[str, Any]
Progress = Callable[[int, int], None]


def numel_of(param: torch.Tensor) -> int:
    """Elements of a full parameter, partitioned by ZeRO-3 or not."""
    return int(getattr(param, "ds_numel", param.numel()))


def model_from_module(
    module: nn.Module,
    inputs: Inputs | None = None,
    *,
    name: str = "",
    tokens: int = 1,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Model:
    """Describe a module.

    Args:
        module: on the meta device if ``inputs`` are given, anywhere otherwise. Only its dtype is changed.
        inputs: of one sample, positional or by name, on the meta device. Without them nothing is run: submodules are
            taken in the order of ``module.modules()``, with two operations per parameter and token, and
            activations count nothing.
        tokens: per sample.
        progress: called after each repeated layer with how many have run and how many there are.

    Raises:
        MicsPlanError: the module cannot be run on the meta device.
    """
    name = name or type(module).__name__
    if inputs is None:
        order = [item for item in module.modules() if any(True for _ in item.parameters(recurse=False))]
        return Model(name, _blocks([(item, 2.0 * tokens * _own_numel(item)) for item in order], module, {}), tokens)
    trace = _Trace(module.to(DTYPES[precision]), progress)
    try:
        trace.run(inputs)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise MicsPlanError(
            f"{name} could not be run on the meta device to count its operations and activations: {error}. "
            f"Describe it as a transformer instead (hidden=...,layers=...,vocabulary=...), or give no inputs."
        ) from error
    if not trace.visits:
        raise MicsPlanError(f"{name} has no parameters, so there is nothing to plan.")
    blocks = _blocks(trace.visits, module, trace.kept)
    rest = trace.saved_bytes - sum(block.activations * block.repeat for block in blocks)
    if rest > 0:  # what is kept outside of the repeated layers
        blocks = (*blocks, Block((), activations=rest))
    return Model(name, blocks, tokens)


class _Trace:
    """One forward pass of a module on the meta device, watched by hooks."""

    def __init__(self, module: nn.Module, progress: Progress | None) -> None:
        self.visits: list[tuple[nn.Module, float]] = []
        """Modules with parameters of their own in the order in which they ran, and operations until the next."""
        self.kept: dict[nn.Module, tuple[float, float]] = {}
        """Of each repeated layer: bytes that autograd keeps in it, and bytes of its inputs."""
        self._module = module
        self._layers = _layers(module)
        self._progress = progress
        self._counter = FlopCounterMode(display=False)
        self._saved = _Saved(module)
        self._starts: dict[nn.Module, float] = {}

    @property
    def saved_bytes(self) -> float:
        return self._saved.bytes

    def run(self, inputs: Inputs) -> None:
        module = self._module
        with ExitStack() as stack:
            for item in module.modules():
                stack.callback(item.register_forward_pre_hook(self._before).remove)
            for item in self._layers:
                stack.callback(item.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(item.register_forward_hook(self._leave).remove)
            stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _attend))
            stack.enter_context(self._saved.hooks())
            stack.enter_context(self._counter)
            module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
            # What was noted so far is the count at which each module began.
            ends = [start for _, start in self.visits[1:]] + [float(self._counter.get_total_flops())]
        self.visits = [(item, max(0.0, end - start)) for (item, start), end in zip(self.visits, ends)]

    def _before(self, item: nn.Module, *_: Any) -> None:
        if any(True for _ in item.parameters(recurse=False)):
            self.visits.append((item, float(self._counter.get_total_flops())))

    def _enter(self, item: nn.Module, args: Any, kwargs: Any) -> None:
        self._starts[item] = self._saved.bytes
        self.kept[item] = (0.0, _bytes(args) + _bytes(list(kwargs.values())))

    def _leave(self, item: nn.Module, *_: Any) -> None:
        self.kept[item] = (self._saved.bytes - self._starts[item], self.kept[item][1])
        if self._progress is not None:
            self._progress(len(self.kept), len(self._layers))


class _Saved:
    """Adds up what autograd keeps, every storage once, parameters not at all."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0.0
        # held on to, so that no storage is freed and its address given to another
        self._seen = {item.untyped_storage()._cdata: item for item in (*module.parameters(), *module.buffers())}

    def hooks(self) -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = tensor
                self.bytes += storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class _FusedAttention(torch.autograd.Function):
    """Attention as a fused kernel on a GPU does it: it keeps its inputs, its output and one number per row.

    Without a GPU, PyTorch takes the route that keeps two matrices of scores.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[-3] // k.shape[-3]
        k_all, v_all = (item.repeat_interleave(groups, dim=-3) if groups > 1 else item for item in (k, v))
        scores = q @ k_all.transpose(-1, -2)
        out = scores @ v_all
        ctx.save_for_backward(q, k, v, out, scores.new_empty(scores.shape[:-1], dtype=torch.float32))
        return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return _FusedAttention.apply(q, k, v)


def _bytes(values: Any) -> float:
    if isinstance(values, torch.Tensor):
        return float(values.nbytes) if values.is_floating_point() else 0.0
    return sum(map(_bytes, values)) if isinstance(values, (list, tuple)) else 0.0


def _own_numel(item: nn.Module) -> int:
    return sum(numel_of(param) for param in item.parameters(recurse=False))


def _layers(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a module: children of its outermost lists of equal modules."""
    found: list[nn.Module] = []

    def search(item: nn.Module) -> None:
        for child in item.children():
            children = list(child.children())
            alike = isinstance(child, (nn.ModuleList, nn.Sequential)) and len({type(one) for one in children}) == 1
            if alike and len(children) > 1 and any(True for _ in children[0].parameters()):
                found.extend(children)
            else:
                search(child)

    search(module)
    return found


def _blocks(
    visits: list[tuple[nn.Module, float]], module: nn.Module, kept: Mapping[nn.Module, tuple[float, float]]
) -> tuple[Block, ...]:
    """Join visits of one layer into a block, and equal blocks in a row into one that repeats."""
    layer_of = {sub: layer for layer in _layers(module) for sub in layer.modules()}
    seen: set[int] = set()
    runs: list[tuple[nn.Module | None, list[Unit]]] = []
    for item, flops in visits:
        fresh = [param for param in item.parameters(recurse=False) if id(param) not in seen]
        known = [param for param in item.parameters(recurse=False) if id(param) in seen]
        seen.update(id(param) for param in fresh)
        units = []
        if fresh or not known:
            trained = tuple(numel_of(param) for param in fresh if param.requires_grad)
            units.append(Unit(trained, flops, tuple(numel_of(param) for param in fresh if not param.requires_grad)))
        if known:
            trained = tuple(numel_of(param) for param in known if param.requires_grad)
            frozen = tuple(numel_of(param) for param in known if not param.requires_grad)
            units.append(Unit(trained, 0.0 if fresh else flops, frozen, again=True))
        layer = layer_of.get(item)
        if not runs or runs[-1][0] is not layer:
            runs.append((layer, []))
        runs[-1][1].extend(units)
    unused = [param for param in module.parameters() if id(param) not in seen]
    if unused:  # never run, but they have states
        trained = tuple(numel_of(param) for param in unused if param.requires_grad)
        runs.append((None, [Unit(trained, 0.0, tuple(numel_of(p) for p in unused if not p.requires_grad))]))
    blocks: list[Block] = []
    for layer, units in runs:
        activations, inputs = kept.get(layer, (0.0, 0.0)) if layer is not None else (0.0, 0.0)
        container = layer is not None and not any(True for _ in layer.parameters(recurse=False))
        block = Block(tuple(units), 1, layer is not None, container, activations, inputs)
        if blocks and blocks[-1].units == block.units and layer is not None and not any(u.again for u in units):
            previous = blocks[-1]
            total = previous.repeat + 1
            mean = (previous.activations * previous.repeat + block.activations) / total
            blocks[-1] = replace(previous, repeat=total, activations=mean)
        else:
            blocks.append(block)
    return tuple(blocks)


def model_from_hf(path: Path, sequence: int, precision: str, progress: Progress | None = None) -> Model:
    """Describe the model of an HF ``config.json``, by building it on the meta device with transformers.

    Raises:
        MicsPlanError: transformers is not installed or does not know the model, or the sequence is too long for it.
    """
    data = read_hf_config(path)
    try:
        import transformers
    except ImportError as error:
        raise MicsPlanError(
            "An HF configuration needs the transformers package. Install it, or describe the model "
            "(hidden=...,layers=...,vocabulary=...)."
        ) from error
    try:
        config = transformers.AutoConfig.for_model(**data)
        factories = [transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM]
        factories += [transformers.AutoModelForSeq2SeqLM, transformers.AutoModel]
        factory = next((item for item in factories if type(config) in (item._model_mapping or ())), None)
        if factory is None:
            raise ValueError("there is no model class for it")
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        with torch.device("meta"):
            module = factory.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MicsPlanError(f"transformers could not build the model of {path}: {error}.") from error
    if isinstance(longest, int) and 0 < longest < sequence:
        raise MicsPlanError(f"The model of {path} takes sequences of up to {longest} tokens, got {sequence}.")
    text.use_cache = False
    tokens = torch.zeros(1, sequence, dtype=torch.long, device="meta")
    # A mask that is ready to use: making one from tokens would look at their values.
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device="meta"),
    }
    if factory is not transformers.AutoModel:
        inputs["labels"] = tokens
    name = str(data["model_type"])
    return model_from_module(module, inputs, name=name, tokens=sequence, precision=precision, progress=progress)


def model_from_factory(target: str, precision: str, progress: Progress | None = None) -> Model:
    """Describe what ``package.module:function`` returns: a module, or a pair of it and the inputs of one sample.

    The function is called with the meta device as default.

    Raises:
        MicsPlanError: there is no such function, or it returns something else.
    """
    where, _, what = target.partition(":")
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(where), what)
    except (ImportError, AttributeError) as error:
        raise MicsPlanError(f"{target} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
    with torch.device("meta"):
        made = factory()
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise MicsPlanError(f"{target} must return an nn.Module, or a pair of it and its inputs, got {type(module)}.")
    return model_from_module(module, inputs, name=target, precision=precision, progress=progress)
