"""One of two processes that move bytes by NIXL's own Python API, told by lines of JSON what to do.

Memory is filled with 64-bit words that depend on their place and on a seed, so that each side knows the other's.
"""

import json
import random
import sys
import time

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

WORD = 8
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def pattern(at, length, seed):
    words = np.arange(at // WORD, (at + length) // WORD, dtype=np.uint64)
    return ((words + np.uint64(seed << 32)) * MULTIPLIER).view(np.uint8)


class Side:
    def __init__(self, span, seed, progress_thread):
        name = f"bench-{random.randrange(1 << 62):016x}"
        self.agent = nixl_agent(name, nixl_agent_config(progress_thread, False, 0, backends=["UCX"]))
        self.memory = np.empty(span, dtype=np.uint8)
        self.memory[:] = pattern(0, span, seed)
        self.address = self.memory.ctypes.data
        self.agent.register_memory([(self.address, span, 0, "")], "DRAM")

    def connect(self, metadata, address):
        self.peer = self.agent.add_remote_agent(bytes.fromhex(metadata))
        self.peer_address = address

    def prepare(self, run_bytes):
        """Both sides' runs in a row, prepared once, as an engine prepares its blocks."""
        starts = range(0, len(self.memory) - run_bytes + 1, run_bytes)
        lists = [[(base + start, run_bytes, 0) for start in starts] for base in (self.address, self.peer_address)]
        own = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", lists[0], "DRAM")
        return own, self.agent.prep_xfer_dlist(self.peer, lists[1], "DRAM")

    def move(self, operation, prepared, own, theirs):
        began = time.perf_counter()
        handle = self.agent.make_prepped_xfer(operation, prepared[0], own, prepared[1], theirs)
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        took = time.perf_counter() - began
        if state != "DONE":
            raise RuntimeError(f"{operation} ended as {state}")
        self.agent.release_xfer_handle(handle)
        return took

    def measure(self, operation, run_bytes, source, target, windows, seconds):
        """Runs number `source[i]` go to place `target[i]`, at one window after the other."""
        prepared = self.prepare(run_bytes)
        own, theirs = (target, source) if operation == "READ" else (source, target)
        took, until, turn = [], time.perf_counter() + seconds, 0
        # One round, which is compared afterwards, before the first that counts.
        while len(took) < 6 or time.perf_counter() < until:
            first = windows[turn % len(windows)]
            at = [np.array(runs, dtype=np.int32) + first for runs in (own, theirs)]
            took.append(self.move(operation, prepared, *at))
            turn += 1
        for handle in prepared:
            self.agent.release_dlist_handle(handle)
        return took[1:]

    def wrong(self, run_bytes, source, target, windows, seed):
        """How many runs do not hold what `seed` says of their sources."""
        wrong = 0
        for first in windows:
            for run, place in zip(source, target):
                at = (place + first) * run_bytes
                want = pattern((run + first) * run_bytes, run_bytes, seed)
                wrong += not np.array_equal(self.memory[at : at + run_bytes], want)
        return wrong

    def clear(self):
        self.memory[:] = 0
        return None

    def refill(self, seed):
        self.memory[:] = pattern(0, len(self.memory), seed)
        return None


def main():
    side = None
    for line in sys.stdin:
        order = json.loads(line)
        verb = order.pop("verb")
        if verb == "open":
            side = Side(**order)
            answer = {"metadata": side.agent.get_agent_metadata().hex(), "address": side.address}
        else:
            answer = getattr(side, verb)(**order)
        print("@" + json.dumps(answer), flush=True)


main()
