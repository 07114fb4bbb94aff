"""KV-1 towards vLLM: one report for each hold and each started load, whatever becomes of it, and none for anything else.

vLLM's engine dies of a report too many and hangs on one too few, so each case here also waits for what must not come.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import BLOCKS, HEADS, LAYERS, SIZE, TOKENS, Cache, Engine
from pdlink.vllm import NixlConnector, P2pNcclConnector, PdlinkConnector, config, geometry
from pdlink.vllm.protocol import Fetch, Hold, StepMeta, WorkerMeta
from pdlink.vllm.scheduler import SchedulerSide

_ids = itertools.count(1)


def transfer_id() -> str:
    return f"{next(_ids):032x}"


@pytest.fixture(autouse=True)
def plain_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_planes", lambda *_: "vec")


def cache() -> Cache:
    memory = torch.zeros(LAYERS, BLOCKS, HEADS, TOKENS, 2 * SIZE)
    return Cache({f"layer.{number}": view for number, view in enumerate(memory)}, memory)


class Pair:
    def __init__(self, **changes: Any):
        self.prefill = Engine("kv_producer", cache(), **changes)
        self.decode = Engine("kv_consumer", cache(), **changes)
        self.prefill.cache.fill()

    def end(self, sent: list[str], received: list[str], failed: list[str]) -> None:
        """The reports that must come, then those that must not, then that nothing is left."""
        self.prefill.until(lambda: len(self.prefill.sent) >= len(sent))
        self.decode.until(lambda: len(self.decode.received) >= len(received))
        for engine in (self.prefill, self.decode):
            engine.settle()
        assert sorted(self.prefill.sent) == sorted(sent)
        assert sorted(self.decode.received) == sorted(received)
        assert sorted(self.decode.failed) == sorted(failed)
        for engine in (self.prefill, self.decode):
            assert not (engine.worker._loads or engine.worker._held or engine.worker._offered)
            assert not (engine.worker._expected or engine.worker._dropping)

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


@pytest.mark.parametrize("send_type", ["GET", "PUT", "PUT_ASYNC"])
def test_taken_whoever_drives_the_copy(send_type: str):
    pair = Pair(send_type=send_type)
    try:
        params = pair.prefill.hold("p", transfer_id(), [[1, 2]], 2 * TOKENS)
        pair.decode.load("d", params, [[5, 3]])
        pair.end(["p"], ["d"], [])
        ours, theirs = pair.decode.cache.logical, pair.prefill.cache.logical
        assert torch.equal(ours[:, [5, 3]], theirs[:, [1, 2]])
    finally:
        pair.close()


def test_a_step_hands_its_orders_on_before_it_waits_for_pushes():
    """With PUT: else decode's own loads would wait for what prefill pushes, in an engine that does both."""
    pair = Pair(send_type="PUT")
    try:
        link, called = pair.decode.worker._link, []

        class Noting:
            def __getattr__(self, name: str) -> Any:
                called.append(name)
                return getattr(link, name)

        params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
        pair.decode.worker._link = Noting()
        pair.decode.load("d", params, [[2]])
        assert called[:3] == ["expect", "fetch", "wait_for_pushes"]
        pair.end(["p"], ["d"], [])
    finally:
        pair.close()


@pytest.mark.parametrize("connector", [PdlinkConnector, P2pNcclConnector, NixlConnector])
def test_host_memory_goes_by_its_own_paths_under_every_name(connector: type[PdlinkConnector]):
    """Without a launcher nobody names paths, and the cache of a CPU is no GPU's."""
    pair = Pair(connector=connector, kv={"lease_ms": 4000, "transfer_timeout_ms": 3000})
    try:
        name = transfer_id()
        pair.decode.load("d", pair.prefill.hold("p", name, [[1]], TOKENS), [[2]])
        pair.end(["p"], ["d"], [])
        assert json.loads(pair.decode.worker._link.record(name))["path"] == "shm"
    finally:
        pair.close()


