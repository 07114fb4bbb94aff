"""The numbers of several ranks, made into those of the worker that they are.

Ranks share the bytes of a transfer; its number and its times are those of the slowest, and it has failed if it has on one of them. What
else each rank does for itself (connections, leases) counts once, as on the rank that has most of it; GPU memory is each one's own.

Ranks hear of a transfer's end in different steps. So a transfer is counted when the last rank has told of it: a count cannot be taken
back, and the first rank knows neither how it ends nor what takes longest. This is done beside the scheduler, of which there is one, and not
where the metrics are shown, of which there may be several.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from .metrics import DONE, PdlinkStats, Transfer

# Transfers that some rank has yet to tell of. One that could not begin it never does: it is counted as the others saw it, when so many
# others wait, or when it has waited so long.
WAITING_MAX = 4096
WAITS_S_MAX = 300.0
# Ends that say that somebody else did not want it any more.
_GIVEN_UP = ("released", "aborted")


class Tally:
    def __init__(self, ranks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ranks = ranks
        self._clock = clock
        # Oldest first: when the first rank told of it, and what each has told.
        self._waiting: dict[tuple[str, str], tuple[float, dict[int, Transfer]]] = {}
        self._leases: defaultdict[int, int] = defaultdict(int)
        self._failures: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        # A rank that tells nothing new stands where it stood.
        self._gauges: dict[int, dict[str, Any]] = {}

    def fold(self, stats: PdlinkStats) -> None:
        """Makes the ranks' news in `stats` the worker's."""
        data, news = stats.data, stats.data["ranks"]
        data["ranks"] = {}
        counted: list[Transfer] = []
        for rank, told in sorted(news.items()):
            counted += self._ended(rank, (Transfer(*transfer) for transfer in told["transfers"]))
            data["leases"] += _grow(self._leases, rank, told["leases"])
            for reason, count in told["peer_failures"].items():
                if more := _grow(self._failures[reason], rank, count):
                    data["peer_failures"][reason] = data["peer_failures"].get(reason, 0) + more
            if told["gauges"]:
                self._gauges[rank] = told["gauges"]
                data["gauges"] = together(self._gauges.values())
        data["transfers"] += [tuple(transfer) for transfer in counted + self._overdue()]

    def _ended(self, rank: int, transfers: Iterable[Transfer]) -> list[Transfer]:
        counted = []
        for transfer in transfers:
            key = (transfer.side, transfer.transfer_id)
            if key in self._waiting and rank in self._waiting[key][1]:
                # The same id again, after its end here: another try.
                counted.append(self._whole(key))
            _, parts = self._waiting.setdefault(key, (self._clock(), {}))
            parts[rank] = transfer
            if len(parts) == self._ranks:
                counted.append(self._whole(key))
        return counted

    def _overdue(self) -> list[Transfer]:
        counted = []
        for key, (since, _) in list(self._waiting.items()):
            if len(self._waiting) <= WAITING_MAX and self._clock() - since < WAITS_S_MAX:
                break
            counted.append(self._whole(key))
        return counted

    def _whole(self, key: tuple[str, str]) -> Transfer:
        return whole(list(self._waiting.pop(key)[1].values()))


def whole(parts: list[Transfer]) -> Transfer:
    """One transfer, of what its ranks told."""
    telling = max(parts, key=lambda part: (_weight(part.outcome), sum(part.times_us)))
    return telling._replace(
        bytes=sum(part.bytes for part in parts),
        posts=sum(part.posts for part in parts),
        digest_checked=any(part.digest_checked for part in parts),
    )


def _weight(outcome: str) -> int:
    """What ended a transfer on one rank is why it was given up on the others."""
    return 0 if outcome == DONE else 1 if outcome in _GIVEN_UP else 2


def together(gauges: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Ranks hold the same requests: the largest of them is the one that is furthest behind."""
    ranks = list(gauges)
    peers: Counter[str] = Counter()
    for rank in ranks:
        peers |= Counter(rank["peers"])
    sides = {side for rank in ranks for side in rank["peers"]}
    return {
        "held": max(rank["held"] for rank in ranks),
        "active": max(rank["active"] for rank in ranks),
        "gpu_bytes": sum(rank["gpu_bytes"] for rank in ranks),
        "peers": {side: peers[side] for side in sorted(sides)},
    }


def _grow(sums: defaultdict[int, int], rank: int, more: int) -> int:
    """By how much the largest of the ranks' sums grows with that."""
    before = max(sums.values(), default=0)
    sums[rank] += more
    return max(sums.values()) - before
