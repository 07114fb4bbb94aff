"""`[proxy] dispatch = "concurrent"` between real servers: both legs at once, prompts of one chunk and of several."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator

import pytest
from client import Client, chat, completion, grown, prompt
from conftest import CHUNK
from fleet import BLOCK, Nursery, Proxy, Server
from test_leaving import leave

LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, 777, 1500]


@pytest.fixture(scope="module")
def early(nursery: Nursery, env: dict[str, str]) -> Iterator[tuple[Server, Server, Proxy]]:
    flags = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "128M", "--max-num-batched-tokens", str(CHUNK))
    kv = {"part_bytes_min": 1}
    prefill = Server("early-prefill", nursery, "kv_producer", flags=flags, send_type="PUT_ASYNC", kv=kv)
    decode = Server("early-decode", nursery, "kv_consumer", send_type="PUT_ASYNC", kv=kv)
    proxy = None
    try:
        for server in (prefill, decode):
            server.log.unlink(missing_ok=True)
            server.start()
        for server in (prefill, decode):
            server.wait()
        proxy = Proxy(prefill, decode, env, "early-proxy", ("--proxy.dispatch", "concurrent"))
        yield prefill, decode, proxy.wait()
    finally:
        if proxy is not None:
            proxy.stop()
        for server in (prefill, decode):
            server.kill()


async def learn(client: Client, proxy: Proxy) -> None:
    """After the first answer of prefill the proxy knows where its runtime listens."""
    answer = await client.complete(proxy, prompt(3, 99))
    assert answer.status == 200, answer


def test_every_length_is_loaded_while_it_is_computed(run, early):
    prefill, decode, proxy = early

    async def test(client: Client) -> None:
        await learn(client, proxy)
        before = (await client.metrics(decode)).prompt_tokens()
        for length in LENGTHS:
            tokens = prompt(length, 1)
            answer = await client.complete(proxy, tokens)
            # Prefill computes by itself what it is asked without parameters.
            expected = await client.complete(prefill, tokens)
            assert answer.tokens == expected.tokens, f"{length} tokens"
            assert answer.headers["x-pdlink-dispatch"] == "concurrent"
            record = await client.record(proxy, answer.headers["x-pdlink-transfer-id"])
            assert json.dumps(record).count('"dispatch": "concurrent"') == 2, record
        came = grown(before, (await client.metrics(decode)).prompt_tokens())
        assert came == {"external_kv_transfer": sum(LENGTHS) - 1, "local_cache_hit": 0, "local_compute": 1}
        await client.at_rest(prefill, decode)

    run(test)


def test_parts_move_under_prefill(run, early):
    prefill, decode, proxy = early

    async def test(client: Client) -> None:
        await learn(client, proxy)
        answer = await client.complete(proxy, prompt(1500, 2))
        record = await client.record(proxy, answer.headers["x-pdlink-transfer-id"])
        (sent,) = (entry["record"] for entry in record["records"] if entry["record"]["side"] == "prefill")
        assert sent["posts"] > 1 and sent["exposed_us"] < sent["copy_us"], sent

    run(test)


def test_streams_chats_and_a_warm_prefill(run, early):
    prefill, decode, proxy = early
    text = "both legs at once give the same answer as one server " * 9
    asked = {"/v1/completions": completion(prompt(400, 3)), "/v1/chat/completions": chat(text)}

    async def test(client: Client) -> None:
        await learn(client, proxy)
        for path, body in asked.items():
            # Its prefix cache has the prompt from here on: cached blocks are pushed too.
            expected = (await client.post(prefill, path, body)).tokens
            assert await client.stream(proxy, path, body) == expected, path
            assert (await client.post(proxy, path, body)).tokens == expected, path
        await client.at_rest(prefill, decode)

    run(test)


def test_32_at_once(run, early):
    prefill, decode, proxy = early
    prompts = [prompt(17 + 13 * number, 4) for number in range(32)]

    async def test(client: Client) -> None:
        await learn(client, proxy)
        answers = await asyncio.gather(*(client.complete(proxy, tokens) for tokens in prompts))
        expected = await asyncio.gather(*(client.complete(prefill, tokens) for tokens in prompts))
        wrong = [len(tokens) for tokens, answer, right in zip(prompts, answers, expected) if answer.tokens != right.tokens]
        assert not wrong, f"prompts of {wrong} tokens"
        await client.at_rest(prefill, decode)

    run(test)


def test_clients_that_leave_at_random_moments_leave_nothing_behind(run, early):
    prefill, decode, proxy = early
    rng = random.Random(5)

    async def test(client: Client) -> None:
        await learn(client, proxy)
        gate = asyncio.Semaphore(8)

        async def one(number: int) -> None:
            async with gate:
                tokens = prompt(rng.randrange(1, 900), 200 + number)
                await leave(client, proxy, completion(tokens, 100), rng.uniform(0, 0.8))

        await asyncio.gather(*(one(number) for number in range(80)))
        await client.at_rest(prefill, decode)
        tokens = prompt(300, 6)
        answer, expected = await client.complete(proxy, tokens), await client.complete(prefill, tokens)
        assert answer.tokens == expected.tokens
        await client.at_rest(prefill, decode)

    run(test)


def test_what_prefill_refuses_the_client_hears_and_decode_is_free(run, early):
    prefill, decode, proxy = early

    async def test(client: Client) -> None:
        await learn(client, proxy)
        answer = await client.complete(proxy, prompt(3000, 7))
        assert answer.status == 400, answer
        await client.at_rest(prefill, decode)

    run(test)
