"""One rank's part: orders of the native receiver, and the two calls that come to all ranks between two steps.

A commit is carried out twice over: `take` loads what was staged, and `settle` either makes it final on all ranks or brings the
old weights back on all (WT-1). Until `settle` the receiver's own machine waits in `committing`.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

from vllm.logger import init_logger

from ... import _native
from . import meeting
from .lead import Lead
from .load import load
from .settings import Settings

logger = init_logger("vllm.pdlink.weights")

# How long `take` waits on a rank that was not yet told to commit: the coordinator tells all ranks at once.
TOLD_WITHIN_S = 5.0
POLL_S = 3600.0


class Link(Protocol):
    """This rank's side of the KV connector."""

    def now_of_weights(self, version: int) -> None: ...
    def let_go(self) -> None: ...


class Rank:
    """Of this process."""

    def __init__(self, settings: Settings, lead: Lead | None):
        self.settings = settings
        self.native = _native.WeightReceiver(settings.receiver)
        self._lead = lead
        self._changed = threading.Condition()
        self._links: list[Link] = []
        self._pending: _native.Order | None = None
        # What `take` has touched, and what serves now; None: what the worker was started with.
        self._taken: _native.Order | None = None
        self._serving: _native.Order | None = None
        self._given_up: int | None = None
        self.version = 0
        threading.Thread(target=self._carry_out, name="pdlink-weights-orders", daemon=True).start()

    # ---------------------------------------------------------------- the KV link

    def join(self, link: Link) -> None:
        self._links.append(link)

    def leave(self, link: Link) -> None:
        self._links.remove(link)

    def let_go_of_kv(self) -> dict[str, Any]:
        for link in self._links:
            link.let_go()
        return self._answer(None)

    # ---------------------------------------------------------------- the receiver's orders

    def _carry_out(self) -> None:
        while True:
            try:
                order = self.native.next_order(POLL_S)
            except _native.ShutDownError:
                return
            if order is None:
                continue
            try:
                self._one(order)
            except Exception:
                logger.exception("an order about new weights (%s) was not carried out", order.kind)

    def _one(self, order: _native.Order) -> None:
        if order.kind == "meet":
            meeting.meet(order)
            return
        if order.kind == "commit":
            self._expect(order)
        if self._lead is not None:
            self._lead.carry_out(order)
        elif order.kind == "pause":
            # One pause stops all ranks, and is rank 0's.
            order.done()

    def _expect(self, order: _native.Order) -> None:
        with self._changed:
            if order.update == self._given_up:
                order.done("another rank gave the update up before")
                return
            self._pending = order
            self._changed.notify_all()

    # ---------------------------------------------------------------- between two steps

    def take(self, worker: Any, update: int, version: int) -> dict[str, Any]:
        begun = time.monotonic()
        try:
            order = self._told_to_commit(update)
            # From here on the model may be a mixture.
            self._taken = order
            load(worker, order)
        except Exception as error:
            logger.warning("version %d was not loaded on rank %d: %s", version, self.settings.rank, error)
            return self._answer(f"{type(error).__name__}: {error}")
        logger.info("version %d is loaded on rank %d after %.3f s", version, self.settings.rank, time.monotonic() - begun)
        return self._answer(None)

    def _told_to_commit(self, update: int) -> _native.Order:
        with self._changed:
            told = self._changed.wait_for(
                lambda: self._pending is not None and self._pending.update == update, TOLD_WITHIN_S
            )
            if not told or self._pending is None:
                raise _native.ShutDownError(f"this rank was not told to commit within {TOLD_WITHIN_S:g} s")
            return self._pending

    def settle(self, worker: Any, update: int, failure: str | None) -> dict[str, Any]:
        with self._changed:
            pending, self._pending = self._pending, None
            taken, self._taken = self._taken, None
            if failure is not None:
                self._given_up = update
        if failure is None and taken is not None:
            # What was streamed is nowhere but in the model.
            self._serving, self.version = (None if taken.streams else taken), taken.version
            for link in self._links:
                # KV made so far, and on its way here, is of the old weights (KV-5).
                link.now_of_weights(taken.version)
            taken.done()
            return self._answer(None)
        if (taken or pending) is not None and (taken or pending).streams:
            why = "the new weights were on their way into the model: it is a mixture, and must be restarted"
            logger.critical(why)
            return self._answer(why)
        if taken is not None:
            try:
                load(worker, self._serving)
            except Exception as error:
                logger.exception("the old weights did not come back: this rank must not serve before it is restarted")
                return self._answer(f"{type(error).__name__}: {error}")
        if pending is not None:
            pending.done(failure or "there was nothing to take")
        return self._answer(None)

    def _answer(self, error: str | None) -> dict[str, Any]:
        return {"rank": self.settings.rank, "error": error}


_of_process: Rank | None = None


def open(settings: Settings) -> None:
    """Makes this process's rank. vLLM has one rank in a process."""
    global _of_process
    _native.init_log(settings.log_filter, settings.log_json)
    _of_process = Rank(settings, Lead(settings.http, settings.has_connector) if settings.rank == 0 else None)
    logger.info("rank %d takes weights from pdlink", settings.rank)


def of_process() -> Rank:
    if _of_process is None:
        raise _native.ShutDownError("this worker has no receiver of weights")
    return _of_process


def if_any() -> Rank | None:
    return _of_process
