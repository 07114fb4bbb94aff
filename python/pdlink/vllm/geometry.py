"""Where a worker's KV lies, read off its tensors.

Strides, storages and `kv_cache_config` say all of it; the version of vLLM is never asked. Known shapes of one layer's view,
with B blocks, N tokens, H heads of this rank, D elements per head, C of K and V (or of MLA's latent) together:

    [B, H, N, C]     K, then V in C (since 0.29); the CPU backend always, with planes packed for its instruction set
    [B, 2, N, H, D]  K and V as halves (until 0.28)
    [B, N, C]        MLA, or [B, 1, N, C]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import _native

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class CacheMap:
    """One rank's KV cache in the runtime's words."""

    geometry: dict[str, Any]
    layers: list[dict[str, int]]
    num_blocks: int
    memory: list[tuple[int, int, Any]]
    """(address, bytes, owner) of each storage."""
    split: int
    """The runtime's blocks in one of the scheduler's: backends may cut blocks smaller."""

    def blocks(self, scheduler_blocks: list[int]) -> list[int]:
        """The runtime's blocks that the scheduler's are made of."""
        if self.split == 1:
            return list(scheduler_blocks)
        return [block * self.split + part for block in scheduler_blocks for part in range(self.split)]

    def cover(self, scheduler_blocks: list[int], tokens: int) -> list[int]:
        """The first of them that hold `tokens` tokens."""
        return self.blocks(scheduler_blocks)[: -(-tokens // self.geometry["groups"][0]["block_size"])]


def describe(
    kv_caches: dict[str, torch.Tensor], vllm_config: VllmConfig, kv_cache_config: Any, model: str
) -> CacheMap:
    """Reads the map of what vLLM registered."""
    layers = _layers(kv_caches, kv_cache_config)
    memory: list[tuple[int, int, Any]] = []
    regions: dict[int, int] = {}
    views = []
    for name, spec in layers:
        tensor = kv_caches[name]
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu":
            raise _native.LayoutError(f"{name}: its KV is on {tensor.device}; this build moves KV in host memory only")
        region = regions.setdefault(storage.data_ptr(), len(memory))
        if region == len(memory):
            memory.append((storage.data_ptr(), storage.nbytes(), storage))
        views.append(_view(name, spec, tensor, region, vllm_config))
    first = views[0]
    for view, (name, _) in zip(views, layers):
        if view.shape != first.shape:
            raise _native.LayoutError(
                f"{name} has KV of another shape than {layers[0][0]}: {view.shape} and {first.shape}; models that mix "
                "shapes are not handed over"
            )
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    kv_heads = 1 if first.mla else vllm_config.model_config.get_total_num_kv_heads()
    group = {
        "kind": "Latent" if first.mla else "Heads",
        "layers": len(views),
        "kv_heads": kv_heads,
        "head_size": first.head_size,
        "element_bytes": first.element_bytes,
        "dtype": first.dtype,
        "block_size": first.tokens,
        "window": None,
        "opaque_planes": first.planes,
    }
    geometry = {"model": model, "tp_size": tp_size, "groups": [group]}
    spec = layers[0][1]
    split, rest = divmod(spec.block_size, first.tokens)
    if rest or first.blocks < kv_cache_config.num_blocks * split:
        raise _native.LayoutError(
            f"{layers[0][0]} has {first.blocks} blocks of {first.tokens} tokens, the scheduler counts "
            f"{kv_cache_config.num_blocks} of {spec.block_size}"
        )
    placements = [view.placement for view in views]
    return CacheMap(geometry, placements, kv_cache_config.num_blocks * split, memory, split)


@dataclass(frozen=True)
class _View:
    placement: dict[str, int]
    blocks: int
    tokens: int
    heads: int
    head_size: int
    element_bytes: int
    dtype: str
    mla: bool
    planes: str | None

    @property
    def shape(self) -> tuple[Any, ...]:
        return (self.blocks, self.tokens, self.heads, self.head_size, self.dtype, self.mla, self.planes)


def _layers(kv_caches: dict[str, Any], kv_cache_config: Any) -> list[tuple[str, Any]]:
    """The layers to hand over, in the order of the model, with the spec of each."""
    groups = transfer_groups(kv_cache_config)
    if len(groups) != 1:
        raise _native.LayoutError(
            f"the model has {len(groups)} KV cache groups; pdlink hands over models with one kind of attention"
        )
    spec = groups[0].kv_cache_spec
    specs = getattr(spec, "kv_cache_specs", None)
    found = [(name, specs[name] if specs else spec) for name in groups[0].layer_names if name in kv_caches]
    if not found:
        raise _native.LayoutError("vLLM registered no KV cache")
    return found


def transfer_groups(kv_cache_config: Any) -> list[Any]:
    groups = kv_cache_config.kv_cache_groups
    return [groups[index] for index in transfer_group_ids(kv_cache_config)]


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """Groups that are handed over: vLLM says so since it has groups that are not."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    return tuple(ids) if ids is not None else tuple(range(len(kv_cache_config.kv_cache_groups)))


