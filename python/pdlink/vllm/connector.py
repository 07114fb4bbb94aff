"""The classes that vLLM loads: its hooks, each one line into the side that this instance has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.distributed.kv_transfer.kv_connector.v1.base as base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from .. import _native
from . import config
from .geometry import transfer_group_ids
from .metrics import PdlinkPromMetrics, PdlinkStats
from .protocol import Card, StepMeta, WorkerMeta
from .scheduler import SchedulerSide
from .worker import Results, WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

# Since 0.30 a worker can name the requests whose load failed; before, only their blocks.
_TransferResults = getattr(base, "KVConnectorTransferResults", None)


def _hit_source() -> Any:
    """Since 0.32 vLLM counts external cache hits by where they came from."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.P2P


def _tp_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


class PdlinkConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands KV over from prefill to decode through pdlink's runtime."""

    _cache_hit_source = _hit_source()
    # What carries KV out of a GPU's memory where `[kv] paths` says nothing; None: whatever it can use, fastest first.
    PATHS: list[str] | None = None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None):
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._results = Results()
        groups = len(transfer_group_ids(kv_cache_config))
        if groups > 1 and _TransferResults is None:
            raise _native.SettingsError(
                f"the model has {groups} KV cache groups, and this vLLM cannot be told which request's load failed; use "
                "vLLM 0.30 or newer, or --disable-hybrid-kv-cache-manager"
            )
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(config.read(vllm_config, self.PATHS, 0), kv_cache_config)
        else:
            settings = config.read(vllm_config, self.PATHS, _tp_rank())
            self._worker = WorkerSide(settings, vllm_config, kv_cache_config)

    # ---------------------------------------------------------------- scheduler

    @property
    def _schedules(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler's hook was called on a worker's connector"
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._schedules.bind_pool(gpu_block_pool)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._schedules.set_cards({rank: card for rank, card in metadata.items() if isinstance(card, Card)})

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return transfer_group_ids(self._kv_cache_config)

    def on_new_request(self, request: Any) -> None:
        self._schedules.meet(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._schedules.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._schedules.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        return self._schedules.step_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._schedules.ends(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._schedules.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._schedules.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.needs_steps

    # ---------------------------------------------------------------- worker

    @property
    def _works(self) -> WorkerSide:
        assert self._worker is not None, "a worker's hook was called on a scheduler's connector"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._works.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        self._works.close()

    def restore_kv_caches(self) -> None:
        self._works.open()

    def get_handshake_metadata(self) -> Card | None:
        return self._works.card()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """The first hook of every step in every version, before the forward: orders must not wait for that."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMeta):
            self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads were begun with the step; they run beside it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No request is scheduled before all of its KV is there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """KV is taken from the cache itself: once prefill has ended, or layer by layer where decode has claimed it already."""
        if self._worker is not None:
            self._worker.layer_saved(layer_name)

    def wait_for_save(self) -> None:
        """Blocks stay as they are until they are reported as sent; with `PUT` the next step waits for it."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self._results = self._works.finish()
        return results.sent or None, results.received or None

    if _TransferResults is not None:

        def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
            results = self._results = self._works.finish()
            return _TransferResults(
                finished_sending=results.sent, finished_recving=results.received, failed_recving=results.failed
            )

        def get_block_ids_with_load_errors(self) -> set[int]:
            return set()

    else:

        def get_block_ids_with_load_errors(self) -> set[int]:
            return self._results.invalid_blocks

    def build_connector_worker_meta(self) -> WorkerMeta | None:
        return self._works.worker_meta(self._results)

    def get_kv_connector_stats(self) -> PdlinkStats | None:
        return self._worker.take_stats() if self._worker is not None else None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    # ---------------------------------------------------------------- classes

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PdlinkStats:
        return PdlinkStats(data=data) if data is not None else PdlinkStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PdlinkPromMetrics:
        return PdlinkPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class P2pNcclConnector(PdlinkConnector):
    """Under the name of the connector that vLLM no longer ships: GPU to GPU."""

    PATHS = ["cuda-ipc", "nccl"]


class NixlConnector(PdlinkConnector):
    """Under the name of vLLM's own: by NIXL."""

    PATHS = ["nixl"]
