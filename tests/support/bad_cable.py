"""A bad cable: carries frames between two interfaces, each late, and some not at all.

    bad_cable.py NEAR FAR DELAY_MS LOSS_PERCENT

Frames carry the kernel's own notes on checksums and segments (PACKET_VNET_HDR), so that what was left for a card to do is done
by the interface at the other end, as it would have been without us.
"""

import heapq
import random
import select
import socket
import sys
import time

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
FRAME_BYTES_MAX = 1 << 17


def opened(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    end.bind((name, 0))
    end.setblocking(False)
    return end


def main() -> None:
    near, far = opened(sys.argv[1]), opened(sys.argv[2])
    delay_s, loss = float(sys.argv[3]) / 1000, float(sys.argv[4]) / 100
    other = {near: far, far: near}
    waiting: list = []
    number = 0
    random.seed(7)
    print("carrying", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([near, far], [], [], pause)
        for end in ready:
            while True:
                try:
                    frame = end.recv(FRAME_BYTES_MAX)
                except BlockingIOError:
                    break
                if random.random() >= loss:
                    number += 1
                    heapq.heappush(waiting, (time.monotonic() + delay_s, number, other[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            try:
                end.send(frame)
            except OSError:
                pass  # A full queue, or a cable that was pulled: the frame is lost, as frames are.


main()
