"""Sends named tensors to every worker behind a pdlink proxy.

The proxy coordinates; the workers pull the bytes from this process, each bucket once, and check a digest of every tensor. When
`publish` returns, every worker serves the new version; when it raises, every worker serves the old one, unless what it raises is an
`UnknownOutcomeError`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import urlsplit

from .._native import PdlinkError, WeightSender

if TYPE_CHECKING:
    import torch

    Weights = Union[torch.nn.Module, Mapping[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]

# PyTorch's names, and what safetensors calls them.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


# How long a question that is answered at once may take.
ASK_S = 30.0
# How much longer than an update may take its answer is waited for.
SLACK_S = 30.0


class PublishError(PdlinkError):
    """The weights were not taken; the message names the phase and the worker. The old version serves on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnknownOutcomeError(PublishError):
    """The proxy had the order, and its answer did not come: the update may have been made, may still be made, or come to nothing.

    `GET /admin/weights` of the proxy says which: `under_way` while it goes on; then `version` is this one's and `source` names `peer`
    if it serves, and if not, `last_failure` says why.
    """

    def __init__(self, status: int, message: str, version: int, peer: str) -> None:
        super().__init__(status, message)
        self.version = version
        self.peer = peer


class _NoAnswer(Exception):
    """A question reached the proxy, and no answer came."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Published:
    """How an update went."""

    version: int
    digest: str | None
    bytes: int
    staging_s: float
    paused_s: float
    # Workers that catch up before they serve: they did not commit, or were down.
    behind: tuple[str, ...]


class WeightPublisher:
    """Publishes to the fleet behind `url`.

    `host` is where workers reach this process; other hosts than loopback need the run's `secret_file`. `weights` are settings of
    `[weights]`, such as `bucket_bytes` and `paths`; `kv` are settings of `[kv]` that hold for broadcasts and copies too, such as `nccl`
    and `transfer_timeout_ms`. `timeout_s` is how long the proxy's answer is waited for; by default somewhat longer than its `[weights]`
    let an update take.
    """

    def __init__(
        self,
        url: str,
        *,
        host: str = "127.0.0.1",
        secret_file: str | PathLike[str] | None = None,
        admin_token: str | None = None,
        timeout_s: float | None = None,
        weights: Mapping[str, Any] | None = None,
        kv: Mapping[str, Any] | None = None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._server = urlsplit(self._url)
        if self._server.scheme not in ("http", "https") or not self._server.hostname:
            raise ValueError(f"`{url}` is no address of a proxy; one is http://127.0.0.1:8000")
        self._host = host
        self._secret_file = None if secret_file is None else fspath(secret_file)
        self._admin_token = admin_token
        self._timeout_s = timeout_s
        self._weights = dict(weights or {})
        self._kv = dict(kv or {})

    def version(self) -> int:
        """The version that the fleet serves."""
        return int(self._status().get("version") or 0)

    def publish(self, weights: Weights, version: int | None = None) -> Published:
        """Sends all tensors as one version: the given one, or the next. They are read while this runs: nobody may write to them."""
        status = self._status()
        if version is None:
            version = int(status.get("version") or 0) + 1
        patience_s = float(status["update_max_s"]) + SLACK_S if self._timeout_s is None else self._timeout_s
        settings = {
            "version": version,
            "host": self._host,
            "port": 0,
            "secret_file": self._secret_file,
            "weights": self._weights,
            "kv": self._kv,
        }
        tensors = [described(name, tensor) for name, tensor in named(weights)]
        settle(tensors)
        sender = WeightSender(json.dumps(settings), tensors)
        try:
            done = self._order(sender.address, version, patience_s)
        finally:
            sender.close()
        behind = [worker["worker"] for worker in done["behind"]] + done["left_out"]
        return Published(
            version=done["version"],
            digest=done["digest"],
            bytes=done["bytes"],
            staging_s=done["staging_s"],
            paused_s=done["paused_s"],
            behind=tuple(behind),
        )

    def _status(self) -> dict[str, Any]:
        try:
            return self._ask("GET", "/admin/weights", None, ASK_S)
        except _NoAnswer as error:
            raise PublishError(error.status, str(error)) from error

    def _order(self, peer: str, version: int, patience_s: float) -> dict[str, Any]:
        try:
            return self._ask("POST", "/admin/weights/update", {"peer": peer, "version": version}, patience_s)
        except _NoAnswer as error:
            why = (
                f"it is not known what became of version {version}: {error}; it may serve, or may yet. GET {self._url}/admin/weights says "
                f"so: once nothing is `under_way`, it serves if `version` is {version} and `source` names {peer}"
            )
            raise UnknownOutcomeError(error.status, why, version, peer) from error

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, patience_s: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._admin_token is not None:
            headers["Authorization"] = f"Bearer {self._admin_token}"
        data = None if body is None else json.dumps(body).encode()
        # Directly: the fleet is on this host or a private network, and a proxy of the environment is not for it.
        kind = http.client.HTTPSConnection if self._server.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._server.hostname or "", self._server.port, timeout=patience_s)
        try:
            try:
                connection.request(method, self._server.path + path, data, headers)
            except (OSError, http.client.HTTPException) as error:
                # Raised before the whole question was sent.
                raise PublishError(0, f"cannot ask {self._url}{path}: {error}") from error
            answer = connection.getresponse()
            text = answer.read()
            if answer.status == HTTPStatus.OK:
                said: dict[str, Any] = json.loads(text)
                return said
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _NoAnswer(0, f"{self._url}{path} gave no answer: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        # A proxy that ends says so without knowing what its workers have been told.
        raised = _NoAnswer if answer.status == HTTPStatus.SERVICE_UNAVAILABLE else PublishError
        raise raised(answer.status, refusal(text) or f"{self._url}{path} answered with {answer.status} {answer.reason}")


def refusal(body: bytes) -> str:
    """What an error answer says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def named(weights: Weights) -> Iterable[tuple[str, torch.Tensor]]:
    """Names and tensors of a module, a mapping or an iterable."""
    state_dict = getattr(weights, "state_dict", None)
    source = state_dict() if callable(state_dict) else weights
    return source.items() if isinstance(source, Mapping) else source


def described(name: str, tensor: torch.Tensor) -> tuple[str, str, list[int], tuple[int, int, Any, int | None]]:
    """A tensor as the native sender takes it. Contiguous memory is borrowed where it lies; anything else is copied first."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise TypeError(f"tensor `{name}` is of {tensor.dtype}, which no checkpoint holds")
    held = tensor.detach()
    if held.device.type not in ("cpu", "cuda"):
        held = held.to("cpu")
    held = held.contiguous()
    gpu = held.device.index if held.device.type == "cuda" else None
    memory = (held.data_ptr(), held.numel() * held.element_size(), held, gpu)
    return name, DTYPES[kind], list(held.shape), memory


def settle(tensors: Iterable[tuple[Any, ...]]) -> None:
    """What the trainer has put on its GPUs before is done afterwards: the sender reads on streams of its own."""
    gpus = {memory[3] for *_, memory in tensors} - {None}
    if gpus:
        import torch

        for gpu in gpus:
            torch.cuda.synchronize(gpu)
