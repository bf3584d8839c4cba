"""Replicas that come and go on one machine: small jobs over gloo that can be killed at chosen moments, and a record of
what they have committed. For tests and for ``replica_kills.py``."""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cluster import Cluster, enter_namespace

os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "deepspeed", "mics_ds", "torchft", "bench.replica_jobs"]
PHASES = ("forward", "backward", "hop 1", "hop 2", "step", "save", "heal")
PUBLISH = "publish"
"""The moment at which a checkpoint is written and not yet there."""
MOMENTS = (*PHASES, PUBLISH)
SAMPLES = 997
WIDTH = 16
LIMIT_S = 120


class Net(nn.Module):
    """A small model with shapes that do not divide by 2."""

    def __init__(self, layers: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.unused = nn.Linear(5, 3)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return (self.head(x) - y).pow(2).mean()


class Samples(torch.utils.data.Dataset):
    """Samples that are computed from their index."""

    def __init__(self, width: int = WIDTH) -> None:
        self._width = width

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(self._width, generator=generator)
        return x, torch.sin(x[:5] * (1 + index % 3))


@dataclass(frozen=True)
class Training:
    """Settings of a job that every rank runs."""

    folder: str
    replicas: int = 3
    ranks: int = 2
    """Ranks of a replica."""
    steps: int = 10
    managed: bool = True
    """Whether replicas are jobs of their own, and not one job."""
    min: int = 1
    timeout_s: float = 30.0
    micro_steps: int = 2
    micro_batch: int = 2
    save_every: int = 0
    layers: int = 3
    width: int = WIDTH
    sleep_s: float = 0.0
    """Seconds that a forward pass takes besides."""
    unit_bytes: int = 256
    """Least bytes of a unit of hop 2: few, so that there are several."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the DeepSpeed configuration."""
    seeds: tuple[int, ...] = ()
    """Seed of each replica's weights, by default the same."""
    program: str = ""
    """``module:function`` that trains :class:`Net` in the place of :func:`train_plainly`, with the same arguments."""

    @property
    def config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": 3, "mics_shard_size": self.ranks, "stage3_param_persistence_threshold": 20}
        if self.managed:
            zero["mics_replicas"] = {"membership": "torchft", "min": self.min, "timeout_s": self.timeout_s}
        extra = dict(self.extra)
        zero.update(extra.pop("zero_optimization", {}))
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": 0.5,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-2, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 3e-3}},
            "zero_optimization": zero,
            **extra,
        }


# --------------------------------------------------------------------------------------------------
# In a rank


def _run_rank(
    training: Training, replica: int, generation: int, rank: int, lighthouse: str, node: Any, order: Any
) -> None:
    """Train as one rank. Ends the process.

    Args:
        node: namespace of the node and its interface, ``None`` for this machine.
    """
    if node is not None:
        enter_namespace(node[0])
        os.environ["GLOO_SOCKET_IFNAME"] = node[1]
    folder = Path(training.folder)
    log = open(folder / f"log-{replica}-{generation}-{rank}", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    ranks = training.ranks if training.managed else training.ranks * training.replicas
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MICS_DS_REPLICA=str(replica),
        TORCHFT_LIGHTHOUSE=lighthouse,
        DS_ACCELERATOR="cpu",
    )
    code = 1
    try:
        _train(training, replica, generation, rank, ranks, order)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(training: Training, replica: int, generation: int, rank: int, ranks: int, order: Any) -> None:
    from datetime import timedelta

    import deepspeed
    import torch.distributed as dist

    from mics_ds.comm import sizes

    torch.set_num_threads(1)
    sizes.ON_CPUS = dataclasses.replace(sizes.ON_CPUS, unit=training.unit_bytes)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # torch's CPU kernels have it
    rendezvous = Path(training.folder) / f"rendezvous-{replica}-{generation}"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    deepspeed.init_distributed("gloo")
    record = open(Path(training.folder) / f"record-{replica}-{generation}-{rank}.jsonl", "w", buffering=1)
    initialize = deepspeed.initialize

    def recording(*args: Any, **kwargs: Any) -> Any:
        engine, *others = initialize(*args, **kwargs)
        Recorder(engine, training, replica, record, order)
        return engine, *others

    deepspeed.initialize = recording
    torch.manual_seed(training.seeds[replica] if training.seeds else 7)
    program = train_plainly
    if training.program:
        module, _, name = training.program.partition(":")
        program = getattr(import_module(module), name)
    program(training)
    dist.destroy_process_group()


