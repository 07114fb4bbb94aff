"""The trainer of vllm_weights_gpu.py: a process that holds tensors on one GPU and does what it is told line by line, in JSON.

    python tools/vllm_weights_trainer.py SHAPE          a SHAPE of `-` holds none, and only takes part in broadcasts
"""

import ctypes
import json
import os
import pickle
import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

from vllm_processes import post
from vllm_weights_model import checkpoint_shapes
from vllm_weights_stand_in import Communicator, stand_in


class Trainer:
    def __init__(self, shape):
        import torch

        self.torch, self.library = torch, stand_in()
        self.dtype = torch.float32 if self.library else torch.bfloat16
        self.tensors = {name: self._empty(size) for name, size in checkpoint_shapes(shape).items()} if shape else {}
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        if self.library:
            from pdlink.trainer import publisher

            described = publisher.described
            # What the stand-in gave is on GPU 0.
            publisher.described = lambda name, tensor: (*described(name, tensor)[:3], (*described(name, tensor)[3][:3], 0))
            publisher.settle = lambda tensors: None

    def _empty(self, size):
        torch = self.torch
        if not self.library:
            return torch.empty(size, dtype=self.dtype, device="cuda")
        count, place, context = 4, ctypes.c_uint64(), ctypes.c_void_p()
        for one in size:
            count *= one
        self.library.cuCtxPushCurrent_v2(ctypes.c_void_p(1))
        status = self.library.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(count))
        self.library.cuCtxPopCurrent_v2(ctypes.byref(context))
        assert status == 0, f"the stand-in has no memory: {status}"
        return torch.frombuffer((ctypes.c_uint8 * count).from_address(place.value), dtype=torch.uint8).view(self.dtype).view(size)

    def _settle(self):
        if not self.library:
            self.torch.cuda.synchronize()

    def make(self, seed):
        """New values. Norms are near one, so that the answers hang on the whole prompt."""
        generator = self.torch.Generator(device="cpu" if self.library else "cuda").manual_seed(seed)
        for name, tensor in self.tensors.items():
            tensor.normal_(0, 0.02, generator=generator)
            if name.endswith("norm.weight"):
                tensor.add_(1)
        self._settle()
        return {"bytes": self.bytes}

    def copy(self, repeat):
        """Bytes a second of a plain copy on this GPU, of as many bytes."""
        torch, size = self.torch, min(self.bytes, 2 << 30)
        source = torch.zeros(size, dtype=torch.uint8, device="cpu" if self.library else "cuda")
        target, rates = torch.empty_like(source), []
        for _ in range(repeat + 1):
            self._settle()
            started, done = time.perf_counter(), 0
            while done < self.bytes:
                target.copy_(source)
                done += size
            self._settle()
            rates.append(done / (time.perf_counter() - started))
        del source, target
        if not self.library:
            torch.cuda.empty_cache()
        return {"rate": statistics.median(rates[1:])}

    def broadcast(self, rank, world, port, bucket_bytes, total_bytes, repeat):
        """Bytes a second of `ncclBroadcast` alone, in such buckets."""
        torch = self.torch
        import torch.distributed as dist

        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        buckets, rates = [torch.zeros(bucket_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)], []
        for _ in range(repeat + 1):
            dist.barrier()
            torch.cuda.synchronize()
            started, done = time.perf_counter(), 0
            while done < total_bytes:
                dist.broadcast(buckets[done // bucket_bytes % 2], 0)
                done += bucket_bytes
            torch.cuda.synchronize()
            rates.append(done / (time.perf_counter() - started))
        dist.destroy_process_group()
        del buckets
        torch.cuda.empty_cache()
        return {"rate": statistics.median(rates[1:])}

    def publish(self, url, secret, weights):
        from pdlink.trainer import WeightPublisher

        if not hasattr(self, "publisher"):
            self.publisher = WeightPublisher(url, secret_file=secret, weights=weights)
        started = time.perf_counter()
        done = self.publisher.publish(self.tensors)
        return {"seconds": time.perf_counter() - started, "staging": done.staging_s, "pause": done.paused_s,
                "version": done.version, "behind": list(done.behind)}

    def forget_publisher(self):
        if hasattr(self, "publisher"):
            del self.publisher
        return {}

    def join_vllm(self, urls, port):
        """vLLM's own engine: this process is rank 0."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        world = 1 + len(urls)
        told = {"master_address": "127.0.0.1", "master_port": port, "world_size": world}
        with ThreadPoolExecutor(len(urls)) as pool:
            joined = [pool.submit(post, url + "/init_weight_transfer_engine", {"init_info": {**told, "rank_offset": at}})
                      for at, url in enumerate(urls, 1)]
            self.group = NCCLWeightTransferEngine.trainer_init(told)
            for one in joined:
                one.result()
        return {}

    def send_vllm(self, urls):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

        info = {"names": list(self.tensors), "shapes": [list(tensor.shape) for tensor in self.tensors.values()],
                "dtype_names": [str(self.dtype).removeprefix("torch.")] * len(self.tensors), "packed": True}

        def send(pool):
            taking = [pool.submit(post, url + "/update_weights", {"update_info": info}) for url in urls]
            args = NCCLTrainerSendWeightsArgs(group=self.group, packed=True)
            NCCLWeightTransferEngine.trainer_send_weights(iter(self.tensors.items()), args)
            self.torch.cuda.synchronize()
            for one in taking:
                one.result()

        return self._by_vllm(urls, send)

    def join_vllm_ipc(self, urls):
        """vLLM's engine for one GPU wants a word too, though there is nothing to say."""
        for url in urls:
            post(url + "/init_weight_transfer_engine", {"init_info": {}})
        return {}

    def send_vllm_ipc(self, urls):
        """Not packed: handles of all tensors in one call to each worker, which is what costs least."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

        def send(pool):
            def to(url):
                args = IPCTrainerSendWeightsArgs(send_mode="http", url=url)
                IPCWeightTransferEngine.trainer_send_weights(iter(self.tensors.items()), args)

            list(pool.map(to, urls))

        return self._by_vllm(urls, send)

    def join_prime_rl(self, url, ranks, port):
        """As PRIME-RL's trainer and orchestrator do it: this process is rank 0, and keeps the store."""
        from vllm.distributed.utils import StatelessProcessGroup

        told = {"host": "127.0.0.1", "port": port, "server_rank": 0, "num_inference_server": 1, "timeout": 120}
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(post, url + "/init_broadcaster", told)
            group = StatelessProcessGroup.create("127.0.0.1", port, 0, 1 + ranks, store_timeout=120)
            if self.library:
                self.communicator = Communicator(group)
            else:
                from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

                self.communicator = PyNcclCommunicator(group, device=self.torch.cuda.current_device())
            joined.result()
        self.step = 0
        return {}

    def send_prime_rl(self, url):
        """One dictionary of what is outside the layers, and one for each layer."""
        self.step += 1
        layers = {}
        for name, tensor in self.tensors.items():
            layers.setdefault(name.split(".")[2] if ".layers." in name else "", {})[name] = tensor
        started = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(post, url + "/update_weights", {"weight_dir": f"/run/broadcasts/step_{self.step}"})
            self._cast(self.torch.tensor([len(layers)]))
            for tensors in sorted(layers.items()):
                self._cast_dictionary(tensors[1])
            self._settle()
            _, done = taking.result()
        return {"seconds": time.perf_counter() - started, "staging": done["staging_s"], "pause": done["paused_s"],
                "version": done["version"], "behind": done["behind"]}

    def _cast_dictionary(self, tensors):
        by_dtype = {}
        for name, tensor in tensors.items():
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        described = {dtype: [(name, one.shape, one.numel()) for name, one in named] for dtype, named in by_dtype.items()}
        pickled = bytearray(pickle.dumps(described))
        self._cast(self.torch.tensor([len(pickled)]))
        self._cast(self.torch.frombuffer(pickled, dtype=self.torch.uint8))
        for named in by_dtype.values():
            self._cast(self.torch.cat([one.flatten() for _, one in named]))

    def _cast(self, tensor):
        self.communicator.broadcast(tensor if self.library else tensor.cuda(), src=0)

    def _by_vllm(self, urls, send):
        """What vLLM wants round an update, at all workers at once."""
        started = time.perf_counter()
        with ThreadPoolExecutor(len(urls)) as pool:
            list(pool.map(lambda url: post(url + "/pause?mode=keep"), urls))
            list(pool.map(lambda url: post(url + "/start_weight_update", {"is_checkpoint_format": True}), urls))
            send(pool)
            list(pool.map(lambda url: post(url + "/finish_weight_update"), urls))
            list(pool.map(lambda url: post(url + "/reset_prefix_cache"), urls))
            list(pool.map(lambda url: post(url + "/resume"), urls))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "staging": 0.0, "pause": seconds, "version": None, "behind": []}


def main(shape):
    # Libraries print where they like: only this is read by who started us.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainer = Trainer(shape if shape != "-" else None)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(trainer, order.pop("do"))(**order)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=said, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
