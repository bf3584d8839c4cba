"""How much of the gradients is reduced at once: never more than the user said, and no more than is of use."""

from __future__ import annotations

import pytest
import torch
from helpers import build, ds_config, full_params, train

MIB = 1 << 20
LARGE = 4 * MIB
"""Elements; far more than the model of these tests has."""


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "zero", "dtype", "expected"),
    [
        (2, {"reduce_bucket_size": LARGE}, "fp32", MIB // 2),
        (2, {"reduce_bucket_size": LARGE}, "bf16", MIB),
        (1, {"reduce_bucket_size": LARGE}, "fp32", MIB // 2),
        (2, {"reduce_bucket_size": 300}, "fp32", 300),
        # nothing runs beside the backward pass, so nothing is gained
        (2, {"reduce_bucket_size": LARGE, "overlap_comm": False}, "fp32", LARGE),
        (2, {"reduce_bucket_size": LARGE, "reduce_scatter": False}, "fp32", LARGE),
        # the collectives of stock ZeRO-3
        (4, {"reduce_bucket_size": LARGE}, "fp32", LARGE),
        (None, {"reduce_bucket_size": LARGE}, "fp32", LARGE),
    ],
)
def test_reduce_bucket_size_is_an_upper_bound(p, zero, dtype, expected):
    optimizer = build(ds_config(p, zero=zero, dtype=dtype)).optimizer
    assert optimizer.reduce_bucket_size == expected
    assert {bucket.buffer.numel() for bucket in optimizer.ipg_buckets.values()} == {expected}


@pytest.mark.ranks(4)
def test_where_buckets_end_does_not_change_a_bit():
    losses, params = [], []
    for size in (100, 300, LARGE):
        engine = build(ds_config(2, micro_steps=3, zero={"reduce_bucket_size": size}))
        losses.append(train(engine, 4))
        params.append(full_params(engine))
    assert losses[0] == losses[1] == losses[2]
    for other in params[1:]:
        assert all(torch.equal(params[0][name], other[name]) for name in params[0])
