"""The link's numbers on vLLM's own `/metrics`, under the names that every pdlink process uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .. import _native

# 10 us to some 20 s, as in the runtime's own histograms.
_SECONDS = [10e-6 * 2**step for step in range(22)]
_PARTS = ("wait", "copy", "validate")


@dataclass
class PdlinkStats(KVConnectorStats):
    """Transfers that ended and the latest gauges, of one worker or of several. `data` crosses processes."""

    def __post_init__(self) -> None:
        self.data.setdefault("transfers", [])
        self.data.setdefault("leases", 0)
        self.data.setdefault("gauges", None)

    def reset(self) -> None:
        self.data = {"transfers": [], "leases": 0, "gauges": None}

    def count(self, report: _native.Report) -> None:
        ended_well = report.end in ("sent", "received")
        outcome = "done" if ended_well else report.reason or report.end
        times = (report.wait_us, report.copy_us, report.validate_us)
        path = report.path or "none"
        transfer = (report.side, path, outcome, report.bytes, times, report.digest_checked, report.posts)
        self.data["transfers"].append(transfer)

    def renewed(self, leases: int) -> None:
        self.data["leases"] += leases

    def gauges(self, held: int, active: int) -> None:
        self.data["gauges"] = (held, active)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["transfers"].extend(other.data["transfers"])
        self.data["leases"] += other.data["leases"]
        ours, theirs = self.data["gauges"], other.data["gauges"]
        # Ranks hold the same requests: the largest of them is the one that is furthest behind.
        both = [gauges for gauges in (ours, theirs) if gauges is not None]
        self.data["gauges"] = tuple(max(values) for values in zip(*both)) if both else None
        return self

    def reduce(self) -> dict[str, int | float]:
        done = [transfer for transfer in self.data["transfers"] if transfer[2] == "done"]
        copy_us = sum(transfer[4][1] for transfer in done)
        moved = sum(transfer[3] for transfer in done)
        return {
            "Transfers done": len(done),
            "Transfers not done": len(self.data["transfers"]) - len(done),
            "MiB moved": round(moved / 2**20, 3),
            "Avg copy time (ms)": round(copy_us / 1e3 / len(done), 3) if done else 0.0,
        }

    def is_empty(self) -> bool:
        return not self.data["transfers"] and not self.data["leases"] and self.data["gauges"] is None


class PdlinkPromMetrics(KVConnectorPromMetrics):
    """Counts observed stats under `_native.METRICS`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        names, histogram = _native.METRICS, self._histogram_cls

        def counter(name: str, text: str, labels: list[str]) -> Any:
            return self._counter_cls(name=names[name], documentation=text, labelnames=labelnames + labels)

        def gauge(name: str, text: str) -> Any:
            return self._gauge_cls(name=names[name], documentation=text, labelnames=labelnames)

        self._transfers = counter("transfers", "Transfers that ended", ["side", "path", "outcome"])
        self._bytes = counter("bytes", "Bytes of KV moved", ["side", "path"])
        self._posts = counter("posts", "Requests posted to a path", ["side", "path"])
        self._leases = counter("leases", "Leases that decode renewed", [])
        self._digests = counter("digests", "Transfers whose digest was compared", ["side"])
        self._held = gauge("held", "Blocks held for decode")
        self._active = gauge("active", "Transfers that have not ended")
        self._seconds = histogram(
            name=names["seconds"],
            documentation="Time of transfers that ended well",
            buckets=_SECONDS,
            labelnames=labelnames + ["side", "part"],
        )
        for engine in per_engine_labelvalues.values():
            self._leases.labels(*engine)
            self._held.labels(*engine)
            self._active.labels(*engine)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for side, path, outcome, moved, times, digest_checked, posts in transfer_stats_data.get("transfers", ()):
            self._transfers.labels(*engine, side, path, outcome).inc()
            if digest_checked:
                self._digests.labels(*engine, side).inc()
            if outcome == "done":
                self._bytes.labels(*engine, side, path).inc(moved)
                self._posts.labels(*engine, side, path).inc(posts)
                for part, micros in zip(_PARTS, times):
                    self._seconds.labels(*engine, side, part).observe(micros / 1e6)
        if leases := transfer_stats_data.get("leases"):
            self._leases.labels(*engine).inc(leases)
        if gauges := transfer_stats_data.get("gauges"):
            self._held.labels(*engine).set(gauges[0])
            self._active.labels(*engine).set(gauges[1])
