"""Work that the ranks of a group have shared out among them, made known to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .collectives import all_gather_rows
from .groups import RankGroup


def share_out_(shares: Sequence[Sequence[torch.Tensor]], group: RankGroup, device: torch.device, what: str) -> None:
    """Overwrite every tensor with what its owner has in it: the same bits, on all ranks of the group.

    One all-gather, of the largest share for each.

    Args:
        shares: one for each rank *in* ``group``: contiguous tensors that it owns, wherever they are. Of the same
            shapes and dtypes on all ranks.
        device: where collectives of ``group`` work.
        what: names the quantity in an error.
    """
    in_bytes = [[tensor.view(-1).view(torch.uint8) for tensor in share] for share in shares]
    lengths = [[tensor.numel() for tensor in share] for share in in_bytes]
    widest = max(sum(share) for share in lengths)
    if widest == 0:
        return
    row = torch.zeros(widest, dtype=torch.uint8, device=device)
    own = sum(lengths[group.rank])
    if own:
        row[:own].copy_(torch.cat(in_bytes[group.rank]))
    for rank, (gathered, share, sizes) in enumerate(zip(all_gather_rows(row, group, what), in_bytes, lengths)):
        if rank != group.rank:
            for tensor, piece in zip(share, gathered.split([*sizes, widest - sum(sizes)])):
                tensor.copy_(piece)
