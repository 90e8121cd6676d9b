"""sentence-transformers folders: what stands around the BERT model in them, read and written.

A folder holds modules.json, which names a Transformer, a Pooling and what follows it (Dense, LayerNorm, Dropout,
Normalize), a subfolder for each module that has settings, and config_sentence_transformers.json with the prompts. Both
the names and settings of today's sentence-transformers and those of earlier versions are read; the earlier ones are
written, which all versions read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch import Tensor, nn

from fastbert import checkpoint, ops
from fastbert._version import __version__
from fastbert.ops import Policy
from fastbert.tokenizer import Tokenizer

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_CONFIG = "sentence_bert_config.json"

# A pooling mode of sentence-transformers -> the mode of fastbert.ops.pool
POOLING_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
# The flags that stood for them before, in the order in which several are concatenated.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "Identity": lambda x: x,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
}
# Settings of a Transformer module that change what it computes, and that are not followed here.
_UNSUPPORTED_TRANSFORMER = (
    "query_length", "document_length", "query_expansion", "processing_kwargs", "tokenizer_name_or_path", "model_args",
    "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs",
)  # fmt: skip


class Dense(nn.Module):
    """activation(x @ weight^T + bias) on sentence vectors, in the dtype of x: (B, K) -> (B, M)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "Tanh") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        return _ACTIVATIONS[self.activation](F.linear(x, weight.to(x), None if bias is None else bias.to(x)))

    def settings(self) -> dict[str, Any]:
        place = "linear" if self.activation == "Identity" else "activation"
        return {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"torch.nn.modules.{place}.{self.activation}",
        }


class LayerNorm(nn.Module):
    """LayerNorm of sentence vectors, in the dtype of x: (B, K) -> (B, K)."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)

    def settings(self) -> dict[str, Any]:
        return {"dimension": self.norm.normalized_shape[0]}


class Dropout(nn.Dropout):
    """Nothing at inference; kept so that a saved folder can be trained on."""

    def settings(self) -> dict[str, Any]:
        return {"dropout": self.p}


class Normalize(nn.Module):
    """x / max(||x||_2, 1e-12): (B, K) -> (B, K)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    def settings(self) -> dict[str, Any]:
        return {}


def apply(module: nn.Module, x: Tensor, policy: Policy) -> Tensor:
    """module(x) on sentence vectors (B, K); where the policy is batch-invariant, on kernels that are.

    PyTorch's sums over a row may depend on the number of rows, those of norms as well as those of products.
    Raises BackendError for a module that is not known to be batch-invariant.
    """
    if not policy.batch_invariant or isinstance(module, nn.Dropout):
        return module(x)
    if isinstance(module, Dense):
        weight, bias = module.linear.weight, module.linear.bias
        out = ops.linear(x, weight.to(x), None if bias is None else bias.to(x), policy=policy)
        return ops.elementwise(_ACTIVATIONS[module.activation], out, policy=policy)
    if isinstance(module, LayerNorm):
        norm = module.norm
        return ops.bias_residual_layer_norm(x, None, None, norm.weight.to(x), norm.bias.to(x), norm.eps, policy=policy)
    if isinstance(module, Normalize):
        one_row_each = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)
        return ops.pool(x, one_row_each, "cls", normalize=True, policy=policy)
    raise ops.BackendError(f"batch_invariant: a module {type(module).__name__} after the pooling cannot promise it")


_KINDS = {kind.__name__: kind for kind in (Dense, LayerNorm, Dropout, Normalize)}


@dataclass
class Pooling:
    """How token vectors become one: a mode of `POOLING_MODES`, or several, concatenated in their order."""

    modes: str | Sequence[str] = ("mean",)
    include_prompt: bool = True

    def __post_init__(self) -> None:
        self.modes = (self.modes,) if isinstance(self.modes, str) else tuple(self.modes)
        if not self.modes or (unknown := [mode for mode in self.modes if mode not in POOLING_MODES]):
            got = unknown if self.modes else "none"
            raise ValueError(f"pooling: got {got}, expected at least one of {', '.join(POOLING_MODES)}")

    def settings(self, hidden_size: int) -> dict[str, Any]:
        """The content of 1_Pooling/config.json: flags where they can say the order, `pooling_mode` elsewhere."""
        if self.modes == tuple(mode for mode in _POOLING_FLAGS.values() if mode in self.modes):
            flags = {flag: mode in self.modes for flag, mode in _POOLING_FLAGS.items()}
            return {"word_embedding_dimension": hidden_size, **flags, "include_prompt": self.include_prompt}
        modes = {"pooling_mode": list(self.modes), "include_prompt": self.include_prompt}
        return {"embedding_dimension": hidden_size, **modes}


