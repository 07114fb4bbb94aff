"""The link's numbers on vLLM's own `/metrics`, under the names that every pdlink process uses.

Each rank tells what is new ([`RankNumbers`]); vLLM brings the ranks' news of a step together; the scheduler's side makes them the
worker's own numbers (`tally`), and the API server's process counts those.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .. import _native

# 10 us to some 20 s, as in the runtime's own histograms.
_SECONDS = [10e-6 * 2**step for step in range(22)]
_PARTS = ("wait", "copy", "validate")
DONE = "done"


class Transfer(NamedTuple):
    """One that ended, on one rank or on all."""

    transfer_id: str
    side: str
    path: str
    outcome: str
    bytes: int
    times_us: tuple[int, int, int]
    digest_checked: bool
    posts: int


@dataclass
class PdlinkStats(KVConnectorStats):
    """News of ranks, or of the worker that they make. `data` crosses processes, where tuples become lists."""

    def __post_init__(self) -> None:
        self.data = {**_nothing(), **self.data}

    def reset(self) -> None:
        self.data = _nothing()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Other ranks' news of the same step, or the same worker's of a later one."""
        ours, theirs = self.data, other.data
        ours["ranks"].update(theirs["ranks"])
        ours["transfers"].extend(theirs["transfers"])
        ours["leases"] += theirs["leases"]
        for reason, count in theirs["peer_failures"].items():
            ours["peer_failures"][reason] = ours["peer_failures"].get(reason, 0) + count
        ours["gauges"] = theirs["gauges"] or ours["gauges"]
        return self

    def reduce(self) -> dict[str, int | float]:
        transfers = [Transfer(*transfer) for transfer in self.data["transfers"]]
        done = [transfer for transfer in transfers if transfer.outcome == DONE]
        copy_us = sum(transfer.times_us[1] for transfer in done)
        return {
            "Transfers done": len(done),
            "Transfers not done": len(transfers) - len(done),
            "MiB moved": round(sum(transfer.bytes for transfer in done) / 2**20, 3),
            "Avg copy time (ms)": round(copy_us / 1e3 / len(done), 3) if done else 0.0,
        }

    def is_empty(self) -> bool:
        return not any(self.data.values())


def _nothing() -> dict[str, Any]:
    """`ranks`: by rank, `transfers`, and what has been added to `leases` and `peer_failures`, and all of `gauges` if one of them has
    changed. The others are the worker's, in the same form."""
    return {"ranks": {}, "transfers": [], "leases": 0, "peer_failures": {}, "gauges": None}


class RankNumbers:
    """What one rank has not told yet."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._transfers: list[Transfer] = []
        # Of the link that is open, as far as they have been seen.
        self._leases = 0
        self._failures: Counter[str] = Counter()
        # Since the rank began.
        self._new_leases = 0
        self._new_failures: Counter[str] = Counter()
        self._gauges: dict[str, Any] = {"held": 0, "active": 0, "gpu_bytes": 0, "peers": {}}
        self._new_gauges: dict[str, Any] | None = None

    def count(self, report: _native.Report) -> None:
        ended_well = report.end in ("sent", "received")
        outcome = DONE if ended_well else report.reason or report.end
        times_us = (report.wait_us, report.copy_us, report.validate_us)
        transfer = Transfer(
            report.transfer_id,
            report.side,
            report.path or "none",
            outcome,
            report.bytes,
            times_us,
            report.digest_checked,
            report.posts,
        )
        self._transfers.append(transfer)

    def look(self, now: _native.Figures) -> None:
        self._new_leases += now.leases_renewed - self._leases
        failures = Counter(now.peer_failures)
        self._new_failures += failures - self._failures
        self._leases, self._failures = now.leases_renewed, failures
        gauges = {"held": now.held, "active": now.active, "gpu_bytes": now.gpu_bytes, "peers": now.peers}
        if gauges != self._gauges:
            self._gauges = self._new_gauges = gauges

    def closed(self, last: _native.Figures) -> None:
        """The next link begins at nothing again."""
        self.look(last)
        self._leases, self._failures = 0, Counter()

    def take(self) -> PdlinkStats | None:
        told = {
            "transfers": [tuple(transfer) for transfer in self._transfers],
            "leases": self._new_leases,
            "peer_failures": dict(self._new_failures),
            "gauges": self._new_gauges,
        }
        self._transfers, self._new_leases, self._new_failures, self._new_gauges = [], 0, Counter(), None
        return PdlinkStats(data={"ranks": {self._rank: told}}) if any(told.values()) else None


class PdlinkPromMetrics(KVConnectorPromMetrics):
    """Counts observed stats under `_native.METRICS`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        names, histogram = _native.METRICS, self._histogram_cls

        def counter(name: str, text: str, labels: list[str]) -> Any:
            return self._counter_cls(name=names[name], documentation=text, labelnames=labelnames + labels)

        def gauge(name: str, text: str, labels: list[str]) -> Any:
            return self._gauge_cls(name=names[name], documentation=text, labelnames=labelnames + labels)

        self._transfers = counter("transfers", "Transfers that ended", ["side", "path", "outcome"])
        self._bytes = counter("bytes", "Bytes of KV moved", ["side", "path"])
        self._posts = counter("posts", "Requests posted to a path", ["side", "path"])
        self._leases = counter("leases", "Leases that decode renewed", [])
        self._digests = counter("digests", "Transfers whose digest was compared", ["side"])
        self._failures = counter("peer_failures", "Workers lost or not reached", ["reason"])
        self._plain = {
            "held": gauge("held", "Blocks held for decode", []),
            "active": gauge("active", "Transfers that have not ended", []),
            "gpu_bytes": gauge("gpu_bytes", "GPU memory that pdlink has taken for staging and lists", []),
        }
        self._peers = gauge("peers", "Connected workers of the other role", ["side"])
        self._seconds = histogram(
            name=names["seconds"],
            documentation="Time of transfers that ended well",
            buckets=_SECONDS,
            labelnames=labelnames + ["side", "part"],
        )
        for engine in per_engine_labelvalues.values():
            for single in (self._leases, *self._plain.values()):
                single.labels(*engine)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for transfer in transfer_stats_data.get("transfers", ()):
            self._ended(engine, Transfer(*transfer))
        if leases := transfer_stats_data.get("leases"):
            self._leases.labels(*engine).inc(leases)
        for reason, count in (transfer_stats_data.get("peer_failures") or {}).items():
            self._failures.labels(*engine, reason).inc(count)
        if gauges := transfer_stats_data.get("gauges"):
            for name, metric in self._plain.items():
                metric.labels(*engine).set(gauges[name])
            for side, count in gauges["peers"].items():
                self._peers.labels(*engine, side).set(count)

    def _ended(self, engine: Any, transfer: Transfer) -> None:
        side, path = transfer.side, transfer.path
        self._transfers.labels(*engine, side, path, transfer.outcome).inc()
        if transfer.digest_checked:
            self._digests.labels(*engine, side).inc()
        if transfer.outcome == DONE:
            self._bytes.labels(*engine, side, path).inc(transfer.bytes)
            self._posts.labels(*engine, side, path).inc(transfer.posts)
            for part, micros in zip(_PARTS, transfer.times_us):
                self._seconds.labels(*engine, side, part).observe(micros / 1e6)
