"""Rank 0's way to the engine: the API server of its own worker.

Pausing, loading on all ranks and going on are calls of vLLM's development routes. A pause can take as long as the longest answer,
and a resumption must not wait behind it, so pauses have a thread of their own; one that comes back too late is taken back at once.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
import urllib.parse
from typing import Any

from vllm.logger import init_logger

from ... import _native

logger = init_logger("vllm.pdlink.weights")

# What vLLM calls what `[weights] in_flight` says.
MODES = {"continue": "keep", "restart": "abort", "finish": "wait"}
AGAIN_S = 0.05
# How long an engine that is to pause may be held up by KV on its way.
LET_GO_S = 1.0
# How long a call that does little may take, and one that loads weights or waits for answers.
SHORT_S = 60.0
LONG_S = 3600.0


class CallError(Exception):
    """The API server did not do it."""


class Lead:
    def __init__(self, url: str, has_connector: bool):
        self._url = url
        # Without a connector some versions call a reset of its cache failed.
        self._reset = f"/reset_prefix_cache?reset_running_requests=true&reset_external={str(has_connector).lower()}"
        self._lock = threading.Lock()
        # The pause that is wanted now, and those that wait for their turn.
        self._wanted: _native.Order | None = None
        self._paused: _native.Order | None = None
        self._pauses: queue.SimpleQueue[_native.Order] = queue.SimpleQueue()
        threading.Thread(target=self._pause_all, name="pdlink-weights-pause", daemon=True).start()

    def carry_out(self, order: _native.Order) -> None:
        if order.kind == "pause":
            with self._lock:
                self._wanted = order
            self._pauses.put(order)
            self._let_go_later(order)
        elif order.kind == "resume":
            with self._lock:
                self._wanted = None
            self._resume()
        else:
            self._commit(order)

    # ---------------------------------------------------------------- pausing

    def _pause_all(self) -> None:
        while True:
            order = self._pauses.get()
            said = ""
            while self._is_wanted(order):
                try:
                    self._pause(MODES[order.in_flight or "continue"])
                except Exception as error:
                    if said != str(error):
                        said = str(error)
                        logger.warning("the engine does not pause yet: %s", error)
                    # It must go on meanwhile: what holds it up may be KV on its way.
                    self._resume()
                    time.sleep(AGAIN_S)
                    continue
                with self._lock:
                    is_wanted = self._wanted is order
                    self._paused = order if is_wanted else None
                if is_wanted:
                    order.done()
                else:
                    self._resume()
                break

    def _let_go_later(self, order: _native.Order) -> None:
        """The proxy has let hand-offs land before; what is left keeps blocks, and vLLM from pausing."""

        def let_go() -> None:
            if not self._is_wanted(order) or self._paused is order:
                return
            try:
                self._call("/collective_rpc", SHORT_S, {"method": "pdlink_let_go_of_kv"})
            except CallError as error:
                logger.warning("transfers of KV are not given up: %s", error)
            self._let_go_later(order)

        timer = threading.Timer(LET_GO_S, let_go)
        timer.daemon = True
        timer.start()

    def _is_wanted(self, order: _native.Order) -> bool:
        with self._lock:
            return self._wanted is order

    def _pause(self, mode: str) -> None:
        """Stops the engine with nothing of the old weights left in its caches. vLLM refuses while blocks are held: for KV on its
        way here, or for whoever fetches it from here."""
        self._call(f"/pause?mode={mode}&clear_cache=true", LONG_S)
        answer = self._call(self._reset, SHORT_S)
        if answer.get("success") is False:
            raise CallError("blocks of the old weights are held still")

    def _resume(self) -> None:
        """Until it has worked: an engine that stays paused serves nobody."""
        said = False
        while True:
            try:
                self._call("/resume", SHORT_S)
                return
            except CallError as error:
                if not said:
                    logger.warning("the engine does not go on yet: %s", error)
                said = True
                time.sleep(AGAIN_S)

    # ---------------------------------------------------------------- loading

    def _commit(self, order: _native.Order) -> None:
        failures = self._on_all_ranks("pdlink_take_weights", order, order.version)
        if not failures:
            failures = self._on_all_ranks("pdlink_settle_weights", order, None)
            if failures:
                logger.critical("version %d is loaded, and not all ranks say so: %s", order.version, "; ".join(failures))
            return
        unsettled = self._on_all_ranks("pdlink_settle_weights", order, "; ".join(failures))
        if unsettled:
            # The receiver stays in `committing`, and the proxy keeps this worker out.
            logger.critical("the old weights did not come back; restart this worker: %s", "; ".join(unsettled))
            return

    def _on_all_ranks(self, method: str, order: _native.Order, argument: Any) -> list[str]:
        """What went wrong, by rank."""
        body = {"method": method, "args": [str(order.update), argument]}
        try:
            results = self._call("/collective_rpc", LONG_S, body).get("results") or []
        except CallError as error:
            return [str(error)]
        return [f"rank {result['rank']}: {result['error']}" for result in results if result["error"] is not None]

    def _call(self, path: str, within_s: float, body: Any = None) -> dict[str, Any]:
        url = urllib.parse.urlsplit(self._url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "127.0.0.1", url.port, timeout=within_s)
        try:
            text = json.dumps(body) if body is not None else ""
            connection.request("POST", url.path + path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise CallError(f"POST {self._url}{path}: {error}") from error
        finally:
            connection.close()
        if answer.status == 404:
            raise CallError(f"POST {self._url}{path}: 404; set VLLM_SERVER_DEV_MODE=1 for this worker")
        if answer.status != 200:
            raise CallError(f"POST {self._url}{path}: {answer.status} {said[:300].decode(errors='replace')}")
        try:
            parsed = json.loads(said or b"{}")
        except ValueError:
            parsed = {}
        return parsed if isinstance(parsed, dict) else {}
