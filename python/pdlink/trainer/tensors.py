"""A trainer's tensors, as the native sender takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    import torch

    Weights = Union[torch.nn.Module, Mapping[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
    Named = list[tuple[str, torch.Tensor]]

# (address, bytes, owner, GPU)
Memory = tuple[int, int, Any, Union[int, None]]

# PyTorch's names, and what safetensors calls them.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


def collected(weights: Weights) -> tuple[Named, Exception | None]:
    """Names and tensors of a module, a mapping or an iterable; if that fails, those before, and how."""
    found: Named = []
    try:
        state_dict = getattr(weights, "state_dict", None)
        source = state_dict() if callable(state_dict) else weights
        found.extend(source.items() if isinstance(source, Mapping) else source)
    except Exception as error:
        return found, error
    return found, None


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Nothing of `torch.distributed` is imported for that: it is slow, and not there in every build."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def is_cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.dtype.is_floating_point and tensor.dtype != dtype


def dtype_of(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """What safetensors calls the elements that are sent."""
    if any(kind.__name__ == "ShardedTensor" for kind in type(tensor).__mro__):
        raise TypeError(
            f"tensor `{name}` is a ShardedTensor, as FSDP1's SHARDED_STATE_DICT has them, and cannot be gathered here: shard by "
            "torch.distributed.fsdp.fully_shard, or give what FULL_STATE_DICT makes"
        )
    sent = dtype if dtype is not None and is_cast(tensor, dtype) else tensor.dtype
    kind = str(sent).removeprefix("torch.")
    if kind not in DTYPES:
        raise TypeError(f"tensor `{name}` is of {sent}, which no checkpoint holds")
    return DTYPES[kind]


def memory_of(tensor: torch.Tensor) -> Memory:
    """Contiguous memory is borrowed where it lies; anything else is copied first."""
    held = tensor.detach()
    if held.device.type not in ("cpu", "cuda"):
        held = held.to("cpu")
    held = held.contiguous()
    gpu = held.device.index if held.device.type == "cuda" else None
    return held.data_ptr(), held.numel() * held.element_size(), held, gpu


def described(name: str, tensor: torch.Tensor) -> tuple[str, str, list[int], Memory]:
    """A tensor that is all here."""
    return name, dtype_of(name, tensor), list(tensor.shape), memory_of(tensor)


def settle(gpus: Iterable[int | None]) -> None:
    """What the trainer has put on its GPUs before is done afterwards: the sender reads on streams of its own."""
    used = set(gpus) - {None}
    if used:
        import torch

        for gpu in used:
            torch.cuda.synchronize(gpu)


def settle_stream(gpus: Iterable[int | None]) -> None:
    """The same of what this thread has put there, in the stream that it uses now."""
    used = set(gpus) - {None}
    if used:
        import torch

        for gpu in used:
            torch.cuda.current_stream(gpu).synchronize()
