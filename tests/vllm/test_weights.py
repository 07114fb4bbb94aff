"""New weights into real vLLM workers that serve: every answer is of one version, and whatever fails leaves the old one serving."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from client import Client, completion, prompt
from fleet import BIN, LEASE_S, MODEL, OTHER_MODEL, Nursery, Proxy, Server, free_ports
from pdlink.trainer import WeightPublisher
from safetensors.torch import load_file, save_file
from yarl import URL

PROMPTS = [prompt(40 + 31 * number, 700 + number) for number in range(6)]
TOKENS = 24
CLIENTS = 32
SLOWLY = ("--weights.bucket_bytes", "4096")


@dataclass
class Given:
    """One answer of a client under load."""

    number: int
    version: int
    tokens: list[int]
    reason: str | None


@dataclass
class Story:
    """Which weights each version of the fleet has, and what they answer."""

    right: dict[str, list[list[int]]]
    versions: dict[int, str]

    def is_whole(self, given: Given) -> bool:
        return given.tokens == self.right[self.versions[given.version]][given.number]

    def is_cut(self, given: Given) -> bool:
        """It ended early: vLLM says so, or, before the first word of a stream, says nothing."""
        whole = self.right[self.versions[given.version]][given.number]
        return given.reason in ("abort", None) and given.tokens == whole[: len(given.tokens)]


@pytest.fixture(scope="module")
def workers(nursery: Nursery) -> Iterator[tuple[Server, Server, Server]]:
    """Two prefill workers and a decode worker."""
    servers = (
        Server("weights-prefill-0", nursery, "kv_producer", send_type="PUT_ASYNC", weights=True),
        Server("weights-prefill-1", nursery, "kv_producer", send_type="PUT_ASYNC", weights=True),
        Server("weights-decode", nursery, "kv_consumer", policy="recompute", send_type="PUT_ASYNC", weights=True),
    )
    for server in servers:
        server.log.unlink(missing_ok=True)
    try:
        for server in servers:
            server.start()
        yield tuple(server.wait() for server in servers)
    finally:
        for server in servers:
            server.kill()


class Fleet:
    """The workers behind a proxy, and the ways to give them weights."""

    def __init__(self, workers: tuple[Server, ...], env: dict[str, str], in_flight: str, *flags: str):
        self.secret = env["PDLINK_SECRET_FILE"]
        flags = ("--weights.in_flight", in_flight, "--proxy.health_interval_s", "0.2", *flags)
        self.proxy = Proxy(workers[:-1], workers[-1], env, f"proxy-weights-{in_flight}", flags).wait()

    async def update(self, client: Client, path: str, body: dict[str, Any]) -> int:
        answer = await client.post(self.proxy, path, body)
        assert answer.status == 200, answer
        return answer.body["version"]

    async def push(self, checkpoint: Path) -> int:
        done = await asyncio.to_thread(subprocess.run, self.pushing(checkpoint), capture_output=True, text=True)
        assert done.returncode == 0, done
        return json.loads(done.stdout)["version"]

    def pushing(self, checkpoint: Path, *flags: str) -> list[str]:
        command = [str(BIN / "pdlink"), "weights", "push", "--json", "--to", self.proxy.url, "--checkpoint", str(checkpoint)]
        return [*command, "--secret-file", self.secret, *flags]

    async def state(self, client: Client) -> dict[str, Any]:
        async with client._session.get(self.proxy.url + "/admin/weights") as response:
            return await response.json()

    async def to_base(self, client: Client) -> int:
        return await self.update(client, "/reload_weights", {})


@pytest.fixture
def fleet_of(workers: tuple[Server, Server, Server], env: dict[str, str]) -> Callable[..., Any]:
    @contextmanager
    def open(in_flight: str, *flags: str, prefills: int = 2) -> Iterator[Fleet]:
        fleet = Fleet((*workers[:prefills], workers[2]), env, in_flight, *flags)
        try:
            yield fleet
        finally:
            fleet.proxy.stop()

    return open


async def ask(client: Client, proxy: Proxy, number: int, stream: bool = False) -> Given:
    body = {**completion(PROMPTS[number], TOKENS), "stream": stream}
    tokens: list[int] = []
    reason = None
    async with client._session.post(proxy.url + "/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        assert len(response.headers.getall("x-pdlink-weight-version")) == 1
        version = int(response.headers["x-pdlink-weight-version"])
        if not stream:
            choice = (await response.json())["choices"][0]
            return Given(number, version, choice["token_ids"], choice["finish_reason"])
        async for line in response.content:
            text = line.decode().strip().removeprefix("data: ")
            if text and text != "[DONE]":
                choice = json.loads(text)["choices"][0]
                tokens += choice.get("token_ids") or []
                reason = choice.get("finish_reason") or reason
    return Given(number, version, tokens, reason)


async def ask_all(client: Client, proxy: Proxy) -> list[list[int]]:
    return [(await ask(client, proxy, number)).tokens for number in range(len(PROMPTS))]


# What the two checkpoints answer; learnt by the first test.
_right: dict[str, list[list[int]]] = {}


async def begin(client: Client, fleet: Fleet, mono: Server) -> Story:
    """The base serves, as the first or as a later version."""
    # A worker that was in no fleet for a while takes the others' weights first.
    await until_all_serve(client, fleet)
    if not _right:
        _right["a"] = [(await client.complete(mono, tokens, TOKENS)).tokens for tokens in PROMPTS]
        await fleet.update(client, "/update_weights", {"weight_dir": str(OTHER_MODEL)})
        _right["b"] = await ask_all(client, fleet.proxy)
        assert all(one != other for one, other in zip(_right["a"], _right["b"]))
    return Story(_right, {await fleet.to_base(client): "a"})


async def until_all_serve(client: Client, fleet: Fleet) -> None:
    end = time.monotonic() + 60
    while True:
        workers = (await fleet.state(client))["workers"]
        if len({worker["version"] for worker in workers}) == 1 and not any(worker["kept_out"] for worker in workers):
            return
        assert time.monotonic() < end, workers
        await asyncio.sleep(0.05)


@contextmanager
def load(client: Client, proxy: Proxy, clients: int = 6) -> Iterator[list[Given]]:
    """Clients that ask one after the other, half of them for streams. What they were given, as it comes."""
    given: list[Given] = []

    async def keep_asking(number: int) -> None:
        turn = number
        while True:
            given.append(await ask(client, proxy, turn % len(PROMPTS), stream=number % 2 == 0))
            turn += clients

    tasks = [asyncio.create_task(keep_asking(number)) for number in range(clients)]
    try:
        yield given
    finally:
        for task in tasks:
            task.cancel()
    assert all(task.cancelled() or not task.done() for task in tasks), [task for task in tasks if task.done()]


async def until(done: Callable[[], bool], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("in_flight", "dispatch", "prefills"),
    [
        ("finish", "sequential", 2),
        ("finish", "concurrent", 1),
        ("restart", "concurrent", 2),
        ("continue", "sequential", 1),
    ],
)
def test_every_answer_says_which_weights_made_it(run, mono, fleet_of, in_flight: str, dispatch: str, prefills: int) -> None:
    async def test(client: Client) -> None:
        with fleet_of(in_flight, "--proxy.dispatch", dispatch, prefills=prefills) as fleet:
            story = await begin(client, fleet, mono)
            with load(client, fleet.proxy, CLIENTS) as given:
                for name, way in (
                    ("b", fleet.push(OTHER_MODEL)),
                    ("a", fleet.update(client, "/update_weights", {"weight_dir": str(MODEL)})),
                    ("b", fleet.push(OTHER_MODEL)),
                    ("a", fleet.to_base(client)),
                ):
                    before = len(given)
                    await until(lambda: len(given) > before + 6)
                    version = await way
                    story.versions[version] = name
                    # No request that begins from here on gets an older version.
                    late = await ask(client, fleet.proxy, 0)
                    assert late.version == version and story.is_whole(late), late
                before = len(given)
                await until(lambda: len(given) > before + 6)
            whole = [one for one in given if story.is_whole(one)]
            others = [one for one in given if not story.is_whole(one)]
            assert len({one.version for one in whole}) >= 4
            if in_flight == "finish":
                assert others == []
            elif in_flight == "restart":
                assert [one for one in others if not story.is_cut(one)] == []
            else:
                # It began with the one, and went on with the other; nothing is lost.
                assert all(len(one.tokens) == TOKENS and one.reason == "length" for one in others), others
            state = await fleet.state(client)
            assert {worker["phase"] for worker in state["workers"]} == {"serving"}

    run(test)


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A checkpoint like the other one, but for what `change` did to it."""
    shutil.copytree(OTHER_MODEL, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


NORM = "model.layers.3.post_attention_layernorm.weight"


def test_what_cannot_be_loaded_leaves_the_old_weights_everywhere(run, mono, fleet_of, tmp_path: Path) -> None:
    short = damaged(tmp_path / "short", lambda tensors: tensors.update({NORM: torch.ones(3)}))
    partial = damaged(tmp_path / "partial", lambda tensors: drop(tensors, NORM))
    cut = damaged(tmp_path / "cut", lambda tensors: None)
    (file,) = cut.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    cases = [
        (short, "while committing", "rank 0"),
        (partial, "while committing", "nothing for 1 of the model's parameters"),
        (cut, "while staging", "model.safetensors"),
        (tmp_path / "nowhere", "while staging", "nowhere"),
    ]

    async def test(client: Client) -> None:
        with fleet_of("finish") as fleet:
            story = await begin(client, fleet, mono)
            with load(client, fleet.proxy, 3) as given:
                for folder, phase, why in cases:
                    answer = await client.post(fleet.proxy, "/update_weights", {"weight_dir": str(folder)})
                    assert answer.status == 502, answer
                    message = answer.body["error"]["message"]
                    assert phase in message and why in message and "on worker http://" in message, message
                    assert story.is_whole(await ask(client, fleet.proxy, 0))
                before = len(given)
                await until(lambda: len(given) > before + 6)
            assert all(story.is_whole(one) for one in given)
            assert {one.version for one in given} == set(story.versions)
            # Nothing of it stays: the next one is taken.
            story.versions[await fleet.push(OTHER_MODEL)] = "b"
            assert story.is_whole(await ask(client, fleet.proxy, 1))

    run(test)


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def test_kv_that_nobody_fetches_does_not_stand_in_the_way_and_is_not_used_later(run, mono, fleet_of, workers) -> None:
    """WT-3, KV-5: it would be held for longer than the update may take."""
    times = ("--weights.drain_timeout_s", "0.3", "--weights.pause_timeout_s", str(LEASE_S / 2))

    async def test(client: Client) -> None:
        with fleet_of("continue", *times) as fleet:
            story = await begin(client, fleet, mono)
            held = [await client.prefill(workers[number % 2], PROMPTS[number]) for number in range(4)]
            await fleet.update(client, "/update_weights", {"weight_dir": str(OTHER_MODEL)})
            for number, params in enumerate(held):
                answer = await client.complete(workers[2], PROMPTS[number], TOKENS, params)
                assert answer.tokens == story.right["b"][number]
            await client.at_rest(*workers, within_s=LEASE_S / 2)
            # What a pause is made with is for nobody outside.
            for path in ("/collective_rpc", "/v1/../collective_rpc", "/v1/%2e%2e/collective_rpc", "/sleep", "/server_info"):
                url = URL(fleet.proxy.url + path, encoded=True)
                async with client._session.post(url, json={"method": "pdlink_let_go_of_kv"}) as response:
                    assert response.status == 404, (path, await response.text())

    run(test)


def test_a_sender_or_a_worker_that_dies_changes_nothing_and_the_worker_catches_up(
    run, mono, fleet_of, workers: tuple[Server, Server, Server]
) -> None:
    victim = workers[0]

    async def test(client: Client) -> None:
        with fleet_of("finish") as fleet:
            story = await begin(client, fleet, mono)
            # The trainer's tensors are those of the other checkpoint.
            (file,) = OTHER_MODEL.glob("*.safetensors")
            publisher = WeightPublisher(fleet.proxy.url, secret_file=fleet.secret)
            published = await asyncio.to_thread(publisher.publish, load_file(file))
            story.versions[published.version] = "b"
            with load(client, fleet.proxy, 3) as given:
                sender = subprocess.Popen(fleet.pushing(MODEL, *SLOWLY), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                await is_staging(client, fleet)
                sender.send_signal(signal.SIGKILL)
                sender.wait()
                failure = await gave_up(client, fleet)
                assert "while staging" in failure, failure
                await until(lambda: len(given) > 6)
            assert all(story.is_whole(one) and one.version == published.version for one in given)

            pushing = asyncio.create_task(
                asyncio.to_thread(subprocess.run, fleet.pushing(MODEL, *SLOWLY), capture_output=True, text=True)
            )
            await is_staging(client, fleet)
            victim.kill()
            refused = await pushing
            assert refused.returncode != 0 and victim.url in refused.stderr, refused
            # One prefill worker is enough. The other one begins with the base, and answers nothing before it has caught up.
            assert all([story.is_whole(await ask(client, fleet.proxy, number)) for number in range(3)])
            victim.start()
            with load(client, fleet.proxy, 2) as given:
                await asyncio.to_thread(victim.wait)
                await serves(client, fleet, victim, published.version)
                before = len(given)
                await until(lambda: len(given) > before + 6)
            assert all(story.is_whole(one) and one.version == published.version for one in given)
            story.versions[await fleet.to_base(client)] = "a"
            assert all([story.is_whole(await ask(client, fleet.proxy, number)) for number in range(3)])

    run(test)


async def is_staging(client: Client, fleet: Fleet) -> None:
    while not any(worker.get("phase") == "staging" for worker in (await fleet.state(client))["workers"]):
        await asyncio.sleep(0.005)


async def gave_up(client: Client, fleet: Fleet) -> str:
    while (state := await fleet.state(client))["under_way"] is not None:
        await asyncio.sleep(0.02)
    return state["last_failure"] or ""


async def serves(client: Client, fleet: Fleet, server: Server, version: int) -> None:
    """Until the worker is let in with the fleet's version."""
    end = time.monotonic() + 60
    while True:
        state = await fleet.state(client)
        (worker,) = (worker for worker in state["workers"] if worker["worker"] == server.url)
        if worker.get("version") == version and not worker["kept_out"]:
            return
        assert time.monotonic() < end, state
        await asyncio.sleep(0.1)


def test_all_ranks_of_a_worker_change_together(run, mono, workers, nursery: Nursery, env, tmp_path: Path) -> None:
    flags = ("--max-model-len", "1024", "--kv-cache-memory-bytes", "64M", "--tensor-parallel-size", "2")
    wide = Server(
        "weights-wide",
        nursery,
        "kv_consumer",
        policy="recompute",
        flags=flags,
        send_type="PUT_ASYNC",
        ports=free_ports(3),
        weights=True,
    )
    wide.log.unlink(missing_ok=True)
    partial = damaged(tmp_path / "partial", lambda tensors: drop(tensors, NORM))

    async def test(client: Client) -> None:
        fleet = Fleet((workers[0], workers[1], wide), env, "finish", "--pd_disagg.decode_tp", "2")
        try:
            # The prefill workers have been updated before, and the wide one catches up with them.
            await serves(client, fleet, wide, (await fleet.state(client))["version"])
            story = await begin(client, fleet, mono)
            assert all([story.is_whole(await ask(client, fleet.proxy, number)) for number in range(3)])
            story.versions[await fleet.push(OTHER_MODEL)] = "b"
            state = await fleet.state(client)
            (told,) = (worker for worker in state["workers"] if worker["worker"] == wide.url)
            assert [rank["version"] for rank in told["other_ranks"]] == [told["version"]]
            assert all([story.is_whole(await ask(client, fleet.proxy, number)) for number in range(3)])
            refused = await client.post(fleet.proxy, "/update_weights", {"weight_dir": str(partial)})
            assert refused.status == 502, refused
            assert all([story.is_whole(await ask(client, fleet.proxy, number)) for number in range(3)])
        finally:
            fleet.proxy.stop()

    try:
        wide.start().wait()
        run(test)
    finally:
        wide.kill()