def train_plainly(training: Training) -> None:
    """Train with DeepSpeed alone."""
    import deepspeed
    import torch.distributed as dist

    from mics_ds.replicas import ReplicaBatches

    model = Net(training.layers, training.width)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=training.config)
    save = Path(training.folder) / "checkpoints"
    is_there = [(save / "latest").exists()]
    dist.broadcast_object_list(is_there)  # another replica may be about to save
    if is_there[0]:
        engine.load_checkpoint(str(save))
    dtype = next(engine.module.parameters()).dtype
    for x, y in ReplicaBatches(Samples(training.width), engine, seed=1):
        step = engine.global_steps
        engine.backward(engine(x.to(dtype), y.to(dtype)))
        engine.step()
        if engine.global_steps > step and training.save_every and engine.global_steps % training.save_every == 0:
            engine.save_checkpoint(str(save))
        if engine.global_steps >= training.steps:
            break
    engine.destroy()


class Recorder:
    """Writes a line for each step of an engine, and ends its rank where that has been ordered.

    Args:
        order: of this rank, see :func:`reach`.
    """

    def __init__(self, engine: Any, training: Training, replica: int, file: Any, order: Any) -> None:
        self._engine, self._training, self._replica = engine, training, replica
        self._file, self._order = file, order
        self._losses: list[float] = []
        self._before: dict[str, Any] = {}
        self._started = time.monotonic()
        engine.module.register_forward_pre_hook(self._forward)  # after the hook that gets states of a sibling
        engine.module.register_forward_hook(self._backward)
        self._step, engine.step = engine.step, self.step
        instrument(engine, order)

    def _forward(self, module: nn.Module, _: Any) -> None:
        if not module.training:
            return
        engine = self._engine
        reach(self._order, "forward")
        if not self._losses:
            rate = engine.optimizer.param_groups[0]["lr"]
            self._before = {"step": engine.global_steps, "position": engine.global_samples, "lr": rate}
            self._before["before"] = digest(engine)
        time.sleep(self._training.sleep_s)

    def _backward(self, module: nn.Module, _: Any, returned: Any) -> None:
        if module.training:
            self._losses.append((returned["loss"] if isinstance(returned, dict) else returned).item())
            reach(self._order, "backward")

    def step(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        result = self._step(*args, **kwargs)
        if len(self._losses) < self._training.micro_steps:
            return result
        line = {"replica": self._replica, "step": self._before["step"], "lost": True}
        if engine.global_steps > line["step"]:
            members = getattr(engine, "mics_replicas", None)
            line |= {**self._before, "lost": False, "losses": self._losses, "after": digest(engine)}
            line["members"], line["member"] = (1, 0) if members is None else (members.size, members.rank)
        line["scale"] = float(engine.optimizer.loss_scale)
        line["seconds"], line["time"] = time.monotonic() - self._started, time.time()
        self._file.write(json.dumps(line) + "\n")
        self._losses, self._started = [], time.monotonic()
        return result


def digest(engine: Any) -> str:
    """Return a digest of everything this rank continues from, without padding, which may be anything."""
    from mics_ds.deepspeed_compat.states import states_of

    found = hashlib.sha1()
    for state in states_of(engine.optimizer):
        for piece in state.pieces:
            found.update(state.tensor[piece.start : piece.stop].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def reach(order: Any, moment: str) -> None:
    """Note that this rank reaches a moment: end it, or let it sleep, where that was ordered by :class:`Jobs`."""
    if order is None:
        return
    if order.value < 0 and moment == "backward":
        seconds, order.value = -order.value, 0
        time.sleep(seconds)
    if order.value != MOMENTS.index(moment) + 1:
        return
    order.value = 0
    if moment == PUBLISH:
        os.kill(os.getpid(), signal.SIGKILL)
    delay = (os.getpid() * 7919 % 10) / 1000
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def instrument(engine: Any, order: Any) -> None:
    """Note phases that lie inside the engine."""
    if order is None:
        return
    from mics_ds.checkpoint import folder
    from mics_ds.comm import collectives

    def noting(owner: Any, name: str, moment: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            reach(order, moment)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    noting(collectives, "start_hop1", "hop 1")
    noting(engine.optimizer.replication, "start_average_", "hop 2")
    noting(engine.optimizer, "_optimizer_step", "step")
    noting(engine.mics_replicas, "take", "heal")
    noting(engine.mics_replicas, "put", "heal")
    noting(engine, "save_checkpoint", "save")
    noting(folder, "publish", PUBLISH)


# --------------------------------------------------------------------------------------------------
# In the process that starts them


class Lighthouse:
    """A lighthouse of torchft, as a process of its own, on the first node of an emulated cluster if there is one."""

    def __init__(
        self,
        min_replicas: int,
        join_timeout_s: float = 10.0,
        heartbeat_timeout_s: float = 2.0,
        cluster: Cluster | None = None,
    ) -> None:
        self.port, self._cluster = free_port(), cluster
        self.address = f"http://{'127.0.0.1' if cluster is None else cluster.address(0)}:{self.port}"
        self._options = [
            *("--min_replicas", str(min_replicas)),
            *("--join_timeout_ms", str(int(1000 * join_timeout_s))),
            *("--heartbeat_timeout_ms", str(int(1000 * heartbeat_timeout_s))),
        ]
        self.start()

    def start(self) -> None:
        command = [str(Path(sys.executable).parent / "torchft_lighthouse"), "--bind", f"[::]:{self.port}"]
        if self._cluster is not None:
            command = ["ip", "netns", "exec", self._cluster.node(0), *command]
        environment = {**os.environ, "RUST_LOG": "error"}
        self.process = subprocess.Popen([*command, *self._options], env=environment, stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Jobs:
    """The jobs of all replicas, or one job with all of them.

    Args:
        cluster: nodes of an emulated cluster: the first is for the lighthouse, and each replica has one.
    """

    def __init__(self, training: Training, lighthouse: Lighthouse | None, cluster: Cluster | None = None) -> None:
        self.training, self._lighthouse, self._cluster = training, lighthouse, cluster
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self.generation: dict[int, int] = {}
        self.ranks: dict[int, list[Any]] = {}
        self.orders: dict[int, list[Any]] = {}

    def start(self, replica: int) -> None:
        """Start a replica, or start it again."""
        training = self.training
        generation = self.generation[replica] = self.generation.get(replica, -1) + 1
        count = training.ranks if training.managed else training.ranks * training.replicas
        address = "" if self._lighthouse is None else self._lighthouse.address
        node = None if self._cluster is None else (self._cluster.node(replica + 1), self._cluster.interface)
        self.orders[replica] = [self._context.Value("i", 0) if training.managed else None for _ in range(count)]
        self.ranks[replica] = [
            self._context.Process(
                target=_run_rank,
                args=(training, replica, generation, rank, address, node, self.orders[replica][rank]),
                daemon=True,
            )
            for rank in range(count)
        ]
        for process in self.ranks[replica]:
            process.start()

    def start_all(self) -> None:
        for replica in range(self.training.replicas if self.training.managed else 1):
            self.start(replica)

    def kill(self, replica: int, rank: int | None = None) -> None:
        """Kill a rank, or all of a replica."""
        for index, process in enumerate(self.ranks[replica]):
            if rank in (None, index):
                process.kill()

    def aim(self, replica: int, rank: int, moment: str) -> None:
        """Have a rank killed when it reaches a moment."""
        self.orders[replica][rank].value = MOMENTS.index(moment) + 1

    def stall(self, replica: int, rank: int, seconds: int) -> None:
        """Have a rank sleep between its next forward and backward pass."""
        self.orders[replica][rank].value = -seconds

    def codes(self, replica: int) -> list[int | None]:
        return [process.exitcode for process in self.ranks[replica]]

    def has_failed(self, replica: int) -> bool:
        return any(code not in (None, 0) for code in self.codes(replica))

    def is_done(self, replica: int) -> bool:
        return all(code == 0 for code in self.codes(replica))

    def end_rest_of_failed(self) -> list[int]:
        """Do what a launcher does: end the rest of each replica of which a rank has died. Returns those replicas."""
        failed = [replica for replica in self.ranks if self.has_failed(replica)]
        for replica in failed:
            self.kill(replica)
        return failed

    def restart_failed(self) -> list[int]:
        """Start replicas again of which a rank has died.

        Raises:
            RuntimeError: replicas die again and again without a step.
        """
        failed = self.end_rest_of_failed()
        for replica in failed:
            if self.generation[replica] >= 5 and not self.records():
                raise RuntimeError(f"replicas cannot start\n{self.logs()}")
            for process in self.ranks[replica]:
                process.join()
            self.start(replica)
        return failed

    def wait(self, limit_s: float, *, restart: bool = True) -> None:
        """Wait until all are done.

        Raises:
            TimeoutError: they were not in time. Shows their logs.
        """
        deadline = time.monotonic() + limit_s
        while not all(self.is_done(replica) for replica in self.ranks):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done after {limit_s} s\n{self.logs()}")
            if restart:
                self.restart_failed()
            elif any(self.has_failed(replica) for replica in self.ranks):
                raise RuntimeError(f"a rank failed\n{self.logs()}")
            time.sleep(0.02)

    def until(self, reached: Callable[[list[dict[str, Any]]], bool], *, restart: bool = True) -> None:
        """Wait until a condition on the records holds."""
        deadline = time.monotonic() + LIMIT_S
        while not reached(self.records()):
            assert time.monotonic() < deadline, self.logs()
            if restart:
                self.restart_failed()
            time.sleep(0.05)

    def until_all_take_part(self) -> None:
        """Wait until each rank that runs has committed a step of all replicas. The first to start takes steps alone."""
        training = self.training

        def reached(records: list[dict[str, Any]]) -> bool:
            together = {
                (line["replica"], line["rank"])
                for line in records
                if line.get("members") == training.replicas and line["generation"] == self.generation[line["replica"]]
            }
            return len(together) == training.replicas * training.ranks

        self.until(reached)

    def close(self) -> None:
        for replica, processes in self.ranks.items():
            self.kill(replica)
            for process in processes:
                process.join()
        if self._lighthouse is not None:
            self._lighthouse.stop()

    def logs(self, lines: int = 30) -> str:
        """Return the last lines of all ranks' logs, with the stacks of those that are alive."""
        for process in (process for processes in self.ranks.values() for process in processes if process.is_alive()):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        parts = []
        for path in sorted(Path(self.training.folder).glob("log-*")):
            parts += [f"== {path.name}", *path.read_text().splitlines()[-lines:]]
        return "\n".join(parts)

    def records(self) -> list[dict[str, Any]]:
        """Return the steps of all ranks, with the rank and the generation."""
        found = []
        for path in sorted(Path(self.training.folder).glob("record-*.jsonl")):
            _, _, generation, rank = path.stem.split("-")
            for line in path.read_text().splitlines():
                try:
                    found.append({"rank": int(rank), "generation": int(generation), **json.loads(line)})
                except json.JSONDecodeError:  # killed while writing
                    continue
        return found


@contextmanager
def running(training: Training, cluster: Cluster | None = None, **options: Any) -> Iterator[Jobs]:
    """Start all replicas of a training, and end whatever is left of them.

    Args:
        options: of :class:`Lighthouse`.
    """
    options = {"min_replicas": training.min, "cluster": cluster, **options}
    jobs = Jobs(training, Lighthouse(**options) if training.managed else None, cluster)
    try:
        jobs.start_all()
        yield jobs
    finally:
        jobs.close()


# --------------------------------------------------------------------------------------------------
# What was committed


class WrongStepError(AssertionError):
    """Raised where replicas have committed other results than a reference computes."""


def committed(training: Training, records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the records of each step that the newest states come from, from the first step on.

    A step that only a replica has committed that died with it is not among them.

    Raises:
        WrongStepError: replicas have different states, or samples are left out or come twice.
    """
    kept = [line for line in records if not line["lost"]]
    last = min(max(line["step"] for line in kept if line["rank"] == rank) for rank in range(training.ranks))
    steps: list[list[dict[str, Any]]] = []
    after: dict[int, str] | None = None
    position = None
    for step in range(last, -1, -1):
        lines = [line for line in kept if line["step"] == step]
        if after is not None:
            lines = [line for line in lines if line["after"] == after[line["rank"]]]
        for key in ("before", "after"):
            if any(len({line[key] for line in lines if line["rank"] == rank}) > 1 for rank in range(training.ranks)):
                raise WrongStepError(f"step {step}: replicas differ {key} it\n{lines}")
        if {line["rank"] for line in lines} != set(range(training.ranks)):
            raise WrongStepError(f"step {step}: no rank has recorded the states that step {step + 1} began with")
        facts = {(line["position"], line["members"], line["lr"]) for line in lines}
        if len(facts) != 1:
            raise WrongStepError(f"step {step}: replicas disagree on position, members and rate: {facts}")
        [(start, members, _)] = facts
        samples = members * training.ranks * training.micro_batch * training.micro_steps
        if position is not None and start + samples != position:
            raise WrongStepError(
                f"step {step} took samples {start} to {start + samples}, the next one begins at {position}"
            )
        position = start
        after = {line["rank"]: line["before"] for line in lines}
        steps.append(lines)
    if position != 0:
        raise WrongStepError(f"the first step begins at sample {position}")
    return steps[::-1]


def compare_with_reference(training: Training, steps: list[list[dict[str, Any]]]) -> float:
    """Train on the same batches in one process, by plain PyTorch. Returns the greatest difference of a loss."""
    torch.manual_seed(7)
    model, data = Net(training.layers, training.width), Samples(training.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-2)
    order: list[int] = []
    worst = 0.0
    for lines in steps:
        first = lines[0]
        count = first["members"] * training.ranks
        losses = {}
        optimizer.zero_grad()
        for micro_step in range(training.micro_steps):
            for member in range(count):
                start = first["position"] + (micro_step * count + member) * training.micro_batch
                while len(order) < start + training.micro_batch:
                    generator = torch.Generator().manual_seed(1 + len(order) // SAMPLES)
                    order += torch.randperm(SAMPLES, generator=generator).tolist()
                x, y = zip(*(data[order[place]] for place in range(start, start + training.micro_batch)))
                loss = model(torch.stack(x), torch.stack(y))
                (loss / (count * training.micro_steps)).backward()
                losses[member, micro_step] = loss.item()
        for line in lines:
            for micro_step, loss in enumerate(line["losses"]):
                member = line["member"] * training.ranks + line["rank"]
                worst = max(worst, abs(loss - losses[member, micro_step]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = first["lr"]
        optimizer.step()
    return worst
