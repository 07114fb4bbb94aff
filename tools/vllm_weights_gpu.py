#!/usr/bin/env python3
"""Publish a trainer's weights to real vLLM workers on a GPU machine while they serve, and say what it costs.

    python tools/vllm_weights_gpu.py [--shape qwen3-8b] [--gpus 0 | 0,1 | 0,1,2] [--cases device,host,none] [--repeat 4]
        [--bucket-mib 256] [--graphs] [--serve-arg=...] [--json FILE] [--logs DIR]

Needs vLLM and our wheel in the Python that runs it; nothing else. A trainer process holds tensors of the model's checkpoint names
and shapes (random, 16.4 GB for qwen3-8b) on the first GPU. A prefill and a decode worker serve behind `pdlink proxy`, decode on the
last GPU, prefill on the second of three, else on the first. The trainer publishes two sets of weights in turn; each time greedy
answers through both workers must be those that the same weights gave before, under the version that was published.

Cases: `device`, `host` and `none` are `[weights] staging` with the bytes pulled by `cuda-ipc`; `nccl` is one `ncclBroadcast` a bucket to
the workers on other GPUs than the trainer's (the rest pull), staged on the device; `prime-rl` is the NCCL stream that PRIME-RL's own
trainer sends, which wants a GPU for each rank, so three; `vllm` is vLLM's own NCCL engine, packed, into the
workers on other GPUs, without a proxy, and `vllm-ipc` its engine for one GPU, into those on the trainer's (it imports Ray). What needs a
second GPU is said and left out on one. Beside them stand what a plain copy on
the trainer's GPU does for the same bytes, and on several GPUs `ncclBroadcast` alone, in buckets of the same size.

It ends with one table. Exit status 1: an answer was wrong, or something did not start. `--stand-in LIB` runs it without a GPU, on a
stand-in for the driver (tests/support/fake_cuda.c), with `--shape tiny`: then only that it works means anything; `--stand-in-nccl LIB`
is one for NCCL (fake_nccl.c), for `prime-rl`.
"""

import argparse
import ctypes
import glob
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from vllm_processes import Process, free_ports, post
from vllm_weights_model import SHAPES, write_model
from vllm_weights_stand_in import STAND_IN, STAND_IN_NCCL

ANSWER_TOKENS = 24
CACHE_BYTES = 4 << 30
# Of a GPU, as vLLM asks for it before it starts: trainer, workers and what is staged share one.
GPU_SHARE = 0.3
CASES = {
    "device": {"staging": "device", "paths": ["cuda-ipc"]},
    "host": {"staging": "host", "paths": ["cuda-ipc"]},
    "none": {"staging": "none", "paths": ["cuda-ipc"]},
    "nccl": {"staging": "device", "paths": ["nccl", "cuda-ipc"]},
    "prime-rl": {"staging": "device", "paths": ["cuda-ipc"]},
    "vllm": None,
    "vllm-ipc": None,
}
NEEDS_GPUS = {"nccl": 2, "vllm": 2, "prime-rl": 3}
# What vLLM calls its own engines.
VLLM_BACKENDS = {"vllm": "nccl", "vllm-ipc": "ipc"}


