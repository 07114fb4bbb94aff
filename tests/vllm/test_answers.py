"""Decode answers what one server would have answered, out of KV that came over the link."""

from __future__ import annotations

import asyncio

from client import Client, chat, completion, grown, prompt
from conftest import CHUNK
from fleet import BLOCK, Nursery, Server

LENGTHS = [1, 2, *(n + d for n in (BLOCK, 2 * BLOCK, 3 * BLOCK, CHUNK) for d in (-1, 0, 1)), 300, 777, 1500]


def test_every_length_is_loaded_over_the_link(run, mono, prefill, decode, proxy):
    async def test(client: Client) -> None:
        before = (await client.metrics(decode)).prompt_tokens()
        for length in LENGTHS:
            tokens = prompt(length)
            params = await client.prefill(prefill, tokens)
            answer, expected = await asyncio.gather(
                client.complete(decode, tokens, params=params), client.complete(mono, tokens)
            )
            assert answer.tokens == expected.tokens, f"{length} tokens"
            record = await client.record(proxy, params["pdlink"]["transfer_id"])
            assert record["status"] == 200, record
            assert '"done"' in str(record).replace("'", '"'), record
        came = grown(before, (await client.metrics(decode)).prompt_tokens())
        # The last token of a loaded prompt is computed again. Where it is the only one, vLLM counts that and not the load.
        assert came == {"external_kv_transfer": sum(LENGTHS) - 1, "local_cache_hit": 0, "local_compute": 1}
        await client.at_rest(prefill, decode)

    run(test)


def test_both_endpoints_streamed_and_not_through_the_proxy(run, mono, prefill, decode, proxy):
    text = "the proxy gives the same answer as one server " * 9
    asked = {"/v1/completions": completion(prompt(100, 1)), "/v1/chat/completions": chat(text)}

    async def test(client: Client) -> None:
        for path, body in asked.items():
            expected = (await client.post(mono, path, body)).tokens
            before = (await client.metrics(decode)).prompt_tokens()
            answer = await client.post(proxy, path, body)
            assert answer.tokens == expected, path
            came = grown(before, (await client.metrics(decode)).prompt_tokens())
            assert came["external_kv_transfer"] > 0 and came["local_compute"] == 0, (path, came)
            assert await client.stream(proxy, path, body) == expected, path
        await client.at_rest(prefill, decode)

    run(test)


def test_32_at_once(run, mono, prefill, decode, proxy):
    prompts = [prompt(17 + 13 * number, 2) for number in range(32)]

    async def test(client: Client) -> None:
        before = (await client.metrics(decode)).prompt_tokens()
        expected = await asyncio.gather(*(client.complete(mono, tokens) for tokens in prompts))
        answers = await asyncio.gather(*(client.complete(proxy, tokens) for tokens in prompts))
        wrong = [
            len(tokens)
            for tokens, answer, right in zip(prompts, answers, expected)
            if answer.tokens != right.tokens
        ]
        assert not wrong, f"prompts of {wrong} tokens"
        came = grown(before, (await client.metrics(decode)).prompt_tokens())
        everything = sum(map(len, prompts))
        assert came == {"external_kv_transfer": everything, "local_cache_hit": 0, "local_compute": 0}
        await client.at_rest(prefill, decode)

    run(test)


def test_prefill_that_pushes_before_its_next_step(run, mono, decode, nursery: Nursery):
    """With PUT its steps wait for what it pushes: answers come all the same, also where prompts are computed meanwhile."""
    pushing = Server("pushing", nursery, "kv_producer", send_type="PUT")
    pushing.log.unlink(missing_ok=True)
    prompts = [prompt(40 + 31 * number, 10) for number in range(16)]

    async def test(client: Client) -> None:
        expected = await asyncio.gather(*(client.complete(mono, tokens) for tokens in prompts))
        answers = await asyncio.gather(*(client.two_legs(pushing, decode, tokens) for tokens in prompts))
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        await client.at_rest(pushing, decode)
        sent = (await client.metrics(pushing))("pdlink_kv_transfers_total", side="prefill", outcome="done")
        assert sent == len(prompts)

    try:
        pushing.start().wait()
        run(test)
    finally:
        pushing.kill()


def test_what_is_cached_on_either_side_is_not_loaded_again(run, mono, prefill, decode):
    shared = prompt(3 * BLOCK, 3)
    asked = [shared + prompt(20, 4), shared + prompt(45, 5), shared + prompt(20, 4)]
    # The last block of a prompt that was seen whole is loaded all the same: its last token has to be computed.
    cached = [0, 3 * BLOCK, 3 * BLOCK]

    async def test(client: Client) -> None:
        for tokens, hit in zip(asked, cached):
            before = (await client.metrics(decode)).prompt_tokens()
            answer = await client.two_legs(prefill, decode, tokens)
            assert answer.tokens == (await client.complete(mono, tokens)).tokens
            came = grown(before, (await client.metrics(decode)).prompt_tokens())
            want = {"external_kv_transfer": len(tokens) - hit, "local_cache_hit": hit, "local_compute": 0}
            assert came == want
        await client.at_rest(prefill, decode)

    run(test)


def test_requests_that_lose_their_blocks_are_computed_again(run, mono, prefill, small):
    """More requests than blocks: some wait for blocks while their KV is held, some are preempted."""
    prompts = [prompt(100 + number, 6) for number in range(16)]

    async def test(client: Client) -> None:
        before = (await client.metrics(small))("vllm:num_preemptions_total")
        expected = await asyncio.gather(*(client.complete(mono, tokens, 150) for tokens in prompts))
        answers = await asyncio.gather(*(client.two_legs(prefill, small, tokens, 150) for tokens in prompts))
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        assert (await client.metrics(small))("vllm:num_preemptions_total") > before
        await client.at_rest(prefill, small)

    run(test)


def test_plain_requests_are_served_by_either_worker(run, mono, prefill, decode):
    async def test(client: Client) -> None:
        expected = (await client.complete(mono, prompt(50, 7))).tokens
        for worker in (prefill, decode):
            assert (await client.complete(worker, prompt(50, 7))).tokens == expected
        await client.at_rest(prefill, decode)

    run(test)


def test_prompt_logprobs_are_computed_here_and_let_go_of_prefill(run, prefill, decode):
    async def test(client: Client) -> None:
        tokens = prompt(70, 8)
        params = await client.prefill(prefill, tokens)
        body = {**completion(tokens, params=params), "prompt_logprobs": 1}
        answer = await client.post(decode, "/v1/completions", body)
        assert len(answer.body["choices"][0]["prompt_logprobs"]) == len(tokens)
        await client.at_rest(prefill, decode)

    run(test)


def test_the_link_counts_on_vllms_own_page(run, prefill, decode):
    async def test(client: Client) -> None:
        tokens = prompt(2 * BLOCK, 9)
        sides = {"prefill": prefill, "decode": decode}
        before = {side: await client.metrics(server) for side, server in sides.items()}
        await client.two_legs(prefill, decode, tokens)
        await client.at_rest(prefill, decode)
        for side, server in sides.items():
            after = await client.metrics(server)
            ended = {"side": side, "outcome": "done"}
            assert after("pdlink_kv_transfers_total", **ended) == before[side]("pdlink_kv_transfers_total", **ended) + 1
        # 4 layers, K and V, 4 heads of 64 elements of 4 bytes, for each token.
        moved = [page("pdlink_kv_transfer_bytes_total", side="decode", path="shm") for page in (before["decode"], after)]
        assert moved[1] - moved[0] == len(tokens) * 4 * 2 * 4 * 64 * 4

    run(test)
