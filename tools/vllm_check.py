#!/usr/bin/env python3
"""Hold the answers of a running deployment against one of its prefill workers' own, and see that clients who leave leave nothing.

    python tools/vllm_check.py http://127.0.0.1:8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
        [--lengths 1,15,16,17,33,500,3000,7000] [--turns 3] [--leaving 60] [--seed 1] [--model NAME] [--vocabulary 250]

Sends random prompts of each length through the proxy and to the prefill worker alone, and compares 16 greedy token ids. Then
clients leave at random moments, until both workers must be idle with every block free; then the prompts of another seed. Both
roles must hold the same weights: dummy weights differ between sizes of tensor parallelism. A second run wants another --seed, since
decode has the prompts of the first in its prefix cache.

Exit status 1: an answer differed, a prompt did not cross the link, or something was held. Standard library only.
"""

import argparse
import http.client
import json
import random
import sys
import threading
import time
import urllib.parse
import urllib.request

ANSWER_TOKENS = 16
REQUEST_SECONDS_MAX = 120
REST_SECONDS_MAX = 60
LEAVE_SECONDS_MAX = 2.0
AT_REST = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def tokens_of(base, model, prompt):
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}
    request = urllib.request.Request(base + "/v1/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=REQUEST_SECONDS_MAX))["choices"][0]["token_ids"]


def metric(base, name):
    """Every series of a metric, by its labels."""
    page = urllib.request.urlopen(base + "/metrics", timeout=30).read().decode()
    lines = (line.rsplit(" ", 1) for line in page.splitlines() if line.startswith(name))
    return {labels: float(value) for labels, value in lines}


def came_over_the_link(decode):
    found = metric(decode, "vllm:prompt_tokens_by_source_total")
    return sum(value for labels, value in found.items() if 'source="external_kv_transfer"' in labels)


def compare(args, seed):
    """How many answers were equal, and how many prompts there were."""
    equal = total = 0
    for length in args.lengths:
        for turn in range(args.turns):
            rng = random.Random(f"{seed} {length} {turn}")
            prompt = [rng.randrange(args.vocabulary) for _ in range(length)]
            through, alone = tokens_of(args.proxy, args.model, prompt), tokens_of(args.prefill, args.model, prompt)
            total += 1
            equal += through == alone
            if through != alone:
                print(f"  {length} tokens, turn {turn}: {through} is not {alone}")
    return equal, total


def leave(args, number):
    """One client that goes away at a random moment."""
    rng = random.Random(f"{args.seed} leaving {number}")
    prompt = [rng.randrange(args.vocabulary) for _ in range(rng.randrange(1, max(args.lengths)))]
    body = {"model": args.model, "prompt": prompt, "max_tokens": 300, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(args.proxy).netloc, timeout=REQUEST_SECONDS_MAX)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        connection.sock.settimeout(rng.uniform(0.01, LEAVE_SECONDS_MAX))
        connection.getresponse().read()
    except OSError:
        pass
    finally:
        connection.close()


def held(args):
    return sum(sum(metric(worker, name).values()) for worker in (args.prefill, args.decode) for name in AT_REST)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proxy")
    parser.add_argument("--prefill", required=True)
    parser.add_argument("--decode", required=True)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")],
                        default=[1, 15, 16, 17, 33, 500, 3000, 7000])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--leaving", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default=None)
    parser.add_argument("--vocabulary", type=int, default=250)
    args = parser.parse_args()
    if args.model is None:
        models = json.load(urllib.request.urlopen(args.proxy + "/v1/models", timeout=30))
        args.model = models["data"][0]["id"]

    failed = False
    before = came_over_the_link(args.decode)
    equal, total = compare(args, args.seed)
    crossed = came_over_the_link(args.decode) - before
    # One token of a prompt may always be computed where it is decoded.
    least = args.turns * sum(length - 1 for length in args.lengths)
    print(f"{equal} of {total} answers equal the prefill worker's own; {crossed:.0f} prompt tokens came over the link, "
          f"at least {least} were to", flush=True)
    failed |= equal < total or crossed < least

    clients = [threading.Thread(target=leave, args=(args, number)) for number in range(args.leaving)]
    for client in clients:
        client.start()
        time.sleep(0.05)
    for client in clients:
        client.join()
    deadline = time.monotonic() + REST_SECONDS_MAX
    while held(args) and time.monotonic() < deadline:
        time.sleep(0.5)
    idle = not held(args)
    print(f"after {args.leaving} clients left, both workers are {'idle, with every block free' if idle else 'NOT AT REST'}",
          flush=True)

    equal, total = compare(args, args.seed + 1)
    print(f"{equal} of {total} answers equal the prefill worker's own afterwards")
    sys.exit(1 if failed or not idle or equal < total else 0)


if __name__ == "__main__":
    main()
