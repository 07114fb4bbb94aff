"""Tensors of a trainer's GPU into real vLLM workers on it, with stand-ins for NVIDIA's driver and NCCL whose GPU memory is the host's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from fleet import LOGS, ROOT


CASES = ("device", "none", "prime-rl")


def compiled(source: str, library: Path) -> Path:
    command = ["cc", "-shared", "-fPIC", "-O2", "-pthread", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([*command, str(ROOT / "tests" / "support" / source)], check=True)
    return library


def test_weights_go_from_gpu_to_gpu_and_make_the_same_answers_each_time(tmp_path: Path) -> None:
    """Staged on the device, streamed into the model, and out of the NCCL group of a trainer that speaks as PRIME-RL's: each set of
    weights answers as it did before, under its version."""
    library, nccl = compiled("fake_cuda.c", tmp_path / "libcuda.so.1"), compiled("fake_nccl.c", tmp_path / "libnccl.so.2")
    # What an earlier run wrote is not what this one says.
    shutil.rmtree(LOGS / "weights-gpu", ignore_errors=True)
    found = tmp_path / "found.json"
    program = [sys.executable, str(ROOT / "tools" / "vllm_weights_gpu.py"), "--shape", "tiny", "--stand-in", str(library)]
    program += ["--stand-in-nccl", str(nccl), "--cases", ",".join(CASES), "--repeat", "2", "--bucket-mib", "2", "--json", str(found), "--logs", str(LOGS / "weights-gpu")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(found.read_text())["rows"]
    assert [(row["case"], row["right"]) for row in rows] == [(case, True) for case in CASES], done.stdout
    # It is learnt to be copied, so that the pause is short.
    workers = [f"{case}-{role}.log" for case in CASES for role in ("prefill", "decode")]
    logs = [(LOGS / "weights-gpu" / worker).read_text(errors="replace") for worker in workers]
    assert all(log.count("later updates of this model are plain copies") == 1 for log in logs)
