"""Adapters, wrappers, compilers, threads, pipelines and graphs work around and inside an accelerated model."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from accelerate_cases import ROWS, accelerated, check
from fastbert.adapters import counts
from fastbert.engine import capture
from helpers import assert_as_accurate
from model_cases import assert_close, in_dtype, make_batch, run, theirs, weighted_sum


def test_eval_leaves_the_mode_of_adapters_alone() -> None:
    """Catches a look at the weights that switches off what somebody has switched on inside an adapter."""
    model = accelerated()
    adapter = Lora(model.encoder.layer[0].output.dense)
    model.encoder.layer[0].output.dense = adapter.eval()
    model.eval()
    adapter.base.train()
    run(model, make_batch())
    assert adapter.base.training


class Lora(nn.Module):
    """x W^T + b + s x A^T B^T: what PEFT puts in the place of a linear, written by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 4, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * (x @ self.a.T @ self.b.T)

    def merged(self) -> nn.Linear:
        self.base.weight.data += 0.1 * self.b @ self.a
        return self.base


def test_low_rank_adapters_live_and_merged() -> None:
    """Catches an adapter that is passed over, trained without gradients, or merged into weights that are not read."""
    model = accelerated()
    places = [(layer.attention.self, name) for layer in model.encoder.layer for name in ("query", "value")]
    for place, name in places:
        setattr(place, name, Lora(getattr(place, name)).eval())
    check(model, 2)

    gradients = []
    for each in (model, fastbert.restore(copy.deepcopy(model))):
        weighted_sum({"tokens": each(**make_batch("right")).last_hidden_state[ROWS]}).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert any(".a" in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        if not name.endswith("key.bias"):  # which shifts all scores alike: its gradient is rounding
            assert_close(name, gradients[0][name], gradient, 1e-8)

    for place, name in places:
        setattr(place, name, getattr(place, name).merged())
    model.eval()
    check(model, 4)


def test_peft(tmp_path: Any) -> None:
    """Catches a use of PEFT that fails or changes numbers: wrapping, saving, loading, merging, disabling."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    tuned = peft.get_peft_model(accelerated(), config).double().eval()
    batch = make_batch("right")
    inner = tuned.get_base_model()
    assert_close("live", run(tuned, batch)[0][ROWS], run(fastbert.restore(copy.deepcopy(tuned)), batch)[0][ROWS])
    with tuned.disable_adapter():
        off = run(tuned, batch)[0]
    assert_close("off", off[ROWS], run(theirs(), batch)[0][ROWS])
    tuned.save_pretrained(tmp_path)

    loaded = peft.PeftModel.from_pretrained(accelerated(), tmp_path).double()
    live = run(loaded, batch)[0]
    assert_close("loaded", live[ROWS], run(tuned, batch)[0][ROWS])
    merged = loaded.merge_and_unload()
    assert_close("merged", run(merged, batch)[0][ROWS], live[ROWS])
    assert set(counts(merged)) == {"fastbert"} and counts(inner)["fastbert"] >= 3
    at_once = peft.PeftModel.from_pretrained(accelerated(), tmp_path).double().merge_and_unload()
    assert_close("merged at once", run(at_once, batch)[0][ROWS], live[ROWS])

    by_transformers = accelerated()
    by_transformers.add_adapter(config)
    by_transformers.double().eval()
    check(by_transformers, 2)


def test_data_parallel() -> None:
    """Catches a wrapper around the model, or its replicas, that give something else."""
    model = accelerated("BertForSequenceClassification")
    wrapped = nn.DataParallel(model)
    with torch.no_grad():
        assert torch.equal(wrapped(**make_batch())[0], run(model, make_batch())[0])
    assert fastbert.restore(fastbert.accelerate(wrapped)) is wrapped
    model = accelerated()
    replica = model._replicate_for_data_parallel()
    replica._modules = dict(model._modules)  # torch.nn.parallel.replicate puts copies on other GPUs here
    assert replica._is_replica
    with torch.no_grad():
        output = replica(**make_batch("right"))[0]
    assert_close("replica", output[ROWS], run(model, make_batch("right"))[0][ROWS])
    assert counts(model) == {"fastbert": 2, "a replica of DataParallel": 1}


def test_compiled_around() -> None:
    """Catches torch.compile that fails on our forward, or fixes the packing of its first batch."""
    model = accelerated("BertForSequenceClassification")
    compiled = torch.compile(model, backend="eager")
    for kind in ("right", "left", "right"):
        with torch.no_grad():
            output = compiled(**make_batch(kind)).logits
        assert_close(kind, output, run(model, make_batch(kind)).logits)
    assert counts(model) == {"fastbert": 5, "padding in the first column": 2}


def test_traced_and_exported() -> None:
    """Catches a trace in which the packing of one batch is fixed for all."""
    model = accelerated(dtype=torch.float32)
    inputs = {name: make_batch("right")[name] for name in ("input_ids", "attention_mask")}
    other = {**inputs, "attention_mask": make_batch("left")["attention_mask"]}
    with torch.no_grad():
        traced = torch.jit.trace(model, tuple(inputs.values()), strict=False, check_trace=False)
        expected = run(fastbert.restore(copy.deepcopy(model)), other)[0]
        assert_close("traced", traced(*other.values())["last_hidden_state"], expected, 1e-5)
        exported = torch.export.export(model, (), inputs).module()
        assert_close("exported", exported(**other)["last_hidden_state"], expected, 1e-5)
    assert counts(model) == {"fastbert": 1}


def test_parameters_of_a_functional_call() -> None:
    """Catches weights that are looked up where they were, and not in the modules."""
    model = accelerated()
    parameters = {name: (p * 1.5).detach() for name, p in model.named_parameters()}
    args = (make_batch("none")["input_ids"],)
    with torch.no_grad():
        ours = torch.func.functional_call(model, parameters, args)[0]
        expected = torch.func.functional_call(fastbert.restore(copy.deepcopy(model)), parameters, args)[0]
    assert_close("functional_call", ours, expected)


def test_threads() -> None:
    """Catches two threads that build what is kept at once, and mix it up."""
    model = fastbert.accelerate(in_dtype(theirs(), torch.float64))
    expected = run(fastbert.restore(copy.deepcopy(model)), make_batch("none"))[0]
    outputs: list[Tensor] = []
    threads = [threading.Thread(target=lambda: outputs.append(run(model, make_batch("none"))[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    for output in outputs:
        assert_close("thread", output, expected)


def test_pipelines(minilm: Any) -> None:
    """Catches a pipeline that refuses the model by its class, or reads something else of its output."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2,
                                     num_hidden_layers=1, intermediate_size=37)  # fmt: skip
    jobs = {
        "feature-extraction": ("BertModel", "a text of some words"),
        "text-classification": ("BertForSequenceClassification", "a text of some words"),
        "fill-mask": ("BertForMaskedLM", "Paris is the [MASK] of France."),
    }
    for task, (name, text) in jobs.items():
        model = getattr(transformers, name)(config).eval()
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer)
        expected = pipe([text, text + " And more."], batch_size=2)
        assert fastbert.accelerate(pipe) is pipe
        results = pipe([text, text + " And more."], batch_size=2)
        again = transformers.pipeline(task, model=model, tokenizer=tokenizer)(text)
        if task == "feature-extraction":  # gives rows of padding, too, which are zeros from us
            results, expected = results[1], expected[1]
        assert numbers(results) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-5)
        assert numbers(again) == numbers(pipe(text))
        assert set(counts(pipe)) == {"fastbert"}
        assert fastbert.restore(pipe) is pipe and counts(model) == {}