class TrainerProcess(Process):
    def __init__(self, args, gpu, shape):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vllm_weights_trainer.py")
        command = [sys.executable, program, shape]
        super().__init__(command, env, os.path.join(args.logs, f"trainer-{gpu}.log"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what, **told):
        self.tell(what, **told)
        return self.answer()

    def tell(self, what, **told):
        self.process.stdin.write(json.dumps({"do": what, **told}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise RuntimeError(f"the trainer: {answer['error']}\n{self.tail()}")
        return answer


class Worker(Process):
    def __init__(self, args, case, role, gpu, model, secret):
        self.port, self.kv_port = free_ports(2)
        self.url, self.kv_address, self.gpu = f"http://127.0.0.1:{self.port}", f"127.0.0.1:{self.kv_port}", gpu
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_SERVER_DEV_MODE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
               "PDLINK_SECRET_FILE": secret}
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(self.port), "--host",
                   "127.0.0.1", "--served-model-name", "m", "--load-format", "dummy", "--max-model-len", "2048",
                   "--kv-cache-memory-bytes", str(CACHE_BYTES), "--gpu-memory-utilization", str(GPU_SHARE)]
        if not args.graphs:
            command.append("--enforce-eager")
        if case in VLLM_BACKENDS:
            command += ["--weight-transfer-config", json.dumps({"backend": VLLM_BACKENDS[case]})]
            # Its handles are pickled.
            env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        else:
            weights = {**CASES[case], "bucket_bytes": args.bucket_mib << 20}
            told = {"http": self.url, "weights": weights}
            if args.stand_in_nccl:
                told["kv"] = {"nccl": {"library": os.path.abspath(args.stand_in_nccl)}}
            paths = ["cuda-ipc"]
            extension = "pdlink.vllm.weights.WeightsExtension"
            if args.stand_in:
                told["gpus"], paths, extension = [0], ["shm", "tcp"], "vllm_weights_stand_in.StandInExtension"
                here = os.path.dirname(os.path.abspath(__file__))
                env |= {"PYTHONPATH": here, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
                        "TORCHDYNAMO_DISABLE": "1"}
                command[command.index("--kv-cache-memory-bytes") + 1] = "64M"
                command += ["--dtype", "float32", "--block-size", "32"]
            env["PDLINK_WEIGHTS"] = json.dumps(told)
            extra = {"kv_host": "127.0.0.1", "kv_ports": [self.kv_port], "kv": {"paths": paths}}
            transfer = {"kv_connector": "PdlinkConnector", "kv_connector_module_path": "pdlink.vllm",
                        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
                        "kv_connector_extra_config": extra}
            command += ["--worker-extension-cls", extension, "--kv-transfer-config", json.dumps(transfer)]
        super().__init__(command + args.serve_arg, env, os.path.join(args.logs, f"{case}-{role}.log"))


class Proxy(Process):
    def __init__(self, args, case, prefill, decode, secret):
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [program(), "proxy", "--port", str(port), "--prefill", prefill.url, "--decode", decode.url,
                   "--prefill-kv-addrs", prefill.kv_address, "--decode-kv-addrs", decode.kv_address,
                   "--connector-impl", "native"]
        super().__init__(command, {**os.environ, "PDLINK_SECRET_FILE": secret}, os.path.join(args.logs, f"{case}-proxy.log"))


def program():
    """The `pdlink` command, wherever the wheel was put."""
    import pdlink

    site = os.path.dirname(os.path.dirname(os.path.abspath(pdlink.__file__)))
    beside = [os.environ.get("PDLINK_BIN"), os.path.join(os.path.dirname(sys.executable), "pdlink"),
              os.path.join(site, "bin", "pdlink"), *glob.glob(os.path.join(site, "pdlink-*.data", "scripts", "pdlink")),
              shutil.which("pdlink")]
    for path in beside:
        if path and os.path.isfile(path):
            if not os.access(path, os.X_OK):
                os.chmod(path, 0o755)
            return path
    sys.exit("there is no `pdlink` command beside this Python or our wheel; name it in PDLINK_BIN")


class Memory:
    """Used memory of GPUs, watched: the most there was above what there was at first."""

    def __init__(self, gpus):
        self.gpus, self.peaks, self.stop = sorted(set(gpus)), {}, threading.Event()
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
            assert self.library.nvmlInit_v2() == 0
        except (OSError, AssertionError):
            self.library = None

    def used(self, gpu):
        class Info(ctypes.Structure):
            _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

        handle, info = ctypes.c_void_p(), Info()
        if self.library is None or self.library.nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(handle)) != 0:
            return 0
        self.library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info))
        return info.used

    def settle(self):
        """Waits until what the last update used is given back, and nothing changes any more."""
        deadline, since, before = time.monotonic() + 60, time.monotonic(), None
        while self.library is not None and time.monotonic() < deadline and time.monotonic() - since < 1:
            now = [self.used(gpu) for gpu in self.gpus]
            if now != before:
                before, since = now, time.monotonic()
            time.sleep(0.05)

    def __enter__(self):
        self.settle()
        first = {gpu: self.used(gpu) for gpu in self.gpus}
        self.peaks = dict.fromkeys(self.gpus, 0)

        def watch():
            while not self.stop.wait(0.003):
                for gpu in self.gpus:
                    self.peaks[gpu] = max(self.peaks[gpu], self.used(gpu) - first[gpu])

        self.stop.clear()
        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


PROMPTS = [[(7 * at + 13 * number) % 250 for at in range(40 + 30 * number)] for number in range(3)]


