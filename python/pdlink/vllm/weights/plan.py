"""Where each tensor of a checkpoint ends in a running model, learnt once, so that every later load is plain copies.

vLLM's layer-wise reload makes each layer anew, loads it, and copies it to where kernels read it: right for every model, and for one of
8 billion parameters 0.2 s of Python round copies that take 8 ms. Where a model keeps what its loaders write as they write it, those
copies are all there is. `learn` has the model's own loader run on tensors without bytes and writes down what it would copy; what the next
reload makes is held against that, by `Plan.differs` or, where the tensors are gone by then, by `Prints`. Anything that is not a plain copy,
or not equal, means that there is no plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What a tensor of a checkpoint is called and looks like.
Described = tuple[str, torch.dtype, tuple[int, ...]]


class Part(NamedTuple):
    """A stretch of a tensor's bytes: how many of the tensor's are before it, and where it lies."""

    described: Described
    skip: int
    start: int
    end: int

    def is_whole(self) -> bool:
        _, dtype, shape = self.described
        return self.end - self.start == math.prod(shape) * dtype.itemsize


class Lying(NamedTuple):
    """Parts of tensors of a checkpoint in one stretch of memory."""

    whole: torch.Tensor
    parts: list[Part]


# Attributes of layers whose tensors are not made of weights.
NOT_OF_WEIGHTS = {"kv_cache"}
# Objects that layers keep what they have made of their weights in, beside themselves.
HELPERS = ("impl", "quant_method")
# Bytes that are compared at once, which takes as much memory again, or made a number of, which takes more.
COMPARED_BYTES = 64 << 20
PRINTED_BYTES = 16 << 20


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


GOLDEN = _signed(0x9E3779B97F4A7C15)

aten = torch.ops.aten


class NoPlan(Exception):
    """The model does not just copy."""


class Piece(NamedTuple):
    """A part of a tensor, by where its elements lie in it, and its place in the model."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    into: torch.Tensor

    def is_in_order(self) -> bool:
        """Whether no row begins before the one before it has ended."""
        return all(step >= _span(self.size[at + 1 :], self.stride[at + 1 :]) for at, step in enumerate(self.stride) if self.size[at] > 1)

    def within(self, first: int, end: int) -> Iterator[Piece]:
        """What of it lies in such elements of the tensor. It must be in order."""
        begin, stop = self.offset, self.offset + _span(self.size, self.stride)
        if stop <= first or begin >= end or 0 in self.size:
            return
        if first <= begin and stop <= end:
            yield self
            return
        # Rows that are all inside, and the one before and behind them, which may be cut.
        (rows, *size), (step, *stride) = self.size, self.stride
        inside = range(max(0, -((begin - first) // step)), min(rows, (end - begin - _span(size, stride)) // step + 1))
        if inside:
            at = begin + inside.start * step
            yield Piece((len(inside), *size), self.stride, at, self.into[inside.start : inside.stop])
        for row in sorted({inside.start - 1, max(inside.stop, inside.start - 1)}):
            if 0 <= row < rows:
                yield from Piece(tuple(size), tuple(stride), begin + row * step, self.into[row]).within(first, end)


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((count - 1) * step for count, step in zip(size, stride))


class Plan:
    """Good for checkpoints of the same names, dtypes and shapes, as long as the model's parameters stay where they are."""

    def __init__(self, described: tuple[Described, ...], pieces: dict[str, list[Piece]], model: torch.nn.Module):
        self._described = described
        self._pieces = pieces
        # Whether tensors can be loaded part by part.
        self.goes_in_parts = all(piece.is_in_order() for of_one in pieces.values() for piece in of_one)
        self._places = [
            (module._parameters, name, parameter.data_ptr())
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def fits(self, described: tuple[Described, ...]) -> bool:
        def is_there(parameters: dict[str, Any], name: str, address: int) -> bool:
            parameter = parameters.get(name)
            return parameter is not None and bool(parameter.data_ptr() == address)

        return described == self._described and all(is_there(*place) for place in self._places)

    @torch.no_grad()
    def load(self, lying: Lying) -> None:
        """Copies all of them. On a GPU the copies may still run when this returns."""
        given = [(into, part) for _, into, part in self.copies(lying)]
        if given:
            torch._foreach_copy_([into for into, _ in given], [part for _, part in given], non_blocking=True)

    @torch.no_grad()
    def differs(self, lying: Lying) -> str | None:
        """The first tensor that does not lie in the model as `load` would have put it there."""
        return next((name for name, into, part in self.copies(lying) if not _equal(into, part)), None)

    def copies(self, lying: Lying) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each copy that loads these: whose it is, where it goes, and what lies there now."""
        # Seen once as each dtype that there is: a view of each tensor first would double the work.
        seen: dict[torch.dtype, torch.Tensor] = {}
        for part in lying.parts:
            name, dtype, _ = part.described
            pieces = self._pieces.get(name)
            if not pieces:
                continue
            if dtype not in seen:
                seen[dtype] = lying.whole[: len(lying.whole) // dtype.itemsize * dtype.itemsize].view(dtype)
            first, end = part.skip // dtype.itemsize, (part.skip + part.end - part.start) // dtype.itemsize
            begin = part.start // dtype.itemsize - first
            is_whole = part.is_whole()
            for piece in pieces:
                for size, stride, offset, into in [piece] if is_whole else piece.within(first, end):
                    yield name, into, seen[dtype].as_strided(size, stride, begin + offset)


def _equal(into: torch.Tensor, part: torch.Tensor) -> bool:
    if into.dim() == 0:
        into, part = into.view(1), part.view(1)
    row_bytes = max(1, into[:1].numel() * into.element_size())
    rows = max(1, COMPARED_BYTES // row_bytes)
    slabs = zip(into.split(rows), part.split(rows))
    return all(torch.equal(one, other.to(one.device, one.dtype)) for one, other in slabs)


class Prints:
    """What the model should hold in each place of a plan, as numbers: for tensors that are gone when it can be looked at."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._spread: torch.Tensor | None = None

    @torch.no_grad()
    def see(self, lying: Lying) -> None:
        """Tensors pass."""
        for name, into, part in self._plan.copies(lying):
            self._seen.append((name, into, self._number(part, into)))

    @torch.no_grad()
    def differs(self) -> str | None:
        """As `Plan.differs`, of all that passed."""
        return next((name for name, into, number in self._seen if not torch.equal(self._number(into, into), number)), None)

    def _number(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Of a tensor's bytes and their order, as it would be on the device and of the dtype of `like`."""
        if tensor.dim() == 0:
            tensor = tensor.view(1)
        total = torch.zeros((), dtype=torch.int64, device=like.device)
        rows = max(1, PRINTED_BYTES // max(1, tensor[:1].numel() * like.element_size()))
        for slab in tensor.split(rows):
            words = _words(slab.to(like.device, like.dtype).contiguous())
            total = total * GOLDEN + ((words ^ (words >> 32)) * self._spread_for(words)).sum()
        return total

    def _spread_for(self, words: torch.Tensor) -> torch.Tensor:
        if self._spread is None or len(self._spread) < len(words) or self._spread.device != words.device:
            self._spread = _spread(max(len(words), PRINTED_BYTES // 8), words.device)
        return self._spread[: len(words)]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, eight by eight."""
    raw = tensor.view(-1).view(torch.uint8)
    if len(raw) % 8 == 0 and raw.storage_offset() % 8 == 0:
        return raw.view(torch.int64)
    words = torch.zeros(-(-len(raw) // 8), dtype=torch.int64, device=raw.device)
    words.view(torch.uint8)[: len(raw)].copy_(raw)
    return words


def _spread(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers that have nothing to do with their neighbours: splitmix64 of 1, 2, 3 …"""
    mixed = torch.arange(1, count + 1, device=device) * GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ (mixed >> 31) | 1


def learn(model: torch.nn.Module, load: Callable[[Any], Any], described: tuple[Described, ...]) -> Plan:
    """The plan by which `load`, which is the model's own loader, would load such tensors. Raises `NoPlan`."""
    kept = made_of_weights(model)
    if kept:
        raise NoPlan(f"it keeps `{kept}` beside its parameters")
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in described}
    recorder = _Recorder(empty)
    try:
        with torch.no_grad(), recorder:
            load((name, tensor) for name, tensor in empty.items())
    except NoPlan:
        raise
    except Exception as error:
        raise NoPlan(f"its loader wants the bytes: {type(error).__name__}: {error}") from error
    _check_all_is_covered(model, recorder)
    return Plan(described, recorder.pieces, model)


def made_of_weights(model: torch.nn.Module) -> str | None:
    """A tensor that a layer keeps in another way than as a parameter or buffer: it may have been computed from weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name, module in model.named_modules():
        holders = [module, *(getattr(module, helper, None) for helper in HELPERS)]
        for attribute, value in ((key, value) for holder in holders for key, value in getattr(holder, "__dict__", {}).items()):
            if attribute in NOT_OF_WEIGHTS or not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
                continue
            if value.is_floating_point() and value.numel() > 1 and value.untyped_storage().data_ptr() not in own:
                return f"{name}.{attribute}"
    return None


class _Recorder(TorchDispatchMode):
    """Writes down what is copied from tensors without bytes, and does nothing that would change the model."""

    def __init__(self, given: dict[str, torch.Tensor]):
        super().__init__()
        self._names = {_storage(tensor): name for name, tensor in given.items()}
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        # Elements that are written, by the storage that they are in.
        self.covered: dict[int, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default:
            return self._copied(args[0], args[1])
        if func in (aten.fill_.Scalar, aten.zero_.default) and not self._is_given(args[0]):
            # A constant that is there already: the model was loaded before.
            self.covered[_storage(args[0])] += args[0].numel()
            return args[0]
        if func._schema.is_mutable:
            raise NoPlan(f"its loader does more than copy: {func}")
        given = [value for value in (*args, *kwargs.values()) if self._is_given(value)]
        if given and func is aten._to_copy.default and kwargs.get("dtype") in (None, given[0].dtype):
            # To the GPU, where the copy goes anyway.
            return given[0]
        made = func(*args, **kwargs)
        if given and not (isinstance(made, torch.Tensor) and self._is_given(made) or _are_all(made, self._is_given)):
            raise NoPlan(f"its loader does more than copy: {func}")
        return made

    def _is_given(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_meta and _storage(value) in self._names

    def _copied(self, into: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        if not self._is_given(part) or into.is_meta:
            raise NoPlan("its loader copies what is not the checkpoint's")
        if into.shape != part.shape:
            part = part.expand(into.shape)
        piece = Piece(tuple(part.shape), tuple(part.stride()), part.storage_offset(), into.detach())
        self.pieces[self._names[_storage(part)]].append(piece)
        self.covered[_storage(into)] += into.numel()
        return into


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _are_all(made: Any, is_so: Callable[[Any], bool]) -> bool:
    return isinstance(made, (list, tuple)) and len(made) > 0 and all(is_so(one) for one in made)


def _check_all_is_covered(model: torch.nn.Module, recorder: _Recorder) -> None:
    """What no copy reaches was computed, or is none of the checkpoint's."""
    for name, parameter in model.named_parameters():
        written = recorder.covered.get(_storage(parameter), 0)
        if written != parameter.numel():
            raise NoPlan(f"{written} of the {parameter.numel()} elements of `{name}` are copied")
