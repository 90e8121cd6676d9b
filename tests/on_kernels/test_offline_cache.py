"""The offline compile leaves in Triton's cache what launches look for there.

A driver that launches nothing stands for the GPU, so that Triton's own launch looks up and loads the compiled kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import source_env

SERVE = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Utils:
    def load_binary(self, *rest): return 1, 1, 100, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 232448, "multiprocessor_count": 132}

class Launcher:
    def __init__(self, source, metadata): pass
    def __call__(self, *rest): launched.append(1)

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_device_capability(self, device=0): return 9, 0
    def get_active_torch_device(self): return torch.device("cpu")

launched = []
driver.set_active(Driver())
import fastbert
from fastbert.ops import dispatch, packing
from fastbert_kernels import events, launch
from fastbert_kernels.pooling import pool_forward

dispatch.interpreting = lambda: True
launch.arch = lambda device: 90
launch.n_multiprocessors = lambda device: 132
sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 1}
config, lengths = fastbert.BertConfig(**sizes), [20, 7]
ids, cu_seqlens = torch.ones(27, dtype=torch.int64), torch.tensor([0, 20, 27], dtype=torch.int32)
with torch.inference_mode():
    for settings in ({}, {"batch_invariant": True}, {"precision": "fp8"}):
        settings = {"backend": "triton", "strict": True, **settings}
        model = fastbert.BertModel(config, add_pooling_layer=False, **settings).to(torch.bfloat16).eval()
        model.cuda_graphs = False
        states = model.forward_packed(ids, cu_seqlens)
    batch = packing.from_lengths(lengths, torch.device("cpu"))
    pool_forward(states, batch.cu_seqlens, "mean", True, torch.float32)
print(json.dumps({**events.counts(), "launches": len(launched)}))
"""


def run(cache: Path, *arguments: str) -> str:
    environment = source_env(TRITON_CACHE_DIR=str(cache), OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    line = [sys.executable, *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    """Catches a source, signature, alignment, constant or option of a launch that is not the offline compile's."""
    chosen = "--arch", "90", "--model", "minilm", "--dtype", "bf16", "fp8", "--jobs", "2"
    run(tmp_path, "-m", "fastbert_kernels.offline", *chosen)
    served = json.loads(run(tmp_path, "-c", SERVE).splitlines()[-1])
    assert served["compilations"] == 0 and served["loads"] >= 12 and served["launches"] > served["loads"], served
