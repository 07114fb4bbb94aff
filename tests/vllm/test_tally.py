"""What ranks tell of their links becomes the worker's own numbers on vLLM's page: each transfer once."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import prometheus_client as prom
import pytest
from fakes import TOKENS
from pdlink import _native
from pdlink.vllm import PdlinkConnector, tally
from pdlink.vllm.metrics import PdlinkStats, RankNumbers
from pdlink.vllm.tally import Tally
from test_reports import Pair, plain_planes, transfer_id

__all__ = ["plain_planes"]


def report(name: str, end: str = "received", *, micros: int = 10, reason: str | None = None, **changes: Any) -> Any:
    usual = {"side": "decode", "path": "shm", "bytes": 100, "posts": 1, "digest_checked": False}
    times = {"wait_us": 1, "copy_us": micros, "validate_us": 1}
    return SimpleNamespace(**{"transfer_id": name, "end": end, "reason": reason, **usual, **times, **changes})


def figures(**changes: Any) -> Any:
    usual = {"held": 0, "active": 0, "gpu_bytes": 0, "leases_renewed": 0, "peers": {}, "peer_failures": {}}
    return SimpleNamespace(**{**usual, **changes})


class Worker:
    """Two ranks, and what vLLM does with their news of one step."""

    def __init__(self) -> None:
        self.ranks = [RankNumbers(0), RankNumbers(1)]
        self.now = 0.0
        self.tally = Tally(2, lambda: self.now)

    def step(self) -> dict[str, Any]:
        """As it comes to the process that shows it."""
        told = [stats for stats in (rank.take() for rank in self.ranks) if stats is not None]
        if not told:
            return {}
        first, *others = told
        for other in others:
            first.aggregate(other)
        self.tally.fold(first)
        said: dict[str, Any] = json.loads(json.dumps(first.to_dict()))
        assert said["ranks"] == {}
        return said


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_transfer_counts_once_when_its_last_rank_has_told_of_it(worker: Worker) -> None:
    worker.ranks[0].count(report("t", micros=50, posts=2))
    assert worker.step()["transfers"] == []
    worker.ranks[1].count(report("t", micros=70, digest_checked=True))
    (transfer,) = worker.step()["transfers"]
    assert transfer == ["t", "decode", "shm", "done", 200, [1, 70, 1], True, 3]
    for rank in worker.ranks:
        rank.count(report("u"))
    assert [one[0] for one in worker.step()["transfers"]] == ["u"], "both told of it in one step"


@pytest.mark.parametrize("failed", [0, 1])
def test_what_fails_on_one_rank_has_failed(worker: Worker, failed: int) -> None:
    for name, other in (("done", "received"), ("given up", "aborted")):
        worker.ranks[failed].count(report(name, "failed", reason="copy"))
        worker.ranks[1 - failed].count(report(name, other, micros=10_000))
    assert [one[3] for one in worker.step()["transfers"]] == ["copy", "copy"]


def test_sides_and_tries_of_one_id_are_told_apart(worker: Worker) -> None:
    worker.ranks[0].count(report("t"))
    worker.ranks[0].count(report("t", "sent", side="prefill"))
    assert worker.step()["transfers"] == []
    worker.ranks[0].count(report("t", "aborted"))
    assert [(one[1], one[3]) for one in worker.step()["transfers"]] == [("decode", "done")]


def test_a_rank_that_never_tells_holds_nothing_back_for_good(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.ranks[0].count(report("alone"))
    assert worker.step()["transfers"] == []
    worker.now = tally.WAITS_S_MAX
    worker.ranks[0].count(report("next"))
    assert [one[0] for one in worker.step()["transfers"]] == ["alone"]
    monkeypatch.setattr(tally, "WAITING_MAX", 3)
    for number in range(4):
        worker.ranks[1].count(report(f"other {number}"))
    assert [one[0] for one in worker.step()["transfers"]] == ["next", "other 0"]


def test_a_rank_with_nothing_new_stands_where_it_stood(worker: Worker) -> None:
    worker.ranks[0].look(figures(active=3, held=9, gpu_bytes=100, peers={"decode": 2}))
    worker.ranks[1].look(figures(active=2, held=9, gpu_bytes=50, peers={"decode": 1}))
    gauges = {"held": 9, "active": 3, "gpu_bytes": 150, "peers": {"decode": 2}}
    assert worker.step()["gauges"] == gauges
    worker.ranks[1].look(figures(active=0, held=9, gpu_bytes=50, peers={"decode": 1}))
    assert worker.step()["gauges"] == gauges, "rank 0 has three under way still"
    worker.ranks[0].look(figures(gpu_bytes=100, peers={"decode": 0}))
    worker.ranks[1].look(figures(gpu_bytes=50, peers={"decode": 0}))
    assert worker.step()["gauges"] == {"held": 0, "active": 0, "gpu_bytes": 150, "peers": {"decode": 0}}
    assert worker.step() == {}


def test_what_every_rank_does_for_itself_counts_once(worker: Worker) -> None:
    worker.ranks[0].look(figures(leases_renewed=4, peer_failures={"silent": 1}))
    worker.ranks[1].look(figures(leases_renewed=3))
    said = worker.step()
    assert (said["leases"], said["peer_failures"]) == (4, {"silent": 1})
    worker.ranks[1].look(figures(leases_renewed=6, peer_failures={"silent": 1, "closed": 1}))
    said = worker.step()
    assert (said["leases"], said["peer_failures"]) == (2, {"closed": 1})


def test_a_link_that_is_opened_again_begins_at_nothing(worker: Worker) -> None:
    worker.ranks[0].closed(figures(leases_renewed=4, peer_failures={"silent": 2}))
    worker.ranks[0].look(figures(leases_renewed=1, peer_failures={"silent": 1}))
    said = worker.step()
    assert (said["leases"], said["peer_failures"]) == (5, {"silent": 3})


class Page:
    """vLLM's page of one engine."""

    def __init__(self) -> None:
        self.registry = prom.CollectorRegistry()
        kinds = {kind: partial(kind, registry=self.registry) for kind in (prom.Counter, prom.Gauge, prom.Histogram)}
        config = SimpleNamespace(kv_transfer_config=None)
        self.metrics = PdlinkConnector.build_prom_metrics(config, kinds, ["engine"], {0: ["0"]})

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"engine": "0", **labels})


