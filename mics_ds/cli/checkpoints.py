"""``mics-ds reshape``, ``export``, ``guard`` and ``memory``: work on what jobs have saved, without their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .output import cell, errors, exit_with, out, table

SAME, DIFFERENT, NOTHING_TO_COMPARE = 0, 1, 2
_SHOWN = 10


def reshape(
    old: Annotated[Path, typer.Argument(help="Folder of one tag, for example checkpoints/global_step100.")],
    new: Annotated[Path, typer.Argument(help="Folder to save into. It gets the same tag, which becomes its latest.")],
    shards: Annotated[
        int, typer.Option(min=1, help="mics_shard_size of the job that will load it; for ZeRO-3, all its ranks.")
    ],
    sub_group_size: Annotated[
        float | None, typer.Option(min=1, help="sub_group_size of that job, if it differs from the old job's.")
    ] = None,
) -> None:
    """Cut a ZeRO-3 or MiCS checkpoint into another number of shards.

    The old checkpoint is not changed. Runs in one process, with one new shard in memory at a time.
    """
    from ..errors import MicsCheckpointError
    from ..reshape import reshape as cut

    with exit_with(1, MicsCheckpointError, OSError):
        target = cut(old, new, shards, sub_group_size=None if sub_group_size is None else int(sub_group_size))
    out.print(f"{target} is complete")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of one tag, for example checkpoints/global_step100.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Type of the weights.")] = "bf16",
    model: Annotated[Path | None, typer.Option(help="Folder with the config.json of a Hugging Face model.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not compare files with checksums first.")] = False,
) -> None:
    """Write the weights of a checkpoint as a folder of safetensors.

    With a Hugging Face model's config.json (--model, or in one of the folders) from_pretrained loads the result.
    """
    from ..errors import MicsCheckpointError
    from ..export import export as write

    with exit_with(1, MicsCheckpointError, OSError, ImportError):
        write(checkpoint, to, dtype, model=model, max_shard_size=max_shard_size, check=not unchecked)
    out.print(f"{to} has the weights of {checkpoint}")


def guard(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of one tag, for example checkpoints/global_step100.")],
    weights: Annotated[
        list[Path] | None,
        typer.Argument(help="Files with the weights of the same step (.bin, .safetensors). Default: in that folder."),
    ] = None,
    old_flag: Annotated[bool, typer.Option("--weights", hidden=True)] = False,
) -> None:
    """Compare the 16-bit weights of a checkpoint with its fp32 masters.

    Masters and optimizer states also have to be finite. Reads files only and starts no ranks.

    Exit code: 0 equal, 1 something is wrong, 2 there are no weights to compare masters with.
    """
    from ..errors import MicsCheckpointError
    from ..guard.files import compare_files

    with exit_with(DIFFERENT, MicsCheckpointError, OSError, KeyError, RuntimeError):
        result = compare_files(checkpoint, weights or ())
    out.print(f"{result.checked:,} elements of masters and optimizer states checked")
    out.print(f"{result.compared:,} weights compared with them")
    for finding in result.findings[:_SHOWN]:
        out.print(f"  {finding}")
    if len(result.findings) > _SHOWN:
        out.print(f"  and {len(result.findings) - _SHOWN} more")
    if result.findings:
        raise typer.Exit(DIFFERENT)
    if not result.compared:
        out.print("There are no 16-bit weights in that folder. Name their files after the folder.")
        raise typer.Exit(NOTHING_TO_COMPARE)


def memory(
    names: Annotated[list[str] | None, typer.Argument(help="What to remove. Default: all of yours.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove copies. Without it, list them.")] = False,
    folder: Annotated[Path, typer.Option(help="memory_folder of the jobs.")] = Path("/dev/shm"),
) -> None:
    """List or remove the training states that jobs keep in the memory of this node.

    They are there with "mics_checkpoint": {"memory_every": ...}.
    """
    from ..checkpoint.folder import discard
    from ..memory import regions

    found = regions(str(folder))
    if unknown := sorted(set(names or ()) - {region.path.name for region in found}):
        errors.print(f"there is no {', '.join(unknown)} of yours in {folder}")
        raise typer.Exit(1)
    chosen = [region for region in found if not names or region.path.name in names]
    if remove:
        for region in chosen:
            discard(region.path)
            out.print(f"removed {region.path}")
        return
    if not chosen:
        out.print("nothing is kept in memory here")
        return
    rows = table("name", "memory", "steps", "last written")
    for region in chosen:
        rows.add_row(
            cell(region.path.name),
            f"{region.nbytes / 1e6:.1f} MB",
            ", ".join(map(str, region.steps)) or "none complete",
            f"{region.age_s / 60:.0f} min ago",
        )
    out.print(rows)
