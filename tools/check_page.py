#!/usr/bin/env python3
"""Clicks through the live page in a headless Chromium, before a real fleet of reference engines.

    tools/check_page.py PDLINK [--screenshots FOLDER]

PDLINK is the program. Needs chromium (Debian's package `chromium`) and nothing else: the browser is driven over its own
debugging pipe. Exits 0 if all holds; says what does not otherwise. With --screenshots it leaves pictures of the page at two widths
and in both themes.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60
WIDTHS = {"wide": (1280, 1000), "phone": (375, 800)}


class Browser:
    """Chromium over its debugging pipe: file descriptors 3 (to it) and 4 (from it), JSON ended by a zero byte."""

    def __init__(self, folder: str):
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            sys.exit("chromium was not found; install Debian's package `chromium`")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def descriptors() -> None:
            # Both copies first: either may lie where the other is to go.
            ends = [os.dup2(fd, 100 + at) for at, fd in enumerate((to_read, to_write))]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=descriptors, start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number = b"", 0
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = None
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def _message(self, until: float) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser did not answer")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise ConnectionError("the browser ended")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params: object) -> dict:
        self._number += 1
        message: dict = {"id": self._number, "method": method, "params": params}
        if getattr(self, "session", None):
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE_S
        while True:
            answer = self._message(until)
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def js(self, expression: str) -> object:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, what: str, expression: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.js(expression):
            if time.monotonic() > end:
                raise AssertionError(f"it never came about that {what}; the page: {self.js('document.body.innerText')}")
            time.sleep(0.1)

    def key(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def look(self, width: str, theme: str) -> None:
        columns, rows = WIDTHS[width]
        self.call("Emulation.setDeviceMetricsOverride", width=columns, height=rows, deviceScaleFactor=1, mobile=width == "phone")
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        time.sleep(0.3)

    def picture(self, file: Path) -> None:
        height = self.js("document.documentElement.scrollHeight")
        width = self.js("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Fleet:
    """`pdlink up` with two prefill and two decode workers."""

    def __init__(self, pdlink: str, folder: str):
        command = [pdlink, "up", "--json", "@", str(ROOT / "configs/debug/local_2p2d.toml"),
                   "--launcher.log_dir", folder, "--telemetry.watch_interval_s", "0.5", "--launcher.restart_backoff_s", "4"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.pids: dict[str, int] = {}
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "started":
                self.pids[event["worker"]] = event["pid"]
            if event.get("event") == "ready":
                self.base = re.sub(r"/v1$", "", event["base_url"])
                break
        else:
            sys.exit("the fleet did not come up")
        # A pipe that nobody empties would stop the launcher.
        threading.Thread(target=lambda: [None for _ in self.process.stdout], daemon=True).start()
        self._stop = threading.Event()
        self.load = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(4)]
        for thread in self.load:
            thread.start()

    def _ask(self, client: int) -> None:
        number = 0
        while not self._stop.wait(0.1):
            number += 1
            body = {"model": "pdlink-reference", "prompt": f"{client} {number} " + "words " * 60, "max_tokens": 16}
            request = urllib.request.Request(
                f"{self.base}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=PATIENCE_S).read()
            except OSError:
                pass

    def close(self) -> None:
        self._stop.set()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


def check(browser: Browser, fleet: Fleet, pictures: Path | None) -> None:
    is_drawn(browser, fleet)
    with_the_mouse(browser)
    with_the_keyboard(browser)
    with_a_screen_reader(browser)
    pauses(browser)
    sees_a_death(browser, fleet, pictures)
    fits(browser, pictures)
    contrast(browser)
    asks_nobody_else(browser, fleet)


def is_drawn(browser: Browser, fleet: Fleet) -> None:
    browser.look("wide", "light")
    browser.call("Page.navigate", url=f"{fleet.base}/")
    browser.until("the page is live", "document.getElementById('live')?.dataset.state === 'live'")
    browser.until("four workers are drawn", "document.querySelectorAll('.worker').length === 4")
    browser.until("all are up", "[...document.querySelectorAll('.worker')].every(w => w.dataset.state === 'up')")
    browser.until("four links are listed", "document.querySelectorAll('#links tbody tr').length >= 4")
    browser.until("KV has moved", "[...document.querySelectorAll('#links tbody tr')].some(r => +r.cells[4].textContent > 0)")
    browser.until("wires are drawn", "document.querySelectorAll('#wires path').length === 4")
    browser.until("rates are drawn", "document.querySelector('#plot-moved polyline').getAttribute('points').includes(' ')")


def with_the_mouse(browser: Browser) -> None:
    """One worker chosen, and all again."""
    browser.js("document.querySelector('[data-number=\"0\"]').click()")
    browser.until("only its links are listed", "document.querySelectorAll('#links tbody tr').length === 2")
    assert browser.js("document.getElementById('chosen-title').textContent") == "prefill_0: up"
    browser.js("document.getElementById('all').click()")
    browser.until("all links are listed", "document.querySelectorAll('#links tbody tr').length === 4")


def with_the_keyboard(browser: Browser) -> None:
    """Everything can be reached, in order, and nothing holds the focus."""
    browser.js("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(10):
        browser.key("Tab")
        reached.append(browser.js("document.activeElement.id || document.activeElement.textContent.slice(0, 9) || 'scroll'"))
    assert reached[0] == "pause", reached
    for worker in ("prefill_0", "prefill_1", "decode_0", "decode_1"):
        assert any(at.startswith(worker[:9]) for at in reached), (worker, reached)
    browser.js("document.querySelector('[data-number=\"2\"]').focus()")
    browser.key("Enter")
    browser.until("the decode worker is chosen", "document.getElementById('chosen-title').textContent.startsWith('decode_0')")
    browser.until("it still has the focus", "document.activeElement.dataset.number === '2'")
    browser.key("Escape")
    browser.until("all is shown again", "document.getElementById('chosen').hidden")


def with_a_screen_reader(browser: Browser) -> None:
    """Every control and table has a name, and the plots say in words what they show."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            name = node.get("name", {}).get("value", "")
            roles.setdefault(node.get("role", {}).get("value", ""), []).append(name)
    for role in ("button", "image", "meter", "region", "table", "heading"):
        names = roles.get(role, [])
        assert names and all(names), f"a {role} is missing or has no name: {names}"
    assert any("at most in the last" in name for name in roles["image"]), roles["image"]
    assert "status" in roles, "nothing announces changes"


