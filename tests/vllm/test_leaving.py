"""Clients that leave: whatever they were waiting for, both workers are at rest afterwards and answer rightly."""

from __future__ import annotations

import asyncio
import random

import aiohttp
from client import HOLD, Client, completion, prompt
from fleet import LEASE_S, Proxy, Server

LEAVING = 200
AT_ONCE = 16


async def leave(client: Client, to: Server | Proxy, body: dict, after_s: float) -> dict | None:
    """The answer, if it came before the client left."""
    try:
        async with asyncio.timeout(after_s):
            answer = await client.post(to, "/v1/completions", body)
    except (TimeoutError, aiohttp.ClientError):
        return None
    return answer.body if answer.status == 200 else None


def test_200_clients_that_leave_at_random_moments_leave_nothing_behind(run, mono, prefill, decode, proxy):
    rng = random.Random(0)

    async def through_the_proxy(client: Client, number: int) -> None:
        tokens = prompt(rng.randrange(1, 600), 100 + number)
        await leave(client, proxy, completion(tokens, 200), rng.uniform(0, 0.8))

    async def leg_by_leg(client: Client, number: int) -> None:
        """Without the proxy nobody tells the workers of each other's fate: only they themselves do."""
        tokens = prompt(rng.randrange(1, 600), 100 + number)
        first = await leave(client, prefill, completion(tokens, 1, HOLD), rng.choice([0.02, 0.1, 30]))
        if first is not None and first.get("kv_transfer_params"):
            await leave(client, decode, completion(tokens, 200, first["kv_transfer_params"]), rng.uniform(0, 0.4))

    async def test(client: Client) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with gate:
                await (leg_by_leg if number % 2 else through_the_proxy)(client, number)

        await asyncio.gather(*(one(number) for number in range(LEAVING)))
        # A first leg whose second never came is held for as long as its lease says.
        await client.at_rest(prefill, decode, within_s=LEASE_S + 30)
        for length in (1, 70, 300):
            tokens = prompt(length, 9000)
            answer, expected = await asyncio.gather(client.complete(proxy, tokens), client.complete(mono, tokens))
            assert answer.tokens == expected.tokens
        await client.at_rest(prefill, decode)

    run(test)


def test_clients_that_leave_while_their_request_waits_for_blocks(run, mono, prefill, small):
    """Decode has announced them to prefill, and never got to load: prefill's blocks are free long before the lease ends."""

    async def test(client: Client) -> None:
        running = [
            asyncio.create_task(client.complete(small, prompt(500, 200 + number), 500)) for number in range(3)
        ]
        await asyncio.sleep(0.5)
        params = await asyncio.gather(*(client.prefill(prefill, prompt(600, 300 + number)) for number in range(4)))
        waiting = [
            asyncio.create_task(leave(client, small, completion(prompt(600, 300 + number), 16, held), 1.5))
            for number, held in enumerate(params)
        ]
        await asyncio.gather(*waiting)
        await client.at_rest(prefill)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await client.at_rest(prefill, small)
        tokens = prompt(100, 400)
        answer = await client.two_legs(prefill, small, tokens)
        assert answer.tokens == (await client.complete(mono, tokens)).tokens

    run(test)
