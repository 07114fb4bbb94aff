"""What the scheduler's side, the workers and the metrics page say to each other. Plain data: all of it is pickled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

Blocks = list[list[int]]
"""Block ids, one list for each KV cache group that is handed over."""


@dataclass
class Fetch:
    request_id: str
    blocks: Blocks
    first_token: int
    tokens: int


@dataclass
class Hold:
    """Prefill's blocks of one request, to be offered when the step's forward has been made."""

    request_id: str
    transfer_id: str
    label: str
    blocks: Blocks
    tokens: int


@dataclass
class Early:
    """Decode: a request whose KV prefill is yet to compute."""

    request_id: str
    transfer_id: str
    params: str
    tokens: int
    fingerprint: int


@dataclass
class Begin:
    """Prefill: a request that decode may claim while its prompt is computed."""

    transfer_id: str
    label: str
    tokens: int
    fingerprint: int


@dataclass
class StepMeta(KVConnectorMetadata):
    """One step's orders to every worker, carried out in this order."""

    expects: list[tuple[str, str, str]] = field(default_factory=list)
    """Decode: request, transfer id, JSON text of the parameters."""
    earlies: list[Early] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    """Decode: a request whose parameters are no good, and why. Its load will fail."""
    fetches: list[Fetch] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)
    """Decode: requests that ended, or need nothing, before blocks were there."""
    aborts: list[str] = field(default_factory=list)
    """Decode: requests that ended while their KV was being loaded."""
    begins: list[Begin] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)
    """Prefill: transfers whose request was preempted, and is computed anew in this step."""
    chunks: list[tuple[str, Blocks, int]] = field(default_factory=list)
    """Prefill: transfer, blocks, and up to which token this step computes it."""
    withdrawals: list[str] = field(default_factory=list)
    """Prefill: transfers that were begun, and whose request ended without anything to hand over."""
    holds: list[Hold] = field(default_factory=list)
    closes: list[tuple[str, bool]] = field(default_factory=list)
    """Prefill: a request with a hold has ended; True: nobody will come for it."""

    def __bool__(self) -> bool:
        decode = (self.expects, self.earlies, self.refusals, self.fetches, self.drops, self.aborts)
        prefill = (self.begins, self.restarts, self.chunks, self.withdrawals, self.holds, self.closes)
        return any(decode + prefill)


@dataclass
class Card(KVConnectorHandshakeMetadata):
    """What one rank tells the scheduler's side: `Link.card()`."""

    text: str


@dataclass
class WorkerMeta(KVConnectorWorkerMetadata):
    """What a worker tells beside vLLM's own reports."""

    unfenced: set[str] = field(default_factory=set)
    """Loads that failed while a lost peer may still write into their blocks (KV-7)."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Drops that were carried out, and by how many ranks: nothing of the request is under way there any more."""

    def aggregate(self, other: Any) -> WorkerMeta:
        return WorkerMeta(self.unfenced | other.unfenced, self.dropped + other.dropped)