@dataclass
class Layout:
    """What a folder says of a sentence encoder, but for the BERT model and its tokenizer."""

    transformer: Path  # the folder that holds these
    max_seq_length: int | None = None
    do_lower_case: bool = False
    pooling: Pooling = field(default_factory=Pooling)
    tail: list[nn.Module] = field(default_factory=list)  # what follows pooling
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None
    truncate_dim: int | None = None


def read(folder: Path) -> Layout | None:
    """The layout of a sentence-transformers folder; None where there is no modules.json.

    Raises ValueError that names the file for a module or a setting that is not supported, FileNotFoundError for a
    module's missing file.
    """
    if not (folder / MODULES).is_file():
        return None
    entries = _read_modules(folder / MODULES)
    (kind, path), *rest = entries
    if kind != "Transformer" or not rest or rest[0][0] != "Pooling":
        raise ValueError(
            f"{folder / MODULES}: expected a Transformer, a Pooling and what follows it, "
            f"got {', '.join(kind for kind, _ in entries)}"
        )
    layout = Layout(path, pooling=_read_pooling(rest[0][1] / "config.json"))
    for kind, path in rest[1:]:
        if kind not in _KINDS:
            raise ValueError(f"{folder / MODULES}: got a second {kind}, which is not supported")
        layout.tail.append(_read_tail(kind, path))
    _read_transformer(layout)
    _read_settings(layout, folder / SETTINGS)
    return layout


def read_cross_encoder(folder: Path) -> tuple[Layout, str | None]:
    """The layout of a cross-encoder's folder, and the path of its activation function, if it names one.

    Without modules.json, as sentence-transformers wrote it before 6.0, config.json has that path. Raises as `read`.
    """
    if (folder / MODULES).is_file():
        entries = _read_modules(folder / MODULES)
        kinds = [kind for kind, _ in entries]
        if kinds != ["Transformer"]:
            raise ValueError(f"{folder / MODULES}: expected a Transformer alone, got {', '.join(kinds)}")
        layout = Layout(entries[0][1])
        _read_transformer(layout, "sequence-classification", "scores")
        path = _read_settings(layout, folder / SETTINGS, "CrossEncoder").get("activation_fn")
    else:
        layout, path = Layout(folder), None
    config = checkpoint.read_json(layout.transformer / "config.json")
    stored = config.get("sentence_transformers")
    if path is None and isinstance(stored, dict):
        path = stored.get("activation_fn")
    return layout, path or config.get("sbert_ce_default_activation_function")


def _read_modules(file: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each module."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: expected a list of modules")
    modules = []
    for entry in entries:
        name, path = str(entry.get("type")), str(entry.get("path", ""))
        package, _, kind = name.rpartition(".")
        known = ("Transformer", "Pooling", *_KINDS)
        if package.split(".")[0] != "sentence_transformers" or kind not in known:
            raise ValueError(
                f"{file}: the module type {name!r} is not supported, only {', '.join(known)} of sentence_transformers"
            )
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise ValueError(f"{file}: path {path!r} leads out of the folder")
        modules.append((kind, file.parent / path))
    return modules


