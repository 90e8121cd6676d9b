"""Serving does not stall: warm-up compiles everything, compilations are counted, and the cache on disk is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.engine import buckets, events
from graph_cases import StandIn, cheap, encode, make, packed, random_lengths
from helpers import source_env
from process_cases import run

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


# Warm-up


def test_after_warmup_nothing_happens(stand_in: StandIn, device: torch.device) -> None:
    """Catches a capture, a new buffer or a dropped graph in any of 1,000 batches of random lengths after a warm-up."""
    model = make(device)
    cheap(model)
    report = fastbert.warmup(model, max_tokens=2500)
    assert report.buckets == tuple(b for b in buckets.BUCKETS if b <= buckets.bucket_of(2500)) + (4096,)
    assert report.events.captures == stand_in.captures == len(model.engine.graphs) and not report.notes
    before, replays = fastbert.compile_events(), stand_in.replays
    held, buffers = len(model.engine.graphs), {key: id(value) for key, value in model.engine.graphs._buffers.items()}
    for seed in range(1000):
        lengths = random_lengths(seed, 3000 if seed % 50 else 20000)
        out = encode(model, lengths, seed)
        if seed % 10 == 0:
            assert torch.equal(out[:, 0].long(), packed(lengths, device, seed)[0])
    assert (fastbert.compile_events() - before).total == 0
    assert held == len(model.engine.graphs) and buffers == {
        key: id(value) for key, value in model.engine.graphs._buffers.items()
    }
    assert stand_in.replays - replays > 800


def test_without_warmup_they_are_captured_at_first_use(stand_in: StandIn, device: torch.device) -> None:
    """Catches a counter that misses captures."""
    model, before = make(device), fastbert.compile_events()
    encode(model, [5])
    assert fastbert.compile_events() - before == events.CompileEvents(captures=1)
    encode(model, [7])
    assert (fastbert.compile_events() - before).total == 1


def test_warmup_again_and_after_a_change(stand_in: StandIn, device: torch.device) -> None:
    """Catches a second warm-up that captures what is there, and a warmed model without graphs once weights changed."""
    model = make(device)
    cheap(model)
    first = fastbert.warmup(model, max_tokens=200)
    assert fastbert.warmup(model, max_tokens=200).events.captures == 0
    encode(model, [199] * 2)
    assert model.engine.graphs.captured() == first.buckets, "a capture after the warm-up"
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2.0)
    encode(model, [20])
    assert model.engine.graphs.captured() == (32,)


@pytest.mark.parametrize("kind", [None, *(name for name in fastbert.__all__ if name.startswith("BertFor"))])
def test_warmup_of_every_model(kind: str | None, stand_in: StandIn, device: torch.device) -> None:
    """Catches a head whose kernels are left for the first batch."""
    model = make(device, kind=getattr(fastbert, kind or "BertModel"))
    report = fastbert.warmup(model, max_tokens=33)
    assert report.model == (kind or "BertModel") and report.buckets == (32, 64)
    assert "2 CUDA graphs, for batches of 32 to 64 tokens" in str(report)


def test_warmup_of_a_sentence_encoder(stand_in: StandIn, device: torch.device, minilm: Path) -> None:
    """Catches a warm-up for another token budget than the encoder's, or none of its pooling."""
    encoder = fastbert.SentenceEncoder.from_pretrained(
        minilm, device=device, backend="triton", num_hidden_layers=1, token_budget=40
    )
    calls = []
    encode_texts = encoder.encode
    encoder.encode = lambda *args, **options: calls.append(options) or encode_texts(*args, **options)
    assert fastbert.warmup(encoder).buckets == (32, 64)
    assert [call["normalize_embeddings"] for call in calls] == [False, True]


def test_warmup_on_a_cpu() -> None:
    """Catches a warm-up that fails where there is nothing to capture, or does not say so."""
    model = fastbert.BertModel(fastbert.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)).eval()
    report = fastbert.warmup(model)
    assert report.buckets == () and report.events.total == 0 and report.seconds > 0
    assert str(report).splitlines()[1] == "No CUDA graphs: there are no CUDA graphs on cpu."


