"""Workers of unequal tensor parallelism: each rank of decode takes its own heads, and all of them report together."""

from __future__ import annotations

import asyncio

from client import Client, prompt
from fleet import BLOCK, LEASE_S, Nursery, Server, free_ports
from test_references import edited

FLAGS = ("--max-model-len", "1024", "--kv-cache-memory-bytes", "64M", "--tensor-parallel-size", "2")
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 300]


def test_two_ranks_load_what_one_has_computed(run, mono, prefill, nursery: Nursery):
    wide = Server("wide", nursery, "kv_consumer", flags=FLAGS, ports=free_ports(3))
    wide.log.unlink(missing_ok=True)

    async def test(client: Client) -> None:
        sent = (await client.metrics(prefill))("pdlink_kv_transfers_total", side="prefill", outcome="done")
        for length in LENGTHS:
            tokens = prompt(length, 700)
            answer = await client.two_legs(prefill, wide, tokens)
            assert answer.tokens == (await client.complete(mono, tokens)).tokens, f"{length} tokens"
        came = (await client.metrics(wide)).prompt_tokens()
        assert came["external_kv_transfer"] == sum(LENGTHS) - 1
        await client.at_rest(prefill, wide, within_s=LEASE_S + 30)
        sent = (await client.metrics(prefill))("pdlink_kv_transfers_total", side="prefill", outcome="done") - sent
        page = await client.metrics(wide)
        assert page("pdlink_kv_transfers_total", side="decode", outcome="done") == sent > 0, "each counts once, not for each rank"
        assert page("pdlink_kv_transfer_seconds_count", side="decode", part="copy") == sent
        assert page("pdlink_kv_peers", side="decode") == 1
        params = await client.prefill(prefill, prompt(40, 701))
        refused = await client.complete(wide, prompt(40, 701), params=edited(params, pdlink__seal="0" * 64))
        assert refused.status == 500
        leaving = [asyncio.create_task(client.two_legs(prefill, wide, prompt(200, 710 + n), 200)) for n in range(8)]
        await asyncio.sleep(0.5)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await client.at_rest(prefill, wide, within_s=LEASE_S + 30)
        tokens = prompt(100, 702)
        answer = await client.two_legs(prefill, wide, tokens)
        assert answer.tokens == (await client.complete(mono, tokens)).tokens

    try:
        wide.start().wait()
        run(test)
    finally:
        wide.kill()
