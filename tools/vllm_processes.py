"""What the tools that run real `vllm serve` processes share: ports, processes that end with all that they started, and requests."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

START_SECONDS_MAX = 400
ASK_SECONDS_MAX = 600


def post(url, body=None, timeout=ASK_SECONDS_MAX):
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return dict(answer.headers), json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read()[:500].decode(errors='replace')}") from None


_given = set()


def free_ports(count):
    """Ports below those that the kernel gives to outgoing connections: nobody takes one between now and its use."""
    found = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as each, contextlib.suppress(OSError):
            each.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                found.append(port)
    return found


class Process:
    """Ended with everything that it started."""

    def __init__(self, command, env, log, **pipes):
        self.log = log
        with open(log, "a", encoding="utf-8") as file:
            to = {"stdout": file, "stderr": file, **pipes}
            self.process = subprocess.Popen(command, env=env, start_new_session=True, **to)

    def tail(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return "".join(log.readlines()[-40:])

    def wait_until_healthy(self, url):
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(url + "/health", timeout=2)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise RuntimeError(f"what writes {self.log} did not start:\n{self.tail()}")

    def end(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                continue