def test_warmup_says_why_there_are_no_graphs(stand_in: StandIn, device: torch.device) -> None:
    """Catches a warm-up of a model in training, or with graphs off, that looks like any other."""
    model = make(device)
    model.cuda_graphs = False
    assert "cuda_graphs is False" in str(fastbert.warmup(model))
    model.cuda_graphs = True
    model.policy = fastbert.ops.Policy("torch")
    assert "the backend of attention is 'torch'" in str(fastbert.warmup(model))
    assert "training mode" in str(fastbert.warmup(model.train()))
    assert stand_in.captures == 0


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, True, "all"])
def test_bad_max_tokens(max_tokens: Any) -> None:
    """Catches a bad argument that surfaces as an error about something else."""
    with pytest.raises(ValueError, match=f"max_tokens: got {max_tokens!r}, expected a positive whole number"):
        fastbert.warmup(make(torch.device("cpu")), max_tokens=max_tokens)


def test_not_a_model() -> None:
    """Catches an AttributeError where the argument is the mistake."""
    with pytest.raises(TypeError, match="model: expected a BertModel"):
        fastbert.warmup(torch.nn.Linear(2, 2))


# The counter


def test_the_counter_needs_no_compiler() -> None:
    """Catches an import of Triton, a second of it, for a counter that is zero."""
    code = (
        "import json, sys, fastbert\n"
        "total = fastbert.compile_events().total\n"
        "print(json.dumps([total, 'triton' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=source_env(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, False]


def test_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches other people's kernels in the counts, or their listener put out of work."""
    import triton

    from fastbert_kernels import events

    class Source:
        def __init__(self, module: str) -> None:
            self.fn = type("Kernel", (), {"fn": type("Function", (), {"__module__": module})})

    heard: list[Any] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **news: heard.append(news))
    events.listen()
    events.listen()
    before = events.counts()
    listener: Any = triton.knobs.compilation.listener
    news = {"metadata": {}, "metadata_group": {}, "times": None}
    listener(src=Source("fastbert_kernels.gelu"), cache_hit=False, **news)
    listener(src=Source("fastbert_kernels.gelu"), cache_hit=True, **news)
    listener(src=Source("somebody.else"), cache_hit=False, **news)
    listener(src=object(), cache_hit=False, **news)
    events.count("tunings")
    after = events.counts()
    assert {name: after[name] - before[name] for name in after} == {"compilations": 1, "loads": 1, "tunings": 1}
    assert len(heard) == 4 and heard[0]["metadata"] == {}


COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from fastbert_kernels import events, launch, layer_norm, offline
x, w = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
with launch.recording(90) as launches:
    layer_norm.bias_residual_layer_norm_forward(x, w, x, w, w, 1e-12)
source, options = offline.specialize(launches[0], GPUTarget("cuda", 90, 32))
triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(json.dumps(events.counts()))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Catches something of ours in the key of Triton's cache that differs between processes."""
    assert run(COMPILE, cache=tmp_path) == {"compilations": 1, "loads": 0, "tunings": 0}
    # Neither the seed of str.__hash__ nor the folder that a process runs in may matter.
    assert run(COMPILE, cache=tmp_path, PYTHONHASHSEED="7") == {"compilations": 0, "loads": 1, "tunings": 0}


KEYS = """
import json, sys, torch, fastbert
from fastbert import ops
from fastbert.engine import graphs
from fastbert.ops import dispatch
from fastbert_kernels import launch, offline
from triton.backends.compiler import GPUTarget
from helpers import cu_seqlens_of

dispatch.interpreting = lambda: True  # kernels on the CPU, which `recording` lists instead of running them
target, dtype = GPUTarget("cuda", 90, 32), torch.bfloat16
config = fastbert.BertConfig(
    vocab_size=101, hidden_size=96, num_hidden_layers=1, num_attention_heads=3, intermediate_size=128
)
settings = {"backend": "triton", "strict": True, "batch_invariant": "batch_invariant" in sys.argv}
model = fastbert.BertForMaskedLM(config, **settings).eval().to(dtype)


def keys(lengths, offset=0, ids_dtype=torch.int64):
    n = sum(lengths)
    memory = torch.zeros(n + offset, dtype=ids_dtype)  # ids that start anywhere in memory
    cu_seqlens = torch.cat([torch.zeros(offset, dtype=torch.int32), cu_seqlens_of(lengths)])[offset:]
    all_keys = set()
    with launch.recording(90) as launches, torch.no_grad():
        hidden = model.bert.forward_packed(memory[offset:], cu_seqlens, memory[offset:], memory[offset:])
        ops.pool(hidden, cu_seqlens, "mean", normalize=True, out_dtype=torch.float32, policy=model.policy)
        model.cls.predictions(hidden, model.policy)
        model(torch.zeros(len(lengths), max(lengths), dtype=ids_dtype))
    for recorded in launches:
        source, options = offline.specialize(recorded, target)
        all_keys.add((recorded.kernel.fn.__name__, source.hash(), str(options)))
    return all_keys


first = keys([8, 8]) | keys([127, 128, 129])  # attention has a tile for few tokens or short texts, and another
names = {name for name, *_ in first}
later = set()
for lengths in ([1], [16], [17, 3], [1] * 16, [5] * 16, [7] * 33, [127, 128, 129], [33], [48], [512]):
    for offset in (0, 1, 3):
        for ids_dtype in (torch.int64, torch.int32):
            later |= keys(lengths, offset, ids_dtype)
print(json.dumps([sorted(names), sorted(name for name, *_ in later - first)]))
"""


