"""A prefill worker that is killed, again and again, under load: decode neither dies nor hangs, and serves again by itself."""

from __future__ import annotations

import asyncio
import os
import random
import time

import aiohttp
from client import ANSWER_S, Client, prompt
from fleet import Nursery, Proxy, Server

KILLS = int(os.environ.get("PDLINK_TEST_KILLS", "20"))
CLIENTS = 4


def test_prefill_killed_and_started_again_under_load(run, mono, decode, nursery: Nursery, env):
    victim = Server("victim", nursery, "kv_producer")
    victim.log.unlink(missing_ok=True)
    rng = random.Random(1)
    prompts = [prompt(40 + 37 * number, 500 + number) for number in range(24)]

    async def test(client: Client) -> None:
        right = [(await client.complete(mono, tokens, 24)).tokens for tokens in prompts]
        proxy = Proxy(victim, decode, env, "proxy-killed").wait()
        stop = asyncio.Event()
        answered = failed = 0

        async def keep_asking(number: int) -> None:
            nonlocal answered, failed
            turn = number
            while not stop.is_set():
                turn = (turn + CLIENTS) % len(prompts)
                asked = time.monotonic()
                try:
                    answer = await client.complete(proxy, prompts[turn], 24)
                except aiohttp.ClientError:
                    failed += 1
                    continue
                assert time.monotonic() - asked < ANSWER_S
                if answer.status == 200:
                    assert answer.tokens == right[turn], f"wrong tokens for a prompt of {len(prompts[turn])}"
                    answered += 1
                else:
                    assert answer.status >= 429, answer
                    failed += 1
                    await asyncio.sleep(0.05)

        async def one_more(than: int) -> None:
            while answered <= than:
                await asyncio.sleep(0.02)

        load = [asyncio.create_task(keep_asking(number)) for number in range(CLIENTS)]
        try:
            async with asyncio.timeout(60 * (KILLS + 1)):
                for _ in range(KILLS):
                    await one_more(answered)
                    await asyncio.sleep(rng.uniform(0, 0.3))
                    victim.kill()
                    assert decode.is_alive() and await asyncio.to_thread(decode.is_healthy)
                    victim.start()
                    await asyncio.to_thread(victim.wait)
                # Nobody restarted decode or the proxy: they find the new prefill by themselves.
                await one_more(answered)
        finally:
            stop.set()
            ended = await asyncio.gather(*load, return_exceptions=True)
            proxy.stop()
        assert [each for each in ended if each is not None] == []
        await client.at_rest(decode, victim)

    try:
        victim.start().wait()
        run(test)
    finally:
        victim.kill()
