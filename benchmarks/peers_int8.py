"""This module has further engines that are recommended for CPUs: int8 of OpenVINO and ONNX Runtime, and zentorch.

sentence-transformers' documentation recommends OpenVINO with static quantisation on CPUs, and names ONNX Runtime with
dynamic quantisation as the other way. Both use the settings of its functions `export_static_quantized_openvino_model`
and `export_dynamic_quantized_onnx_model`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import peers_cpu
import torch
from peers_cpu import INPUTS, OpenVINO, exported, workdir

from fastbert import Tokenizer
from fastbert.bench.engines import Compiled, Engine, Source, package_obstacle
from fastbert.bench.texts import docstrings, spread
from fastbert_kernels import cpu

CALIBRATION_TEXTS = 300  # optimum's number for OpenVINO
CALIBRATION_TOKENS = 128
SMOOTH_QUANT = 0.95  # likewise


class ONNXRuntimeInt8(peers_cpu.ONNXRuntime):
    """This is ONNX Runtime with dynamic quantisation: a scale for each weight, activations quantised at run time."""

    name, computes_in = "ONNX Runtime int8", "int8"

    def obstacle(self) -> str | None:
        return super().obstacle() or package_obstacle("onnx")

    def graph(self) -> str:
        path = workdir() / f"{peers_cpu._key(self.source)}-int8.onnx"
        if not path.exists():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            has_vnni = cpu.int8_obstacle() is None
            quantize_dynamic(
                exported(self.source),
                path,
                weight_type=QuantType.QInt8 if has_vnni else QuantType.QUInt8,
                reduce_range=not has_vnni,  # without VNNI the sums of two products are held in 16 bits
            )
        return str(path)


class OpenVINOInt8(OpenVINO):
    """This is OpenVINO with static quantisation by NNCF. Its ranges come from docstrings that the benchmark does not
    time.
    """

    name, computes_in = "OpenVINO int8", "int8"

    def obstacle(self) -> str | None:
        return super().obstacle() or package_obstacle("nncf")

    def model(self, core: Any) -> Any:
        path = workdir() / f"{peers_cpu._key(self.source)}-int8.xml"
        if not path.exists():
            import nncf
            import openvino

            nncf.set_log_level("ERROR")
            smooth = nncf.AdvancedSmoothQuantParameters(matmul=SMOOTH_QUANT)
            model = nncf.quantize(
                core.read_model(exported(self.source)),
                nncf.Dataset(calibration(self.source)),
                subset_size=CALIBRATION_TEXTS,
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER,
                fast_bias_correction=True,
                advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
            )
            openvino.save_model(model, path, compress_to_fp16=False)
        return core.read_model(path)


class Zentorch(Compiled):
    """This engine is AMD's plug-in for PyTorch on its processors: torch.compile with its own backend."""

    name, package = "zentorch", "zentorch"

    def obstacle(self) -> str | None:
        if self.source.device.type != "cpu":
            return "is compared on CPUs only"
        obstacle = package_obstacle(self.package) or super().obstacle()
        if obstacle is None:
            try:
                import zentorch  # noqa: F401
            except (ImportError, OSError, RuntimeError) as error:  # each build is for one release of PyTorch
                obstacle = f"zentorch does not load: {str(error).splitlines()[0]}"
        return obstacle

    def load(self) -> None:
        super().load()
        self.compiled = torch.compile(self._pooled, dynamic=self.varied, fullgraph=True, backend="zentorch")


def calibration(source: Source) -> list[dict[str, np.ndarray]]:
    """Returns ids and mask, (1, S) int64, of texts for ranges of activations: every other docstring, as they are not
    timed.
    """
    tokenizer = Tokenizer.from_pretrained(source.folder)
    texts = spread(docstrings()[1::2], CALIBRATION_TEXTS)
    longest = min(CALIBRATION_TOKENS, source.config.max_length)
    rows = [np.array([ids], np.int64) for ids in tokenizer(texts, max_length=longest)["input_ids"]]
    return [dict(zip(INPUTS, (ids, np.ones_like(ids)), strict=True)) for ids in rows]


def engines(dtype: torch.dtype) -> tuple[type[Engine], ...]:
    """Returns the engines that compete with fastbert in a dtype."""
    return (Zentorch,) if dtype == torch.float32 else (Zentorch, ONNXRuntimeInt8, OpenVINOInt8)
