"""Running vllm_weights_gpu.py without a GPU, on a stand-in for the driver whose GPU memory is the host's."""

import ctypes
import os

STAND_IN = "PDLINK_STAND_IN"


def stand_in():
    """The library that stands in for the driver, loaded: whoever asks for libcuda.so.1 then gets it. None: a real one is used."""
    path = os.environ.get(STAND_IN)
    return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) if path else None


def __getattr__(name):
    """Made when a vLLM worker asks for it, because it needs vLLM: its memory is the host's, and PyTorch is to see it as that."""
    if name != "StandInExtension":
        raise AttributeError(name)
    stand_in()
    import torch
    from pdlink.vllm.weights import WeightsExtension, load
    from vllm.model_executor.layers import utils

    def as_on_a_gpu(layer, remove_weight):
        """What reads weights where they were loaded, and not from a packed copy."""
        layer.cpu_linear = torch.nn.functional.linear

    def bytes_of(memory):
        held = (ctypes.c_uint8 * memory.bytes).from_address(memory.address)
        held.memory = memory
        return torch.frombuffer(held, dtype=torch.uint8)

    load.bytes_of, utils.dispatch_cpu_unquantized_gemm = bytes_of, as_on_a_gpu
    return type(name, (WeightsExtension,), {})
