#!/usr/bin/env python3
"""Hand KV over between two real `vllm serve` processes on a GPU machine, with vLLM's own connector and with ours, and compare.

    python tools/vllm_gpu_compare.py MODEL_DIR [--gpus 0,1] [--lengths 512,2048,8192,16000] [--repeat 4] [--only pdlink]
        [--serve-arg=--block-size=128] [--env UCX_TLS=cuda_ipc,cuda_copy,sm,self,tcp] [--kv '{"digest": "every"}'] [--logs DIR]

Needs vLLM and our wheel in the Python that runs it; nothing else. Both servers load MODEL_DIR with dummy weights, which are
seeded and so equal. With one GPU (`--gpus 0`) both roles share it. For each length it sends fresh random prompts, and takes
medians of: the prefill leg (max_tokens=1), the time from its start to decode's first token with the KV handed over, and the
same prompt again on decode, now in its prefix cache: what is left of the second without the other two is what the hand-off
costs. Every answer's greedy token ids are held against the prefill server's own, and decode's counters say how many prompt
tokens it loaded and computed. `pdlink-concurrent` sends both legs at once, as `[proxy] dispatch = "concurrent"` does: then the
KV moves layer by layer under prefill.

It ends with one table. Exit status 1: an answer differed, or a server did not start.
"""

import argparse
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from vllm_processes import Process, free_ports

ANSWER_TOKENS = 16
REQUEST_SECONDS_MAX = 300
SHARED_GPU_CACHE_BYTES = 20 << 30
CASES = ("vllm-nixl", "pdlink", "pdlink-concurrent")


def kv_config(case, role, port, kv):
    if case == "vllm-nixl":
        return {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    send_type = "PUT_ASYNC" if case == "pdlink-concurrent" else "GET"
    extra = {"kv_host": "127.0.0.1", "kv_ports": [port], "send_type": send_type, "kv": {"paths": ["cuda-ipc"], **kv}}
    kv_role = {"prefill": "kv_producer", "decode": "kv_consumer"}[role]
    return {"kv_connector": "PdlinkConnector", "kv_connector_module_path": "pdlink.vllm", "kv_role": kv_role,
            "kv_connector_extra_config": extra}


class Server(Process):
    """One `vllm serve`."""

    def __init__(self, case, role, gpu, port, kv_port, args):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_port), "VLLM_USE_FLASHINFER_SAMPLER": "0",
               **dict(pair.split("=", 1) for pair in args.env)}
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model, "--port", str(port),
                   "--host", "127.0.0.1", "--served-model-name", "m", "--load-format", "dummy", "--enforce-eager",
                   "--max-model-len", "20000", "--max-num-batched-tokens", "16384",
                   "--gpu-memory-utilization", "0.4",
                   "--enable-prefix-caching" if role == "decode" else "--no-enable-prefix-caching",
                   "--kv-transfer-config", json.dumps(kv_config(case, role, kv_port, args.kv)), *args.serve_arg]
        if len(set(args.gpus)) == 1:
            # Two servers that start at once on one GPU take each other's memory for their own when they look for the rest.
            command += ["--kv-cache-memory-bytes", str(SHARED_GPU_CACHE_BYTES)]
        self.kv_address = f"127.0.0.1:{kv_port}"
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(command, env, os.path.join(args.logs, f"{case}-{role}.log"))

    def post(self, body, request_id):
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"content-type": "application/json", "X-Request-Id": request_id})
        return urllib.request.urlopen(request, timeout=REQUEST_SECONDS_MAX)

    def ask(self, body, request_id):
        """Seconds to the first token, and all token ids."""
        started, first, ids = time.perf_counter(), None, []
        with self.post({**body, "stream": True, "return_token_ids": True}, request_id) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - started
                    for choice in json.loads(line[6:]).get("choices", []):
                        ids += choice.get("token_ids") or []
        return first, ids

    def prompt_tokens_by_source(self):
        page = urllib.request.urlopen(self.url + "/metrics", timeout=30).read().decode()
        found = {}
        for line in page.splitlines():
            if line.startswith("vllm:prompt_tokens_by_source_total{"):
                source = line.split('source="')[1].split('"')[0]
                found[source] = found.get(source, 0) + float(line.rsplit(" ", 1)[1])
        return found


