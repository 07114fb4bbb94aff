"""Sends named tensors to every worker behind a pdlink proxy.

The proxy coordinates; the workers pull the bytes from this process, each bucket once, and check a digest of every tensor. When
`publish` returns, every worker serves the new version; when it raises, every worker serves the old one, unless what it raises is an
`UnknownOutcomeError`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .._native import WeightSender
from .errors import PublishError, UnknownOutcomeError
from .gathering import Begun, Gathering
from .ranks import Alone, ranks_of
from .tensors import DTYPES, collected, described, is_cast, settle

if TYPE_CHECKING:
    import torch
    import torch.distributed

    from .tensors import Named, Weights

# How long a question that is answered at once may take.
ASK_S = 30.0
# How much longer than an update may take its answer is waited for.
SLACK_S = 30.0


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

    `dtype` is what floating tensors are cast to on their way, such as `torch.bfloat16`; by default they go as they are. `group` is the
    process group whose ranks publish together, each by the same call; rank 0 of it sends. By default it is torch's default group if a
    tensor is a DTensor, and otherwise there is none: this process publishes alone.
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
        dtype: torch.dtype | None = None,
        group: torch.distributed.ProcessGroup | None = None,
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
        if dtype is not None and (not dtype.is_floating_point or str(dtype).removeprefix("torch.") not in DTYPES):
            raise ValueError(f"floating tensors cannot be sent as {dtype}; name a floating dtype that checkpoints hold, as torch.bfloat16")
        self._dtype = dtype
        self._group = group

    def version(self) -> int:
        """The version that the fleet serves."""
        return int(self._status().get("version") or 0)

    def publish(self, weights: Weights, version: int | None = None) -> Published:
        """Sends all tensors as one version: the given one, or the next. They are read while this runs: nobody may write to them.

        Where ranks publish together, each calls this with the same names, and all return the same, or raise the same error: a
        `PublishError` of what the fleet said, or of the first rank that failed, by its number. The tensors of rank 0 are sent, those that
        are DTensors gathered from all ranks, and `version` is rank 0's.
        """
        tensors, failed = collected(weights)
        ranks = ranks_of(self._group, tensors)
        if failed is None and isinstance(ranks, Alone) and not any(is_cast(tensor, self._dtype) for _, tensor in tensors):
            return self._lend(tensors, version)
        gathering = Gathering(ranks, self._dtype)
        published: Published = gathering.publish(tensors, failed, lambda descriptions, gpu: self._begin(version, descriptions, gpu))
        return published

    def _lend(self, tensors: Named, version: int | None) -> Published:
        """Sends tensors out of the memory that they are in."""
        version, patience_s = self._next(version)
        given = [described(name, tensor) for name, tensor in tensors]
        settle(memory[3] for *_, memory in given)
        sender = WeightSender(self._settings(version), given)
        try:
            return self._order(sender.address, version, patience_s)
        finally:
            sender.close()

    def _begin(self, version: int | None, descriptions: list[tuple[str, str, list[int]]], gpu: int | None) -> Begun:
        """A sender of tensors that come while they are sent, and the order for it."""
        number, patience_s = self._next(version)
        sender = WeightSender.gathering(self._settings(number), descriptions, gpu)
        return Begun(sender, number, lambda: self._order(sender.address, number, patience_s))

    def _next(self, version: int | None) -> tuple[int, float]:
        """The version to publish, and how long the proxy's answer is waited for."""
        status = self._status()
        patience_s = float(status["update_max_s"]) + SLACK_S if self._timeout_s is None else self._timeout_s
        return int(status.get("version") or 0) + 1 if version is None else version, patience_s

    def _settings(self, version: int) -> str:
        settings = {
            "version": version,
            "host": self._host,
            "port": 0,
            "secret_file": self._secret_file,
            "weights": self._weights,
            "kv": self._kv,
        }
        return json.dumps(settings)

    def _status(self) -> dict[str, Any]:
        try:
            return self._ask("GET", "/admin/weights", None, ASK_S)
        except _NoAnswer as error:
            raise PublishError(error.status, str(error)) from error

    def _order(self, peer: str, version: int, patience_s: float) -> Published:
        try:
            done = self._ask("POST", "/admin/weights/update", {"peer": peer, "version": version}, patience_s)
        except _NoAnswer as error:
            why = (
                f"it is not known what became of version {version}: {error}; it may serve, or may yet. GET {self._url}/admin/weights says "
                f"so: once nothing is `under_way`, it serves if `version` is {version} and `source` names {peer}"
            )
            raise UnknownOutcomeError(error.status, why, version, peer) from error
        behind = [worker["worker"] for worker in done["behind"]] + done["left_out"]
        return Published(
            version=done["version"],
            digest=done["digest"],
            bytes=done["bytes"],
            staging_s=done["staging_s"],
            paused_s=done["paused_s"],
            behind=tuple(behind),
        )

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
