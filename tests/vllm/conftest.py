"""The servers that the tests share: started together, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from client import Client
from fleet import Nursery, Proxy, Server, environment, write_secret

# Prompts beyond this are computed in several steps.
CHUNK = 256


@pytest.fixture(scope="session")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(write_secret(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="session")
def nursery(env: dict[str, str]) -> Iterator[Nursery]:
    nursery = Nursery(env)
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def fleet(nursery: Nursery) -> Iterator[dict[str, Server]]:
    chunked = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "128M", "--max-num-batched-tokens", str(CHUNK))
    # 47 blocks besides the null block: a handful of requests take them all.
    small = ("--max-model-len", "1024", "--kv-cache-memory-bytes", "12M")
    servers = [
        Server("mono", nursery),
        Server("prefill", nursery, "kv_producer", flags=chunked),
        Server("decode", nursery, "kv_consumer"),
        Server("small", nursery, "kv_consumer", policy="recompute", flags=small),
    ]
    for server in servers:
        server.log.unlink(missing_ok=True)
    try:
        for server in servers:
            server.start()
        yield {server.name: server.wait() for server in servers}
    finally:
        for server in servers:
            server.kill()


def of_fleet(name: str) -> Any:
    return pytest.fixture(scope="session", name=name)(lambda fleet: fleet[name])


# Prefill and decode in one: what every answer is compared with.
mono = of_fleet("mono")
prefill = of_fleet("prefill")
# Fails what it cannot load.
decode = of_fleet("decode")
# A decode worker with few blocks, which computes what it cannot load.
small = of_fleet("small")


@pytest.fixture(scope="session")
def proxy(prefill: Server, decode: Server, env: dict[str, str]) -> Iterator[Proxy]:
    proxy = Proxy(prefill, decode, env)
    try:
        yield proxy.wait()
    finally:
        proxy.stop()


@pytest.fixture
def run() -> Callable[[Callable[[Client], Coroutine[Any, Any, None]]], None]:
    """Runs a test's coroutine with a client of its own."""

    def run(test: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
        async def inside() -> None:
            async with Client() as client:
                await test(client)

        asyncio.run(inside())

    return run
