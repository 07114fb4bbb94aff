"""Tensors that are gathered from a trainer's ranks, or cast, while they are sent: never more of them than the sender is near to.

Every rank does the same steps: it describes its tensors, and all compare; rank 0 starts the sender and orders the update; then, part
by part, a part being the tensors that begin in one bucket, all gather what is due and rank 0 gives it. Before each part the ranks
agree to go on. Whatever a rank does by itself it does before that, so that nobody waits in a gather for one that has failed. While
rank 0 waits for the packer or the proxy, it says so every few seconds: no collective is open for longer.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Union

from .errors import PublishError, UnknownOutcomeError
from .ranks import GO, STOP, WAIT, LostError, Ranks, attempt
from .tensors import Memory, dtype_of, is_cast, is_sharded, memory_of, settle, settle_stream

if TYPE_CHECKING:
    import torch

    from .._native import WeightSender
    from .tensors import Named

    # Starts the sender of tensors that are described, and lie on this GPU if they all lie on one.
    Begin = Callable[[list[tuple[str, str, list[int]]], Union[int, None]], "Begun"]

# How long the other ranks wait in one collective while rank 0 waits for somebody else.
BEAT_S = 5.0


@dataclass(frozen=True, eq=False)
class Plan:
    """One tensor, and what is sent of it."""

    name: str
    tensor: torch.Tensor
    kind: str
    cast: torch.dtype | None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> Plan:
        kind = dtype_of(name, tensor, dtype)
        return cls(name, tensor.detach(), kind, dtype if is_cast(tensor, dtype) else None)

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.tensor)

    @property
    def described(self) -> tuple[str, str, list[int]]:
        return self.name, self.kind, list(self.tensor.shape)

    def line(self) -> str:
        """All that must be the same on every rank."""
        layout = "whole"
        if self.is_sharded:
            mesh: Any = self.tensor.device_mesh
            layout = f"{tuple(self.tensor.placements)} on a mesh of {tuple(mesh.shape)}"
        return f"`{self.name}` {self.kind} {list(self.tensor.shape)} {layout}"

    def is_here(self) -> bool:
        """Whether this process has a part in the tensor's gather."""
        mesh: Any = self.tensor.device_mesh
        return mesh.get_coordinate() is not None

    def device(self) -> torch.device:
        """Where the whole tensor will lie. Parts that are kept in host memory are gathered where the mesh can gather."""
        if not self.is_sharded:
            return self.tensor.device
        local: torch.device = self.tensor.to_local().device
        if local.type == "cuda" or self.tensor.device_mesh.device_type != "cuda":
            return local
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    def gpu(self) -> int | None:
        device = self.device()
        return device.index if device.type == "cuda" else None


def prepared(plan: Plan) -> torch.Tensor:
    """This rank's part of a tensor, as it goes into the gather: cast first, for then less is gathered."""
    made = plan.tensor if plan.cast is None else plan.tensor.to(plan.cast)
    return made.to(plan.device()) if plan.is_sharded and made.to_local().device != plan.device() else made


