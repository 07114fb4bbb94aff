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

# Attention that needs all tokens, or the last of them. What else vLLM has keeps state, or forgets in steps.
KNOWN_KINDS = {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "SlidingWindowMLASpec"}


@dataclass(frozen=True)
class Group:
    """One of the runtime's KV groups: layers of one shape that share a block table."""

    table: int
    """Which of vLLM's transfer groups has its blocks."""
    block_size: int
    split: int
    """The runtime's blocks in one of the scheduler's: backends may cut blocks smaller."""

    def blocks(self, scheduler_blocks: list[int], tokens: int) -> list[int]:
        """The runtime's blocks that the scheduler's are made of, up to the last of `tokens` tokens."""
        if self.split == 1:
            return scheduler_blocks
        parts = [block * self.split + part for block in scheduler_blocks for part in range(self.split)]
        behind = -(-tokens // (self.block_size * self.split)) * self.split - -(-tokens // self.block_size)
        return parts[: len(parts) - behind]


@dataclass(frozen=True)
class CacheMap:
    """One rank's KV cache in the runtime's words."""

    geometry: dict[str, Any]
    groups: list[Group]
    layers: list[dict[str, int]]
    """Group by group."""
    names: list[str]
    """Of the layers, in the same order."""
    num_blocks: int
    memory: list[tuple[int, int, Any, int | None]]
    """(address, bytes, owner, number of its GPU) of each storage."""

    @property
    def on_gpu(self) -> bool:
        return any(gpu is not None for *_, gpu in self.memory)

    def blocks(self, scheduler_blocks: list[list[int]], tokens: int) -> list[list[int]]:
        """The blocks of each of the runtime's groups, of those of each of vLLM's."""
        return [group.blocks(scheduler_blocks[group.table], tokens) for group in self.groups]


def describe(
    kv_caches: dict[str, torch.Tensor], vllm_config: VllmConfig, kv_cache_config: Any, model: str
) -> CacheMap:
    """Reads the map of what vLLM registered."""
    memory = _Memory()
    groups: dict[tuple[int, Any], list[_View]] = {}
    specs: dict[tuple[int, Any], Any] = {}
    for table, name, spec in _layers(kv_caches, kv_cache_config):
        tensor = kv_caches[name]
        view = _view(name, spec, tensor, memory.region(name, tensor), vllm_config)
        # Where layers of one table differ in shape, they are several groups to the runtime.
        groups.setdefault((table, view.shape), []).append(view)
        specs[table, view.shape] = spec
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    found, described = [], []
    for key, views in groups.items():
        found.append(Group(key[0], views[0].tokens, _split(views[0], specs[key], kv_cache_config.num_blocks)))
        described.append(_group(views, specs[key], vllm_config, tp_size))
    splits = {group.split for group in found}
    if len(splits) > 1:
        raise _native.LayoutError(f"backends cut the scheduler's blocks into {sorted(splits)} parts, by layer; one is known")
    return CacheMap(
        geometry={"model": model, "tp_size": tp_size, "groups": described},
        groups=found,
        layers=[view.placement for views in groups.values() for view in views],
        names=[view.name for views in groups.values() for view in views],
        num_blocks=kv_cache_config.num_blocks * splits.pop(),
        memory=memory.storages,
    )


class _Memory:
    """The storages under the views, each once."""

    def __init__(self) -> None:
        self.storages: list[tuple[int, int, Any, int | None]] = []
        self._regions: dict[int, int] = {}

    def region(self, name: str, tensor: torch.Tensor) -> int:
        if tensor.device.type not in ("cpu", "cuda"):
            raise _native.LayoutError(f"{name}: its KV is on {tensor.device}; pdlink moves KV of CPUs and NVIDIA GPUs")
        storage = tensor.untyped_storage()
        region = self._regions.setdefault(storage.data_ptr(), len(self.storages))
        if region == len(self.storages):
            self.storages.append((storage.data_ptr(), storage.nbytes(), storage, tensor.device.index))
        return region


def _split(view: _View, spec: Any, num_blocks: int) -> int:
    split, rest = divmod(spec.block_size, view.tokens)
    if rest or view.blocks < num_blocks * split:
        raise _native.LayoutError(
            f"{view.name} has {view.blocks} blocks of {view.tokens} tokens, the scheduler counts {num_blocks} of "
            f"{spec.block_size}"
        )
    return split


def _group(views: list[_View], spec: Any, vllm_config: VllmConfig, tp_size: int) -> dict[str, Any]:
    view = views[0]
    return {
        "kind": "Latent" if view.mla else "Heads",
        "layers": len(views),
        "kv_heads": 1 if view.mla else _all_heads(view, vllm_config, tp_size),
        "head_size": view.head_size,
        "element_bytes": view.element_bytes,
        "dtype": view.dtype,
        "block_size": view.tokens,
        "window": view.window,
        "opaque_planes": view.planes,
    }


def _all_heads(view: _View, vllm_config: VllmConfig, tp_size: int) -> int:
    """KV heads over all ranks. Fewer than ranks are replicated; layers may have other numbers than the model's."""
    total = vllm_config.model_config.get_total_num_kv_heads()
    return total if max(1, total // tp_size) == view.heads else view.heads * tp_size


@dataclass(frozen=True)
class _View:
    name: str
    placement: dict[str, int]
    blocks: int
    tokens: int
    heads: int
    head_size: int
    element_bytes: int
    dtype: str
    mla: bool
    planes: str | None
    window: int | None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for layers that are one group to the runtime."""
        return (self.tokens, self.heads, self.head_size, self.dtype, self.mla, self.planes, self.window)


def _layers(kv_caches: dict[str, Any], kv_cache_config: Any) -> list[tuple[int, str, Any]]:
    """The layers to hand over, in the order of the model: which transfer group, name, spec."""
    found = []
    for table, group in enumerate(transfer_groups(kv_cache_config)):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            if name in kv_caches:
                found.append((table, name, specs[name] if specs else group.kv_cache_spec))
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
    kind = type(spec).__name__
    shape, item = tuple(tensor.shape), tensor.element_size()
    if kind not in KNOWN_KINDS or getattr(spec, "tokens_per_state", 1) != 1:
        raise _native.LayoutError(f"{name} keeps KV as {kind}; pdlink hands over {', '.join(sorted(KNOWN_KINDS))}")
    if tensor.stride(-1) != 1:
        raise _native.LayoutError(f"{name}: KV with strides {tensor.stride()} is unknown: the last one must be 1")
    mla = "MLA" in kind
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
        name=name,
        placement=placement,
        blocks=shape[0],
        tokens=shape[2] if len(shape) == 5 else shape[-2],
        heads=heads,
        head_size=head_size,
        element_bytes=item,
        dtype=_dtype(tensor, vllm_config),
        mla=mla,
        planes=planes,
        window=spec.sliding_window if kind.startswith("SlidingWindow") else None,
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