def pauses(browser: Browser) -> None:
    browser.js("document.getElementById('pause').click()")
    browser.until("it pauses", "document.getElementById('live').dataset.state === 'paused'")
    browser.js("document.getElementById('pause').click()")
    browser.until("it goes on", "document.getElementById('live')?.dataset.state === 'live'")


def sees_a_death(browser: Browser, fleet: Fleet, pictures: Path | None) -> None:
    """A worker that is killed is seen, with its cause, and announced; so is its return."""
    os.kill(fleet.pids["prefill_1"], signal.SIGKILL)
    browser.until("the death is seen", "document.querySelector('[data-number=\"1\"]').dataset.state === 'down'")
    browser.until("its cause is listed", "document.querySelector('#failures tbody').textContent.includes('prefill_1')")
    browser.until("it is announced", "document.getElementById('said').textContent.includes('prefill_1 is down')")
    if pictures:
        browser.picture(pictures / "down.png")
    browser.until("it comes back", "document.querySelector('[data-number=\"1\"]').dataset.state === 'up'")


def fits(browser: Browser, pictures: Path | None) -> None:
    """Nothing is wider than the window, and no control too small for a finger."""
    for width in WIDTHS:
        for theme in ("light", "dark"):
            browser.look(width, theme)
            time.sleep(1.2)
            over = browser.js("document.documentElement.scrollWidth - innerWidth")
            assert over <= 0, f"the page is {over} pixels wider than the {width} window"
            small = browser.js("[...document.querySelectorAll('button')].filter(b => b.offsetParent && b.offsetHeight < 24).length")
            assert small == 0, f"{small} controls are too small for a finger at {width}"
            if pictures:
                browser.picture(pictures / f"{width}-{theme}.png")


def asks_nobody_else(browser: Browser, fleet: Fleet) -> None:
    """And no script has failed."""
    for event in browser.events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            assert url.startswith((fleet.base, "data:", "about:")), f"the page asked for {url}"
        if method == "Runtime.exceptionThrown":
            raise AssertionError(f"the page's script failed: {params['exceptionDetails']}")
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            raise AssertionError(f"the browser complains: {params['entry']['text']}")


def contrast(browser: Browser) -> None:
    """All text stands out from what it lies on: 4.5 to 1, as the WCAG asks, in both themes."""
    measure = """(() => {
      const parts = text => text.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
      const back = element => { for (; element; element = element.parentElement) { const c = parts(getComputedStyle(element).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c; } return parts(getComputedStyle(document.body).backgroundColor); };
      const poor = [];
      for (const element of document.querySelectorAll('body *')) {
        if (!element.offsetParent || ![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [light(parts(getComputedStyle(element).color)), light(back(element))].sort((a, b) => b - a);
        if ((a + .05) / (b + .05) < 4.5) poor.push(element.tagName + ' ' + element.className + ' ' + element.textContent.slice(0, 30));
      }
      return poor;
    })()"""
    for theme in ("light", "dark"):
        browser.look("wide", theme)
        poor = browser.js(measure)
        assert not poor, f"too little contrast in the {theme} theme: {poor}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pdlink")
    parser.add_argument("--screenshots", type=Path)
    args = parser.parse_args()
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fleet = Fleet(str(Path(args.pdlink).resolve()), f"{folder}/logs")
        try:
            browser = Browser(f"{folder}/browser")
            try:
                check(browser, fleet, args.screenshots)
            finally:
                browser.close()
        finally:
            fleet.close()
    print("the page holds")


if __name__ == "__main__":
    main()
