"""Starts `vllm serve` again and again without importing it each time.

One process imports vLLM and then waits; each server is a fork of it, in a session of its own. What runs in the fork is the
`vllm` command itself. A start takes a few seconds instead of half a minute, which is what makes killing a server twenty
times affordable.

Speaks one JSON object a line: in `{"argv": [...], "env": {...}, "log": PATH}`, out `{"pid": N}`; the first line out, `{}`,
says that it is ready. A child is forked twice, so that nobody has to reap it.
"""

import json
import multiprocessing
import os
import sys
import time


def preload() -> None:
    import torch
    import transformers  # noqa: F401
    import vllm.entrypoints.cli.main  # noqa: F401
    import vllm.entrypoints.cli.serve  # noqa: F401
    import vllm.entrypoints.openai.api_server  # noqa: F401
    import vllm.model_executor.models.qwen3  # noqa: F401
    import vllm.v1.engine.async_llm  # noqa: F401
    import vllm.v1.engine.core  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import pdlink.vllm  # noqa: F401

    # Threads do not survive a fork: there must be none yet.
    torch.set_num_threads(1)


def serve(order: dict) -> None:
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["env"])
    # On CPU vLLM spawns its engine, which imports all of it again; elsewhere it forks.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and "get_mp_context" in vars(module):
            module.get_mp_context = lambda: multiprocessing.get_context("fork")
    # Engine and ranks that wait for each other's messages yield their core in a loop, and while a load is under way they do
    # nothing else. Where such loops share their cores, Linux 6.18 was seen to run nothing but them for 8 s: no other process,
    # no kernel thread. A short sleep lets go of the core for good.
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(0.0005)
    sys.argv = ["vllm", *order["argv"]]
    from vllm.entrypoints.cli.main import main

    sys.exit(main())


def fork(order: dict) -> int:
    """The server's process id; the process between this one and it ends at once."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        server = os.fork()
        if server:
            os.write(write, str(server).encode())
            os._exit(0)
        os.close(read)
        os.close(write)
        try:
            serve(order)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
    os.close(write)
    pid = int(os.read(read, 32))
    os.close(read)
    os.waitpid(between, 0)
    return pid


def main() -> None:
    preload()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print("{}", file=answers)
    for line in sys.stdin:
        print(json.dumps({"pid": fork(json.loads(line))}), file=answers)


if __name__ == "__main__":
    main()