def test_dropped_before_its_blocks_came(pair: Pair):
    params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    name = json.loads(params)["pdlink"]["transfer_id"]
    pair.decode.step(StepMeta(expects=[("d", name, params)]))
    pair.decode.step(StepMeta(drops=["d"]))
    pair.end(["p"], [], [])


def test_dropped_in_the_same_step(pair: Pair):
    params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    name = json.loads(params)["pdlink"]["transfer_id"]
    pair.decode.step(StepMeta(expects=[("d", name, params)], drops=["d"]))
    pair.end(["p"], [], [])


def test_aborted_while_loading(pair: Pair):
    params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    name = json.loads(params)["pdlink"]["transfer_id"]
    fetch = Fetch("d", [[4]], 0, TOKENS)
    pair.decode.step(StepMeta(expects=[("d", name, params)], fetches=[fetch], aborts=["d"]))
    pair.decode.until(lambda: pair.decode.received)
    # It may have been complete before the abort was heard: then it is no failure.
    pair.end(["p"], ["d"], pair.decode.failed)


def test_aborted_after_it_was_reported(pair: Pair):
    params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    pair.decode.load("d", params, [[4]])
    pair.decode.until(lambda: pair.decode.received)
    pair.decode.step(StepMeta(aborts=["d"]))
    pair.end(["p"], ["d"], [])


def test_refused_before_the_fetch_and_told_with_it(pair: Pair):
    params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    pair.decode.load("first", params, [[4]])
    pair.end(["p"], ["first"], [])
    name = json.loads(params)["pdlink"]["transfer_id"]
    pair.decode.step(StepMeta(expects=[("late", name, params)]))
    pair.decode.settle()
    assert pair.decode.received == ["first"], "nothing is told of a load that has not started"
    pair.decode.step(StepMeta(fetches=[Fetch("late", [[6]], 0, TOKENS)]))
    pair.end(["p"], ["first", "late"], ["late"])


def test_parameters_that_are_no_good(pair: Pair):
    pair.decode.step(StepMeta(refusals=[("a", "no good"), ("b", "no good")]))
    pair.decode.step(StepMeta(fetches=[Fetch("a", [[6]], 0, TOKENS)], drops=["b"]))
    pair.end([], ["a"], ["a"])


def test_the_same_parameters_twice_at_once(pair: Pair):
    params = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    name = json.loads(params)["pdlink"]["transfer_id"]
    pair.decode.step(StepMeta(expects=[("one", name, params), ("two", name, params)]))
    pair.decode.step(StepMeta(fetches=[Fetch("two", [[6]], 0, TOKENS), Fetch("one", [[7]], 0, TOKENS)]))
    pair.end(["p"], ["one", "two"], ["two"])


def test_offered_but_unwanted(pair: Pair):
    hold = Hold("p", transfer_id(), "p#0", [[1]], TOKENS)
    pair.prefill.step(StepMeta(holds=[hold]))
    pair.prefill.settle()
    assert pair.prefill.sent == [], "the request has not ended"
    pair.prefill.step(StepMeta(closes=[("p", True)]))
    pair.end(["p"], [], [])


def test_ended_on_the_link_before_the_request_ends(pair: Pair):
    """The proxy may give a transfer up while the request that makes it still runs: vLLM must not hear of it yet."""
    name = transfer_id()
    pair.prefill.step(StepMeta(holds=[Hold("p", name, "p#0", [[1]], TOKENS)]))
    pair.prefill.worker._link.abort(name)
    pair.prefill.settle()
    assert pair.prefill.sent == []
    pair.prefill.step(StepMeta(closes=[("p", False)]))
    pair.end(["p"], [], [])


def test_blocks_that_are_none_and_ids_in_use(pair: Pair):
    name = transfer_id()
    pair.prefill.hold("far", transfer_id(), [[BLOCKS + 5]], TOKENS)
    pair.prefill.hold("one", name, [[1]], TOKENS)
    params = pair.prefill.hold("again", name, [[2]], TOKENS)
    pair.prefill.until(lambda: sorted(pair.prefill.sent) == ["again", "far"])
    pair.decode.load("d", params, [[4]])
    pair.end(["again", "far", "one"], ["d"], [])