@pytest.mark.parametrize("mode", ["default", "batch_invariant"])
def test_nothing_of_a_batch_makes_a_kernel(mode: str, tmp_path: Path) -> None:
    """Catches a specialisation on a length, a count, an alignment or a dtype that changes from batch to batch.

    Token counts, sequences and work lists of 1, of multiples of 16 and of neither; ids of either dtype, anywhere.
    """
    names, new = run(KEYS, mode, cache=tmp_path, PYTHONPATH=os.pathsep.join([source_env()["PYTHONPATH"], "tests"]))
    assert len(names) >= 5, names
    assert not new, f"compiled for one batch and not for another: {new}"


# The cache on disk


@pytest.fixture
def triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for Triton's cache; what a test makes of it is undone."""
    import triton

    from fastbert_kernels import disk_cache

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_cache, "_own", None)
    return tmp_path / "cache"


class Kernel:
    """A stand-in for a compiled kernel: `launch` is called with the folder of Triton's cache."""

    def __init__(self, launch: Callable[[str], None]) -> None:
        self.launch, self.launches = launch, 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        import triton

        def start(**arguments: Any) -> None:
            self.launch(triton.knobs.cache.dir)
            self.launches += 1

        return start


def put(folder: str) -> None:
    """Does what Triton does first to compile a kernel."""
    from triton.runtime.cache import FileCacheManager

    FileCacheManager("a kernel").put("source", "a.source")


def start(kernel: Kernel) -> None:
    from fastbert_kernels import launch

    launch.run(kernel, (1,), {}, x_ptr=torch.zeros(1))


def test_a_cache_that_cannot_be_made(triton_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a crash where TRITON_CACHE_DIR is no place for a folder, or a fallback that says nothing."""
    import triton

    triton_cache.write_text("a file")
    kernel = Kernel(put)
    with caplog.at_level(logging.WARNING, "fastbert"):
        start(kernel)
        start(kernel)
    assert kernel.launches == 2 and len(caplog.records) == 1
    assert str(triton_cache) in caplog.text and "set TRITON_CACHE_DIR" in caplog.text
    assert list(Path(triton.knobs.cache.dir).rglob("a.source")) and triton_cache.read_text() == "a file"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_disk_that_takes_no_more(code: int, triton_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a crash on a full or read-only disk."""

    def launch(folder: str) -> None:
        if folder == str(triton_cache):
            raise OSError(code, os.strerror(code), *([] if code == errno.ENOSPC else [f"{folder}/k"]))

    kernel = Kernel(launch)
    with caplog.at_level(logging.WARNING, "fastbert"):
        start(kernel)
    assert kernel.launches == 1 and os.strerror(code) in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file", "ptxas"),
        OSError(errno.ECONNRESET, "reset"),
        RuntimeError("gone"),
    ],
    ids=repr,
)
def test_other_errors_are_raised(error: Exception, triton_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an error that has nothing to do with the cache taken for one that has."""

    def launch(folder: str) -> None:
        raise error

    with pytest.raises(type(error)), caplog.at_level(logging.WARNING, "fastbert"):
        start(Kernel(launch))
    assert not caplog.records


def test_no_place_at_all(triton_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an endless retry, or an error that does not say what to do, where no folder can be written."""
    import tempfile

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kernel = Kernel(full)
    with pytest.raises(OSError, match="No space left"):
        start(kernel)  # the folder of this process is full as well
    with pytest.raises(OSError, match="No space left"):
        start(kernel)
    from fastbert_kernels import disk_cache

    monkeypatch.setattr(disk_cache, "_own", None)
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(OSError, match="nor a temporary folder .* set TRITON_CACHE_DIR"):
        start(kernel)


# Launches


class Gemms(TorchDispatchMode):
    """Counts what PyTorch gives to cuBLAS."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.count += name.startswith(("aten.addmm", "aten.mm", "aten.bmm", "aten.linear"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 7), (torch.float32, 8)], ids=str)
def test_launches_of_a_layer(
    dtype: torch.dtype, expected: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a layer that launches more kernels than before, or an explain that says another number."""
    from fastbert_kernels import launch

    model = make(device, dtype, num_hidden_layers=3)
    launched: list[Any] = []
    start = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *args, **rest: launched.append(kernel) or start(kernel, *args, **rest)
    )
    with Gemms() as gemms:
        encode(model, [9, 4])
    note = next(note for note in fastbert.explain(model).notes if note.startswith("launches"))
    total = 3 * expected + 1
    assert len(launched) + gemms.count == total
    assert note == f"launches: {expected} kernels a layer, {total} from ids to last hidden state"