def test_the_page_shows_all_that_the_link_has(worker: Worker) -> None:
    page = Page()
    assert {family.name for family in page.registry.collect()} == set(_native.METRICS.values())
    for rank in worker.ranks:
        rank.count(report("t", digest_checked=True))
        rank.look(figures(active=1, gpu_bytes=512, peers={"decode": 1}, leases_renewed=2, peer_failures={"silent": 1}))
    page.metrics.observe(worker.step())
    page.metrics.observe({})
    on = {"side": "decode", "path": "shm"}
    assert page.value("pdlink_kv_transfers_total", outcome="done", **on) == 1
    assert page.value("pdlink_kv_transfer_bytes_total", **on) == 200
    assert page.value("pdlink_kv_transfer_seconds_count", side="decode", part="copy") == 1
    assert page.value("pdlink_gpu_memory_bytes") == 1024
    assert page.value("pdlink_kv_peers", side="decode") == 1
    assert page.value("pdlink_kv_peer_failures_total", reason="silent") == 1
    assert page.value("pdlink_kv_leases_renewed_total") == 2


def test_the_log_adds_up_steps() -> None:
    whole = PdlinkConnector.build_kv_connector_stats()
    for micros in (1000, 3000):
        rank = RankNumbers(0)
        rank.count(report("t", micros=micros, bytes=2**20))
        stats = rank.take()
        assert stats is not None
        Tally(1).fold(stats)
        whole = whole.aggregate(PdlinkStats(data=stats.to_dict()))
    told = {"Transfers done": 2, "Transfers not done": 0, "MiB moved": 2, "Avg copy time (ms)": 2}
    assert whole.reduce() == told


def test_a_real_link_tells_of_its_peers_and_of_those_it_lost() -> None:
    pair, page = Pair(), Page()
    try:

        def show() -> None:
            if (stats := pair.decode.worker.take_stats()) is not None:
                ended = SimpleNamespace(finished_recving=None, kv_connector_worker_meta=None, kv_connector_stats=stats)
                pair.decode.scheduler.ends(ended)
                page.metrics.observe(stats.to_dict())

        pair.decode.load("d", pair.prefill.hold("p", transfer_id(), [[1]], TOKENS), [[2]])
        pair.end(["p"], ["d"], [])
        show()
        assert page.value("pdlink_kv_transfers_total", side="decode", path="shm", outcome="done") == 1
        assert page.value("pdlink_kv_peers", side="decode") == 1
        params = pair.prefill.hold("q", transfer_id(), [[1]], TOKENS)
        pair.prefill.worker.close()
        pair.decode.load("e", params, [[3]])
        pair.decode.until(lambda: "e" in pair.decode.received)
        pair.decode.until(lambda: show() or page.value("pdlink_kv_peers", side="decode") == 0)
        assert "pdlink_kv_peer_failures_total{" in prom.generate_latest(page.registry).decode()
    finally:
        pair.close()