def _read_pooling(file: Path) -> Pooling:
    config = checkpoint.read_json(file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    try:
        return Pooling(modes, bool(config.get("include_prompt", True)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_tail(kind: str, folder: Path) -> nn.Module:
    file = folder / "config.json"
    if kind == "Normalize":  # had no settings, and so no folder, in earlier versions
        _check_names(file, checkpoint.read_json(file) if file.is_file() else {})
        return Normalize()
    config = checkpoint.read_json(file)
    try:
        if kind == "Dropout":
            return Dropout(config.get("dropout", 0.2))
        if kind == "LayerNorm":
            module: nn.Module = LayerNorm(config["dimension"])
        else:
            _check_names(file, config)
            if config.get("use_residual"):
                raise ValueError(f"{file}: use_residual is not supported")
            sizes = config["in_features"], config["out_features"]
            module = Dense(*sizes, config.get("bias", True), _activation(file, config))
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    _load(module, folder)
    return module


def _check_names(file: Path, config: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ValueError(f"{file}: {key} is {config[key]!r}, but only 'sentence_embedding' is supported")


def _activation(file: Path, config: Mapping[str, Any]) -> str:
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = path.rpartition(".")
    if not package.startswith("torch.nn") or name not in _ACTIVATIONS:
        expected = ", ".join(f"torch.nn.{name}" for name in _ACTIVATIONS)
        raise ValueError(f"{file}: activation_function is {path!r}, but only {expected} are supported")
    return name


def _load(module: nn.Module, folder: Path) -> None:
    """Loads a module's weights, in float32 at least, the dtype of sentence vectors."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    try:
        matched = checkpoint.match(checkpoint.read_state_dict(folder), expected, base_prefix="")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if matched.missing:
        raise ValueError(f"{folder}: the weights lack {', '.join(matched.missing)}")
    state = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in matched.state.items()}
    module.load_state_dict(state, assign=True)


def _read_transformer(layout: Layout, task: str = "feature-extraction", output_name: str = "token_embeddings") -> None:
    file = layout.transformer / TRANSFORMER_CONFIG
    config = checkpoint.read_json(file) if file.is_file() else {}
    for key, expected in (("transformer_task", task), ("module_output_name", output_name)):
        if config.get(key) not in (None, expected):
            raise ValueError(f"{file}: {key} is {config[key]!r}, but only {expected!r} is supported")
    for key in _UNSUPPORTED_TRANSFORMER:
        value = config.get(key)
        if isinstance(value, dict):
            value = {name: v for name, v in value.items() if name != "trust_remote_code"}
        if value:
            raise ValueError(f"{file}: {key} is {value!r}, which is not supported")
    limit = config.get("max_seq_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{file}: max_seq_length is {limit!r}, expected a positive whole number or null")
    layout.max_seq_length = limit
    layout.do_lower_case = bool(config.get("do_lower_case"))


def _read_settings(layout: Layout, file: Path, expected: str = "SentenceTransformer") -> dict[str, Any]:
    config = checkpoint.read_json(file) if file.is_file() else {}
    kind = config.get("model_type", expected)
    if kind != expected:
        raise ValueError(f"{file}: model_type is {kind!r}, but only {expected!r} is supported")
    layout.prompts = {name: prompt or "" for name, prompt in (config.get("prompts") or {}).items()}
    layout.default_prompt_name = config.get("default_prompt_name")
    layout.similarity_fn_name = config.get("similarity_fn_name")
    layout.truncate_dim = config.get("truncate_dim")
    return config


def lowercasing(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer with lower-casing in front of its normalizer, where that does none; accents stay as they were."""
    normalizer = tokenizer._rust.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        if normalizer.lowercase:
            return tokenizer
        return Tokenizer.from_pretrained(folder, do_lower_case=True, strip_accents=bool(normalizer.strip_accents))
    before = [] if normalizer is None else [normalizer]
    tokenizer._rust.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return tokenizer


def write(folder: Path, hidden_size: int, layout: Layout) -> None:
    """Writes everything in `folder` but the model and the tokenizer; modules.json, which makes it count, last."""

    def write_json(file: Path, content: Any) -> None:
        file.parent.mkdir(exist_ok=True)
        checkpoint.write_text(file, json.dumps(content, indent=2) + "\n")

    write_json(
        folder / TRANSFORMER_CONFIG, {"max_seq_length": layout.max_seq_length, "do_lower_case": layout.do_lower_case}
    )
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "__version__": {"fastbert": __version__, "pytorch": torch.__version__},
        "prompts": layout.prompts,
        "default_prompt_name": layout.default_prompt_name,
        "similarity_fn_name": layout.similarity_fn_name,
    }
    if layout.truncate_dim is not None:
        settings["truncate_dim"] = layout.truncate_dim
    write_json(folder / SETTINGS, settings)
    write_json(folder / "1_Pooling" / "config.json", layout.pooling.settings(hidden_size))
    names = ["Transformer", "Pooling", *_write_tail(folder, layout.tail, write_json)]
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    write_json(folder / MODULES, entries)


def _write_tail(folder: Path, tail: Sequence[nn.Module], write_json: Callable[[Path, Any], None]) -> list[str]:
    names = []
    for i, module in enumerate(tail, start=2):
        name = type(module).__name__
        names.append(name)
        settings: dict[str, Any] = getattr(module, "settings", dict)()
        if settings:
            write_json(folder / f"{i}_{name}" / "config.json", settings)
        if state := module.state_dict():
            checkpoint.write_state_dict(state, folder / f"{i}_{name}")
    return names
