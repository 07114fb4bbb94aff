"""Plain copies instead of a reload: learnt where a model's loader just copies, and only there."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pdlink.vllm.weights import load
from pdlink.vllm.weights.plan import NoPlan, Piece, Prints, learn
from test_weight_orders import Staged, Worker

Tensors = dict[str, torch.Tensor]


class Fused(torch.nn.Module):
    """As vLLM's models do: parts of one parameter, one rank's columns, rows beyond a vocabulary, and one bias for two names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.zeros(6, 4))
        self.down = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
        self.words = torch.nn.Parameter(torch.zeros(5, 2))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            if name in "qkv":
                rows = self.qkv.data.narrow(0, 2 * "qkv".index(name), 2)
                rows.copy_(tensor)
            elif name == "down":
                self.down.data.copy_(tensor.narrow(1, 2, 2).to(self.down.device))
            elif name == "words":
                self.words.data[: len(tensor)].copy_(tensor)
                self.words.data[len(tensor) :].fill_(0)
        return {"qkv", "down", "words"}


def made(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (2, 4), "k": (2, 4), "v": (2, 4), "down": (3, 4), "words": (4, 2), "rotary": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def described(tensors: Tensors) -> Any:
    return tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def lying(tensors: Tensors) -> Any:
    staged = Staged(tensors)
    return next(load.coming(Worker(), staged))


class Streamed(Staged):
    """Eight bytes at a time, which cuts through rows, in one of two places, whatever tensors they are of."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.streams = True
        self.coming = []
        for name, dtype, shape, _, start, end in self.told:
            parts = [(skip, self.bytes[start:end][skip : skip + 8].clone()) for skip in range(0, max(1, end - start), 8)]
            self.coming += [((name, dtype, shape, skip), raw) for skip, raw in parts]
        self.bytes = torch.zeros(16, dtype=torch.uint8)

    def arrived(self) -> Any:
        self.bytes.fill_(77)
        if not self.coming:
            return None
        told, raw = self.coming.pop(0)
        at = len(self.coming) % 2 * 8
        self.bytes[at : at + len(raw)] = raw
        return [(*told, at, at + len(raw))]


def parameters(model: torch.nn.Module) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_loads_what_the_models_own_loader_would() -> None:
    model, first, second = Fused(), made(1), made(2)
    model.load_weights(first.items())
    before = parameters(model)
    plan = learn(model, model.load_weights, described(first))
    assert same(parameters(model), before), "learning changes nothing"
    assert plan.differs(lying(first)) is None and plan.differs(lying(second)) == "q"
    plan.load(lying(second))
    by_plan = parameters(model)
    model.load_weights(second.items())
    assert same(by_plan, parameters(model)) and not same(by_plan, before)


def test_a_plan_is_for_tensors_and_parameters_as_they_were() -> None:
    model, tensors = Fused(), made(1)
    plan = learn(model, model.load_weights, described(tensors))
    assert plan.fits(described(tensors))
    assert not plan.fits(described({**tensors, "q": torch.zeros(2, 4, dtype=torch.float64)}))
    model.qkv = torch.nn.Parameter(torch.zeros(6, 4))
    assert not plan.fits(described(tensors)), "a parameter lies elsewhere"


class Computing(Fused):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor.exp() if name == "k" else tensor) for name, tensor in weights)


class Converting(Fused):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor.to(torch.bfloat16)) for name, tensor in weights)


class Looking(Fused):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor) for name, tensor in weights if float(tensor.sum()) != 0)


class Scaling(Fused):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        self.qkv.data.mul_(2)
        return loaded


class Leaving(Fused):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor) for name, tensor in weights if name != "v")


class Absorbing(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.absorbed = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "kind, why",
    [
        (Computing, "does more than copy: aten.exp"),
        (Converting, "does more than copy: aten._to_copy"),
        (Looking, "does more than copy: aten.sum"),
        (Scaling, "does more than copy: aten.mul_"),
        (Leaving, "16 of the 24 elements of `qkv`"),
        (Absorbing, "keeps `.absorbed`"),
    ],
)
def test_a_model_that_does_more_has_no_plan_and_stays_as_it_was(kind: type[Fused], why: str) -> None:
    model = kind()
    before = parameters(model)
    with pytest.raises(NoPlan, match=why):
        learn(model, model.load_weights, described(made(1)))
    assert same(parameters(model), before)


class Fusing(Worker):
    """Counts what goes vLLM's way; `after` is what it does with a layer once its weights are there."""

    def __init__(self, after: Any = None) -> None:
        super().__init__()
        self.model = Fused()
        self.reloads, self.reset = 0, 0
        self.after = after
        self.model_runner.reset_mm_cache = self.counted
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=False))

    def counted(self) -> None:
        self.reset += 1

    def reload_weights(self, weights_iterator: Any = None, is_checkpoint_format: bool = True) -> None:
        self.reloads += 1
        super().reload_weights(weights_iterator, is_checkpoint_format)
        if self.after is not None:
            self.after(self.model)


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    monkeypatch.setattr("vllm.config.set_current_vllm_config", lambda config: contextlib.nullcontext())