def answers(urls):
    """Greedy token ids of every prompt, the versions that made them, and how long each took."""
    said, versions, took = [], set(), []
    for url in urls:
        for prompt in PROMPTS:
            asked = time.perf_counter()
            body = {"model": "m", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True,
                    "return_token_ids": True}
            headers, answer = post(url + "/v1/completions", body)
            said.append(answer["choices"][0]["token_ids"])
            took.append(time.perf_counter() - asked)
            versions.add({key.lower(): value for key, value in headers.items()}.get("x-pdlink-weight-version"))
    return said, versions, took


def run_case(case, args, trainer, secret):
    gpus = args.gpus
    placed = {"prefill": gpus[1] if len(gpus) > 2 else gpus[0], "decode": gpus[-1]}
    if case in VLLM_BACKENDS:
        placed = {role: gpu for role, gpu in placed.items() if (gpu == gpus[0]) == (case == "vllm-ipc")}
    running = []
    try:
        started = time.monotonic()
        for role, gpu in placed.items():
            running.append(Worker(args, case, role, gpu, args.model, secret))
        workers = list(running)
        for worker in workers:
            worker.wait_until_healthy(worker.url)
        urls = [worker.url for worker in workers]
        if case == "vllm":
            trainer.ask("join_vllm", urls=urls, port=free_ports(1)[0])
            send = {"what": "send_vllm", "urls": urls}
        elif case == "vllm-ipc":
            trainer.ask("join_vllm_ipc", urls=urls)
            send = {"what": "send_vllm_ipc", "urls": urls}
        else:
            running.append(Proxy(args, case, *workers, secret))
            running[-1].wait_until_healthy(running[-1].url)
            urls = [running[-1].url]
            weights = {"paths": CASES[case]["paths"], "bucket_bytes": args.bucket_mib << 20}
            send = {"what": "publish", "url": urls[0], "secret": secret, "weights": weights}
            if case == "prime-rl":
                trainer.ask("join_prime_rl", url=urls[0], ranks=len(workers), port=free_ports(1)[0])
                send = {"what": "send_prime_rl", "url": urls[0]}
        print(f"{case}: up in {time.monotonic() - started:.0f} s", flush=True)
        return measure(case, args, trainer, urls, send)
    finally:
        for one in reversed(running):
            one.end()
        trainer.ask("forget_publisher")


def measure(case, args, trainer, urls, send):
    known, right, times, first, peaks = {}, True, [], None, {}
    for turn in range(args.repeat + 1):
        seed = 1 + turn % 2
        size = trainer.ask("make", seed=seed)["bytes"]
        with Memory(args.gpus) as memory:
            done = trainer.ask(**send)
        said, versions, took = answers(urls)
        # The first one also shows what the update holds up once it is over.
        done |= {"answer": took[0], "usual": statistics.median(took[1:])}
        as_before = known.setdefault(seed, said) == said
        is_right = as_before and not done["behind"] and (case in VLLM_BACKENDS or versions == {str(done["version"])})
        if not is_right:
            print(f"{case}: turn {turn} is wrong: the same answers as before {as_before}, versions {versions}, {done}", flush=True)
        right = right and is_right
        print(f"{case}: turn {turn}: {done['seconds']:.3f} s, staging {done['staging']:.3f}, pause {done['pause']:.3f}; the next answer "
              f"{done['answer']:.3f} s, then {done['usual']:.3f}", flush=True)
        if turn == 0:
            first = done
        else:
            times.append(done)
            peaks = {gpu: max(peaks.get(gpu, 0), memory.peaks[gpu]) for gpu in memory.peaks}
    right = right and len(known) == 2 and known[1] != known[2]
    middle = {key: statistics.median(one[key] for one in times) for key in ("seconds", "staging", "pause", "answer", "usual")}
    return {"case": case, "bytes": size, **middle, "first_seconds": first["seconds"], "rate": size / middle["seconds"],
            "staging_rate": size / middle["staging"] if middle["staging"] else None,
            "pause_share": middle["pause"] / middle["seconds"], "extra_bytes": peaks, "right": right}


