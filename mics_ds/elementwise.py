"""Which optimizers may be given a slice of a parameter: those that update every element by itself."""

from __future__ import annotations

from typing import Any

import torch

from .errors import MicsConfigError

_KNOWN: frozenset[str] = frozenset(
    f"{module}.{name}"
    for module, names in {
        "torch.optim": "SGD Adam AdamW Adamax NAdam RAdam RMSprop Rprop Adagrad Adadelta ASGD",
        "deepspeed.ops": "FusedAdam DeepSpeedCPUAdam DeepSpeedCPUAdagrad DeepSpeedCPULion FusedLion",
    }.items()
    for name in names.split()
)


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """``None`` if each element is updated by itself; otherwise the reason to think that it is not."""
    if any(group.get("use_muon") for group in optimizer.param_groups):
        return "Muon makes each update of a whole matrix of gradients"  # in DeepSpeed's engine, before the step
    kind = type(optimizer)
    if f"{'.'.join(kind.__module__.split('.')[:2])}.{kind.__name__}" in _KNOWN:
        return None
    try:
        depends = _depends_on_others(optimizer)
    except Exception as error:  # whatever an unknown optimizer says to six numbers
        return f"it could not be tried out on a small tensor ({type(error).__name__}: {error})"
    return "it updates the halves of a small tensor otherwise than the whole" if depends else None


def is_known_by_name(name: str) -> bool:
    """Of an optimizer that DeepSpeed builds from a JSON."""
    return name.lower() in ("adam", "adamw", "adagrad", "lion", "sgd")


def refuse_others(optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        MicsConfigError: what the optimizer does to an element depends on others, or cannot be found out.
    """
    why, name = why_not(optimizer), type(optimizer).__name__
    if why is None:
        return
    raise MicsConfigError(
        f'zero_optimization.mics_optimizer_states "world" gives each rank a slice of every parameter, so it needs an '
        f"optimizer that updates every element by itself, like Adam or SGD. {name} is not known to: {why}. "
        f'Use "partition", or another optimizer.'
    )


def _depends_on_others(optimizer: torch.optim.Optimizer) -> bool:
    """Whether three steps on a tensor differ from three steps on its halves, the second of which has much larger
    gradients."""
    device = optimizer.param_groups[0]["params"][0].device
    values = torch.linspace(-1.0, 1.5, 6, device=device)
    gradients = [values.roll(step) * torch.tensor([1.0] * 3 + [100.0] * 3, device=device) for step in range(1, 4)]
    whole = _stepped(optimizer, values, gradients)
    halves = [
        _stepped(optimizer, values[half], [gradient[half] for gradient in gradients])
        for half in (slice(0, 3), slice(3, 6))
    ]
    return not torch.allclose(whole, torch.cat(halves), rtol=1e-5, atol=1e-7)


def _stepped(like: torch.optim.Optimizer, values: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    param = torch.nn.Parameter(values.clone())
    # A copy by hand: pickling and copying leave out what an optimizer keeps beside its groups and states.
    copy: Any = object.__new__(type(like))
    copy.__dict__.update(like.__dict__)
    copy.state = type(like.state)(dict)  # a defaultdict
    copy.param_groups = [{**like.param_groups[0], "params": [param]}]
    for gradient in gradients:
        param.grad = gradient.clone()
        type(like).step(copy)  # an instance's own, as schedulers put there, would step the original
    return param.detach()
