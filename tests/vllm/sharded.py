"""Processes that are the ranks of a trainer, over gloo, and what the tests have them do: functions that every rank is told to call."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pdlink.trainer import WeightPublisher, gathering

ALIGN = 256
BUCKET = 65536
# How long a test waits for a rank, and a rank for another.
PATIENCE_S = 120
COLLECTIVE_S = 60


@dataclass(frozen=True)
class Raised:
    """What a rank raised."""

    kind: str
    message: str
    status: int | None


class Trainer:
    """Ranks that do what they are told until this is closed."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(count)]
        self._ours = [ours for ours, _ in pipes]
        arguments = [(theirs, str(folder / "meeting"), rank, count) for rank, (_, theirs) in enumerate(pipes)]
        self._ranks = [context.Process(target=_serve, args=each, daemon=True) for each in arguments]
        for rank, (_, theirs) in zip(self._ranks, pipes):
            rank.start()
            theirs.close()

    def tell(self, step: Callable[..., Any], *given: Any) -> None:
        for pipe in self._ours:
            pipe.send((step, given))

    def hear(self, rank: int) -> Any:
        assert self._ours[rank].poll(PATIENCE_S), f"rank {rank} has said nothing for {PATIENCE_S} s"
        return self._ours[rank].recv()

    def run(self, step: Callable[..., Any], *given: Any) -> list[Any]:
        """What `step(rank, *given)` came to on each rank."""
        self.tell(step, *given)
        return [self.hear(rank) for rank in range(len(self._ranks))]

    def close(self) -> None:
        for pipe in self._ours:
            pipe.close()
        for rank in self._ranks:
            rank.join(20)
            if rank.is_alive():
                rank.kill()
                rank.join()


def _serve(pipe: Any, meeting: str, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    # Short, so that rank 0 says that it waits in every test.
    gathering.BEAT_S = 0.01
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=COLLECTIVE_S)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=limit)
    with contextlib.suppress(EOFError):
        while True:
            step, given = pipe.recv()
            try:
                said = step(rank, *given)
            except Exception as error:
                said = Raised(type(error).__name__, str(error), getattr(error, "status", None))
            pipe.send(said)
    dist.destroy_process_group()


