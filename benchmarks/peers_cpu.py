"""ONNX Runtime, OpenVINO and CTranslate2 are engines here, with models converted from the weights."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench.engines import Engine, Padded, Source, package_obstacle

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "last_hidden_state"
OPSET = 17
EXPORT_LIMIT = 2**31  # bytes of one ONNX file


class CPURuntime(Padded):
    """A CPURuntime takes ids and mask as arrays. package: the package that it needs. computes_in: its dtype."""

    package: str
    computes_in = "float32"
    always_masked = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.dtype = self.computes_in

    def obstacle(self) -> str | None:
        if self.source.device.type != "cpu":
            return "is compared on CPUs only"
        return package_obstacle(self.package) or super().obstacle()

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Runs the model: (B, S) int64, twice -> (B, S, H) float32."""
        raise NotImplementedError

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return torch.from_numpy(self.run(ids.numpy(), mask.numpy()))


class ONNXRuntime(CPURuntime):
    """This engine is ONNX Runtime with all its own optimisations of the graph."""

    name, package = "ONNX Runtime", "onnxruntime"

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads wait busily for work. Between two runs they would take the processor from the next competitor.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(self.graph(), options, providers=["CPUExecutionProvider"])

    def graph(self) -> str:
        return str(exported(self.source))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))[0]


class FusedONNXRuntime(ONNXRuntime):
    """This is ONNX Runtime after its transformers optimizer, which fuses attention, bias + GELU, residual + norm."""

    name = "ONNX Runtime fused"

    def obstacle(self) -> str | None:
        return super().obstacle() or package_obstacle("onnx")

    def graph(self) -> str:
        path = workdir() / f"{_key(self.source)}-fused.onnx"
        if path.exists():
            return str(path)
        from onnxruntime.transformers import optimizer

        logging.getLogger("onnxruntime").setLevel(logging.ERROR)
        config = self.source.config
        model = optimizer.optimize_model(
            str(exported(self.source)),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        counts = model.get_fused_operator_statistics()
        if counts["Attention"] != config.num_hidden_layers:
            raise RuntimeError(f"fused {counts['Attention']} attentions of {config.num_hidden_layers}")
        model.save_model_to_file(str(path))
        return str(path)


class OpenVINO(CPURuntime):
    """This engine is OpenVINO, with one request at a time on all threads. precision: its hint for the dtype of
    computation.
    """

    name, package = "OpenVINO", "openvino"
    precision, capability = "f32", "FP32"

    def obstacle(self) -> str | None:
        obstacle = super().obstacle()
        if obstacle is None:
            import openvino

            if self.capability not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                obstacle = f"OpenVINO has no {self.computes_in} on this processor"
        return obstacle

    def load(self) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        self.request = core.compile_model(self.model(core), "CPU", settings).create_infer_request()

    def model(self, core: Any) -> Any:
        """Returns the model to compile: the exported one in float32."""
        return core.read_model(exported(self.source))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.request.infer([ids, mask], share_inputs=True)[0]


class OpenVINOBfloat16(OpenVINO):
    precision, capability, computes_in = "bf16", "BF16", "bfloat16"


class CTranslate2(CPURuntime):
    """This engine is CTranslate2 in one of its compute types."""

    name, package = "CTranslate2", "ctranslate2"
    compute_type = "float32"

    def obstacle(self) -> str | None:
        obstacle = super().obstacle()
        if obstacle is None and self.compute_type not in _ctranslate2().get_supported_compute_types("cpu"):
            obstacle = f"CTranslate2 has no {self.compute_type} on this processor"
        return obstacle

    def load(self) -> None:
        self.encoder = _ctranslate2().Encoder(
            converted(self.source), device="cpu", compute_type=self.compute_type, inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )  # fmt: skip

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        arrays = (ids.astype(np.int32), mask.sum(1, dtype=np.int32))
        inputs = [_ctranslate2().StorageView.from_array(array) for array in arrays]
        return np.asarray(self.encoder.forward_batch(*inputs).last_hidden_state)


class CTranslate2Bfloat16(CTranslate2):
    compute_type = computes_in = "bfloat16"


class CTranslate2Int8(CTranslate2):
    name = "CTranslate2 int8"
    compute_type = computes_in = "int8"


def engines(dtype: torch.dtype) -> tuple[type[Engine], ...]:
    """Returns the competing engines in a dtype: in float32 the exact ones, else those in fewer bits."""
    if dtype == torch.float32:
        return ONNXRuntime, FusedONNXRuntime, OpenVINO, CTranslate2
    return OpenVINOBfloat16, CTranslate2Bfloat16, CTranslate2Int8


@functools.cache
def workdir() -> Path:
    """Returns a temporary folder for converted models. It is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fastbert-peers-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def exported(source: Source) -> Path:
    """Exports the checkpoint as an ONNX file in float32: ids and mask, (B, S) int64 -> hidden states (B, S, H)."""
    path = workdir() / f"{_key(source)}.onnx"
    if path.exists():
        return path
    # ONNX Runtime's optimizer knows the form of eager attention.
    model = source.transformers("eager", torch.float32)
    size = sum(p.numel() for p in model.parameters()) * 4
    if size >= EXPORT_LIMIT:
        raise RuntimeError(f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file")
    ids = torch.ones(2, 8, dtype=torch.int64)
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _HiddenStates(model), (ids, mask), str(path), input_names=list(INPUTS), output_names=[OUTPUT],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in (*INPUTS, OUTPUT)},
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return path


class _HiddenStates(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def converted(source: Source) -> str:
    """Converts the checkpoint to a folder for CTranslate2, in float32."""
    path = workdir() / f"{_key(source)}-ctranslate2"
    if path.exists():
        return str(path)
    _ctranslate2()
    from ctranslate2.converters import TransformersConverter

    class Vocabulary:
        """A Vocabulary stands for a tokenizer: the encoder gets ids, and never reads a token."""

        unk_token = "0"

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(source.config.vocab_size)}

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, *args: Any, **kwargs: Any) -> Any:
            import transformers

            model = transformers.AutoModel.from_pretrained(source.folder, dtype=torch.float32).eval()
            model.config.position_embedding_type = "absolute"  # newer configs leave this out
            return model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return Vocabulary()

    Converter(str(source.folder)).convert(str(path))
    return str(path)


def _ctranslate2() -> Any:
    # If its OpenMP is Intel's, the threads wait busily for 200 ms: see ONNXRuntime.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    import ctranslate2

    return ctranslate2


def _key(source: Source) -> str:
    folder = source.folder.resolve()
    return f"{folder.name}-{abs(hash(folder)):x}"