def numbers(results: Any) -> list[float]:
    """All numbers in what a pipeline gave."""
    if isinstance(results, dict):
        return [results["score"]]
    if isinstance(results, (list, tuple)):
        return [number for item in results for number in numbers(item)]
    return [results]


class Capturer:
    """Stands for CUDA graphs: captures by running, replays by running again."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def begin(self, memory: Any) -> None:
        """Nothing to wait for."""

    end = finish = lambda self: None

    def capture(self, function: Any) -> Any:
        self.captures += 1
        function()
        return SimpleNamespace(replay=lambda: self.replay(function))

    def replay(self, function: Any) -> None:
        self.replays += 1
        function()


# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_kernels_and_graphs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches live modules that no graph is captured of, and a graph that replays the weights of before."""
    capturer = Capturer()
    if device.type != "cuda":
        monkeypatch.setattr(capture, "capturer", lambda where: capturer)
    model = fastbert.accelerate(in_dtype(theirs(), torch.float32), backend="triton").to(device)
    batch = {**make_batch("right"), "position_ids": None}
    for change in (1.0, 0.5):
        with torch.no_grad():
            model.encoder.layer[0].attention.self.value.weight.mul_(change)
            model.encoder.layer[1].output.dense.bias.mul_(change)
        original = fastbert.restore(copy.deepcopy(model))
        reference, eager = run(in_dtype(original, torch.float64), batch)[0].cpu(), run(original, batch)[0].cpu()
        for _ in range(2):
            output = run(model, batch)[0].cpu()
            assert_as_accurate("graphs", output[ROWS], eager[ROWS], reference[ROWS])
    assert counts(model) == {"fastbert": 4}
    assert {row.backend for row in fastbert.explain(model).rows if row.op == "attention"} == {"triton"}
    if device.type != "cuda":
        assert capturer.captures >= 1 and capturer.replays >= 2
