"""What watching a fleet costs a proxy: processor time of its process before idle workers, as each kind of looking is added.

    python3 tools/measure_watching.py PDLINK [--workers 64] [--seconds 20]

PDLINK is the program. Workers are stand-ins in this process that answer `/health`, and `/metrics` with a page as long as vLLM's. Only
loopback is used, and what was started is ended. Prints one table, in Markdown.
"""

import argparse
import asyncio
import os
import platform
import re
import socket
import subprocess
import tempfile
import time

PAGE_LINES = 600
SCRAPE_S, VIEWERS = 1.0, 8
WARM_UP_S, START_S = 3, 20
TICKS = os.sysconf("SC_CLK_TCK")


def page():
    """As long as vLLM's page, and with the names that are looked for."""
    lines = ["vllm:num_requests_running 0.0", "vllm:num_requests_waiting 0.0", "vllm:kv_cache_usage_perc 0.0"]
    bucket = 'vllm:time_to_first_token_seconds_bucket{{engine="0",le="{}",model_name="organisation/model"}} 0.0'
    lines += [bucket.format(number) for number in range(PAGE_LINES)]
    return "\n".join(lines) + "\n"


async def worker(page, reader, writer):
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            body = page if head.startswith(b"GET /metrics ") else b"{}"
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def read(port, path):
    """One answer, whole; how many bytes it has."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: proxy\r\nconnection: close\r\n\r\n".encode())
    length = len(await reader.read())
    writer.close()
    return length


async def again_and_again(port, sizes):
    while True:
        sizes.append(await read(port, "/metrics"))
        await asyncio.sleep(SCRAPE_S)


async def view(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /admin/live HTTP/1.1\r\nhost: proxy\r\n\r\n")
    while await reader.read(1 << 16):
        pass


def cpu_s(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def measured(args, urls, settings, looking):
    """Processor time of the proxy in each second, while these look; `looking` gives tasks for its port."""
    half = len(urls) // 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [args.pdlink, "proxy", "--host", "127.0.0.1", "--port", str(port), "--prefill", *urls[:half]]
    command += ["--decode", *urls[half:], "--connector", "NixlConnector", "--connector-impl", "vllm", *settings]
    with tempfile.TemporaryFile() as log:
        proxy = subprocess.Popen(command, stdout=log, stderr=log)
        tasks = []
        try:
            await until_serving(proxy, port, log)
            tasks = [asyncio.create_task(task) for task in looking(port)]
            await asyncio.sleep(WARM_UP_S)
            began, before = time.monotonic(), cpu_s(proxy.pid)
            await asyncio.sleep(args.seconds)
            return (cpu_s(proxy.pid) - before) / (time.monotonic() - began)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            proxy.terminate()
            proxy.wait(START_S)


async def until_serving(proxy, port, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and proxy.poll() is None:
        try:
            await read(port, "/health")
            return
        except ConnectionError:
            await asyncio.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the proxy does not serve: {log.read()[-2000:].decode(errors='replace')}")


async def measure(args):
    text, sizes = page().encode(), []
    servers = [await asyncio.start_server(lambda r, w: worker(text, r, w), "127.0.0.1", 0) for _ in range(args.workers)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    seldom = ["--telemetry.watch_interval_s", "3600"]
    rows = [
        ("health questions alone (`telemetry.watch_interval_s = 3600`)", seldom, lambda _: []),
        (f"and its own `/metrics` is scraped every {SCRAPE_S:g} s", seldom, lambda port: [again_and_again(port, sizes)]),
        ("health questions; each worker asked every second, its page every 5 s (the default)", [], lambda _: []),
        (f"and its own `/metrics` is scraped every {SCRAPE_S:g} s", [], lambda port: [again_and_again(port, sizes)]),
        (f"and {VIEWERS} viewers of the page instead", [], lambda port: [view(port) for _ in range(VIEWERS)]),
    ]
    print(f"{await version(args)}; {args.workers} workers, pages of {len(text) / 1e3:.1f} KB; {args.seconds} s each; {machine()}\n")
    print("| What the proxy does | ms of CPU a second | of a core |\n| --- | --- | --- |")
    for name, settings, looking in rows:
        share = await measured(args, urls, settings, looking)
        print(f"| {name} | {share * 1e3:.1f} | {share:.2%} |", flush=True)
    print(f"\nIts own page has {max(sizes) / 1e3:.1f} KB.")


async def version(args):
    told = await asyncio.create_subprocess_exec(args.pdlink, "--version", stdout=subprocess.PIPE)
    return (await told.communicate())[0].decode().strip()


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    return f"{os.cpu_count()} cores, {model[1] if model else platform.machine()}, load {os.getloadavg()[0]:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pdlink")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=20)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