def ceilings(args, trainer, total_bytes):
    found = {"copy": trainer.ask("copy", repeat=args.repeat)["rate"]}
    if len(args.gpus) > 1 and not args.stand_in:
        others = [TrainerProcess(args, gpu, "-") for gpu in args.gpus[1:]]
        try:
            told = {"world": len(args.gpus), "port": free_ports(1)[0], "bucket_bytes": args.bucket_mib << 20,
                    "total_bytes": total_bytes, "repeat": args.repeat}
            for rank, other in enumerate(others, 1):
                other.tell("broadcast", rank=rank, **told)
            found["broadcast"] = trainer.ask("broadcast", rank=0, **told)["rate"]
        finally:
            for other in others:
                other.end()
    return found


def table(args, limits, rows):
    print(f"\n{args.shape}, trainer on GPU {args.gpus[0]}, workers on {', '.join(args.gpus)}; medians of {args.repeat}; "
          f"buckets of {args.bucket_mib} MiB; logs in {args.logs}")
    print("ceilings: " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in limits.items()))
    heads = ("case", "GB", "update s", "first s", "GB/s", "% copy", "% bcast", "staging s", "GB/s", "pause ms", "share %", "answer s", "usual",
             "extra MiB", "right")
    print("{:<9}{:>6}{:>10}{:>9}{:>8}{:>8}{:>9}{:>11}{:>8}{:>10}{:>9}{:>10}{:>7}  {:<18}{}".format(*heads))
    for row in rows:
        if "why" in row:
            print(f"{row['case']:<9}{row['why']}")
            continue
        of = {name: f"{100 * row['rate'] / rate:.1f}" for name, rate in limits.items()}
        staging = f"{row['staging_rate'] / 1e9:.1f}" if row["staging_rate"] else "-"
        extra = " ".join(f"{gpu}:{size >> 20}" for gpu, size in row["extra_bytes"].items())
        print(f"{row['case']:<9}{row['bytes'] / 1e9:>6.1f}{row['seconds']:>10.3f}{row['first_seconds']:>9.3f}{row['rate'] / 1e9:>8.1f}"
              f"{of.get('copy', '-'):>8}{of.get('broadcast', '-'):>9}{row['staging']:>11.3f}{staging:>8}{row['pause'] * 1e3:>10.1f}"
              f"{row['pause_share'] * 100:>9.1f}{row['answer']:>10.3f}{row['usual']:>7.3f}  {extra:<18}{'yes' if row['right'] else 'NO'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["0"])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=None)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs and torch.compile, as vLLM serves by default")
    parser.add_argument("--serve-arg", action="append", default=[])
    parser.add_argument("--json", default=None)
    parser.add_argument("--logs", default=None)
    parser.add_argument("--stand-in", default=None)
    parser.add_argument("--stand-in-nccl", default=None)
    args = parser.parse_args()
    # Whoever ends this ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args.cases = args.cases or (["device", "host", "none", "vllm-ipc"] if len(args.gpus) == 1 else ["nccl", "device", "vllm"])
    args.logs = os.path.abspath(args.logs or tempfile.mkdtemp(prefix="pdlink-weights-"))
    os.makedirs(args.logs, exist_ok=True)
    if args.stand_in:
        os.environ[STAND_IN] = os.path.abspath(args.stand_in)
    if args.stand_in_nccl:
        os.environ[STAND_IN_NCCL] = os.path.abspath(args.stand_in_nccl)
    with tempfile.TemporaryDirectory(prefix="pdlink-weights-") as work:
        args.model = write_model(os.path.join(work, "model"), args.shape)
        secret = os.path.join(work, "secret")
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        trainer = TrainerProcess(args, args.gpus[0], args.shape)
        rows = []
        try:
            total = trainer.ask("make", seed=1)["bytes"]
            limits = ceilings(args, trainer, total)
            for case in args.cases:
                if len(set(args.gpus)) < (0 if args.stand_in else NEEDS_GPUS.get(case, 1)):
                    rows.append({"case": case, "why": "NCCL takes no two ranks on one GPU", "right": True})
                    continue
                try:
                    rows.append(run_case(case, args, trainer, secret))
                except (RuntimeError, OSError) as error:
                    print(error, flush=True)
                    rows.append({"case": case, "why": str(error).splitlines()[0], "right": False})
        finally:
            trainer.end()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"shape": args.shape, "gpus": args.gpus, "bucket_mib": args.bucket_mib, "ceilings": limits, "rows": rows}, file, indent=1)
    table(args, limits, rows)
    sys.exit(0 if rows and all(row["right"] for row in rows) else 1)


if __name__ == "__main__":
    main()