def in_turn(prefill, decode, body, turn):
    """Seconds of the prefill leg, seconds from its start to decode's first token, and decode's token ids."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
           "remote_block_ids": None, "remote_host": None, "remote_port": None}
    started = time.perf_counter()
    with prefill.post({**body, "max_tokens": 1, "kv_transfer_params": ask}, f"p{turn}") as reply:
        params = json.load(reply)["kv_transfer_params"]
    leg = time.perf_counter() - started
    first, ids = decode.ask({**body, "kv_transfer_params": params}, f"d{turn}")
    return leg, leg + first, ids


def at_once(prefill, decode, body, turn):
    """The same, with both legs sent at once. One rank each: decode is told where the runtime of prefill's listens."""
    from pdlink import _native

    transfer_id = secrets.token_hex(16)
    ask = {"do_remote_decode": True, "do_remote_prefill": False, "pdlink": {"transfer_id": transfer_id, "early": True}}
    params = json.loads(_native.early_params(transfer_id, [prefill.kv_address], os.environ.get("PDLINK_SECRET_FILE")))

    def leg():
        started = time.perf_counter()
        with prefill.post({**body, "max_tokens": 1, "kv_transfer_params": ask}, f"p{turn}") as reply:
            reply.read()
        return time.perf_counter() - started

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(leg)
        first, ids = decode.ask({**body, "kv_transfer_params": params}, f"d{turn}")
        return taken.result(), first, ids


def measure(case, prefill, decode, length, repeat):
    times, right = [], True
    for turn in range(repeat + 1):
        rng = random.Random(turn * 7 + length)
        prompt = [rng.randrange(250) for _ in range(length)]
        body = {"model": "m", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        both_legs = at_once if case == "pdlink-concurrent" else in_turn
        leg, first, ids = both_legs(prefill, decode, body, f"{turn}-{length}")
        _, own = prefill.ask(body, f"m{turn}-{length}")
        cached, _ = decode.ask(body, f"c{turn}-{length}")
        right = right and ids == own and len(ids) == ANSWER_TOKENS
        times.append((leg, first, cached))
    # The first turn warmed up.
    leg, first, cached = (statistics.median(column) * 1e3 for column in zip(*times[1:]))
    return leg, first, cached, right


def run_case(case, gpus, args):
    ports = free_ports(4)
    servers = []
    try:
        for role, gpu, port, kv_port in zip(("prefill", "decode"), (gpus[0], gpus[-1]), ports[:2], ports[2:]):
            servers.append(Server(case, role, gpu, port, kv_port, args))
        started = time.monotonic()
        for server in servers:
            server.wait_until_healthy(server.url)
        print(f"{case}: up in {time.monotonic() - started:.0f} s", flush=True)
        prefill, decode = servers
        before = decode.prompt_tokens_by_source()
        rows = []
        for length in args.lengths:
            rows.append((case, length, *measure(case, prefill, decode, length, args.repeat)))
            print("{}: {} tokens, first token after {:.1f} ms".format(case, length, rows[-1][3]), flush=True)
        after = decode.prompt_tokens_by_source()
        sources = {source: int(after[source] - before.get(source, 0)) for source in sorted(after)}
        print(f"{case}: prompt tokens of decode by source: {sources}", flush=True)
        return rows
    finally:
        for server in servers:
            server.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["0", "1"])
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[512, 2048, 8192, 16000])
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--serve-arg", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--kv", type=json.loads, default={}, help="more of pdlink's [kv] settings, as JSON")
    parser.add_argument("--logs", default=None)
    args = parser.parse_args()
    args.logs = args.logs or tempfile.mkdtemp(prefix="pdlink-compare-")
    os.makedirs(args.logs, exist_ok=True)
    rows = [row for case in CASES if args.only in (None, case) for row in run_case(case, args.gpus, args)]
    print(f"\nGPUs {','.join(args.gpus)}, medians of {args.repeat}, logs in {args.logs}")
    print("connector          tokens  prefill leg ms  both legs TTFT ms  from its cache ms  hand-off ms  same tokens")
    for case, length, leg, first, cached, right in rows:
        print(f"{case:<17}  {length:>6}  {leg:>14.1f}  {first:>17.1f}  {cached:>17.1f}  {first - leg - cached:>11.1f}  "
              f"{'yes' if right else 'NO'}")
    sys.exit(0 if all(row[-1] for row in rows) else 1)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
