"""Meeting a trainer in the store that it keeps: vLLM's `StatelessProcessGroup`, which is PyTorch's `TCPStore` behind it.

The trainer, rank 0, waits until as many processes have come as the group has ranks, and then puts NCCL's name of the group there for
all of them, as vLLM's `PyNcclCommunicator` does. It is pickled, and stays so here: the native side reads it without running anything.
"""

from __future__ import annotations

import threading

from vllm.distributed.utils import StatelessProcessGroup
from vllm.logger import init_logger

from ... import _native

logger = init_logger("vllm.pdlink.weights")

# Where the first object lies that rank 0 has for all.
FIRST_FOR_ALL = "broadcast_from/0/0"

# A trainer's store ends when all of its visitors have left: who is in a group stays.
_staying: list[StatelessProcessGroup] = []


def meet(order: _native.Order) -> None:
    """Beside everything else: others may take minutes to come."""
    threading.Thread(target=_meet, args=(order,), name="pdlink-weights-meeting", daemon=True).start()


def _meet(order: _native.Order) -> None:
    assert order.group is not None
    host, port, rank, ranks, within_s = order.group
    try:
        group = StatelessProcessGroup.create(host, port, rank, ranks, store_timeout=max(1, int(within_s)))
        name = group.store.get(FIRST_FOR_ALL)
    except Exception as error:
        order.done(f"{type(error).__name__}: {error}")
        return
    # The group before this one is over.
    _staying[:] = [group]
    order.met(bytes(name))
