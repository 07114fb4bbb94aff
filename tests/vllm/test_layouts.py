"""KV goes between every pair of layouts that vLLM has had, by strides alone: the same elements arrive, and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from fakes import BLOCKS, HEADS, LAYERS, SIZE, TOKENS, Cache, Engine, full_attention
from pdlink import _native
from pdlink.vllm import geometry
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowSpec

HALVES = 2
LENGTH = {"L": LAYERS, "B": BLOCKS, "N": TOKENS, "H": HEADS, "K": HALVES, "D": SIZE}


def permuted(order: str) -> torch.Tensor:
    """Memory in `order` (of L B N H K D), seen as [L, K, B, N, H, D]."""
    memory = torch.zeros([LENGTH[axis] for axis in order])
    return memory.permute([order.index(axis) for axis in "LKBNHD"])


def names(views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.layers.{number}.attn": view for number, view in enumerate(views)}


def side_by_side(order: str) -> Cache:
    """[B, H, N, C] with K, then V in C, one storage for all layers (0.29 and later)."""
    logical = permuted(order)
    views = [layer.permute(1, 3, 2, 0, 4) for layer in logical]
    # K and V are adjacent, so the last two dimensions are one.
    flat = [view.as_strided((BLOCKS, HEADS, TOKENS, 2 * SIZE), (*view.stride()[:3], 1), view.storage_offset()) for view in views]
    return Cache(names(flat), logical)


def halved(order: str) -> Cache:
    """[B, 2, N, H, D], a storage for each layer (0.24 to 0.28)."""
    memories = [torch.zeros([LENGTH[axis] for axis in order]) for _ in range(LAYERS)]
    halves = [memory.permute([order.index(axis) for axis in "KBNHD"]) for memory in memories]
    cache = Cache(names([half.transpose(0, 1) for half in halves]), torch.zeros(0))
    cache.logical = _Stacked(halves)
    return cache


class _Stacked:
    """Separate memories under one index, like a tensor of one more dimension."""

    def __init__(self, parts: list[torch.Tensor]):
        self.parts = parts

    def copy_(self, values: torch.Tensor) -> None:
        for part, value in zip(self.parts, values):
            part.copy_(value)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def numel(self) -> int:
        return sum(part.numel() for part in self.parts)

    def stacked(self) -> torch.Tensor:
        return torch.stack(self.parts)


def split(parts: int) -> Cache:
    """Kernel blocks smaller than the scheduler's: [B·parts, 2, N/parts, H, D]."""
    memories = [torch.zeros(BLOCKS * parts, HALVES, TOKENS // parts, HEADS, SIZE) for _ in range(LAYERS)]
    cache = Cache(names(memories), torch.zeros(0))
    halves = [
        memory.view(BLOCKS, parts, HALVES, TOKENS // parts, HEADS, SIZE).permute(2, 0, 1, 3, 4, 5) for memory in memories
    ]
    cache.logical = _Split(halves)
    return cache


class _Split(_Stacked):
    """Kernel blocks under the scheduler's index."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), HALVES, BLOCKS, TOKENS, HEADS, SIZE)

    def copy_(self, values: torch.Tensor) -> None:
        for part, value in zip(self.parts, values):
            part.copy_(value.view(part.shape))

    def stacked(self) -> torch.Tensor:
        return torch.stack([part.reshape(self.shape[1:]) for part in self.parts])


def content(cache: Cache) -> torch.Tensor:
    logical = cache.logical
    return logical.stacked() if isinstance(logical, _Stacked) else logical.clone()


MAKERS = {
    "LBNHC": lambda: side_by_side("LBNHKD"),
    "LBHNC": lambda: side_by_side("LBHNKD"),
    "LHBNC": lambda: side_by_side("LHBNKD"),
    "BLNHC": lambda: side_by_side("BLNHKD"),
    "BLHNC": lambda: side_by_side("BLHNKD"),
    "BHLNC": lambda: side_by_side("BHLNKD"),
    "halves, NHD": lambda: halved("BKNHD"),
    "halves, HND": lambda: halved("BKHND"),
    "halves, split": lambda: split(2),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory in the layouts of GPU backends: planes are not packed."""
    monkeypatch.setattr(geometry, "_planes", lambda *_: None)


@pytest.mark.parametrize(("theirs", "ours"), list(itertools.product(MAKERS, MAKERS)))
def test_the_same_elements_arrive_and_nothing_else(theirs: str, ours: str):
    source, target = MAKERS[theirs](), MAKERS[ours]()
    source.fill()
    prefill, decode = Engine("kv_producer", source), Engine("kv_consumer", target)
    try:
        from_blocks, to_blocks, tokens = [7, 2, 9], [1, 10, 4], 2 * TOKENS + 5
        params = prefill.hold("p", "1" * 32, [from_blocks], tokens)
        # The first block is cached here: it is not asked for, and stays as it is.
        decode.load("d", params, [to_blocks[1:]], TOKENS)
        decode.until(lambda: decode.received)
        assert (decode.received, decode.failed) == (["d"], [])
        expected = torch.zeros(content(source).shape)
        expected[:, :, to_blocks[1]] = content(source)[:, :, from_blocks[1]]
        arrived = content(target)
        # Of the last block only the prompt's tokens count.
        for page in (expected, arrived):
            page[:, :, to_blocks[2], 5:] = 0
        expected[:, :, to_blocks[2], :5] = content(source)[:, :, from_blocks[2], :5]
        assert torch.equal(arrived, expected)
        prefill.until(lambda: prefill.sent)
    finally:
        prefill.close()
        decode.close()


@pytest.mark.parametrize("dims", [3, 4])
def test_latents(dims: int):
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=SIZE, dtype=torch.float32)

    def cache(dims: int) -> Cache:
        logical = torch.zeros(LAYERS, BLOCKS, TOKENS, SIZE)
        views = [layer if dims == 3 else layer[:, None] for layer in logical]
        return Cache(names(views), logical, spec)

    source, target = cache(3), cache(dims)
    source.fill()
    prefill, decode = Engine("kv_producer", source), Engine("kv_consumer", target)
    try:
        decode.load("d", prefill.hold("p", "2" * 32, [[3, 5]], 2 * TOKENS), [[8, 0]])
        decode.until(lambda: decode.received)
        assert decode.failed == []
        assert torch.equal(target.logical[:, [8, 0]], source.logical[:, [3, 5]])
    finally:
        prefill.close()
        decode.close()


def test_a_sliding_window_has_a_table_of_its_own_and_only_its_last_blocks():
    """One full layer and two with a window of 20 tokens; KV groups share the memory, so their block ids never meet."""
    sliding = SlidingWindowSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32, sliding_window=20
    )

    def cache() -> Cache:
        made = side_by_side("LBHNKD")
        first, *rest = made.views
        made.spec = {(first,): full_attention(), tuple(rest): sliding}
        return made

    source, target = cache(), cache()
    source.fill()
    prefill, decode = Engine("kv_producer", source), Engine("kv_consumer", target)
    try:
        tokens = 2 * TOKENS + 5
        params = prefill.hold("p", "4" * 32, [[7, 2, 9], [3, 5]], tokens)
        decode.load("d", params, [[1, 10, 4], [6, 8]])
        decode.until(lambda: decode.received)
        assert decode.failed == []
        assert torch.equal(target.logical[:1, :, [1, 10]], source.logical[:1, :, [7, 2]])
        assert torch.equal(target.logical[1:, :, [6, 8]], source.logical[1:, :, [3, 5]])
        assert not target.logical[0, :, [6, 8]].any() and not target.logical[1:, :, [1, 10, 4]].any()
    finally:
        prefill.close()
        decode.close()


def test_what_is_unknown_is_refused_by_name():
    odd = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * SIZE + 4)
    with pytest.raises(_native.LayoutError, match="shape"):
        Engine("kv_consumer", Cache(names([odd]), odd))
    mixed = [torch.zeros(BLOCKS * parts, 2, TOKENS // parts, HEADS, SIZE) for parts in (1, 2)]
    with pytest.raises(_native.LayoutError, match="parts"):
        Engine("kv_consumer", Cache(names(mixed), mixed[0]))
    few = torch.zeros(BLOCKS - 1, 2, TOKENS, HEADS, SIZE)
    with pytest.raises(_native.LayoutError, match="blocks"):
        Engine("kv_consumer", Cache(names([few]), few))


def test_packed_planes_go_to_their_own_kind_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry, "_planes", lambda *_: "amx")
    prefill = Engine("kv_producer", side_by_side("LBHNKD"))
    monkeypatch.setattr(geometry, "_planes", lambda *_: "vec")
    decode = Engine("kv_consumer", side_by_side("LBHNKD"))
    try:
        decode.load("d", prefill.hold("p", "3" * 32, [[1]], TOKENS), [[1]])
        decode.until(lambda: decode.received)
        assert decode.failed == ["d"], "the instruction sets differ"
    finally:
        prefill.close()
        decode.close()


def test_quantised_bytes_are_named_by_their_own_setting():
    spec = full_attention(dtype=torch.uint8)
    cache = torch.zeros(BLOCKS, 2, TOKENS, HEADS, SIZE, dtype=torch.uint8)
    engine = Engine("kv_consumer", Cache(names([cache]), cache, spec))
    engine.close()
