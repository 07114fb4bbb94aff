"""The nixl path under vLLM: NIXL driven by pdlink, with the library that is installed beside vLLM."""

from __future__ import annotations

import asyncio

import pytest
from client import Client, prompt
from fleet import BLOCK, Nursery, Proxy, Server

LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 300, 1500]


@pytest.mark.parametrize("send_type", ["GET", "PUT_ASYNC"])
def test_answers_over_nixl_are_those_of_one_server(run, mono, nursery: Nursery, env, send_type: str):
    prefill, decode = (
        Server(f"nixl-{role}", nursery, f"kv_{role}", send_type=send_type, paths=("nixl",))
        for role in ("producer", "consumer")
    )

    async def test(client: Client) -> None:
        for length in LENGTHS:
            tokens = prompt(length, 800)
            params = await client.prefill(prefill, tokens)
            answer, expected = await asyncio.gather(
                client.complete(decode, tokens, params=params), client.complete(mono, tokens)
            )
            assert answer.tokens == expected.tokens, f"{length} tokens"
            record = str(await client.record(proxy, params["pdlink"]["transfer_id"]))
            assert "'path': 'nixl'" in record, record
        came = (await client.metrics(decode)).prompt_tokens()
        assert came["external_kv_transfer"] == sum(LENGTHS) - 1
        await client.at_rest(prefill, decode)

    for server in (prefill, decode):
        server.log.unlink(missing_ok=True)
    try:
        for server in (prefill, decode):
            server.start()
        for server in (prefill, decode):
            server.wait()
        proxy = Proxy(prefill, decode, env, f"nixl-proxy-{send_type}").wait()
        try:
            run(test)
        finally:
            proxy.stop()
    finally:
        for server in (prefill, decode):
            server.kill()
