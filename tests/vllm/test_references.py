"""References to KV that are no good: each is an error or a recompute, by `kv_load_failure_policy`, and never a token of it."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from client import Client, completion, prompt
from conftest import CHUNK  # noqa: F401  (the fixtures' module)
from fleet import LEASE_S, OTHER_MODEL, Nursery, Server

LENGTH = 100


def edited(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The parameters with values replaced; a name with `__` goes into the object before it."""
    found = copy.deepcopy(params)
    for name, value in changes.items():
        *folders, last = name.split("__")
        target: Any = found
        for folder in folders:
            target = target[int(folder)] if folder.isdigit() else target[folder]
        target[last] = value
    return found


async def refused(client: Client, mono: Server, decode: Server, small: Server, seed: int, *params: Any) -> None:
    """Both policies, with one set of parameters each (or the same for both)."""
    tokens = prompt(LENGTH, seed)
    first, last = params[0], params[-1]
    failed, computed, expected = await asyncio.gather(
        client.post(decode, "/v1/completions", completion(tokens, 16, first)),
        client.complete(small, tokens, params=last),
        client.complete(mono, tokens),
    )
    assert failed.status == 500, (seed, failed.status, failed.body)
    assert computed.tokens == expected.tokens


MADE_UP = [
    pytest.param({"do_remote_prefill": True}, id="nothing of ours"),
    pytest.param({"do_remote_prefill": True, "pdlink": {}}, id="empty"),
    pytest.param({"do_remote_prefill": True, "pdlink": "text"}, id="no object"),
    pytest.param({"do_remote_prefill": True, "pdlink": {"version": 99}}, id="of a later version"),
    pytest.param({"do_remote_prefill": "yes", "pdlink": {"version": 2}}, id="no boolean"),
    pytest.param({"do_remote_prefill": True, "do_remote_decode": True, "pdlink": {"version": 2}}, id="both sides"),
]


@pytest.mark.parametrize("params", MADE_UP)
def test_malformed(run, mono, decode, small, params):
    async def test(client: Client) -> None:
        await refused(client, mono, decode, small, 20, params)
        await client.at_rest(decode, small)

    run(test)


EDITED = [
    pytest.param({"remote_block_ids": [[0, 1, 2, 9_000_000]]}, id="block ids out of range"),
    pytest.param({"remote_port": 1}, id="another port"),
    pytest.param({"pdlink__ranks__0__endpoint": "127.0.0.1:1"}, id="another worker"),
    pytest.param({"pdlink__ranks__0__incarnation": "0" * 16}, id="an older incarnation"),
    pytest.param({"pdlink__geometry_digest": "0" * 16}, id="another geometry"),
    pytest.param({"pdlink__transfer_id": "0" * 32}, id="another transfer"),
    pytest.param({"pdlink__weight_version": 7}, id="other weights"),
    pytest.param({"pdlink__seal": "0" * 64}, id="another seal"),
]


@pytest.mark.parametrize("changes", EDITED)
def test_edited_by_the_client(run, mono, prefill, decode, small, changes):
    async def test(client: Client) -> None:
        params = await client.prefill(prefill, prompt(LENGTH, 21))
        await refused(client, mono, decode, small, 21, edited(params, **changes))

    run(test)


def test_another_requests_id(run, mono, prefill, decode, small):
    """Sealed, held, of the same length: only the prompt is another."""

    async def test(client: Client) -> None:
        params = [await client.prefill(prefill, prompt(LENGTH, 30 + number)) for number in range(2)]
        await refused(client, mono, decode, small, 22, *params)
        shorter = await client.prefill(prefill, prompt(LENGTH - 1, 22))
        await refused(client, mono, decode, small, 22, shorter)

    run(test)


def test_taken_before(run, mono, prefill, decode, small):
    async def test(client: Client) -> None:
        tokens = prompt(LENGTH, 23)
        params = await client.prefill(prefill, tokens)
        assert (await client.complete(decode, tokens, params=params)).status == 200
        await refused(client, mono, decode, small, 23, params)

    run(test)


def test_an_expired_lease(run, mono, prefill, decode, small):
    async def test(client: Client) -> None:
        params = await client.prefill(prefill, prompt(LENGTH, 24))
        await client.at_rest(prefill, within_s=LEASE_S + 30)
        await refused(client, mono, decode, small, 24, params)

    run(test)


def test_another_model_and_a_worker_that_has_restarted(run, mono, decode, small, nursery: Nursery):
    """One worker that is first of another model, then of ours, then gone, then back: as a peer it is never the same."""
    other = Server("other", nursery, "kv_producer", OTHER_MODEL)
    other.log.unlink(missing_ok=True)

    async def test(client: Client) -> None:
        tokens = prompt(LENGTH, 25)
        other.start().wait()
        params = [await client.prefill(other, tokens) for _ in range(2)]
        await refused(client, mono, decode, small, 25, *params)
        other.kill()

        ours = Server("other", nursery, "kv_producer", ports=other.ports)
        other.pid = ours.start().wait().pid
        params = [await client.prefill(ours, tokens) for _ in range(2)]
        ours.kill()
        await refused(client, mono, decode, small, 25, *params)

        other.pid = ours.start().wait().pid
        await refused(client, mono, decode, small, 25, *params)
        answer = await client.two_legs(ours, decode, tokens)
        assert answer.tokens == (await client.complete(mono, tokens)).tokens

    try:
        run(test)
    finally:
        other.kill()


def test_afterwards_nothing_is_held_and_answers_are_right(run, mono, prefill, decode, small):
    async def test(client: Client) -> None:
        await client.at_rest(prefill, decode, small, within_s=LEASE_S + 30)
        tokens = prompt(LENGTH, 26)
        for worker in (decode, small):
            answer = await client.two_legs(prefill, worker, tokens)
            assert answer.tokens == (await client.complete(mono, tokens)).tokens

    run(test)
