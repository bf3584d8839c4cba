"""What the planner is given: descriptions of machines and of models, and how wrong ones are refused. No processes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from round_machine import machine
from torch import nn

from mics_ds.errors import MicsPlanError
from mics_ds.planner.machine import GroupForm, Link, Sweep
from mics_ds.planner.model import NAMED, Transformer, parse_transformer
from mics_ds.planner.presets import PRESETS, load_machine, machine_from_json
from mics_ds.planner.trace import model_from_module

# ------------------------------------------------------------------------------------------ machines


def test_a_machine_survives_its_file(tmp_path):
    subject = machine(2, sweeps=(Sweep("all_reduce", GroupForm(2, 1, 2), False, (10, 20), (1.0, 2.0)),))
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(subject.to_json()))
    assert load_machine(str(path)) == subject


def test_a_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"preset": "p4d.24xlarge", "name": "ours", "inter": {"bandwidth": 1e9, "latency": 0}}))
    loaded = load_machine(str(path))
    assert loaded == replace(PRESETS["p4d.24xlarge"], name="ours", inter=Link(1e9, 0))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "must hold a JSON object"),
        ({"name": "x"}, "lacks gpus_per_node"),
        ({"preset": "p9"}, "There is no preset 'p9'"),
        ({"preset": "p4d.24xlarge", "speed": 1}, "unknown key speed"),
        ({"preset": "p4d.24xlarge", "efficiency": 1.5}, "is a fraction"),
        ({"preset": "p4d.24xlarge", "memory": 0}, "memory of machine"),
        ({"preset": "p4d.24xlarge", "inter": {"bandwidth": 0, "latency": 0}}, "bandwidth of a link must be positive"),
        ({"preset": "p4d.24xlarge", "inter": {"speed": 0}}, "wrong type"),
        ({"preset": "p4d.24xlarge", "step_overhead": "x"}, "wrong type"),
        ({"preset": "p4d.24xlarge", "memory": float("inf")}, "memory of machine"),
        ({"preset": "p4d.24xlarge", "flops": [1]}, "wrong type"),
        ({"preset": "p4d.24xlarge", "sweeps": [{"form": {"nodes": 1, "per_node": 2}}]}, "wrong type"),
        ({"preset": "p4d.24xlarge", "backend": "mpi"}, "must be nccl or gloo"),
        ({"preset": "p4d.24xlarge", "sweeps": [{"operation": "x", "form": {"nodes": 1, "per_node": 2}, "staged": False,
                                               "payload": [1], "seconds": [1]}]}, "A sweep measures one of"),
    ],
)  # fmt: skip
def test_senseless_machines_are_refused(data, match):
    with pytest.raises(MicsPlanError, match=match):
        machine_from_json(data)


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("name", "billions"),
    [("bert-10b", 10), ("bert-15b", 15), ("bert-20b", 20), ("bert-50b", 50), ("bloomberggpt", 50.6), ("gpt-175b", 175),
     ("llama-7b", 6.74), ("llama-13b", 13.02), ("llama-30b", 32.53), ("llama-70b", 68.98)],
)  # fmt: skip
def test_named_models_have_their_published_size(name, billions):
    assert NAMED[name].model(512).numel / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_description_is_the_module_it_describes():
    """Parameters and operations of a real GPT, counted by torch."""

    class GPTLayer(nn.Module):
        def __init__(self, h: int) -> None:
            super().__init__()
            self.first, self.qkv, self.out = nn.LayerNorm(h), nn.Linear(h, 3 * h), nn.Linear(h, h)
            self.second, self.up, self.down = nn.LayerNorm(h), nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

        def forward(self, x):
            q, k, v = (item.unflatten(-1, (2, -1)).transpose(1, 2) for item in self.qkv(self.first(x)).chunk(3, -1))
            x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.second(x))))

    class GPT(nn.Module):
        def __init__(self, h: int, vocabulary: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocabulary, h)
            self.layers = nn.ModuleList(GPTLayer(h) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(h), nn.Linear(h, vocabulary, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x)).float().sum()

    with torch.device("meta"):
        module, tokens = GPT(32, 100), torch.zeros(1, 16, dtype=torch.long)
    traced = model_from_module(module, (tokens,), tokens=16)
    described = Transformer(32, 3, 100, heads=2, flash=True).model(16, 4)
    assert traced.numel == described.numel == sum(param.numel() for param in module.parameters())
    assert traced.flops == described.flops
    assert traced.trainable == described.trainable
    repeated = [block for block in traced.blocks if block.repeat == 3]
    assert len(repeated) == 1
    assert repeated[0].checkpointed


def test_frozen_tied_and_unused_parameters():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.frozen, self.unused = nn.Linear(3, 5).requires_grad_(False), nn.Linear(3, 7)

        def forward(self, x):
            return self.frozen(self.second(self.first(x))).sum()

    with torch.device("meta"):
        model = model_from_module(Odd(), (torch.zeros(1, 3),))
    assert model.trainable == {9: 1, 21: 1, 7: 1}
    assert model.frozen == {15: 1, 5: 1}


def test_a_module_that_cannot_run_without_data_is_refused():
    class Peeks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    with torch.device("meta"), pytest.raises(MicsPlanError, match="could not be run on the meta device"):
        model_from_module(Peeks(2, 2), (torch.zeros(1, 2),))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("hidden=8,layers=2", "needs vocabulary"),
        ("hidden=8,layers=2,vocabulary=x", "positive integer"),
        ("hidden=8,layers=2,vocabulary=9,depth=3", "Expected KEY=VALUE with a key out of"),
        ("hidden=0,layers=2,vocabulary=9", "hidden must be a positive"),
        ("hidden=9,layers=2,vocabulary=9,heads=2", "must be a multiple of the number of heads"),
        ("hidden=8,layers=2,vocabulary=9,gated=perhaps", "must be true or false"),
    ],
)
def test_senseless_descriptions_are_refused(text, match):
    with pytest.raises(MicsPlanError, match=match):
        parse_transformer(text)
