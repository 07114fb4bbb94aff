"""Staged bytes into a running model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from vllm.logger import init_logger

from ... import _native
from ...trainer.publisher import DTYPES

logger = init_logger("vllm.pdlink.weights")

# safetensors' names to PyTorch's types, as far as this PyTorch has them.
TYPES = {told: getattr(torch, name) for name, told in DTYPES.items() if hasattr(torch, name)}


def load(worker: Any, weights: _native.Order | None) -> None:
    """Loads all of a commit's tensors, by the names that checkpoints have, into `worker`'s model: what the kernels read stays
    where it is. `None`, or a commit without bytes: what the worker was started with, from where it came. Raises if anything is
    amiss; then the model is a mixture."""
    memory = weights.memory() if weights is not None else None
    if weights is None or memory is None:
        worker.reload_weights()
        return
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
        worker.reload_weights(weights_iterator=views(weights), is_checkpoint_format=True)
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


def _abandon(worker: Any, model: torch.nn.Module) -> None:
    """Ends a reload that broke off: what is buffered for a layer would go into it at the next one."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    with set_current_vllm_config(worker.vllm_config):
        for layer in model.modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        layerwise.finalize_layerwise_reload(model, worker.model_runner.model_config)


def views(weights: _native.Order) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors where they lie: no byte is copied. They are valid as long as `weights` lives."""
    memory = weights.memory()
    if memory is None:
        return
    address, size = memory
    whole = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    for name, dtype, shape, start, end in weights.tensors():
        if dtype not in TYPES:
            raise TypeError(f"tensor `{name}` is of dtype {dtype}, which this PyTorch does not have")
        yield name, whole[start:end].view(TYPES[dtype]).view(shape)