def gathered(plan: Plan, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor: on every rank, for that is what any placement on any mesh can be made into."""
    return part.full_tensor() if plan.is_sharded else part


class Order(threading.Thread):
    """The order to the proxy, which is answered when all has been sent. Then the sender ends, and whoever waits for it goes on."""

    def __init__(self, sender: WeightSender, order: Callable[[], Any]) -> None:
        super().__init__(name="pdlink-publish", daemon=True)
        self._sender, self._order = sender, order
        self.done: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        self.done, self.error = attempt(self._order)
        self._sender.close()

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.done


@dataclass(frozen=True)
class Begun:
    """What rank 0 does an update with."""

    sender: WeightSender
    version: int
    # Orders the update, and waits until it serves.
    order: Callable[[], Any]


class Gathering:
    """One update, on one rank."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype | None) -> None:
        self._ranks, self._dtype = ranks, dtype
        self._plans: list[Plan] = []
        # Of rank 0.
        self._begun: Begun | None = None
        self._order: Order | None = None

    def publish(self, tensors: Named, found: Exception | None, begin: Begin) -> Any:
        """What the order of rank 0 came to. `found` is how the tensors could not be collected; only rank 0 begins."""
        try:
            self._compare(tensors, found)
            parts, version, peer = self._ranks.together(lambda: self._begin(begin))[0] or ([], 0, "")
        except LostError as error:
            self._close()
            raise PublishError(0, f"nothing was ordered: {error}") from error
        except BaseException:
            self._close()
            raise
        return self._follow(parts, version, peer) if self._begun is None else self._lead(self._begun, parts)

    def _compare(self, tensors: Named, found: Exception | None) -> None:
        def digest() -> bytes:
            if found is not None:
                raise found
            self._plans = sorted((Plan.of(name, tensor, self._dtype) for name, tensor in tensors), key=lambda plan: plan.name)
            return hashlib.sha256("\n".join(plan.line() for plan in self._plans).encode()).digest()

        digests = self._ranks.together(digest)
        if len(set(digests)) > 1:
            self._name_the_difference()

    def _name_the_difference(self) -> None:
        lines = [plan.line() for plan in self._plans]
        first = self._ranks.tell(lines if self._ranks.rank == 0 else None)[0]
        told = self._ranks.tell(difference(first, lines))
        rank, (own, other) = next((rank, said) for rank, said in enumerate(told) if said is not None)
        raise PublishError(
            0,
            f"the ranks of the trainer have different tensors, and nothing was sent: rank {rank} of {self._ranks.count} has {own} where "
            f"rank 0 has {other}; publish the same names, dtypes, shapes and placements on all of them",
        )

    def _begin(self, begin: Begin) -> tuple[list[int], int, str] | None:
        if self._ranks.rank != 0:
            return None
        absent = next((plan.name for plan in self._plans if plan.is_sharded and not plan.is_here()), None)
        if absent is not None:
            raise ValueError(f"tensor `{absent}` lies on a mesh that rank 0 is not in, and rank 0 is the one that sends")
        gpus = {plan.gpu() for plan in self._plans}
        settle(gpus)
        begun = self._begun = begin([plan.described for plan in self._plans], gpus.pop() if len(gpus) == 1 else None)
        return begun.sender.parts(), begun.version, begun.sender.address

    def _close(self) -> None:
        if self._begun is not None:
            self._begun.sender.close()

    def _lead(self, begun: Begun, parts: list[int]) -> Any:
        order = self._order = Order(begun.sender, begun.order)
        order.start()
        try:
            return self._go_through(parts)
        except Exception as error:
            # Workers hear of it at once; their refusal is waited for, so that no update is under way when this ends.
            begun.sender.fail(str(error))
            order.join()
            if isinstance(error, LostError):
                return self._without_the_others(order, error)
            raise
        finally:
            begun.sender.close()

    def _without_the_others(self, order: Order, error: LostError) -> Any:
        if order.error is None or isinstance(order.error, UnknownOutcomeError):
            return order.result()
        raise PublishError(0, f"{error}; {order.error}") from error

    def _follow(self, parts: list[int], version: int, peer: str) -> Any:
        try:
            return self._go_through(parts)
        except LostError as error:
            why = f"it is not known here what became of version {version}: {error}; rank 0 knows, and GET /admin/weights of the proxy"
            raise UnknownOutcomeError(0, why, version, peer) from error

    def _go_through(self, parts: list[int]) -> Any:
        failed: Exception | None = None
        for part in cut(self._plans, parts):
            is_wanted, failed = self._part(part, failed)
            if not is_wanted:
                break
        return self._outcome(failed)

    def _part(self, part: list[Plan], failed: Exception | None) -> tuple[bool, Exception | None]:
        """Gathers a part, if it is wanted still; what failed on this rank alone is told to the others before the next."""
        word = GO if failed is not None else self._wait_until_due()
        made, error = attempt(lambda: self._prepare(part)) if word == GO and failed is None else (None, failed)
        while (said := self._ranks.agree(word, error)) == WAIT:
            pass
        if said == STOP or made is None:
            return False, None
        wholes = [self._gather(plan, own) for plan, own in zip(part, made)]
        begun = self._begun
        return True, None if begun is None else attempt(lambda: give(begun.sender, part, wholes))[1]

    def _wait_until_due(self) -> int:
        """Rank 0 waits for the packer, the others for rank 0's word."""
        if self._begun is None:
            return GO
        while (due := self._begun.sender.wait_until_due(BEAT_S)) == "early":
            self._ranks.agree(WAIT)
        return GO if due == "now" else STOP

    def _prepare(self, part: list[Plan]) -> list[torch.Tensor | None]:
        is_first = self._ranks.rank == 0
        return [prepared(plan) if (plan.is_here() if plan.is_sharded else is_first) else None for plan in part]

    def _gather(self, plan: Plan, own: torch.Tensor | None) -> torch.Tensor | None:
        if own is None:
            return None
        try:
            whole = gathered(plan, own)
        except Exception as error:
            # Whether the others are in this gather or past it cannot be known: no word of this rank would be understood.
            raise LostError(
                f"{self._ranks.name} of the trainer cannot gather tensor `{plan.name}`: {type(error).__name__}: {error}"
            ) from error
        return whole if self._begun is not None else None

    def _outcome(self, failed: Exception | None) -> Any:
        order = self._order
        while order is not None and failed is None and order.is_alive():
            self._ranks.agree(WAIT)
            order.join(BEAT_S)
        while self._ranks.agree(GO, failed) == WAIT:
            pass
        return self._ranks.together(lambda: None if order is None else order.result())[0]


def give(sender: WeightSender, part: list[Plan], wholes: list[torch.Tensor | None]) -> None:
    """Rank 0 gives the sender a part."""
    memory: list[Memory] = [memory_of(whole) for whole in wholes if whole is not None]
    settle_stream(gpu for *_, gpu in memory)
    for plan, each in zip(part, memory):
        if not sender.give(plan.name, each):
            return


def cut(plans: list[Plan], parts: list[int]) -> Iterator[list[Plan]]:
    rest = iter(plans)
    return (list(islice(rest, count)) for count in parts)


def difference(first: list[str], own: list[str]) -> tuple[str, str] | None:
    """The first tensor that is another one than rank 0's, and that one."""
    if own == first:
        return None
    at = next((at for at, (one, other) in enumerate(zip(own, first)) if one != other), min(len(own), len(first)))
    return own[at] if at < len(own) else "nothing more", first[at] if at < len(first) else "nothing more"
