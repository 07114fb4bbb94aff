"""Running vllm_weights_gpu.py without a GPU, on stand-ins for the driver and for NCCL whose GPU memory is the host's."""

import ctypes
import os
import time

STAND_IN = "PDLINK_STAND_IN"
STAND_IN_NCCL = "PDLINK_STAND_IN_NCCL"


def stand_in():
    """The library that stands in for the driver, loaded: whoever asks for libcuda.so.1 then gets it. None: a real one is used."""
    path = os.environ.get(STAND_IN)
    return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) if path else None


class Communicator:
    """What vLLM's PyNcclCommunicator is to a trainer, over the stand-in for NCCL."""

    IN_PROGRESS, BYTES, FLOATS, SUM = 7, 1, 7, 0

    def __init__(self, group):
        from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId

        self.library, self.comm, name = ctypes.CDLL(os.environ[STAND_IN_NCCL]), ctypes.c_void_p(), ncclUniqueId()
        assert self.library.ncclGetUniqueId(ctypes.byref(name)) == 0
        name = group.broadcast_obj(name, src=0)
        self.library.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, ncclUniqueId, ctypes.c_int]
        assert self.library.ncclCommInitRank(ctypes.byref(self.comm), group.world_size, name, group.rank) == 0
        number = ctypes.c_float()
        place = ctypes.byref(number)
        self._settle(self.library.ncclAllReduce(place, place, ctypes.c_size_t(1), self.FLOATS, self.SUM, self.comm, None))

    def broadcast(self, tensor, src):
        place, count = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel() * tensor.element_size())
        self._settle(self.library.ncclBroadcast(place, place, count, self.BYTES, src, self.comm, None))

    def _settle(self, status):
        assert status == 0, status
        state, deadline = ctypes.c_int(self.IN_PROGRESS), time.monotonic() + 60
        while state.value == self.IN_PROGRESS:
            assert time.monotonic() < deadline
            assert self.library.ncclCommGetAsyncError(self.comm, ctypes.byref(state)) == 0
            time.sleep(0.0005)
        assert state.value == 0, state.value


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
