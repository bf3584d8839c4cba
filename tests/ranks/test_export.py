"""Weights exported from a checkpoint, against what ``save_pretrained`` makes of the same model."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from helpers import OddNet, build, ds_config, train
from safetensors.torch import load_file

from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.cli import app
from mics_ds.errors import MicsCheckpointError
from mics_ds.export import Weights, export

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
KINDS = {
    "tied Llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "untied Llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
}


def plain_config(kind):
    import transformers  # here: pytest imports this file to collect tests, and transformers would take it seconds

    name, changes = KINDS[kind]
    return getattr(transformers, name)(**SIZES, **changes)


def models():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def config_of(kind):
    """As ``save_pretrained`` leaves it beside a model."""
    config = plain_config(kind)
    config.architectures = [type(models().from_config(config)).__name__]
    return config


TOKENS = torch.arange(20).view(2, 10) % 61


def loaded(folder: Path, dtype: torch.dtype):
    return models().from_pretrained(folder, dtype=dtype).eval()


def language_model(kind, p, seed=0, frozen=False, **config):
    torch.manual_seed(seed)
    model = models().from_config(plain_config(kind))
    if frozen:
        model.model.embed_tokens.weight.requires_grad_(False)
    return build(ds_config(p, **config), lambda: model)


def step(engine):
    engine.train()
    engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
    engine.step()


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def whole(engine):
    """The module with all of its weights."""
    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()))


def files_of(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def tensors_in(folder):
    return {name: held for path in folder.glob("*.safetensors") for name, held in load_file(path).items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("kind", "p", "states"),
    every(
        [*KINDS],
        (1, 2, 4),
        ("partition", "world"),
        default=[("tied Llama", 2, "partition"), ("untied Llama", 2, "world"), ("Mixtral", 1, "partition")],
    ),
)
def test_the_folder_is_what_save_pretrained_makes(tmp_path, kind, p, states):
    engine = language_model(kind, p, zero={"mics_optimizer_states": states})
    step(engine)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="t")
    expected = logits(engine)
    with whole(engine):
        if dist.get_rank() == 0:
            engine.module.save_pretrained(tmp_path / "reference", max_shard_size="20KB")
    if dist.get_rank() == 0:
        arguments = [str(tmp_path / "saved" / "t"), str(tmp_path / "out"), "--dtype", "fp32"]
        assert app.run(["export", *arguments, "--model", str(tmp_path / "reference"), "--max-shard-size", "20KB"]) == 0
        if kind != "Mixtral":  # whose experts are one tensor, which transformers splits after it has made up files
            assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
        mine, theirs = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "reference")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert index == {
            name: path for path in sorted(set(index.values())) for name in load_file(tmp_path / "out" / path)
        }
        assert torch.equal(logits(loaded(tmp_path / "out", torch.float32)), expected)
    dist.barrier()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("named", [False, True])
def test_one_file_of_weights_is_in_memory_at_a_time(tmp_path, named):
    engine = language_model("untied Llama", 2)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="t")
    dist.barrier()
    if dist.get_rank() == 0:
        alive, most, read = weakref.WeakSet(), [0], Weights.read

        def reading(self, name):
            found = read(self, name)
            alive.add(found.untyped_storage())
            most[0] = max(most[0], sum(storage.nbytes() for storage in alive))
            return found

        if named:
            config_of("untied Llama").save_pretrained(tmp_path / "out")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Weights, "read", reading)
            export(tmp_path / "saved" / "t", tmp_path / "out", "fp32", max_shard_size="12KB")
        sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
        assert len(sizes) > 3
        assert 0 < most[0] <= 12_000
    dist.barrier()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("frozen", [False, True])
def test_sixteen_bits(tmp_path, frozen):
    engine = language_model("tied Llama", 2, frozen=frozen, dtype="bf16")
    step(engine)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="t")
    expected = logits(engine)
    if dist.get_rank() == 0:
        (tmp_path / "out").mkdir()
        config_of("tied Llama").save_pretrained(tmp_path / "out")
        export(tmp_path / "saved" / "t", tmp_path / "out")
        model = loaded(tmp_path / "out", torch.bfloat16)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
        assert torch.equal(logits(model), expected)
    dist.barrier()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("saves", [1, slow(2)])
def test_at_the_end_of_an_asynchronous_save(tmp_path, saves):
    """Of what was saved, in the folder of the checkpoint, whatever training does meanwhile."""
    engine = language_model("untied Llama", 2, zero={"mics_checkpoint": {"async": True, "export": "fp32"}})
    for number in range(saves):
        step(engine)
        expected = logits(engine)
        engine.save_checkpoint(str(tmp_path), tag="t")
        step(engine)
        wait_for_saves()
        dist.barrier()
        if dist.get_rank() == 0:
            assert torch.equal(logits(loaded(tmp_path / "t" / "weights", torch.float32)), expected), number
        dist.barrier()


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_a_checkpoint_is_complete_without_its_export(tmp_path):
    engine = build(ds_config(2, zero={"mics_checkpoint": {"async": True, "export": "bf16"}}), OddNet)
    train(engine, 1)
    if dist.get_rank() == 0:
        tmp_path.joinpath("config.json").write_text("{]")
    dist.barrier()
    engine.save_checkpoint(str(tmp_path), tag="t")
    wait_for_saves()
    dist.barrier()
    assert (tmp_path / "latest").read_text() == "t"
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [None, 2])
def test_a_model_that_transformers_does_not_know(tmp_path, p):
    """Stock's checkpoints too. Names are the module's, and what is tied is there once."""
    engine = build(ds_config(p), OddNet)
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="t")
    with whole(engine):
        expected = {name: held.detach().clone() for name, held in engine.module.state_dict().items()}
    if dist.get_rank() == 0:
        export(tmp_path / "saved" / "t", tmp_path / "out", "fp32", max_shard_size="1KB")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        found = tensors_in(tmp_path / "out")
        assert index.keys() == found.keys() == expected.keys() - {"tied.weight"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
        export(tmp_path / "saved" / "t", tmp_path / "out", "fp32")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"], "older ones are gone"
    dist.barrier()


@pytest.mark.ranks(4)
def test_what_cannot_be_exported_is_refused_and_what_was_there_stays(tmp_path):
    engine = language_model("untied Llama", 2)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="t")
    dist.barrier()
    if dist.get_rank() == 0:
        saved, out = tmp_path / "saved" / "t", tmp_path / "out"
        export(saved, out)
        before = files_of(out)
        config_of("Mixtral").save_pretrained(tmp_path / "other")
        plain_config("untied Llama").save_pretrained(tmp_path / "unnamed")
        (tmp_path / "none").mkdir()
        path = saved / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
        path = path if path.exists() else saved / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        for change, arguments, words in (
            (lambda: None, {"model": tmp_path / "other"}, r"is not of the model that .*other/config.json describes"),
            (lambda: None, {"model": tmp_path / "none"}, "has no config.json"),
            (lambda: None, {"model": tmp_path / "unnamed"}, 'describes no model of transformers: it has no "arch'),
            (lambda: path.write_bytes(content), {}, "other content than was written"),
            (path.unlink, {}, "is missing"),
            ((saved / "mics_manifest.json").unlink, {}, "is gone"),
        ):
            change()
            with pytest.raises(MicsCheckpointError, match=words):
                export(saved, out, **arguments)
            assert files_of(out) == before
        assert app.run(["export", str(tmp_path / "nothing"), str(out)]) == 1
    dist.barrier()
