"""``mics-ds plan``: its table, its JSON, the files that it reads, and its errors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mics_ds.cli import app
from mics_ds.planner.model import NAMED, Transformer
from mics_ds.planner.presets import PRESETS

# ------------------------------------------------------------------------------------------ the command


def mics_plan(arguments):
    """Exit code of ``mics-ds plan``."""
    return app.run(["plan", *arguments])


COMMAND = [
    "--model",
    "bert-10b",
    "--cluster",
    "p3dn.24xlarge",
    "--gpus",
    "64",
    "--sequence",
    "512",
    "--precision",
    "fp16",
]


def test_the_table(capsys):
    assert mics_plan([*COMMAND, "--micro-batch", "8", "--global-batch", "8192", "--checkpointing", "--parts"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "bert-10b: 10.1 B parameters",
        "8 x 16 samples",
        "MiCS p=16",
        "ZeRO-3",
        "choose p = ",
        "NO",
        "optimizer",
    ):
        assert words in printed


def test_the_json(capsys):
    assert mics_plan([*COMMAND, "--json", "--p", "8,16", "--scaling", "weak"]) == 0
    data = json.loads(capsys.readouterr().out)
    kinds = [(row["p"], row["optimizer_states"]) for row in data["rows"]]
    assert kinds == [(64, "partition"), *((p, states) for p in (8, 16) for states in ("partition", "world"))]
    assert data["chosen_p"] in (8, 16)
    for row in data["rows"]:
        assert sum(row["memory_parts"].values()) == row["memory_bytes"]
        assert sum(row["step_parts_s"].values()) == pytest.approx(row["step_s"])
    suffix = ", world states" if data["chosen_optimizer_states"] == "world" else ""
    assert set(data["scaling"]) == {"ZeRO-3", f"MiCS p={data['chosen_p']}{suffix}"}


def test_a_deepspeed_configuration_is_read(capsys, tmp_path):
    path = tmp_path / "ds.json"
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
    }
    path.write_text(json.dumps(config))
    arguments = [
        "--model",
        "llama-7b",
        "--cluster",
        "p4d.24xlarge",
        "--ds-config",
        str(path),
        "--checkpointing",
        "--json",
    ]
    assert mics_plan(arguments) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["memory_parts"]["optimizer"] == 0
    assert row["host_bytes"] > 0
    for given, samples in (
        ({"train_batch_size": 48}, 6 * 1),  # DeepSpeed makes micro-batches of it
        ({"train_batch_size": 48, "gradient_accumulation_steps": 3}, 2 * 3),
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 2}, 2 * 3),
        ({"gradient_accumulation_steps": 3}, 1 * 3),
    ):
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, **given}))
        mics_plan(arguments)
        row = json.loads(capsys.readouterr().out)["rows"][0]
        assert row["tokens_per_s_per_gpu"] * row["step_s"] == pytest.approx(samples * 2048)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert mics_plan(["--model", "llama-7b", "--cluster", "p4d.24xlarge", "--ds-config", str(path)]) == 2
    assert "not a DeepSpeed configuration for ZeRO stage 3" in capsys.readouterr().err


def test_an_hf_configuration_is_read(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 128}
    config |= {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--model", str(tmp_path), "--cluster", "p4d.24xlarge", "--json", "--sequence", "32"]
    assert mics_plan(arguments) == 0
    shape = Transformer(64, 3, 100, heads=4, kv_heads=2, ffn=96, gated=True, tied=False)
    assert json.loads(capsys.readouterr().out)["parameters"] == shape.model(32).numel
    assert mics_plan([*arguments[:-1], "512"]) == 2
    assert "sequences of up to 128 tokens" in capsys.readouterr().err


def factory():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (torch.zeros(1, 8),)


def test_a_module_is_planned(capsys):
    assert mics_plan(["--model", "test_planner_command:factory", "--cluster", "p4d.24xlarge", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 144


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--model", "gpt-9"], "neither a named model"),
        (["--model", "nowhere:nothing"], "cannot be imported"),
        (["--cluster", "p9"], "neither a preset nor a file"),
        (["--gpus", "12"], "do not fill nodes"),
        (["--p", "7"], "must divide the 64 GPUs"),
        (["--global-batch", "100"], "must be a multiple of 64"),
        (["--global-batch", "64", "--micro-steps", "1"], "not both"),
        (["--precision", "bf16"], "no peak for bf16"),
        (["--sequence", "1024"], "positions for 512 tokens"),
        (["--p", "100"], "must divide the 64 GPUs"),
        (["--ds-config", "nowhere.json"], "cannot be read"),
    ],
)
def test_good_errors(arguments, match, capsys):
    assert mics_plan([*COMMAND, *arguments]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "--model is needed"),
        (["--model", "bert-10b"], "--cluster is needed"),
        ([*COMMAND, "--p", "8;16"], "numbers with commas"),
        ([*COMMAND, "--micro-batch", "0"], "Invalid value for '--micro-batch'"),
        ([*COMMAND, "--reserve", "1"], "'--reserve': is a fraction of the memory"),
        ([*COMMAND, "--held-gb", "-1"], "Invalid value for '--held-gb'"),
        ([*COMMAND, "--precision", "fp8"], "'fp8' is not one of"),
        ([*COMMAND, "--p", "0"], "--p': takes positive numbers with commas"),
    ],
)
def test_senseless_arguments(arguments, match, capsys):
    assert mics_plan(arguments) == 2
    assert match in capsys.readouterr().err


def test_nothing_fits_is_told_by_the_exit_code(capsys):
    assert mics_plan(["--model", "gpt-175b", "--cluster", "p3dn.24xlarge", "--gpus", "8", "--precision", "fp16"]) == 3
    assert "no partition size fits" in capsys.readouterr().out


def test_what_there_is(capsys):
    assert mics_plan(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PRESETS, *NAMED))