def values(seed: int) -> dict[str, torch.Tensor]:
    """The names say how each is kept; together they are some 40 buckets, in another order than their names'."""
    torch.manual_seed(seed)
    made = {f"z.{number:02}.rows": torch.randn(64, 257) for number in range(30)}
    made |= {
        "h.empty.rows": torch.empty(0, 4),
        "g.one.rows": torch.randn(1, 9),
        "f.count.plain": torch.tensor(3, dtype=torch.int64),
        "e.long.rows": torch.randn(301, 500),
        "d.same.everywhere": torch.randn(50, 60),
        "c.odd.columns": torch.randn(30, 101),
        "b.odd.rows": torch.randn(7, 300),
        "a.vector.plain": torch.randn(300),
    }
    return made


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def kept(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as a trainer's ranks keep it."""
    placements = {"rows": Shard(0), "columns": Shard(1), "everywhere": Replicate()}
    over, parts = mesh(), {}
    for name, tensor in made.items():
        placement = placements.get(name.rpartition(".")[2])
        parts[name] = tensor if placement is None else distribute_tensor(tensor, over, [placement])
    return parts


def places(made: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Where each lies in the stream."""
    found, end = [], 0
    for _, tensor in sorted(made.items()):
        start = -(-end // ALIGN) * ALIGN
        end = start + tensor.numel() * tensor.element_size()
        found.append((start, end))
    return found


def most_held(made: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that overlap a bucket or begin in the next, where those are most."""
    found = places(made)
    ends = range(BUCKET, found[-1][1] + 2 * BUCKET, BUCKET)
    return max(sum(end - start for start, end in found if end > at - 2 * BUCKET and start < at) for at in ends)


@contextlib.contextmanager
def tally() -> Iterator[dict[str, int]]:
    """Counts what was given to the sender and not yet let go: `now`, `peak`, and `all` that was given, in bytes."""
    counted = {"now": 0, "peak": 0, "all": 0}
    memory_of = gathering.memory_of

    def let_go(size: int) -> None:
        counted["now"] -= size

    def counting(tensor: torch.Tensor) -> Any:
        memory = memory_of(tensor)
        weakref.finalize(memory[2], let_go, memory[1])
        counted["now"] += memory[1]
        counted["all"] += memory[1]
        counted["peak"] = max(counted["peak"], counted["now"])
        return memory

    gathering.memory_of = counting
    try:
        yield counted
    finally:
        gathering.memory_of = memory_of


@contextlib.contextmanager
def failing_at(nth: int, fail: Callable[[], Any]) -> Iterator[None]:
    """Something happens to this rank when it prepares its nth tensor."""
    prepared, seen = gathering.prepared, iter(range(1, 1 << 30))

    def counting(plan: gathering.Plan) -> torch.Tensor:
        if next(seen) == nth:
            fail()
        return prepared(plan)

    gathering.prepared = counting
    try:
        yield
    finally:
        gathering.prepared = prepared


def runs_out() -> None:
    raise RuntimeError("no memory for the cast")


def publisher(url: str, secret: Path | None, **options: Any) -> WeightPublisher:
    return WeightPublisher(url, secret_file=secret, weights={"bucket_bytes": BUCKET}, **options)


def publishes(
    rank: int, url: str, secret: Path | None, seed: int, version: int | None = None, dtype: torch.dtype | None = None
) -> Any:
    with tally() as counted:
        done = publisher(url, secret, dtype=dtype).publish(kept(values(seed)), version)
    return asdict(done), counted


def publishes_a_module(rank: int, url: str, secret: Path, state: dict[str, torch.Tensor]) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(200, 301), torch.nn.LayerNorm(301), torch.nn.Linear(301, 7))
    model.load_state_dict(state)
    fully_shard(model[0], mesh=mesh())
    fully_shard(model, mesh=mesh())
    return asdict(publisher(url, secret, dtype=torch.bfloat16).publish(model))


def publishes_and_fails(rank: int, url: str, secret: Path, seed: int, bad: int, nth: int) -> Any:
    with failing_at(nth, runs_out) if rank == bad else contextlib.nullcontext():
        publisher(url, secret).publish(kept(values(seed)))


def publishes_and_dies(rank: int, url: str, secret: Path, seed: int, nth: int) -> Any:
    with failing_at(nth, lambda: os._exit(1)) if rank == 1 else contextlib.nullcontext():
        publisher(url, secret).publish(kept(values(seed)))


def publishes_what_differs(rank: int, url: str, secret: Path, changes: dict[str, torch.Tensor]) -> Any:
    made = values(0) | (changes if rank == 1 else {})
    publisher(url, secret).publish(kept(made))


def publishes_in_a_group(rank: int, url: str, secret: Path, made: dict[str, torch.Tensor], bad: int | None) -> Any:
    def generated() -> Iterator[tuple[str, torch.Tensor]]:
        yield from made.items()
        if rank == bad:
            raise OSError("the file of the adapter is gone")

    return asdict(publisher(url, secret, group=dist.group.WORLD).publish(generated()))


def publishes_from_a_stand_in(rank: int, url: str, secret: Path, seed: int, library: Path) -> Any:
    """As `publishes`, with every whole tensor on GPU 0 of a stand-in for NVIDIA's driver, whose memory is the host's."""
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def on_gpu(tensor: torch.Tensor) -> Any:
        size, place, context = tensor.numel() * tensor.element_size(), ctypes.c_uint64(), ctypes.c_void_p()
        driver.cuCtxPushCurrent_v2(ctypes.c_void_p(1))
        status = driver.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(max(size, 1)))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        assert status == 0, f"the stand-in has no memory: {status}"
        ctypes.memmove(place.value, tensor.contiguous().data_ptr(), size)
        return place.value, size, tensor.detach(), 0

    gathering.memory_of, gathering.settle, gathering.settle_stream = on_gpu, lambda gpus: None, lambda gpus: None
    gathering.Plan.gpu = lambda plan: 0
    return publishes(rank, url, secret, seed)


def publishes_an_fsdp1_state(rank: int, url: str, secret: Path) -> Any:
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    publisher(url, secret).publish({"layer.weight": sharded_tensor.empty(spec, 4, 4)})