def test_explain_on_graphs(stand_in: StandIn, device: torch.device) -> None:
    """Catches an explain that promises one launch where every kernel is launched by itself."""
    model = make(device)

    def note(start: str = "CUDA graphs", **options: Any) -> str:
        return next((n for n in fastbert.explain(model, **options).notes if n.startswith(start)), "")

    masks = "masks on the GPU: up to 512 places are packed there, and the lengths of more waited for"
    assert note("masks", arch=90) == masks
    model.strict_ids = True
    assert "waits for their lengths: strict_ids=True waits for the checks of each batch" in note("masks", arch=90)
    assert note(arch=90) == "CUDA graphs: a batch of up to 16384 tokens is one launch, without gradients"
    model.cuda_graphs = False
    assert note(arch=90) == "CUDA graphs: none: the model's cuda_graphs is False"
    model.policy = fastbert.ops.Policy("torch")
    assert not [n for n in fastbert.explain(model).notes if n.startswith("launches")]


# On a GPU


@pytest.mark.gpu
def test_gpu_after_warmup_nothing_happens() -> None:
    """Catches a compilation, a load or a capture in any of 1,000 batches of random lengths after a warm-up."""
    model = make(torch.device("cuda"), torch.bfloat16, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    report = fastbert.warmup(model)
    assert report.buckets == buckets.BUCKETS, str(report)
    before = fastbert.compile_events()
    for seed in range(1000):
        encode(model, random_lengths(seed, 6000 if seed % 10 else 40000), seed)
    assert fastbert.compile_events() == before


SERVE = """
import json, torch, fastbert
from graph_cases import encode, make
model = make(torch.device("cuda"), torch.bfloat16)
encode(model, [9, 4])
events = fastbert.compile_events()
print(json.dumps([events.compilations, events.loads]))
"""


@pytest.mark.gpu
def test_gpu_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Catches a key of the cache that differs between processes."""
    path = os.pathsep.join([source_env()["PYTHONPATH"], "tests"])
    compiled, loaded = run(SERVE, cache=tmp_path, PYTHONPATH=path)
    assert compiled > 0 and loaded == 0
    assert run(SERVE, cache=tmp_path, PYTHONPATH=path) == [0, compiled]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 7), (torch.float32, 8)], ids=str)
def test_gpu_launches_of_a_layer(dtype: torch.dtype, expected: int) -> None:
    """Catches a GEMM, or another operation, that is more kernels on the device than we count."""
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for n_layers in (2, 6):
        model = make(
            torch.device("cuda"), dtype, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
            num_hidden_layers=n_layers,
        )  # fmt: skip
        model.cuda_graphs = False
        encode(model, [100] * 100)  # enough tiles that cuBLAS splits no GEMM along K
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            encode(model, [100] * 100)
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels))
    assert (counts[1] - counts[0]) / 4 == expected