def _view(name: str, spec: Any, tensor: torch.Tensor, region: int, vllm_config: VllmConfig) -> _View:
    kinds = {kind.__name__ for kind in type(spec).__mro__}
    shape, item = tuple(tensor.shape), tensor.element_size()
    if "AttentionSpec" not in kinds or tensor.stride(-1) != 1:
        raise _native.LayoutError(f"{name}: KV of kind {type(spec).__name__} and strides {tensor.stride()} is unknown")
    mla = "MLAAttentionSpec" in kinds
    planes = _planes(name, spec, tensor, vllm_config)
    block, token, head, half, heads, head_size = _axes(name, spec, tensor, mla)
    placement = {
        "region": region,
        "base": tensor.data_ptr() - tensor.untyped_storage().data_ptr(),
        "block_stride": block * item,
        "half_stride": half * item,
        "token_stride": token * item,
        "head_stride": head * item,
    }
    if planes is not None and (shape[2], token) != (shape[-2], shape[-1]):
        raise _native.LayoutError(f"{name}: packed planes of shape {shape} and strides {tensor.stride()} are not dense")
    return _View(
        placement=placement,
        blocks=shape[0],
        tokens=shape[2] if len(shape) == 5 else shape[-2],
        heads=heads,
        head_size=head_size,
        element_bytes=item,
        dtype=_dtype(tensor, vllm_config),
        mla=mla,
        planes=planes,
    )


def _axes(name: str, spec: Any, tensor: torch.Tensor, mla: bool) -> tuple[int, int, int, int, int, int]:
    """Strides of block, token, head and half in elements, heads of this rank, elements of one head."""
    shape, stride = tuple(tensor.shape), tensor.stride()
    if mla and len(shape) == 3:
        return stride[0], stride[1], 0, 0, 1, shape[2]
    if mla and len(shape) == 4 and shape[1] == 1:
        return stride[0], stride[2], 0, 0, 1, shape[3]
    if len(shape) == 5 and shape[1] == 2:
        return stride[0], stride[2], stride[3], stride[1], shape[3], shape[4]
    # Quantised caches keep scales beside K and V in C: then C is not the two halves, and copying those would lose them.
    if len(shape) == 4 and shape[3] == 2 * spec.head_size == spec.head_size + getattr(spec, "head_size_v", spec.head_size):
        return stride[0], stride[2], stride[1], spec.head_size, shape[1], spec.head_size
    raise _native.LayoutError(f"{name}: a KV cache of shape {shape} with {type(spec).__name__} is unknown to pdlink")


def _planes(name: str, spec: Any, tensor: torch.Tensor, vllm_config: VllmConfig) -> str | None:
    """The instruction set that the CPU backend packs planes for: bytes mean the same only under an equal one."""
    if tensor.device.type != "cpu" or tensor.dim() != 4:
        return None
    layer = vllm_config.compilation_config.static_forward_context.get(name)
    for owner in (layer, getattr(layer, "impl", None)):
        isa = getattr(owner, "isa", None)
        if isinstance(isa, str):
            return isa
    from vllm.v1.attention.backends import cpu_attn

    cache = vllm_config.cache_config
    return cpu_attn._get_attn_isa(vllm_config.model_config.dtype, spec.block_size, spec.head_size, cache.cache_dtype)


def _dtype(tensor: torch.Tensor, vllm_config: VllmConfig) -> str:
    """Quantised caches are bytes to torch; what the bytes mean is in the cache's own setting."""
    if tensor.dtype.is_floating_point:
        return str(tensor.dtype).removeprefix("torch.")
    return str(vllm_config.cache_config.cache_dtype)
