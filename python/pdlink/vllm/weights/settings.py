"""What a rank needs to know to take new weights: `PDLINK_WEIGHTS`, and what the KV connector was told.

The variable holds JSON. It is no setting of vLLM's, because those are part of the key under which compiled code is kept.

- `http`: the worker's own API server; default: `http_port` of the KV connector, else port 8000, on loopback;
- `host`, `bind_host`, `ports`: where each rank listens for orders, if our own KV connector is not there to listen;
- `gpus`: CUDA's number of each rank's GPU in its process, where that is not the rank's number on its host;
- `secret_file`, `log`, `log_format`: as in `kv_connector_extra_config`;
- `weights`: settings of `[weights]`;
- `kv`: settings of `[kv]` for the paths that weights take, such as `nccl`; those of `kv_connector_extra_config` hold where it is
  silent.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from ... import _native
from .. import config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.pdlink.weights")

VARIABLE = "PDLINK_WEIGHTS"
KNOWN = {"http", "host", "bind_host", "ports", "gpus", "secret_file", "log", "log_format", "weights", "kv"}
# Connectors whose control listener serves for weights too.
OURS = "pdlink.vllm"


@dataclass(frozen=True)
class Settings:
    rank: int
    ranks: int
    http: str
    """The API server of this worker."""
    receiver: str
    """For the native receiver, as JSON."""
    has_connector: bool
    """Some KV connector is there."""
    log_filter: str
    log_json: bool


def read(vllm_config: VllmConfig, rank: int, local_rank: int | None = None) -> Settings | None:
    """None: such a worker takes no weights from us, and serves as it would without."""
    given = _given()
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            logger.warning("%s is %d: pdlink brings weights to tensor-parallel ranks only", name, getattr(parallel, name))
            return None
    transfer = vllm_config.kv_transfer_config
    has_link = transfer is not None and transfer.kv_connector_module_path == OURS
    extra = dict(transfer.kv_connector_extra_config or {}) if has_link else {}
    host = str(given.get("host") or extra.get("kv_host") or "127.0.0.1")
    ports = given.get("ports")
    if has_link:
        addresses = [_link_address(vllm_config, one) for one in range(parallel.tensor_parallel_size)]
    else:
        addresses = [_at(host, int(port)) for port in ports or ()]
    if len(addresses) < parallel.tensor_parallel_size:
        raise _native.SettingsError(
            f"`ports` in {VARIABLE} lists {len(addresses)} ports, and each of {parallel.tensor_parallel_size} ranks needs one"
        )
    # What is staged as a folder can be verified, and be loaded again, without a look at the disk while the engine is paused.
    model = str(vllm_config.model_config.model)
    receiver = {
        "version": 0,
        "weights": given.get("weights") or {},
        "kv": {**(extra.get("kv") or {}), **(given.get("kv") or {})},
        "bind_host": str(given.get("bind_host") or extra.get("kv_bind_host") or host),
        "advertise_host": host,
        "port": None if has_link else int(ports[rank]),
        "secret_file": given.get("secret_file") or extra.get("secret_file") or os.environ.get(config.SECRET_FILE_ENV) or None,
        "base": os.path.abspath(model) if os.path.isdir(model) else None,
        "gpu": _gpu(vllm_config, given.get("gpus"), rank, rank if local_rank is None else local_rank),
        "ranks": addresses if len(addresses) > 1 else [],
    }
    return Settings(
        rank=rank,
        ranks=parallel.tensor_parallel_size,
        http=str(given.get("http") or f"http://127.0.0.1:{extra.get('http_port') or 8000}").rstrip("/"),
        receiver=json.dumps(receiver),
        has_connector=transfer is not None,
        log_filter=str(given.get("log") or extra.get("log") or os.environ.get(config.LOG_ENV) or "info"),
        log_json=(given.get("log_format") or extra.get("log_format")) == "json",
    )


def _gpu(vllm_config: VllmConfig, given: Any, rank: int, local_rank: int) -> int | None:
    """The rank's GPU, as vLLM's own worker will choose it."""
    if given is not None:
        return int(given[rank])
    return local_rank if vllm_config.device_config.device_type == "cuda" else None


def _given() -> dict[str, Any]:
    text = os.environ.get(VARIABLE) or "{}"
    try:
        given = json.loads(text)
    except ValueError as error:
        raise _native.SettingsError(f"{VARIABLE} holds no JSON: {error}") from error
    if not isinstance(given, dict) or (unknown := sorted(given.keys() - KNOWN)):
        what = ", ".join(unknown) if isinstance(given, dict) else text
        raise _native.SettingsError(f"{VARIABLE} holds what pdlink does not know: {what}; it knows {', '.join(sorted(KNOWN))}")
    return given


def _link_address(vllm_config: VllmConfig, rank: int) -> str:
    link = config.read(vllm_config, None, rank)
    return _at(link.host, link.port)


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
