"""Processes of the tests: vLLM servers out of the nursery, and the proxy. Each is ended by whoever holds it, by its own id."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from vllm_processes import free_ports

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LOGS = ROOT / "target" / "vllm-logs"
MODEL = ROOT / "target" / "vllm-model"
OTHER_MODEL = ROOT / "target" / "vllm-model-other"
BIN = Path(sys.executable).parent

START_S = 240
BLOCK = 32
# Short, so that a test can wait for a lease to end; long enough for a machine with two busy cores.
LEASE_S = 12
KV = {
    "lease_ms": LEASE_S * 1000,
    "transfer_timeout_ms": 10_000,
    # Long enough for a machine whose cores are all taken: what is asserted here is what comes of it, not when.
    "connect_timeout_ms": 8000,
    "peer_timeout_ms": 8000,
    "digest": "every",
}
COMMON = [
    *("--served-model-name", "tiny", "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32"),
    *("--block-size", str(BLOCK), "--disable-uvicorn-access-log"),
]


def environment(secret: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Two cores for several workers: bound to cores they would all have the same one.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        # Nothing here is worth half a minute of compiling.
        "TORCHDYNAMO_DISABLE": "1",
        # The worker inside the engine's process: two processes for each server, not three.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PDLINK_SECRET_FILE": str(secret),
    }


def write_secret(folder: Path) -> Path:
    path = folder / "secret"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(handle, secrets.token_hex(32).encode() + b"\n")
    os.close(handle)
    return path


class Nursery:
    def __init__(self, env: dict[str, str]):
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = open(LOGS / "nursery.log", "w")
        command = [sys.executable, str(HERE / "nursery.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=env)
        self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        assert line, f"the nursery ended; see {self._log.name}"
        return json.loads(line)

    def serve(self, argv: list[str], log: Path, env: dict[str, str]) -> int:
        self._process.stdin.write(json.dumps({"argv": argv, "env": env, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return self._answer()["pid"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


@dataclass
class Server:
    """One `vllm serve`, as the leader of its own process group."""

    name: str
    nursery: Nursery
    role: str | None = None
    model: Path = MODEL
    policy: str = "fail"
    flags: tuple[str, ...] = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "128M")
    send_type: str = "GET"
    connector: str = "PdlinkConnector"
    paths: tuple[str, ...] = ("shm", "tcp")
    kv: dict[str, object] = field(default_factory=dict)
    """Further settings of `[kv]`."""
    weights: bool = False
    """Takes new weights from pdlink."""
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    """HTTP, then one KV port for each tensor-parallel rank."""
    pid: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def kv_address(self) -> str:
        return f"127.0.0.1:{self.ports[1]}"

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    def start(self) -> Server:
        argv = ["serve", str(self.model), "--port", str(self.ports[0]), *COMMON, *self.flags]
        if self.role is not None:
            kv = {**KV, "paths": self.paths, **self.kv}
            extra = {"kv_host": "127.0.0.1", "kv_ports": self.ports[1:], "kv": kv, "send_type": self.send_type}
            transfer = {
                "kv_connector": self.connector,
                "kv_connector_module_path": "pdlink.vllm",
                "kv_role": self.role,
                "kv_load_failure_policy": self.policy,
                "kv_connector_extra_config": extra,
            }
            argv += ["--kv-transfer-config", json.dumps(transfer)]
        env: dict[str, str] = {}
        if self.weights:
            argv += ["--worker-extension-cls", "pdlink.vllm.weights.WeightsExtension"]
            env = {"VLLM_SERVER_DEV_MODE": "1", "PDLINK_WEIGHTS": json.dumps({"http": self.url})}
        self.pid = self.nursery.serve(argv, self.log, env)
        return self

    def wait(self) -> Server:
        end = time.monotonic() + START_S
        while (why := self.why_not_healthy()) is not None:
            assert self.is_alive(), f"{self.name} ended while starting; see {self.log}"
            assert time.monotonic() < end, f"{self.name} is not ready after {START_S} s: {why}; see {self.log}"
            time.sleep(0.2)
        return self

    def is_healthy(self) -> bool:
        return self.why_not_healthy() is None

    def why_not_healthy(self) -> str | None:
        try:
            urllib.request.urlopen(self.url + "/health", timeout=5)
        except (urllib.error.URLError, OSError) as error:
            return str(error)
        return None

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        # Nobody may have reaped it yet.
        return "\nState:\tZ" not in Path(f"/proc/{self.pid}/status").read_text()

    def kill(self) -> None:
        """All of it at once, as a machine that loses power would."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class Proxy:
    def __init__(
        self,
        prefill: Server | tuple[Server, ...],
        decode: Server,
        env: dict[str, str],
        name: str = "proxy",
        flags: tuple[str, ...] = (),
    ):
        prefills = prefill if isinstance(prefill, tuple) else (prefill,)
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(str(BIN / "pdlink"), "proxy", "--port", str(port), "--decode", decode.url),
            *("--prefill", ",".join(each.url for each in prefills)),
            *("--prefill-kv-addrs", ",".join(each.kv_address for each in prefills), "--decode-kv-addrs", decode.kv_address),
            *("--connector-impl", "native", *flags),
        ]
        self._log = open(LOGS / f"{name}.log", "w")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=env)

    def wait(self) -> Proxy:
        end = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, f"the proxy ended; see {self._log.name}"
            assert time.monotonic() < end, f"the proxy is not ready; see {self._log.name}"
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
