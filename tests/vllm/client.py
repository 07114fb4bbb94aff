"""What the tests say to servers: the two legs, answers, counters."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
from fleet import Proxy, Server

# Longer than any wait of the runtime (transfer timeout, connect timeout) with a busy machine on top.
ANSWER_S = 60
HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that no special token is among, and no two seeds share a block of."""
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(10, 1000) for _ in range(length)]


@dataclass
class Answer:
    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def tokens(self) -> list[int]:
        assert self.status == 200, (self.status, self.body)
        return self.body["choices"][0]["token_ids"]

    @property
    def params(self) -> dict[str, Any]:
        assert self.status == 200, (self.status, self.body)
        return self.body["kv_transfer_params"]


class Client:
    """One test's connections."""

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def post(self, to: Server | Proxy, path: str, body: dict[str, Any]) -> Answer:
        async with self._session.post(to.url + path, json=body) as response:
            text = await response.text()
            try:
                parsed = json.loads(text)
            except ValueError:
                parsed = {"text": text}
            return Answer(response.status, parsed, dict(response.headers))

    async def complete(self, to: Server | Proxy, tokens: list[int], n: int = 16, params: Any = None) -> Answer:
        return await self.post(to, "/v1/completions", completion(tokens, n, params))

    async def prefill(self, to: Server, tokens: list[int]) -> dict[str, Any]:
        """The first leg's parameters."""
        return (await self.complete(to, tokens, 1, HOLD)).params

    async def two_legs(self, prefill: Server, decode: Server, tokens: list[int], n: int = 16) -> Answer:
        return await self.complete(decode, tokens, n, await self.prefill(prefill, tokens))

    async def stream(self, to: Server | Proxy, path: str, body: dict[str, Any]) -> list[int]:
        """The token ids of a streamed answer."""
        found: list[int] = []
        async with self._session.post(to.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                text = line.decode().strip().removeprefix("data: ")
                if text and text != "[DONE]":
                    for choice in json.loads(text)["choices"]:
                        found += choice.get("token_ids") or []
        return found

    async def record(self, proxy: Proxy, transfer_id: str) -> dict[str, Any]:
        async with self._session.get(f"{proxy.url}/admin/transfers/{transfer_id}") as response:
            return {"status": response.status, **await response.json()}

    async def metrics(self, of: Server) -> Metrics:
        async with self._session.get(of.url + "/metrics") as response:
            return Metrics(await response.text())

    async def at_rest(self, *servers: Server, within_s: float = 30) -> None:
        """Waits until nothing runs, waits or is held, and every block is free."""
        end = time.monotonic() + within_s
        while True:
            left = {server.name: (await self.metrics(server)).busy() for server in servers}
            if not any(left.values()):
                return
            assert time.monotonic() < end, f"still busy after {within_s} s: {left}"
            await asyncio.sleep(0.2)


def completion(tokens: list[int], n: int = 16, params: Any = None) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": tokens, "max_tokens": n, **GREEDY}
    return body if params is None else {**body, "kv_transfer_params": params}


def chat(text: str, n: int = 16) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"model": "tiny", "messages": [message], "max_completion_tokens": n, **GREEDY}


GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Metrics:
    """A page of vLLM's metrics; numbers of one name are summed over what was not asked for."""

    def __init__(self, page: str):
        self._samples = re.findall(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", page, re.MULTILINE)

    def __call__(self, name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [float(v) for n, l, v in self._samples if n == name and all(each in l for each in wanted)]
        return sum(found)

    def busy(self) -> dict[str, float]:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        values = {name: self(name) for name in (*names, "pdlink_kv_blocks_held", "pdlink_kv_transfers_active")}
        return {name: value for name, value in values.items() if value}

    def prompt_tokens(self) -> dict[str, float]:
        name = "vllm:prompt_tokens_by_source_total"
        return {source: self(name, source=source) for source in ("external_kv_transfer", "local_cache_hit", "local_compute")}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}
