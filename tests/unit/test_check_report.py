"""``mics-ds check``: its arguments, its list, how ranks come to a verdict, and the table."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mics_ds.check import checks, local, ranks
from mics_ds.check.checks import Surroundings
from mics_ds.check.ranks import ERROR, MEASURES, STUCK, LostError, RollCall, Worker
from mics_ds.check.report import FAILED, OK, SKIPPED, Result, judge, passed, verdict
from mics_ds.check.runs import Measure, Setup
from mics_ds.cli import app
from mics_ds.cli.check import show

# ------------------------------------------------------------------------------------ arguments


def check(*arguments: str) -> int:
    """Exit code of ``mics-ds check``."""
    return app.run(["check", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "0"], "'--timeout': must be positive, got 0"),
        (["--ranks", "0"], "Invalid value for '--ranks'"),
        (["--partition-sizes", "2,x"], "'--partition-sizes': takes positive numbers with commas, got '2,x'"),
        (["--partition-sizes", "0"], "'--partition-sizes': takes positive numbers with commas, got '0'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert check(*arguments) == 2
    assert message in capsys.readouterr().err


def test_launchers_may_add_a_local_rank_and_say_how_many_ranks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    listing = ["--list", "--ranks", "4", "--partition-sizes", "4,2", "bytes"]
    assert app.run(["--local_rank=0", "check", *listing]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == ["hierarchical bytes p=4", "bytes p=2", "bytes p=4"]
    assert check("--local_rank=0", *listing) == 0
    assert capsys.readouterr().out == said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check("--ranks", "4") == 2
    assert "here the launcher says how many" in capsys.readouterr().err


def test_a_partition_size_that_does_not_divide_is_one_error_with_the_choices(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "6")
        assert check("--partition-sizes", "2,4") == 2
    said = capsys.readouterr().err
    assert said == "--partition-sizes: 4 must divide the 6 ranks. Choose from 1, 2, 3, 6.\n"


def test_started_by_srun_without_ranks_it_does_not_start_ranks_in_each_process(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert check() == 2
    assert "Set RANK, LOCAL_RANK" in capsys.readouterr().err


def test_the_list_can_be_had_alone(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert check("--list", "bytes", "checkpoint,p=4") == 0
    assert capsys.readouterr().out.splitlines() == [
        "hierarchical bytes p=4",
        "bytes p=1",
        "bytes p=2",
        "bytes p=4",
        "checkpoint fp32 p=4",
    ]


# ----------------------------------------------------------------------------------------- list


def skipped(found):
    return {check.name.split()[0] for check in found if check.why_not}


def test_four_ranks_on_a_node_check_everything():
    found = checks.all_checks(Surroundings((0,) * 4))
    assert skipped(found) == set()
    assert {check.name.split()[0] for check in found} == {
        *("parity", "flat", "hierarchical", "bytes", "checkpoint", "late", "offload", "zero.Init")
    }
    setups = [check.run.keywords["setup"] for check in found if check.name.startswith("parity")]
    for dtype in ("fp32", "bf16", "fp16"):
        ways = {(item.p, item.overlap, item.micro_steps) for item in setups if item.dtype == dtype}
        assert {way[0] for way in ways} == {1, 2, 4}
        assert {way[1:] for way in ways} >= {(True, 3), (False, 1)}
    assert {(overlap, steps) for overlap in (True, False) for steps in (1, 3)} == {
        (item.overlap, item.micro_steps) for item in setups if (item.p, item.dtype) == (2, "fp32")
    }


@pytest.mark.parametrize(
    ("nodes", "sizes"),
    [
        ((0,), (1,)),
        ((0,) * 3, (1, 3)),
        ((0,) * 4, (1, 2, 4)),
        ((0,) * 8, (1, 4, 8)),
        ((0,) * 6, (1, 3, 6)),
        (tuple(rank // 8 for rank in range(32)), (1, 8, 32)),
        ((0, 0, 0, 0, 1, 1), (1, 3, 6)),
    ],
)
def test_partition_sizes_are_one_a_divisor_and_all(nodes, sizes):
    assert checks.default_sizes(nodes) == sizes
    assert all(len(nodes) % size == 0 for size in sizes)


@pytest.mark.parametrize(
    ("nodes", "per_node", "why_not"),
    [
        ((0,) * 4, 2, False),
        ((0,) * 8, 4, False),
        ((0, 0, 1, 1), None, False),  # real nodes will do
        ((0,) * 3, None, True),
        ((0,), None, True),
    ],
)
def test_two_stages_take_real_nodes_or_simulated_ones(nodes, per_node, why_not):
    found = [check for check in checks.all_checks(Surroundings(nodes)) if "hierarchical" in check.name.split()]
    assert [bool(check.why_not) for check in found] == [why_not] * len(found)
    assert {check.run.keywords["setup"].per_node for check in found} == {per_node}


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 12])
def test_late_results_are_compared_where_order_cannot_matter(n):
    found = [check for check in checks.all_checks(Surroundings((0,) * n)) if check.name.startswith("late")]
    assert {n // check.run.keywords["setup"].p for check in found} <= {1, 2}


def test_what_cannot_be_done_is_skipped_with_the_reason():
    found = checks.all_checks(Surroundings((0,) * 4, ("fp32",), folder_problem="ranks [3] do not see /x"))
    reasons = {check.name: check.why_not for check in found if check.why_not}
    assert "DeepSpeed does not train in fp16 on this device" in reasons.values()
    assert reasons["checkpoint fp32 p=2"] == "ranks [3] do not see /x"
    assert "parity fp32 p=2 overlap_comm=true micro_steps=3" not in reasons


def test_words_are_whole_and_all_of_one_item_count():
    check = checks.Check("parity fp32 p=16", lambda place: [])
    assert check.matches([])
    assert check.matches(["bytes", "p=16,parity"])
    assert not check.matches(["p=1"])
    assert not check.matches(["parity,bf16"])


def test_stock_is_the_same_run_for_all_that_is_compared_with_it():
    mics = (("mics_reduce_scatter", "native"),)
    assert Setup(2, "bf16", True, 3, per_node=2, mics=mics).stock() == Setup(4, "bf16", False, 3).stock()
    assert "mics" not in str(Setup(2, mics=mics).stock().ds_config())


# -------------------------------------------------------------------------------------- verdict

GOOD, BAD = ("losses", 1e-7, 1e-6), ("losses", 1e-3, 1e-6)


def test_the_worst_rank_counts():
    result = judge("x", [{MEASURES: [GOOD]}, {MEASURES: [BAD]}, {MEASURES: [GOOD]}], 1.0)
    assert (result.state, result.measures, result.can_go_on) == (FAILED, [Measure(*BAD)], True)
    assert judge("x", [{MEASURES: [GOOD]}] * 2, 1.0).state == OK
    assert judge("x", [{MEASURES: [GOOD]}, {MEASURES: [("losses", float("nan"), 1e-6)]}], 1.0).state == FAILED


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([{MEASURES: [GOOD]}, {ERROR: "E: no"}], "on rank 1: E: no"),
        (
            [{STUCK: "still running after 9 s; here"}, {ERROR: "E: no"}],
            "on rank 1: E: no; rank 0 still running after 9 s",
        ),
        ([{MEASURES: [GOOD]}, None], "rank 1 said nothing and may be dead"),
        ([{ERROR: "E: a"}, {ERROR: "E: b"}], "on rank 0: E: a; rank 1 failed too"),
    ],
)
def test_ranks_that_ended_differently_are_out_of_step(said, words):
    result = judge("x", said, 1.0)
    assert (result.state, result.words, result.can_go_on) == (FAILED, words, False)


def test_after_the_same_error_everywhere_the_next_check_has_its_chance():
    result = judge("x", [{ERROR: "E: no", "traceback": "here"}] * 3, 1.0)
    assert (result.state, result.words, result.can_go_on) == (FAILED, "on every rank: E: no", True)
    assert result.detail == "here"


def test_a_result_survives_the_way_through_the_store():
    result = judge("x", [{MEASURES: [BAD]}], 1.0)
    assert Result.from_json(result.to_json()) == result


def test_lines_show_what_is_wrong_and_sum_up_what_is_exact(capsys):
    exact = [Measure("replicas", 0.0, 0.0), Measure("bytes", 0.0, 0.0)]
    show(Result("x", OK, [Measure(*GOOD), *exact], seconds=1.2), 3)
    show(Result("x y", FAILED, [Measure(*GOOD), Measure("bytes", 3.0, 0.0)], seconds=12.3), 3)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "ok       x      1.2 s  losses 1e-07, 2 more exact",
        "FAILED   x y   12.3 s  losses 1e-07, bytes 3 (limit 0)",
    ]


def test_the_verdict_names_what_failed_and_says_what_to_do():
    good, bad, left_out = Result("a", OK), Result("b p=2", FAILED), Result("c", SKIPPED)
    assert passed([good, left_out])
    assert not passed([left_out])
    assert not passed([good, bad])
    assert verdict([good, left_out], 3, None) == [
        "1 ok, 1 skipped in 3 s",
        "PASSED: MiCS trains as stock ZeRO-3 does here.",
    ]
    assert verdict([good, bad], 3, None)[1] == "FAILED: b p=2"
    assert "MICS_DS_ALLOW_UNTESTED=1" in verdict([good], 3, "0.99.1")[1]
    assert "MICS_DS_ALLOW_UNTESTED" not in "".join(verdict([bad], 3, "0.99.1"))


# ---------------------------------------------------------------------------------- ranks agree


@pytest.fixture
def roll_calls(monkeypatch):
    """Two ranks, as threads of this process."""
    monkeypatch.setattr(ranks, "GRACE_S", 0.3)
    monkeypatch.setattr(ranks, "POLL_S", 0.02)
    store = dist.HashStore()
    return [RollCall(store, rank, 2) for rank in range(2)]


def test_all_ranks_get_what_rank_0_decides(roll_calls):
    with ThreadPoolExecutor(2) as threads:
        answers = list(
            threads.map(lambda call: call.join("t", {"rank": call.rank}, lambda said: {"all": said}, 5.0), roll_calls)
        )
    assert answers == [{"all": [{"rank": 0}, {"rank": 1}]}] * 2


def test_a_rank_that_says_nothing_is_not_waited_for_forever(roll_calls):
    assert roll_calls[0].join("t", {}, lambda said: {"all": said}, 0.0) == {"all": [{}, None]}
    with pytest.raises(LostError, match="rank 0 did not say"):
        roll_calls[1].join("another", {}, lambda said: {}, 0.0)


def test_a_check_that_hangs_is_left_when_another_rank_has_failed(roll_calls):
    worker, end = Worker(), threading.Event()
    hanging = worker.start(lambda: end.wait() and [])
    roll_calls[1].alarm("t")
    said = roll_calls[0].watch("t", hanging, worker, 100.0)
    end.set()
    assert said[STUCK].startswith("still waiting when another rank had failed; it was here:")
    assert "end.wait()" in said[STUCK]


def test_a_check_that_hangs_everywhere_is_left_when_its_time_is_over(roll_calls):
    worker, end = Worker(), threading.Event()
    said = roll_calls[0].watch("t", worker.start(lambda: end.wait() and []), worker, 0.1)
    end.set()
    assert said[STUCK].startswith("still running after 0 s")


def test_measures_and_errors_of_a_check_are_said(roll_calls):
    worker = Worker()
    good = worker.start(lambda: [Measure("x", 1.0, 2.0)])
    assert roll_calls[0].watch("t", good, worker, 5.0) == {MEASURES: [["x", 1.0, 2.0]]}
    bad = roll_calls[0].watch("t", worker.start(lambda: [][0]), worker, 5.0)
    assert bad[ERROR] == "IndexError: list index out of range"
    assert "Traceback" in bad["traceback"]


# --------------------------------------------------------------------------------- local ranks


def test_local_ranks_know_their_place_and_the_first_failure_is_the_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "GRACE_S", 0.1)
    write = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])"
    assert local.run_ranks(2, ["-c", write]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2", "1": "2"}
    began = time.monotonic()
    hangs_or_fails = "import os, time; os._exit(3) if os.environ['RANK'] == '1' else time.sleep(1000)"
    assert local.run_ranks(2, ["-c", hangs_or_fails]) == 3
    assert time.monotonic() - began < 100, "the rank that hangs is not waited for"
