"""``mics-ds doctor``: what a job on this node would meet."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from ..doctor.examination import examine, facts
from ..doctor.job import describe
from ..doctor.node import Finding, Node
from .arguments import LocalRank
from .output import cell, out, table


def doctor(
    config: Annotated[Path | None, typer.Argument(help="DeepSpeed JSON of the job.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Hostfile of the job. Default: /job/hostfile.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks of the job. Default: of hostfile or GPUs.")] = None,
    model: Annotated[str, typer.Option(help="Model, as mics-ds plan takes it, for the size of copies.")] = "",
    json: Annotated[bool, typer.Option("--json", help="JSON in place of tables.")] = False,
    local_rank: LocalRank = -1,
) -> None:
    """Report what a job on this node would meet: network, versions, limits, variables, placement, JSON.

    Needs no GPU. Under torchrun (-m mics_ds doctor) it also compares the nodes: clocks, versions and GPUs.

    Exit code: 0 without findings, 1 with some.
    """
    node = Node.here()
    job, findings = describe(node, config, hostfile, ranks, _parameters(model))
    findings += examine(node, job)
    known: dict[str, Any] = facts(node, job)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        findings = _of_all_nodes(node, findings)
        if os.environ["RANK"] != "0":
            raise typer.Exit(int(bool(findings)))
    if json:
        value = {"facts": known, "findings": [item._asdict() for item in findings]}
        out.file.write(json_format.dumps(value, indent=1) + "\n")
    else:
        out.print(_text(known, findings))
    raise typer.Exit(int(bool(findings)))


def _parameters(model: str) -> float | None:
    if not model:
        return None
    from ..planner.job import find_model

    return find_model(model, 1, "bf16").numel


def _of_all_nodes(node: Node, findings: list[Finding]) -> list[Finding]:
    """Return the findings of all nodes and their differences. Collective."""
    from ..doctor.together import about, compare, gather

    everything = gather({**about(node), "findings": [tuple(item) for item in findings]})
    found: dict[Finding, list[str]] = {}
    for item in everything:
        for values in item["findings"]:
            hosts = found.setdefault(Finding(*values), [])
            if item["host"] not in hosts:
                hosts.append(item["host"])
    located = [item._replace(found=f"{', '.join(hosts[:4])}: {item.found}") for item, hosts in found.items()]
    return [*located, *compare(everything)]


def _text(known: dict[str, Any], findings: list[Finding]) -> Group:
    lines = table("", "")
    lines.show_header = False
    for name, value in known.items():
        lines.add_row(name, cell(value))
    parts: list[Any] = [lines, ""]
    for item in findings:
        parts += [f"{item.topic}: expected {item.expected}", f"  found: {item.found}", f"  {item.remedy}"]
    parts.append(f"{len(findings)} finding{'s' * (len(findings) != 1)}" if findings else "no findings")
    return Group(*parts)
