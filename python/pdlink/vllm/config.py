"""What a vLLM engine was told about its link: `kv_transfer_config` and the keys we keep in `kv_connector_extra_config`."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import _native

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
# Names the run's secret to a child process; the secret itself is in no environment and no argument.
SECRET_FILE_ENV = "PDLINK_SECRET_FILE"
LOG_ENV = "PDLINK_LOG"
HOST_PATHS = ["shm", "tcp"]
KNOWN = {
    "kv",
    "kv_host",
    "kv_bind_host",
    "kv_ports",
    "kv_rank",
    "kv_parallel_size",
    "http_port",
    "send_type",
    "secret_file",
    "log",
    "log_format",
}


@dataclass(frozen=True)
class LinkConfig:
    """Settings of this engine's link. Every address comes from the extra config: vLLM's own keys changed in 0.32."""

    engine_id: str
    role: str
    host: str
    bind_host: str
    port: int
    """Of this rank. 0 takes a free one."""
    siblings: tuple[str, ...]
    """`host:port` of the worker's other ranks."""
    send_type: str
    kv: dict[str, Any]
    """`[kv]`, as it was given."""
    gpu_paths: list[str] | None
    """What this connector prefers for a cache in GPU memory."""
    secret_file: str | None
    model: str
    tp_rank: int
    tp_size: int
    log_filter: str
    log_json: bool

    @property
    def prefills(self) -> bool:
        return self.role != "decode"

    def kv_of(self, on_gpu: bool) -> dict[str, Any]:
        """`[kv]` for a cache that lies there: the paths that were given, else those that suit its memory."""
        paths = self.gpu_paths if on_gpu else HOST_PATHS
        kv = self.kv if paths is None else {"paths": paths, **self.kv}
        if "nixl" not in (kv.get("paths") or ()):
            return kv
        nixl = {key: value for key, value in kv.get("nixl", {}).items() if value is not None}
        if "library" not in nixl and "environment" not in nixl and (library := _nixl_library()):
            nixl["library"] = library
        return {**kv, "nixl": nixl}


def read(vllm_config: VllmConfig, gpu_paths: list[str] | None, tp_rank: int) -> LinkConfig:
    """The settings of rank `tp_rank`; `gpu_paths` is the connector's own preference."""
    transfer = vllm_config.kv_transfer_config
    extra = dict(transfer.kv_connector_extra_config or {})
    unknown = sorted(extra.keys() - KNOWN)
    if unknown:
        raise _native.SettingsError(
            f"kv_connector_extra_config has keys that pdlink does not know: {', '.join(unknown)}; "
            f"it knows {', '.join(sorted(KNOWN))}"
        )
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise _native.SettingsError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: pdlink hands KV over between tensor-parallel "
            "ranks only; use --tensor-parallel-size"
        )
    host = str(extra.get("kv_host") or "127.0.0.1")
    return LinkConfig(
        engine_id=str(transfer.engine_id),
        role=ROLES[transfer.kv_role],
        host=host,
        bind_host=str(extra.get("kv_bind_host") or host),
        port=_port(extra.get("kv_ports"), transfer.kv_port, parallel, tp_rank),
        siblings=_siblings(host, extra.get("kv_ports"), transfer.kv_port, parallel, tp_rank),
        send_type=str(extra.get("send_type") or "GET"),
        kv=dict(extra.get("kv") or {}),
        gpu_paths=gpu_paths,
        secret_file=extra.get("secret_file") or os.environ.get(SECRET_FILE_ENV) or None,
        model=_model(vllm_config.model_config),
        tp_rank=tp_rank,
        tp_size=parallel.tensor_parallel_size,
        log_filter=str(extra.get("log") or os.environ.get(LOG_ENV) or "info"),
        log_json=extra.get("log_format") == "json",
    )


def _nixl_library() -> str | None:
    """NIXL's library among this interpreter's packages, wherever they are installed."""
    for wheel in ("nixl-cu13", "nixl-cu12"):
        try:
            files = importlib.metadata.distribution(wheel).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "libnixl_capi.so":
                return str(file.locate())
    return None


def _port(ports: list[int] | None, first: int, parallel: Any, tp_rank: int) -> int:
    """One port for each rank: as listed, else counted from `kv_port`."""
    index = getattr(parallel, "data_parallel_index", 0) * parallel.tensor_parallel_size + tp_rank
    if ports:
        # A launcher lists the ranks of one engine; with several engines behind one server it lists all of theirs.
        at = index if index < len(ports) else tp_rank
        if at >= len(ports):
            raise _native.SettingsError(
                f"`kv_ports` in kv_connector_extra_config lists {len(ports)} ports, rank {tp_rank} of "
                f"{parallel.tensor_parallel_size} needs one of its own"
            )
        return int(ports[at])
    return int(first) + index


def _siblings(host: str, ports: list[int] | None, first: int, parallel: Any, tp_rank: int) -> tuple[str, ...]:
    """Where the other ranks listen, as far as that is settled beforehand."""
    others = [rank for rank in range(parallel.tensor_parallel_size) if rank != tp_rank]
    known = [_port(ports, first, parallel, rank) for rank in others]
    name = f"[{host}]" if ":" in host else host
    return tuple(f"{name}:{port}" for port in known if port)


def _model(model_config: Any) -> str:
    """What must be equal on both sides for KV to mean the same."""
    name = str(model_config.model).rstrip("/")
    revision = getattr(model_config, "revision", None)
    return f"{name}@{revision}" if revision else name
