"""Wrong configurations: one clear error on every rank, before anything hangs."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import pairs
from deepspeed.moe.layer import MoE
from helpers import OddNet, build, ds_config, environment, train
from muon_engines import muon_engine
from torch import nn

from mics_ds.deepspeed_compat import support
from mics_ds.errors import MicsAgreementError, MicsCompatError, MicsConfigError, MicsError


def with_zero(**keys: Any) -> dict[str, Any]:
    config = ds_config()
    config["zero_optimization"].update(keys)
    return config


def healthy() -> None:
    """After a refusal the process must be as good as new: MiCS still works in it."""
    train(build(ds_config(2)), 1)


WRONG_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"mics_shard_size": 0}, "must be greater than or equal to 1"),
    ({"mics_shard_size": -2}, "must be greater than or equal to 1"),
    ({"mics_shard_size": 3}, r"must divide the number of data-parallel ranks, which is 4\. Choose one of 1, 2, 4"),
    ({"mics_shard_size": 8}, "must divide the number of data-parallel ranks"),
    ({"mics_shard_size": "2"}, "must be a valid integer"),
    ({"mics_shard_size": 2.5}, "must be a valid integer"),
    ({"mics_shard_size": 2, "stage": 1}, "needs ZeRO stage 3"),
    ({"mics_shard_size": 2, "stage": 2}, "needs ZeRO stage 3"),
    (
        {"mics_shard_size": 2, "mics_gather": True},
        "Unknown key under .zero_optimization.: mics_gather.*Known keys: mics_shard_size",
    ),
]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [True, False])
def test_wrong_keys_are_refused_on_every_rank(inside_init):
    for keys, message in WRONG_KEYS:
        with pytest.raises(MicsConfigError, match=message):
            build(with_zero(**keys), inside_init=inside_init)
    healthy()


UNSUPPORTED = {
    "qgZ": ({"zero_quantized_gradients": True}, {}),
    "qwZ": ({"zero_quantized_weights": True}, {}),
    "zero_quantized_nontrainable_weights": ({"zero_quantized_nontrainable_weights": True}, {}),
    "zenflow": ({"zenflow": {}, "offload_optimizer": {"device": "cpu"}}, {}),
    "offload_optimizer to NVMe": ({"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, {}),
    "DeepCompile": ({}, {"compile": {"deepcompile": True}}),
    "AutoEP": ({}, {"expert_parallel": {"enabled": True}}),
    "hybrid_engine": ({}, {"hybrid_engine": {"enabled": True}}),
}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_features_are_refused_by_name(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    zero, top = UNSUPPORTED[name]
    with pytest.raises(MicsConfigError, match=name):
        DeepSpeedConfig({**with_zero(mics_shard_size=2, **zero), **top})


AGAINST_MANAGED_REPLICAS = {
    "mics_optimizer_states": ({"mics_optimizer_states": "world"}, {}),
    "mics_replica_wire": ({"mics_replica_wire": "bf16"}, {}),
    "mics_shard_size": ({"mics_shard_size": "auto"}, {}),
    "mics_guard": ({"mics_guard": True}, {}),
    "memory_every": ({"mics_checkpoint": {"memory_every": 1}}, {}),
    "tensor parallelism": ({}, {"tensor_parallel": {"autotp_size": 2}}),
}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", AGAINST_MANAGED_REPLICAS)
def test_what_does_not_go_with_replicas_that_come_and_go(name):
    zero, top = AGAINST_MANAGED_REPLICAS[name]
    keys = {"mics_shard_size": 4, "mics_replicas": {"membership": "torchft"}, **zero}
    from deepspeed.runtime.config import DeepSpeedConfig

    with pytest.raises(MicsConfigError, match=f"mics_replicas with .*{name}"):
        DeepSpeedConfig({**with_zero(**keys), **top})
    dist.barrier()


@pytest.mark.ranks(4)
def test_a_replica_that_is_not_the_whole_job_is_refused():
    with pytest.raises(MicsConfigError, match=r"mics_shard_size must be the number of its ranks, 4, got 2"):
        build(with_zero(mics_shard_size=2, mics_replicas={"membership": "torchft"}))
    healthy()


@pytest.mark.ranks(4)
@pytest.mark.skipif(find_spec("torchft") is None, reason="torchft is not installed")
def test_replicas_without_a_lighthouse_are_refused():
    with pytest.raises(MicsConfigError, match="needs the address of torchft's lighthouse in the variable TORCHFT_LIG"):
        build(with_zero(mics_shard_size=4, mics_replicas={"membership": "torchft"}))
    healthy()


@pytest.mark.ranks(4)
def test_replicas_without_torchft_are_refused_with_the_way_to_install_it():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchft", None)
        with pytest.raises(MicsConfigError, match=r"pip install 'mics-ds\[ft\]'"):
            build(with_zero(mics_shard_size=4, mics_replicas={"membership": "torchft"}))
    healthy()


class ExpertParallel(nn.Module):
    """With DeepSpeed's own layer of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MoE(hidden_size=7, expert=nn.Linear(7, 7), num_experts=4)


@pytest.mark.ranks(4)
def test_experts_of_deepspeed_itself_are_refused_as_in_stock():
    with pytest.raises(AssertionError, match="MoE is not supported with ZeRO Stage 3"):
        build(ds_config(2), ExpertParallel)
    healthy()