def test_nobody_comes(pair: Pair):
    pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    pair.end(["p"], [], [])


def test_asleep_and_awake(pair: Pair):
    """What was under way ends, nothing is held while the pages are away, and the worker comes back as a new peer."""
    old = pair.prefill.hold("p", transfer_id(), [[1]], TOKENS)
    before = json.loads(pair.prefill.worker.card().text)
    pair.prefill.worker.close()
    pair.prefill.until(lambda: pair.prefill.sent == ["p"])
    assert pair.prefill.worker.card() is None
    pair.prefill.hold("asleep", transfer_id(), [[1]], TOKENS)
    pair.prefill.until(lambda: pair.prefill.sent == ["p", "asleep"])
    pair.prefill.worker.open()
    pair.prefill.tell_cards()
    assert json.loads(pair.prefill.worker.card().text)["incarnation"] != before["incarnation"]
    pair.decode.load("old", old, [[4]])
    pair.decode.load("new", pair.prefill.hold("q", transfer_id(), [[2]], TOKENS), [[5]])
    pair.end(["p", "asleep", "q"], ["old", "new"], ["old"])


def test_decode_falls_asleep_while_it_loads(pair: Pair):
    params = [pair.prefill.hold(name, transfer_id(), [[1]], TOKENS) for name in ("p", "q")]
    pair.decode.load("started", params[0], [[4]])
    name = json.loads(params[1])["pdlink"]["transfer_id"]
    pair.decode.step(StepMeta(expects=[("announced", name, params[1])]))
    pair.decode.worker.close()
    pair.decode.until(lambda: "started" in pair.decode.received)
    pair.decode.step(StepMeta(fetches=[Fetch("announced", [[5]], 0, TOKENS)]))
    pair.decode.until(lambda: "announced" in pair.decode.received)
    assert "announced" in pair.decode.failed
    pair.end(["p", "q"], ["started", "announced"], pair.decode.failed)


# ---------------------------------------------------------------- the scheduler's side, with vLLM's objects made up


def scheduler(role: str, tp_size: int = 1) -> SchedulerSide:
    from fakes import vllm_config

    settings = config.read(vllm_config(role), None, 0)
    return SchedulerSide(dataclasses.replace(settings, tp_size=tp_size), cache().config)


def request(request_id: str, params: Any, tokens: int = 40, **changes: Any) -> SimpleNamespace:
    found = {
        "request_id": request_id,
        "kv_transfer_params": params,
        "prompt_token_ids": list(range(tokens)),
        "num_prompt_tokens": tokens,
        "num_computed_tokens": 0,
        "max_tokens": 1,
        "status": SimpleNamespace(name="FINISHED_LENGTH_CAPPED"),
    }
    return SimpleNamespace(**{**found, **changes})


def output(new: dict[str, list[int]], scheduled: dict[str, int]) -> SimpleNamespace:
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
    reqs = [SimpleNamespace(req_id=name, block_ids=(blocks,)) for name, blocks in new.items()]
    return SimpleNamespace(scheduled_new_reqs=reqs, scheduled_cached_reqs=cached, num_scheduled_tokens=scheduled)


HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


def test_a_prompt_is_held_with_the_step_that_completes_it():
    side = scheduler("kv_producer")
    asked = request("r", dict(HOLD))
    side.meet(asked)
    assert side.matched_tokens(asked, 0) == (0, False)
    assert side.step_meta(output({"r": [3, 4, 5]}, {"r": 16})).holds == []
    asked.num_computed_tokens = 16
    later = output({}, {"r": 24})
    later.scheduled_cached_reqs.req_ids, later.scheduled_cached_reqs.new_block_ids = ["r"], [None]
    (hold,) = side.step_meta(later).holds
    assert (hold.request_id, hold.blocks, hold.tokens) == ("r", [[3, 4, 5]], 40)


