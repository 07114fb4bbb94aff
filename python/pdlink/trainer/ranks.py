"""The processes of a trainer that publish together, and how they agree.

Every call is made by all of them, in the same order. What fails on one of them is raised on all, as the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import PublishError, UnknownOutcomeError
from .tensors import is_sharded

if TYPE_CHECKING:
    import torch
    import torch.distributed

    from .tensors import Named

Made = TypeVar("Made")

# What a rank says before each step: do it; not yet; nobody wants it any more; it cannot.
GO, WAIT, STOP, FAILED = range(4)


class LostError(Exception):
    """The ranks cannot speak with each other any more."""


@dataclass(frozen=True)
class Failure:
    """An error, in words that go to another process."""

    status: int
    message: str
    version: int | None = None
    peer: str | None = None

    @classmethod
    def of(cls, error: Exception, who: str) -> Failure:
        """What concerns the fleet is said as it is; anything else is this rank's."""
        if isinstance(error, UnknownOutcomeError):
            return cls(error.status, str(error), error.version, error.peer)
        if isinstance(error, PublishError):
            return cls(error.status, str(error))
        return cls(0, f"{who} of the trainer failed: {type(error).__name__}: {error}")

    def error(self) -> PublishError:
        if self.version is not None and self.peer is not None:
            return UnknownOutcomeError(self.status, self.message, self.version, self.peer)
        return PublishError(self.status, self.message)


def attempt(step: Callable[[], Made]) -> tuple[Made | None, Exception | None]:
    try:
        return step(), None
    except Exception as error:
        return None, error


class Ranks:
    """The ranks of a process group."""

    def __init__(self, group: torch.distributed.ProcessGroup | None) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("there is no process group: call torch.distributed.init_process_group before tensors are published by it")
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the `group` that it publishes with")
        # One that carries words through host memory does so without a wait for the GPU.
        kinds = [kind.partition(":")[0] for kind in dist.get_backend_config(group).split(",")]
        self._device = "cpu" if "cpu" in kinds else kinds[0]

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.count}"

    def agree(self, word: int, error: Exception | None = None) -> int:
        """Rank 0's word, unless a rank failed: then that rank's error, on all."""
        words = self._words(word if error is None else FAILED)
        if FAILED in words:
            self._raise_first(self.tell(None if error is None else Failure.of(error, self.name)), error)
        return words[0]

    def together(self, step: Callable[[], Made]) -> list[Made]:
        """Does a step on every rank, and says to all what each made. That is small, and can be pickled."""
        made, error = attempt(step)
        said = self.tell((made, None if error is None else Failure.of(error, self.name)))
        self._raise_first([failure for _, failure in said], error)
        return [made for made, _ in said]

    def _raise_first(self, failures: list[Failure | None], own: Exception | None) -> None:
        first = next((failure for failure in failures if failure is not None), None)
        if first is not None:
            raise first.error() from own

    def tell(self, said: Any) -> list[Any]:
        """What every rank says."""
        import torch.distributed as dist

        heard: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(heard, said, group=self._group)
        except Exception as error:
            raise self._lost(error) from error
        return heard

    def _words(self, word: int) -> list[int]:
        import torch
        import torch.distributed as dist

        try:
            own = torch.tensor([word], dtype=torch.int64, device=self._device)
            heard = [torch.empty_like(own) for _ in range(self.count)]
            dist.all_gather(heard, own, group=self._group)
            return [int(each) for each in torch.cat(heard).tolist()]
        except Exception as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> LostError:
        return LostError(f"{self.name} of the trainer cannot speak with the others: {type(error).__name__}: {error}")


class Alone(Ranks):
    """One process that is no group: what fails is raised as it is."""

    def __init__(self) -> None:
        self.rank, self.count = 0, 1

    def tell(self, said: Any) -> list[Any]:
        return [said]

    def _words(self, word: int) -> list[int]:
        return [word]

    def _raise_first(self, failures: list[Failure | None], own: Exception | None) -> None:
        if own is not None:
            raise own


def ranks_of(group: torch.distributed.ProcessGroup | None, tensors: Named) -> Ranks:
    """Those that publish together: all of a group that was named, or of the default one if a tensor is sharded."""
    is_together = group is not None or any(is_sharded(tensor) for _, tensor in tensors)
    return Ranks(group) if is_together else Alone()