@pytest.mark.parametrize("kind", [Staged, Streamed])
def test_the_first_update_goes_vllms_way_and_later_ones_are_copies(kind: type[Staged]) -> None:
    worker = Fusing()
    for seed in (1, 2, 3):
        load.load(worker, kind(made(seed)))
        want = Fused()
        want.load_weights(made(seed).items())
        assert same(parameters(worker.model), parameters(want)), f"update {seed}"
    assert (worker.reloads, worker.reset) == (1, 2)
    # Another kind of checkpoint, and the one from before again: learnt anew.
    load.load(worker, kind({name: tensor for name, tensor in made(4).items() if name != "rotary"}))
    load.load(worker, kind(made(5)))
    load.load(worker, kind(made(6)))
    assert worker.reloads == 3


def flipped(model: Fused) -> None:
    model.qkv.data.copy_(model.qkv.data.flip(0))


def one_bit_off(model: Fused) -> None:
    model.down.data.view(torch.int16)[2, 1] ^= 1


@pytest.mark.parametrize("kind", [Staged, Streamed])
@pytest.mark.parametrize("after", [flipped, one_bit_off])
def test_a_model_whose_layers_are_changed_after_loading_always_goes_vllms_way(kind: type[Staged], after: Any) -> None:
    worker = Fusing(after)
    for seed in (1, 2):
        load.load(worker, kind(made(seed)))
    assert worker.reloads == 2


def test_what_was_streamed_is_told_from_its_like() -> None:
    model, tensors = Fused(), made(1)
    model.load_weights(tensors.items())
    plan = learn(model, model.load_weights, described(tensors))
    swapped = {"q": tensors["q"].flip(0), "k": tensors["k"][:, [1, 0, 2, 3]], "words": -tensors["words"]}
    for passed, differs in [({}, None), *(({name: tensor}, name) for name, tensor in swapped.items())]:
        prints = Prints(plan)
        prints.see(lying({**tensors, **passed}))
        assert prints.differs() == differs


@pytest.mark.parametrize("count", [1, 3, 7, 24, 1000])
@pytest.mark.parametrize("columns", [slice(0, 5), slice(1, 4), slice(3, 4)])
def test_a_piece_is_copied_by_whatever_parts_come(count: int, columns: slice) -> None:
    tensor = torch.arange(4.0 * 3 * 5).view(4, 3, 5)
    part = tensor[1:, :2, columns]
    into = torch.zeros(part.shape)
    piece = Piece(tuple(part.shape), part.stride(), part.storage_offset(), into)
    assert piece.is_in_order() and not Piece((5, 4), (1, 5), 0, into).is_in_order()
    copied = 0
    for first in range(0, tensor.numel(), count):
        for size, stride, offset, place in piece.within(first, first + count):
            assert first <= offset and (place == 0).all(), "nothing twice"
            place.copy_(tensor.as_strided(size, stride, offset) + 100)
            copied += place.numel()
    assert copied == part.numel() and torch.equal(into, part + 100)


class Turning(Fused):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor.view(2, 4).t() if name == "words" else tensor) for name, tensor in weights)


def test_what_is_turned_over_is_copied_whole_and_never_in_parts() -> None:
    worker = Fusing()
    worker.model = Turning()
    for kind, reloads in [(Staged, 1), (Staged, 1), (Streamed, 2), (Streamed, 3)]:
        load.load(worker, kind(made(reloads)))
        want = Turning()
        want.load_weights(made(reloads).items())
        assert same(parameters(worker.model), parameters(want)) and worker.reloads == reloads
