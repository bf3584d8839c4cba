"""``mics-ds guard``: checkpoints of MiCS and of stock ZeRO-3, whole and damaged."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
from cases import slow
from helpers import build, ds_config, train

from mics_ds.cli import app
from mics_ds.cli.checkpoints import DIFFERENT, NOTHING_TO_COMPARE, SAME
from mics_ds.guard.files import compare_files


def edit(path, change) -> None:
    states = torch.load(path, weights_only=False)
    change(states)
    torch.save(states, path)


def run(*arguments: str) -> tuple[int, str]:
    """Exit code, and all that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return app.run(["guard", *arguments]), said.getvalue()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "dtype"),
    [(None, "bf16"), slow(2, "bf16"), slow(2, "fp32")],
)
def test_weights_against_masters(p, dtype, tmp_path):
    zero = {"stage3_gather_16bit_weights_on_model_save": True, "sub_group_size": 100}
    engine = build(ds_config(p, dtype=dtype, zero=zero), optimizer=lambda items: torch.optim.AdamW(items, lr=1e-2))
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="step")
    folder = tmp_path / "step"
    bare = run(str(folder)) if dist.get_rank() == 0 else None
    dist.barrier()
    engine.save_16bit_model(str(folder))
    if dist.get_rank() == 0:
        assert bare[0] == NOTHING_TO_COMPARE, bare
        elements = sum(param.ds_numel for param in engine.module.parameters())
        assert compare_files(folder).compared == elements
        assert run(str(folder))[0] == SAME
        weights = folder / "pytorch_model.bin"
        away = tmp_path / "model.safetensors"
        held = torch.load(weights)
        from safetensors.torch import save_file

        save_file({name: value.clone() for name, value in held.items()}, away)
        weights.unlink()
        assert run(str(folder))[0] == NOTHING_TO_COMPARE
        assert run(str(folder), str(away))[0] == SAME

        held["middle.1.weight"].view(-1)[7] += 1
        held["frozen.weight"].view(-1)[:3] *= -1
        torch.save(held, weights)
        code, said = run(str(folder))
        assert code == DIFFERENT
        assert "middle.1.weight: 1 of 169 weights are not their masters" in said
        assert "elements 7 to 7" in said
        assert "frozen.weight: 3 of 169" in said

        (states, *_) = sorted(folder.glob("*zero_pp_rank_1_*optim_states.pt"))
        edit(states, lambda item: item["optimizer_state_dict"]["fp32_flat_groups"][0].data.fill_(torch.nan))
        code, said = run(str(folder), str(away))
        assert code == DIFFERENT
        assert "masters of sub-group 0 are no numbers" in said
        states.unlink()
        code, said = run(str(folder))
        assert code == DIFFERENT
        assert "lacks the optim states of shards [1]" in said
    dist.barrier()