@pytest.mark.ranks(4)
def test_a_predivide_factor_that_deepspeed_does_not_undo():
    config = {**with_zero(mics_shard_size=2, reduce_scatter=False), "gradient_predivide_factor": 4.0}
    with pytest.raises(MicsConfigError, match=r"gradient_predivide_factor 4 on 4 ranks.*does not multiply"):
        build(config)
    healthy()


@pytest.mark.ranks(4)
def test_several_unsupported_features_are_named_together():
    config = with_zero(mics_shard_size=2, zero_quantized_weights=True, zero_quantized_gradients=True)
    with pytest.raises(MicsConfigError, match=r"qgZ.*qwZ"):
        build(config)
    healthy()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [True, False])
def test_ranks_that_disagree_on_the_size(inside_init):
    with pytest.raises(MicsAgreementError, match=r"agree on whether MiCS is on(?=.*\[0, 1, 2\])(?=.*\[3\])"):
        build(ds_config(4 if dist.get_rank() == 3 else 2), inside_init=inside_init)
    healthy()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_that_disagree_on_disabling(rank):
    value = "1" if dist.get_rank() == rank else "0"
    with environment(MICS_DS_DISABLE=value), pytest.raises(MicsAgreementError, match="agree on whether MiCS is on"):
        build(ds_config(2), inside_init=True)
    healthy()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("wrong", [0, 2])
def test_a_mistake_on_one_rank_reaches_all(wrong):
    expected = MicsConfigError if dist.get_rank() == wrong else MicsAgreementError
    with pytest.raises(expected, match="must be greater than or equal to 1"):
        build(ds_config(0 if dist.get_rank() == wrong else 2))
    healthy()


@pytest.mark.ranks(4)
def test_simulated_nodes_must_agree():
    simulated = environment(MICS_DS_RANKS_PER_NODE="2") if dist.get_rank() == 1 else environment()
    with (
        simulated,
        pytest.raises(MicsAgreementError, match=r"learn their node in the same way.*MICS_DS_RANKS_PER_NODE"),
    ):
        build(ds_config(2))
    healthy()


@pytest.mark.ranks(4)
def test_a_rank_that_never_reports_is_named():
    if dist.get_rank() == 2:
        dist.barrier()
        return
    with (
        environment(MICS_DS_AGREEMENT_TIMEOUT="2"),
        pytest.raises(MicsAgreementError, match=r"nothing came from ranks \[2\]"),
    ):
        build(ds_config(2))
    dist.barrier()


# Rounds of agreement are counted, and rank 2 above has missed one: later tests need another pool.
test_a_rank_that_never_reports_is_named.pytestmark[0] = pytest.mark.ranks(4, fresh=True).mark


@pytest.mark.ranks(4)
def test_an_untested_deepspeed_is_refused_unless_overridden():
    actual = deepspeed.__version__
    deepspeed.__version__ = "9.9.9"
    try:
        with (
            environment(MICS_DS_ALLOW_UNTESTED="0"),
            pytest.raises(MicsCompatError, match=r"9\.9\.9.*mics_ds check.*MICS_DS_ALLOW_UNTESTED=1"),
        ):
            build(ds_config(2))
        with environment(MICS_DS_ALLOW_UNTESTED="1"):
            healthy()
    finally:
        deepspeed.__version__ = actual


@pytest.mark.ranks(2)
def test_the_callers_configuration_is_never_changed(tmp_path):
    """Frameworks hand the same dictionary to zero.Init and to initialize; a path and base64 work as well."""
    import base64

    config = ds_config(1)
    before = json.dumps(config)
    path = tmp_path / "ds_config.json"
    path.write_text(before)
    for form in (config, str(path), base64.urlsafe_b64encode(before.encode()).decode()):
        with deepspeed.zero.Init(config_dict_or_path=form):
            model = OddNet()
        assert next(model.parameters()).mics_groups.partition.size == 1
        engine = build(form if isinstance(form, dict) else json.loads(before), lambda: model)  # noqa: B023
        assert engine.optimizer.mics_groups.partition.size == 1
    assert json.dumps(config) == before


def test_all_errors_share_a_base_class():
    assert issubclass(MicsConfigError, (MicsError, ValueError))


class WithParameter(OddNet):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.strange = torch.nn.Parameter(value)


STRANGE = {
    "no element": (torch.zeros(0, 3), (AssertionError, ValueError)),
    "no dimension": (torch.tensor(0.5), RuntimeError),
    "another dtype": (torch.ones(3, dtype=torch.bfloat16), AssertionError),
}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "inside_init", "kind"), pairs((None, 1, 2, 4), (False, True), [*STRANGE]))
def test_parameters_that_stage_3_cannot_partition_are_refused_as_in_stock(p, inside_init, kind):
    """On all ranks, before the first step. ``None`` is stock."""
    value, error = STRANGE[kind]
    # zero.Init casts, and gathers of ours have nothing against an empty parameter.
    works = inside_init if kind == "another dtype" else kind == "no element" and p in (1, 2)
    with nullcontext() if works else pytest.raises(error):
        train(build(ds_config(p), lambda: WithParameter(value), inside_init=inside_init, cast=works), 1)
    healthy()


@pytest.mark.ranks(4)
@pytest.mark.skipif(not support.MUON_FOLLOWS_GRADIENTS, reason="this Muon is refused at every size")
def test_muon_is_refused_with_replicas_that_come_and_go():
    with pytest.raises(MicsConfigError, match="mics_replicas does not go with Muon: replicas take turns"):
        muon_engine(4, zero={"mics_replicas": {"membership": "torchft"}})
    healthy()