@pytest.mark.parametrize(
    ("status", "blocks"), [("FINISHED_ABORTED", [3, 4, 5]), ("FINISHED_LENGTH_CAPPED", [6, 7, 8])]
)
def test_a_hold_of_a_request_that_ended_otherwise_is_taken_back(status: str, blocks: list[int]):
    """Aborted, or preempted and computed again into other blocks."""
    side = scheduler("kv_producer")
    asked = request("r", dict(HOLD))
    side.meet(asked)
    assert len(side.step_meta(output({"r": [3, 4, 5]}, {"r": 40})).holds) == 1
    asked.num_computed_tokens, asked.status.name = 40, status
    assert side.finished(asked, (blocks,)) == (True, None), "the blocks are kept until the worker reports"
    assert side.step_meta(output({}, {})).closes == [("r", True)]


def test_a_request_that_ends_before_its_prompt_is_complete_holds_nothing():
    side = scheduler("kv_producer")
    asked = request("r", dict(HOLD), num_computed_tokens=16, status=SimpleNamespace(name="FINISHED_ABORTED"))
    side.meet(asked)
    assert side.finished(asked, ([3],)) == (False, None)
    assert not side.needs_steps


def test_a_failed_or_finished_load_is_not_asked_for_again():
    side = scheduler("kv_consumer")
    asked = request("r", {"do_remote_prefill": True})
    assert side.matched_tokens(asked, 16) == (24, True)
    assert side.matched_tokens(asked, 16) == (24, True), "asked again after a failed allocation"
    side.allocated(asked, SimpleNamespace(get_block_ids=lambda: ([7, 8, 9],)), 24)
    meta = side.step_meta(output({}, {}))
    assert [(fetch.blocks, fetch.first_token) for fetch in meta.fetches] == [([[8, 9]], 16)]
    assert len(meta.refusals) == 1
    assert side.matched_tokens(asked, 0) == (0, False)


def test_a_dropped_load_keeps_the_engine_stepping_until_it_is_carried_out():
    side = scheduler("kv_consumer")
    asked = request("r", {"do_remote_prefill": True})
    side.meet(asked)
    side.step_meta(output({}, {}))
    assert side.finished(asked, ([],)) == (False, None)
    assert side.step_meta(output({}, {})).drops == ["r"] and side.needs_steps
    side.ends(told(WorkerMeta(dropped=Counter(["r"]))))
    assert not side.needs_steps


def test_a_drop_is_carried_out_when_every_rank_has_said_so():
    side = scheduler("kv_consumer", tp_size=2)
    asked = [request(name, {"do_remote_prefill": True}) for name in ("r", "s")]
    for each in asked:
        side.meet(each)
        side.finished(each, ([],))
    side.step_meta(output({}, {}))
    side.ends(told(WorkerMeta(dropped=Counter(["r", "s"])).aggregate(WorkerMeta(dropped=Counter(["s"])))))
    assert side.needs_steps, "rank 1 may still load for r"
    side.ends(told(None))
    assert side.needs_steps
    side.ends(told(WorkerMeta(dropped=Counter(["r"]))))
    assert not side.needs_steps


def told(meta: WorkerMeta | None) -> SimpleNamespace:
    return SimpleNamespace(finished_recving=None, kv_connector_worker_meta=meta, kv_connector_stats=None)


def test_kv_7_blocks_that_a_lost_peer_may_write_stay_out_of_use():
    side, touched = scheduler("kv_consumer"), []
    side.bind_pool(SimpleNamespace(blocks=list("0123456789"), touch=touched.extend))
    asked = request("r", {"do_remote_prefill": True})
    side.meet(asked)
    side.allocated(asked, SimpleNamespace(get_block_ids=lambda: ([7, 8, 9],)), 40)
    asked.status.name = "FINISHED_ABORTED"
    assert side.finished(asked, ([],)) == (False, None)
    ended = told(WorkerMeta(unfenced={"r"}))
    ended.finished_recving = {"r"}
    side.ends(ended)
    assert touched == ["7", "8", "9"] and not side._loads
