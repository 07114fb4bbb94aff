"""A worker's side: block ids into the native runtime, ends out of it.

vLLM's engine dies of a report that it does not expect, and hangs on one that does not come. So each request has one entry
here, and the entry decides what is reported (KV-1):

- *decode*: one report for each started load, whatever became of it; none for a load that never started;
- *prefill*: one report for each hold, and not before the scheduler's side has said that the request has ended.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from .. import _native
from .config import LinkConfig
from .geometry import CacheMap, describe
from .metrics import PdlinkStats, RankNumbers
from .protocol import Blocks, Card, Early, Fetch, Hold, StepMeta, WorkerMeta
from .weights import rank as weights

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = init_logger("vllm.pdlink.worker")


@dataclass
class _Load:
    transfer_id: str | None = None
    """None: the runtime knows nothing of it, or not any more."""
    failure: str | None = None
    fetch: Fetch | None = None


@dataclass
class _Held:
    ended: bool = False
    closed: bool = False


@dataclass
class Results:
    """Reports since the last step, as vLLM takes them."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    invalid_blocks: set[int] = field(default_factory=set)
    unfenced: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)


class WorkerSide:
    def __init__(self, config: LinkConfig, vllm_config: VllmConfig, kv_cache_config: Any):
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._caches: dict[str, torch.Tensor] = {}
        self._link: _native.Link | None = None
        self._map: CacheMap | None = None
        self._loads: dict[str, _Load] = {}
        self._held: dict[str, _Held] = {}
        # Transfers under way, by side and transfer id, to the request.
        self._expected: dict[str, str] = {}
        self._offered: dict[str, str] = {}
        self._dropping: dict[str, str] = {}
        self._holds: list[Hold] = []
        # Concurrent dispatch: whether this step computes prompts that decode may have claimed, and the number of each layer.
        self._has_chunks = False
        self._layers: dict[str, int] = {}
        self._early: set[str] = set()
        self._closes: list[tuple[str, bool]] = []
        self._results = Results()
        self._numbers = RankNumbers(config.tp_rank)

    # ---------------------------------------------------------------- memory and link

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = kv_caches
        self.open()

    def open(self) -> None:
        """Starts the runtime over the registered memory, as a new incarnation."""
        config = self._config
        _native.init_log(config.log_filter, config.log_json)
        receiver = weights.if_any()
        cache = describe(self._caches, self._vllm_config, self._kv_cache_config, config.model)
        settings = {
            "kv": config.kv_of(cache.on_gpu),
            "engine_id": config.engine_id,
            "role": config.role,
            "send_type": config.send_type,
            "geometry": cache.geometry,
            "rank": config.tp_rank,
            "siblings": list(config.siblings),
            "layers": cache.layers,
            "num_blocks": cache.num_blocks,
            "bind_host": config.bind_host,
            "advertise_host": config.host,
            "port": config.port,
            "secret_file": config.secret_file,
            "weight_version": receiver.version if receiver is not None else 0,
        }
        self._map = cache
        self._layers = {name: number for number, name in enumerate(cache.names)}
        self._link = _native.Link(json.dumps(settings), cache.memory, receiver.native if receiver is not None else None)
        if receiver is not None:
            receiver.join(self)
        groups = [_words(group) for group in cache.geometry["groups"]]
        logger.info("KV link of rank %d (%s) at %s: %s", config.tp_rank, config.role, self._link.address, "; ".join(groups))

    def close(self) -> None:
        """Ends every transfer with its report, and lets go of the memory."""
        link, self._link = self._link, None
        if link is not None:
            if (receiver := weights.if_any()) is not None:
                receiver.leave(self)
            link.shutdown()
            self._hear(link)
            self._numbers.closed(link.figures())
        self._map = None

    def now_of_weights(self, version: int) -> None:
        if self._link is not None:
            self._link.set_weight_version(version)

    def let_go(self) -> None:
        """Gives up every transfer under way; each still has its one report."""
        if self._link is not None:
            for transfer_id in {*self._offered, *self._expected, *self._early}:
                self._link.abort(transfer_id)

    def card(self) -> Card | None:
        return Card(self._link.card()) if self._link is not None else None

    # ---------------------------------------------------------------- one step

    def begin(self, meta: StepMeta) -> None:
        """Carries out a step's orders. Holds wait until the forward has been made: see `finish`. With `PUT` the step then
        waits for what is being pushed out of here."""
        for request_id, reason in meta.refusals:
            self._loads[request_id] = _Load(failure=reason)
        for request_id, transfer_id, params in meta.expects:
            self._expect(request_id, transfer_id, params)
        for early in meta.earlies:
            self._expect_early(early)
        for fetch in meta.fetches:
            self._fetch(fetch)
        for request_id in meta.drops:
            self._drop(request_id)
        for request_id in meta.aborts:
            load = self._loads.get(request_id)
            if load is not None and load.transfer_id is not None and self._link is not None:
                self._link.abort(load.transfer_id)
        self._begin_prompts(meta)
        self._holds += meta.holds
        self._closes += meta.closes
        if self._link is not None:
            self._link.wait_for_pushes()

    def finish(self) -> Results:
        """Offers what the step has computed, and hands out the reports since the last step."""
        if self._has_chunks:
            # Also of layers that had no hook, in a CUDA graph say.
            self._computed(0, len(self._layers))
            self._has_chunks = False
        for hold in self._holds:
            self._offer(hold)
        for request_id, unwanted in self._closes:
            self._close_hold(request_id, unwanted)
        self._holds, self._closes = [], []
        if self._link is not None:
            self._hear(self._link)
        results, self._results = self._results, Results()
        return results

    # ---------------------------------------------------------------- decode

    def _expect(self, request_id: str, transfer_id: str, params: str) -> None:
        load = self._loads[request_id] = _Load()
        try:
            self._check_new(transfer_id)
            self._running().expect(params)
        except _native.PdlinkError as error:
            load.failure = str(error)
        else:
            load.transfer_id = transfer_id
            self._expected[transfer_id] = request_id

    def _check_new(self, transfer_id: str) -> None:
        """When a client leaves, vLLM sends a request of its own with the same parameters. Until the first has its report, the
        second must not get it."""
        if transfer_id in self._expected:
            raise _native.DuplicateTransferError(f"transfer {transfer_id} is in progress here already")

    def _expect_early(self, early: Early) -> None:
        load = self._loads[early.request_id] = _Load()
        try:
            self._check_new(early.transfer_id)
            self._running().expect_early(early.params, early.tokens, early.fingerprint)
        except _native.PdlinkError as error:
            load.failure = str(error)
        else:
            load.transfer_id = early.transfer_id
            self._expected[early.transfer_id] = early.request_id

    def _fetch(self, fetch: Fetch) -> None:
        load = self._loads.get(fetch.request_id)
        if load is None:
            load = self._loads[fetch.request_id] = _Load(failure="it was never announced to this worker")
        load.fetch = fetch
        if load.failure is not None:
            self._load_ended(fetch.request_id, load)
            return
        try:
            blocks = self._in_our_blocks(fetch.blocks, fetch.tokens)
            self._running().fetch(load.transfer_id or "", blocks, fetch.first_token)
        except _native.PdlinkError as error:
            # Nothing was begun, so nothing will be reported: end it here, and at prefill.
            load.failure = str(error)
            if load.transfer_id is not None and self._link is not None:
                self._link.abort(load.transfer_id)
            self._load_ended(fetch.request_id, load)

    def _drop(self, request_id: str) -> None:
        """The request has ended, or loads nothing: prefill's hold ends, and nothing is reported."""
        load = self._loads.pop(request_id, None)
        if load is not None and load.transfer_id is not None and self._link is not None:
            self._link.release(load.transfer_id)
            self._dropping[load.transfer_id] = request_id
        else:
            self._results.dropped.add(request_id)

    def _load_ended(self, request_id: str, load: _Load, fenced: bool = True) -> None:
        """The one report of a started load."""
        del self._loads[request_id]
        results = self._results
        results.received.add(request_id)
        if load.failure is None:
            return
        logger.warning("the KV of request %s was not loaded: %s", request_id, load.failure)
        results.failed.add(request_id)
        if load.fetch is not None:
            results.invalid_blocks.update(block for group in load.fetch.blocks for block in group)
        if not fenced:
            results.unfenced.add(request_id)

    # ---------------------------------------------------------------- prefill

    def _begin_prompts(self, meta: StepMeta) -> None:
        """Concurrent dispatch: what is going to be computed, and what this step computes of it."""
        link = self._link
        if link is None:
            return
        for begin in meta.begins:
            try:
                link.begin(begin.transfer_id, begin.label, begin.tokens, begin.fingerprint)
                self._early.add(begin.transfer_id)
            except _native.PdlinkError as error:
                logger.warning("transfer %s cannot be claimed early: %s", begin.transfer_id, error)
        for transfer_id in meta.restarts:
            link.restart(transfer_id)
        for transfer_id in meta.withdrawals:
            self._early.discard(transfer_id)
            link.abort(transfer_id)
        if meta.chunks:
            link.step([(transfer_id, self._in_our_blocks(blocks, tokens), tokens) for transfer_id, blocks, tokens in meta.chunks])
            self._has_chunks = True

    def layer_saved(self, layer_name: str) -> None:
        """The step's KV of one layer is in the cache, or will be when the GPU comes to what its stream has by now."""
        if self._has_chunks and (number := self._layers.get(layer_name)) is not None:
            self._computed(number, number + 1)

    def _computed(self, first: int, end: int) -> None:
        if self._link is not None:
            self._link.computed(first, end, self._stream())

    def _stream(self) -> int | None:
        """The GPU's stream that the engine computes on, by its handle."""
        if self._map is None or not self._map.on_gpu:
            return None
        import torch

        return torch.cuda.current_stream(self._map.memory[0][3]).cuda_stream

    def _offer(self, hold: Hold) -> None:
        held = self._held[hold.request_id] = _Held()
        try:
            if hold.transfer_id in self._offered:
                raise _native.DuplicateTransferError(f"transfer {hold.transfer_id} is in progress here already")
            blocks = self._in_our_blocks(hold.blocks, hold.tokens)
            # What decode may have claimed already must be final when it is told so.
            stream = self._stream() if hold.transfer_id in self._early else None
            self._early.discard(hold.transfer_id)
            self._running().offer(hold.transfer_id, hold.label, blocks, hold.tokens, stream)
        except _native.PdlinkError as error:
            logger.warning("the KV of request %s is not held: %s", hold.request_id, error)
            held.ended = True
            if self._link is not None and hold.transfer_id not in self._offered:
                # Decode may wait for it.
                self._link.abort(hold.transfer_id)
        else:
            self._offered[hold.transfer_id] = hold.request_id

    def _close_hold(self, request_id: str, unwanted: bool) -> None:
        held = self._held.get(request_id)
        if held is None:
            logger.error("request %s ended with blocks held that were never offered", request_id)
            self._results.sent.add(request_id)
            return
        held.closed = True
        if unwanted and not held.ended and self._link is not None:
            transfer_id = next(id for id, request in self._offered.items() if request == request_id)
            self._link.abort(transfer_id)
        self._let_go(request_id, held)

    def _let_go(self, request_id: str, held: _Held) -> None:
        """The one report of a hold: after both its transfer and its request have ended."""
        if held.ended and held.closed:
            del self._held[request_id]
            self._results.sent.add(request_id)

    # ---------------------------------------------------------------- the runtime's reports

    def _hear(self, link: _native.Link) -> None:
        for report in link.take_reports():
            self._numbers.count(report)
            if report.side == "prefill":
                self._hold_reported(report)
            else:
                self._load_reported(report)

    def _hold_reported(self, report: _native.Report) -> None:
        request_id = self._offered.pop(report.transfer_id, None)
        held = self._held.get(request_id) if request_id is not None else None
        if request_id is None or held is None:
            return
        if report.end not in ("sent", "released", "aborted"):
            logger.warning("the KV of request %s was not taken: %s", request_id, report.failure or report.end)
        held.ended = True
        self._let_go(request_id, held)

    def _load_reported(self, report: _native.Report) -> None:
        request_id = self._expected.pop(report.transfer_id, None)
        if dropped := self._dropping.pop(report.transfer_id, None):
            self._results.dropped.add(dropped)
            return
        load = self._loads.get(request_id) if request_id is not None else None
        if request_id is None or load is None or load.transfer_id != report.transfer_id:
            return
        load.transfer_id = None
        if report.end != "received":
            load.failure = report.failure or f"transfer {report.transfer_id} was {report.end}"
        # Before the fetch there is nobody to tell: the request hears of it when its blocks are there.
        if load.fetch is not None:
            self._load_ended(request_id, load, report.fenced)

    # ---------------------------------------------------------------- small things

    def _running(self) -> _native.Link:
        if self._link is None:
            raise _native.ShutDownError("the KV link is closed while the engine sleeps or ends")
        return self._link

    def _in_our_blocks(self, blocks: Blocks, tokens: int) -> Blocks:
        return self._map.blocks(blocks, tokens) if self._map is not None else blocks

    def worker_meta(self, results: Results) -> WorkerMeta | None:
        told = WorkerMeta(results.unfenced, Counter(results.dropped))
        return told if told.unfenced or told.dropped else None

    def take_stats(self) -> PdlinkStats | None:
        """What has changed since the last call."""
        if self._link is not None:
            self._numbers.look(self._link.figures())
        return self._numbers.take()


def _words(group: dict[str, Any]) -> str:
    """A KV group in one line of the log."""
    return ", ".join(f"{name} {value}" for name, value in group.items() if value is not None)
