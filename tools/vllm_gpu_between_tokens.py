#!/usr/bin/env python3
"""What a hand-over costs the requests that decode serves meanwhile: the time between the tokens of a running stream, on a GPU machine.

    python tools/vllm_gpu_between_tokens.py MODEL_DIR [--gpus 0,1] [--length 16000] [--prompts 5] [--rounds 3] [--logs DIR]

Starts a prefill and a decode `vllm serve` as vllm_gpu_compare.py does, with our connector. A stream runs on decode; beside it
prompts of `--length` tokens come in one after the other for one token each: out of decode's own prefix cache, and with their KV
from prefill, which computed it before the stream began. Both cost decode the same step, so what one is slower than the other is
the transfer's. Gaps between tokens count while such a prompt is under way; `alone` is the stream by itself.

It ends with one table.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time

from vllm_gpu_compare import Server
from vllm_processes import free_ports

STREAM_TOKENS = 4000
WARM_TOKENS = 30
ALONE_SECONDS = 1.5
PAUSE_SECONDS = 0.1


def prompt_of(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(250) for _ in range(length)]


def completion(prompt, tokens):
    return {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


class Stream:
    """A stream on decode, and when its tokens came."""

    def __init__(self, decode, name):
        self.times, self.ended = [], False
        self.thread = threading.Thread(target=self.read, args=(decode, name))
        self.thread.start()
        while len(self.times) < WARM_TOKENS and self.thread.is_alive():
            time.sleep(0.005)

    def read(self, decode, name):
        body = {**completion(prompt_of(name, 64), STREAM_TOKENS), "stream": True}
        with decode.post(body, name) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    self.times.append(time.perf_counter())
                if self.ended:
                    return

    def end(self):
        self.ended = True
        self.thread.join()

    def gaps_within(self, windows):
        pairs = zip(self.times, self.times[1:])
        return [b - a for a, b in pairs if any(a < end and b > start for start, end in windows)]


def ask_each(decode, bodies, name):
    windows = []
    for number, body in enumerate(bodies):
        started = time.perf_counter()
        decode.ask(body, f"{name}-{number}")
        windows.append((started, time.perf_counter()))
        time.sleep(PAUSE_SECONDS)
    return windows


def handed_over(prefill, prompts, name):
    """The prompts as decode's requests, once prefill has computed them."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    bodies = []
    for number, prompt in enumerate(prompts):
        with prefill.post({**completion(prompt, 1), "kv_transfer_params": ask}, f"{name}-p{number}") as reply:
            bodies.append({**completion(prompt, 1), "kv_transfer_params": json.load(reply)["kv_transfer_params"]})
    return bodies


def one_round(prefill, decode, turn, args, gaps):
    prompts = [prompt_of(f"{turn}-{number}", args.length) for number in range(args.prompts)]
    bodies = handed_over(prefill, prompts, f"r{turn}")
    stream = Stream(decode, f"s{turn}")
    started = time.perf_counter()
    time.sleep(ALONE_SECONDS)
    alone = [(started, time.perf_counter())]
    fetched = ask_each(decode, bodies, f"h{turn}")
    cached = ask_each(decode, [completion(prompt, 1) for prompt in prompts], f"c{turn}")
    stream.end()
    for what, windows in (("alone", alone), ("handed over", fetched), ("from its cache", cached)):
        gaps[what] += stream.gaps_within(windows)


def row(what, gaps):
    ordered = sorted(gap * 1e3 for gap in gaps)
    at = lambda share: ordered[min(int(len(ordered) * share), len(ordered) - 1)]
    return f"{what:<15} {len(ordered):>6} {statistics.median(ordered):>10.2f} {at(0.9):>9.2f} {at(0.99):>9.2f} {ordered[-1]:>9.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["0", "1"])
    parser.add_argument("--length", type=int, default=16000)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-arg", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--logs", default=None)
    args = parser.parse_args()
    args.kv, args.logs = {}, args.logs or tempfile.mkdtemp(prefix="pdlink-between-")
    os.makedirs(args.logs, exist_ok=True)
    ports = free_ports(4)
    servers = []
    gaps = {"alone": [], "handed over": [], "from its cache": []}
    try:
        for role, gpu, port, kv_port in zip(("prefill", "decode"), (args.gpus[0], args.gpus[-1]), ports[:2], ports[2:]):
            servers.append(Server("pdlink", role, gpu, port, kv_port, args))
        for server in servers:
            server.wait_until_healthy(server.url)
        prefill, decode = servers
        # Round 0 warms up.
        for turn in range(args.rounds + 1):
            one_round(prefill, decode, turn, args, gaps if turn else {what: [] for what in gaps})
        sources = {source: int(count) for source, count in sorted(decode.prompt_tokens_by_source().items())}
    finally:
        for server in servers:
            server.end()
    print(f"GPUs {','.join(args.gpus)}, {args.rounds} rounds of {args.prompts} prompts of {args.length} tokens, logs in {args.logs}")
    print(f"prompt tokens of decode by source: {sources}")
    print("gaps of a stream beside prompts that are\n                 count  median ms    p90 ms    p99 ms    max ms")
    for what, found in gaps.items():
        print(row(what, found))
    sys.exit(0 if all(gaps.values()) else 1)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
