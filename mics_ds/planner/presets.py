"""Machines that can be named, found by the GPU's name, or read from a file: ``presets.hjson`` and JSON of users."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import hjson

from ..errors import MicsPlanError
from .machine import GroupForm, Link, Machine, Sweep

_TABLES: dict[str, dict[str, dict[str, Any]]] = hjson.loads(
    Path(__file__).with_name("presets.hjson").read_text(encoding="utf-8"), object_pairs_hook=dict
)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``above``, and of ``below`` where ``above`` has none. Their sources are joined."""
    sources = {**below.get("sources", {}), **above.get("sources", {})}
    return {**below, **above, "sources": sources}


def _values(cluster: str) -> dict[str, Any]:
    """Return what the tables say of a cluster, its GPU and the GPU's generation."""
    own = _TABLES["clusters"][cluster]
    gpu = _TABLES["gpus"][own["gpu"]]
    values = _over(_over(_TABLES["generations"][gpu["generation"]], gpu), own)
    return {name: value for name, value in values.items() if name not in ("gpu", "generation", "devices", "cluster")}


def machine_from_json(data: Any, origin: str = "machine") -> Machine:
    """Read what :meth:`Machine.to_json` wrote, or what a user did.

    ``preset`` takes the values of a preset for whatever is not given.

    Raises:
        MicsPlanError: a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise MicsPlanError(f"{origin} must hold a JSON object that describes a machine, got {type(data).__name__}.")
    data = dict(data)
    preset = data.pop("preset", None)
    known = {item.name for item in fields(Machine)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise MicsPlanError(
            f"{origin}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}. A machine has "
            f"{', '.join(sorted(known))}, and may name a preset to start from."
        )
    try:
        if preset is not None:
            data = _over({"name": preset, **_values(find_preset(preset).name)}, data)
        for name in ("intra", "inter"):
            if name in data:
                data[name] = Link(**data[name])
        if "sweeps" in data:
            data["sweeps"] = tuple(_sweep(item) for item in data["sweeps"])
        required = ["name", "gpus_per_node", "memory", "flops", "efficiency", "intra", "inter"]
        missing = [name for name in required if name not in data]
        if missing:
            raise MicsPlanError(
                f"{origin} lacks {', '.join(missing)}. Give them, or name a preset to start from "
                f'("preset": one of {", ".join(PRESETS)}).'
            )
        return Machine(**data)
    except (TypeError, KeyError, AttributeError) as error:
        raise MicsPlanError(f"{origin} has a value of the wrong type: {error!r}.") from error


def _sweep(item: Mapping[str, Any]) -> Sweep:
    return Sweep(
        operation=item["operation"],
        form=GroupForm(**item["form"]),
        staged=bool(item["staged"]),
        payload=tuple(item["payload"]),
        seconds=tuple(item["seconds"]),
    )


PRESETS: dict[str, Machine] = {
    name: machine_from_json({"name": name, **_values(name)}, f"presets.hjson: {name}") for name in _TABLES["clusters"]
}
"""Machines that can be named."""

_CLUSTER_OF = {device: gpu["cluster"] for gpu in _TABLES["gpus"].values() for device in gpu["devices"]}


def preset_of_device(device: str) -> Machine | None:
    """Return the cluster that is assumed for a GPU, by the whole name that torch reports; ``None`` if it is unknown."""
    return PRESETS[_CLUSTER_OF[device]] if device in _CLUSTER_OF else None


def find_preset(name: Any) -> Machine:
    """Return the preset of that name.

    Raises:
        MicsPlanError: there is none of that name.
    """
    if name not in PRESETS:
        raise MicsPlanError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def load_machine(source: str) -> Machine:
    """Return a preset by its name, or a machine from a JSON file that ``calibrate`` or a user wrote.

    Raises:
        MicsPlanError: there is no such preset or file, or the file is not a machine.
    """
    if source in PRESETS:
        return PRESETS[source]
    path = Path(source)
    if not path.is_file():
        raise MicsPlanError(
            f"{source!r} is neither a preset nor a file. Presets: {', '.join(PRESETS)}. A file comes from "
            f"`mics-ds calibrate` run on the cluster, or is written by hand."
        )
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise MicsPlanError(f"{source} cannot be read as JSON: {error}.") from error
    return machine_from_json(data, source)
