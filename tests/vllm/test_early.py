"""Concurrent dispatch inside one process: what the connector tells the runtime while prefill computes, layer by layer."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import LAYERS, TOKENS, Engine
from pdlink import _native
from pdlink.vllm import geometry
from pdlink.vllm.protocol import Begin, Early, Fetch, Hold, StepMeta
from test_reports import Pair, cache, transfer_id

BLOCKS = [4, 2, 7]
INTO = [1, 9, 3]
PROMPT = 2 * TOKENS + 5
NAMES = [f"layer.{number}" for number in range(LAYERS)]


@pytest.fixture(autouse=True)
def plain_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_planes", lambda *_: "vec")


@pytest.fixture
def pair():
    pair = Pair(send_type="PUT_ASYNC", kv={"paths": ["shm"], "digest": "every", "part_bytes_min": 0, "transfer_timeout_ms": 3000})
    yield pair
    pair.close()


class Request:
    """One request on both sides: prefill's orders step by step, decode's at once."""

    def __init__(self, pair: Pair):
        self.pair, self.id = pair, transfer_id()
        self.prefill, self.decode = pair.prefill, pair.decode

    def claim(self, fingerprint: int = 5) -> None:
        params = _native.early_params(self.id, [self.prefill.worker._link.address])
        early = Early("d", self.id, params, PROMPT, fingerprint)
        self.decode.step(StepMeta(earlies=[early], fetches=[Fetch("d", [INTO], 0, PROMPT)]))

    def begin(self) -> None:
        self.prefill.step(StepMeta(begins=[Begin(self.id, "p#5", PROMPT, 5)]))

    def compute(self, tokens: int, meta: StepMeta | None = None, hooks: bool = True) -> None:
        """One step of prefill's forward; without hooks as inside a CUDA graph."""
        known = BLOCKS[: -(-tokens // TOKENS)]
        self.prefill.worker.begin(replace(meta or StepMeta(), chunks=[(self.id, [known], tokens)]))
        for name in NAMES if hooks else []:
            self.prefill.worker.layer_saved(name)
        self.prefill.worker.layer_saved("a layer that shares another's cache")
        results = self.prefill.worker.finish()
        self.prefill.sent += results.sent

    def hold(self) -> StepMeta:
        return StepMeta(holds=[Hold("p", self.id, "p#5", [BLOCKS], PROMPT)], closes=[("p", False)])

    def has_landed(self, blocks: int) -> bool:
        ours, theirs = self.decode.cache.logical, self.prefill.cache.logical
        return torch.equal(ours[:, INTO[:blocks]], theirs[:, BLOCKS[:blocks]])


@pytest.mark.parametrize("hooks", [True, False])
def test_blocks_land_while_the_prompt_is_computed(pair: Pair, hooks: bool):
    request = Request(pair)
    request.begin()
    request.claim()
    request.compute(TOKENS + 3, hooks=hooks)
    request.compute(2 * TOKENS, hooks=hooks)
    request.decode.until(lambda: request.has_landed(2))
    assert not request.decode.received, "KV-3: nothing is told before prefill has ended"
    request.compute(PROMPT, request.hold(), hooks)
    pair.end(sent=["p"], received=["d"], failed=[])
    assert request.has_landed(3)


def test_a_preempted_prompt_is_pushed_again_out_of_its_new_blocks(pair: Pair):
    request = Request(pair)
    request.begin()
    request.claim()
    request.compute(2 * TOKENS)
    request.decode.until(lambda: request.has_landed(2))
    request.prefill.cache.logical[:] += 1
    request.compute(PROMPT, replace(request.hold(), restarts=[request.id]))
    pair.end(sent=["p"], received=["d"], failed=[])
    assert request.has_landed(3)


def test_another_prompt_is_never_loaded(pair: Pair):
    request = Request(pair)
    request.begin()
    request.claim(fingerprint=6)
    pair.decode.until(lambda: pair.decode.failed == ["d"])
    request.compute(PROMPT, request.hold())
    pair.prefill.worker._link.abort(request.id)
    pair.end(sent=["p"], received=["d"], failed=["d"])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_prompt_that_ends_half_way_fails_decodes_load(pair: Pair, steps: int):
    request = Request(pair)
    request.begin()
    request.claim()
    for step in range(steps):
        request.compute((step + 1) * TOKENS)
    pair.prefill.step(StepMeta(withdrawals=[request.id]))
    pair.end(sent=[], received=["d"], failed=["d"])


def test_decode_that_goes_half_way_lets_prefill_go_on_alone(pair: Pair):
    request = Request(pair)
    request.begin()
    request.claim()
    request.compute(TOKENS)
    pair.decode.step(StepMeta(aborts=["d"]))
    request.compute(PROMPT, request.hold())
    pair.end(sent=["p"], received=["d"], failed=["d"])


def test_a_second_request_with_the_same_parameters_takes_nobodys_report(pair: Pair):
    request = Request(pair)
    request.begin()
    request.claim()
    # It has ended in the runtime, which no step has told of yet: vLLM's own word for a client that left comes just then.
    pair.decode.worker._link.abort(request.id)
    params = _native.early_params(request.id, [request.prefill.worker._link.address])
    while pair.decode.worker._link.figures().active:
        pass
    pair.decode.step(StepMeta(earlies=[Early("again", request.id, params, 1, 0)], drops=["again"]))
    pair.prefill.step(StepMeta(withdrawals=[request.id]))
    pair.end(sent=[], received=["d"], failed=["d"])


def asked(request_id: str, params: Any, tokens: int = PROMPT, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=request_id,
        kv_transfer_params=params,
        prompt_token_ids=list(range(tokens)),
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        max_tokens=1,
        **more,
    )


def test_both_schedulers_mean_the_same_prompt_and_prefills_tells_each_chunk(monkeypatch: pytest.MonkeyPatch):
    prefill, decode = (Engine(role, cache(), send_type="PUT_ASYNC") for role in ("kv_producer", "kv_consumer"))
    id = transfer_id()
    leg = {"do_remote_decode": True, "do_remote_prefill": False, "pdlink": {"transfer_id": id, "early": True}}
    first = asked("p", leg)
    prefill.scheduler.meet(first)
    decode.scheduler.meet(asked("d", json.loads(_native.early_params(id, ["127.0.0.1:1"]))))
    (begin,), (early,) = prefill.scheduler._meta.begins, decode.scheduler._meta.earlies
    assert (begin.tokens, begin.fingerprint) == (early.tokens, early.fingerprint) == (PROMPT, begin.fingerprint)
    assert decode.scheduler.matched_tokens(asked("d", None), 0) == (PROMPT, True)

    def step(computed: int, count: int, blocks: list[int] | None, resumed: bool = False) -> StepMeta:
        first.num_computed_tokens = computed
        new = None if blocks is None else (blocks,)
        monkeypatch.setattr("pdlink.vllm.scheduler.yield_req_data", lambda _: [("p", new, resumed)])
        return prefill.scheduler.step_meta(SimpleNamespace(num_scheduled_tokens={"p": count}))

    assert step(0, TOKENS + 3, [4, 2]).chunks == [(id, [[4, 2]], TOKENS + 3)]
    again = step(0, TOKENS, [5], resumed=True)
    assert (again.restarts, again.chunks) == ([id], [(id, [[5]], TOKENS)])
    last = step(TOKENS, PROMPT - TOKENS, [6, 8])
    assert last.chunks == [(id, [[5, 6, 8]], PROMPT)] and last.holds[0].blocks == [[5, 6, 8]]
    first.status = SimpleNamespace(name="FINISHED_ABORTED")
    other = asked("q", {**leg, "pdlink": {"transfer_id": transfer_id(), "early": True}})
    other.status = first.status
    prefill.scheduler.meet(other)
    assert prefill.scheduler.finished(other, ([],)) == (False, None)
    assert prefill.scheduler._meta.withdrawals == [other.kv_transfer_params["pdlink"]["transfer_id"]]
    for engine in (prefill, decode):
        engine.close()
