"""Staged bytes into a running model."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.logger import init_logger

from ... import _native
from ...trainer.tensors import DTYPES
from .plan import Described, Lying, NoPlan, Part, Plan, Prints, learn

logger = init_logger("vllm.pdlink.weights")

# safetensors' names to PyTorch's types, as far as this PyTorch has them.
TYPES = {told: getattr(torch, name) for name, told in DTYPES.items() if hasattr(torch, name)}


# What was learnt of each model: how to load it, or that vLLM has to.
_learnt: WeakKeyDictionary[torch.nn.Module, Plan | None] = WeakKeyDictionary()
# What vLLM sets back after a reload, in the versions that have it.
AFTERWARDS = ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache")


def load(worker: Any, weights: _native.Order | None) -> None:
    """Loads all of a commit's tensors, by the names that checkpoints have, into `worker`'s model: what the kernels read stays
    where it is. `None`, or a commit without bytes: what the worker was started with, from where it came. Raises if anything is
    amiss; then the model is a mixture."""
    if weights is None or weights.memory() is None:
        _by_vllm(worker, None)
    else:
        _given(worker, weights)
    if worker.device.type == "cuda":
        # Whoever gave the memory may take it back from here on.
        torch.cuda.synchronize(worker.device)


def _given(worker: Any, weights: _native.Order) -> None:
    """By plain copies where that was seen to be the same, else vLLM's way."""
    model = worker.model_runner.get_model()
    described = tuple(part.described for part in _parts(weights.tensors()))
    learnt = _learnt.get(model)
    if learnt is not None and learnt.fits(described) and (learnt.goes_in_parts or not weights.streams):
        for lying in coming(worker, weights):
            learnt.load(lying)
        for name in AFTERWARDS:
            getattr(worker.model_runner, name, lambda: None)()
        return
    is_known = learnt is None and model in _learnt
    plan = None if is_known else _plan(worker, model, described, weights.streams)
    prints = Prints(plan) if plan is not None and weights.streams else None

    def passing() -> Iterator[tuple[str, torch.Tensor]]:
        for lying in gathered(coming(worker, weights)) if weights.streams else coming(worker, weights):
            if prints is not None:
                prints.see(lying)
            yield from views(lying)

    _by_vllm(worker, passing())
    if plan is not None:
        differs = prints.differs() if prints is not None else plan.differs(next(coming(worker, weights)))
        if differs is None:
            logger.info("later updates of this model are plain copies")
        else:
            plan = None
            _say_why(f"`{differs}` is in the model otherwise than in the checkpoint")
    _learnt[model] = plan


def _plan(worker: Any, model: torch.nn.Module, described: tuple[Described, ...], in_parts: bool) -> Plan | None:
    """To be proven by a reload."""
    try:
        if worker.model_runner.model_config.quantization is not None:
            raise NoPlan("it is quantised")
        if getattr(worker.vllm_config.parallel_config, "enable_eplb", False):
            raise NoPlan("its experts move")
        plan = learn(model, model.load_weights, described)
        if in_parts and not plan.goes_in_parts:
            raise NoPlan("it turns tensors over, which cannot be done part by part")
        return plan
    except NoPlan as why:
        _say_why(str(why))
    except Exception:
        logger.exception("each update of this model takes vLLM's layer-wise reload")
    return None


def _say_why(why: str) -> None:
    logger.info("each update of this model takes vLLM's layer-wise reload: %s", why)


def _by_vllm(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]] | None) -> None:
    from vllm.config import set_current_vllm_config

    # vLLM makes a layer's new parameters on whatever device is current, and some layers look at the configuration.
    with torch.device(worker.device), set_current_vllm_config(worker.vllm_config):
        if tensors is None:
            worker.reload_weights()
        else:
            _reload(worker, tensors)


def _reload(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    model = worker.model_runner.get_model()
    # Layers that adapters are put round are called otherwise in checkpoints.
    wanted = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    loaded: set[str] | None = None
    original = model.load_weights

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded
        loaded = original(*args, **kwargs)
        return loaded

    # vLLM itself only warns of parameters that no tensor was for. They would keep the old values.
    model.load_weights = load_weights
    try:
        worker.reload_weights(weights_iterator=iter(tensors), is_checkpoint_format=True)
    except Exception:
        try:
            _abandon(worker, model)
        except Exception:
            logger.exception("a reload that broke off could not be ended")
        raise
    finally:
        del model.load_weights
    missing = sorted(wanted - loaded) if loaded is not None else []
    if missing and worker.model_runner.model_config.quantization is None:
        raise ValueError(f"the new weights have nothing for {len(missing)} of the model's parameters, such as {missing[0]}")


def coming(worker: Any, weights: _native.Order) -> Iterator[Lying]:
    """All tensors where they lie, in host memory or on the GPU: at once if they are staged, else in parts, as they come. Then the next
    ones take the place of the last."""
    memory = weights.memory()
    assert memory is not None
    whole = bytes_of(memory)

    def next_ones() -> list[Any] | None:
        if worker.device.type == "cuda":
            # What was put into PyTorch's stream still reads the last ones.
            torch.cuda.current_stream(worker.device).synchronize()
        return weights.arrived()

    for told in iter(next_ones, None) if weights.streams else [weights.tensors()]:
        yield Lying(whole, _parts(told))


def _parts(told: Iterable[tuple[str, str, list[int], int, int, int]]) -> list[Part]:
    return [Part((name, _type(name, dtype), tuple(shape)), *place) for name, dtype, shape, *place in told]


def gathered(coming: Iterable[Lying]) -> Iterator[Lying]:
    """Tensors that come in parts, whole: each in memory of its own, because vLLM gathers a layer's before it loads them."""
    held = torch.empty(0, dtype=torch.uint8)
    for whole, parts in coming:
        for part in parts:
            _, dtype, shape = part.described
            if part.skip == 0:
                held = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=whole.device)
            end = part.skip + part.end - part.start
            held[part.skip : end].copy_(whole[part.start : part.end])
            if end == len(held):
                yield Lying(held, [Part(part.described, 0, 0, end)])


def _type(name: str, dtype: str) -> torch.dtype:
    if dtype not in TYPES:
        raise TypeError(f"tensor `{name}` is of dtype {dtype}, which this PyTorch does not have")
    return TYPES[dtype]


def _abandon(worker: Any, model: torch.nn.Module) -> None:
    """Ends a reload that broke off: what is buffered for a layer would go into it at the next one."""
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    layerwise.finalize_layerwise_reload(model, worker.model_runner.model_config)


def views(lying: Lying) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors where they lie: no byte is copied."""
    for (name, dtype, shape), _, start, end in lying.parts:
        yield name, lying.whole[start:end].view(dtype).view(shape)


class _Owner:
    """What keeps the memory of a view alive: PyTorch holds what it made a tensor of."""

    def __init__(self, memory: _native.StagedMemory):
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }


def bytes_of(memory: _native.StagedMemory) -> torch.Tensor:
    """Staged memory as one tensor of bytes."""
    if memory.gpu is not None:
        return torch.as_tensor(_Owner(memory), device=f"cuda:{memory.gpu}")
    held = (ctypes.c_uint8 * memory.bytes).from_address(memory.address)
    held.memory = memory
    return torch.frombuffer(held, dtype=torch.uint8)
