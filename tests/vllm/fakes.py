"""vLLM's objects, as far as the connector looks at them: one engine of each role in this very process, without a model."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from pdlink.vllm import PdlinkConnector, config, worker
from pdlink.vllm.protocol import Blocks, Card, Fetch, Hold, StepMeta
from pdlink.vllm.scheduler import SchedulerSide
from vllm.v1.kv_cache_interface import FullAttentionSpec

KV = {"paths": ["shm", "tcp"], "lease_ms": 4000, "transfer_timeout_ms": 3000, "digest": "every"}
NEVER_S = 30


def vllm_config(role: str, **changes: Any) -> SimpleNamespace:
    """`changes` go into the extra config."""
    extra = {"kv_ports": [0], "kv": KV, **changes}
    transfer = SimpleNamespace(kv_role=role, engine_id=role, kv_port=0, kv_connector_extra_config=extra)
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_index=0),
        model_config=SimpleNamespace(
            model="tiny", revision=None, dtype=torch.float32, get_total_num_kv_heads=lambda: HEADS
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


LAYERS, BLOCKS, TOKENS, HEADS, SIZE = 3, 12, 16, 2, 8


def full_attention(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float32, **changes}
    )


@dataclass
class Cache:
    """One engine's KV: what vLLM would register, and the same memory as [layer, half, block, token, head, element]."""

    views: dict[str, torch.Tensor]
    logical: torch.Tensor
    spec: Any = field(default_factory=full_attention)

    def fill(self) -> None:
        self.logical.copy_(torch.arange(self.logical.numel(), dtype=torch.float32).view(self.logical.shape) + 1)

    @property
    def config(self) -> SimpleNamespace:
        """Of one group; with a dictionary for spec, of the groups that it gives: layer names to spec."""
        groups = self.spec if isinstance(self.spec, dict) else {tuple(self.views): self.spec}
        found = [SimpleNamespace(layer_names=list(names), kv_cache_spec=spec) for names, spec in groups.items()]
        return SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=found)


class Engine:
    """A worker's side with a real runtime, and the scheduler's side of the same engine."""

    def __init__(self, role: str, cache: Cache, connector: type[PdlinkConnector] = PdlinkConnector, **changes: Any):
        told = vllm_config(role, **changes)
        settings = config.read(told, connector.PATHS, 0)
        self.cache = cache
        self.worker = worker.WorkerSide(settings, told, cache.config)
        self.worker.register(cache.views)
        self.scheduler = SchedulerSide(settings, cache.config)
        self.sent: list[str] = []
        self.received: list[str] = []
        self.failed: list[str] = []
        self.tell_cards()

    def tell_cards(self) -> None:
        card = self.worker.card()
        if card is not None:
            self.scheduler.set_cards({0: Card(card.text)})

    def step(self, meta: StepMeta | None = None) -> None:
        self.worker.begin(meta or StepMeta())
        results = self.worker.finish()
        self.sent += results.sent
        self.received += results.received
        self.failed += results.failed

    def until(self, done: Any) -> None:
        end = time.monotonic() + NEVER_S
        while not done():
            assert time.monotonic() < end, (self.sent, self.received, self.failed)
            self.step()
            time.sleep(0.002)

    def settle(self, steps: int = 20) -> None:
        """Time for a report too many to come."""
        for _ in range(steps):
            self.step()
            time.sleep(0.005)

    def hold(self, request_id: str, transfer_id: str, blocks: Blocks, tokens: int) -> str:
        """Offers blocks, ends the request, and gives the JSON text of the parameters."""
        label = f"{request_id}#label"
        self.step(StepMeta(holds=[Hold(request_id, transfer_id, label, blocks, tokens)], closes=[(request_id, False)]))
        return self.scheduler._maker.params(transfer_id, label, blocks, tokens)

    def load(self, request_id: str, params: str, blocks: Blocks, first_token: int = 0) -> None:
        read = json.loads(params)
        expects = [(request_id, read["pdlink"]["transfer_id"], params)]
        fetch = Fetch(request_id, blocks, first_token, read["remote_num_tokens"])
        self.step(StepMeta(expects=expects, fetches=[fetch]))

    def close(self) -> None:
        self.worker.close()
