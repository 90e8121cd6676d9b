"""This module holds the loading, saving and settings that BertModel and the models with heads share."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import DTYPES, BertConfig
from fastbert.checkpoint.folder import resolve
from fastbert.checkpoint.loading_arguments import Arguments, check_saving, n_bytes
from fastbert.checkpoint.match import Match, match
from fastbert.checkpoint.weights import read_state_dict, write_state_dict
from fastbert.engine import Options, cpu_encoder
from fastbert.engine.state import first_parameter
from fastbert.models.access import ModelAccess
from fastbert.models.trainer_saving import install
from fastbert.ops import BackendError, packing
from fastbert.ops.dispatch import check_batch_invariant

logger = logging.getLogger("fastbert")

Model = TypeVar("Model", bound="PreTrainedModel")


class PreTrainedModel(ModelAccess):
    """This class loads and saves BertModel and the models with heads, and holds their settings.

    settings: the fields of `Options`, by name. `options`: the present options of the model. `policy`: its backend,
    strict and batch_invariant, for the operations. With a `precision`, the parameters require no gradients; they are
    not changed, and are saved unchanged. `missing_names`: the weights that the checkpoint lacked, and that
    from_pretrained initialised.

    The table of a family (fastbert.checkpoint.families) translates its names when files are read or written.
    """

    base_prefix = "bert."
    _class_arguments: tuple[str, ...] = ()  # of from_pretrained, for the class alone
    task: str | None = None  # the part after "For" in the class name of a model with a head
    cuda_graphs: Any  # bool: a property of the models, as is the next one
    strict_ids: Any
    dtype_choice: tuple[torch.dtype, str] | None = None  # the choice of dtype="auto" on a CPU, and its reason

    def __init__(self, config: BertConfig, options: Options | None = None, **settings: Any) -> None:
        super().__init__()
        options = Options.of(options, settings)
        self.config = config
        self.policy = options.policy
        self.precision = options.precision
        self.missing_names: list[str] = []
        self.warnings_issued: dict[str, bool] = {}
        self.name_or_path = config.name_or_path
        install(PreTrainedModel)

    @property
    def options(self) -> Options:
        """The present options of the model."""
        policy = self.policy
        return Options(
            policy.backend, policy.strict, policy.batch_invariant, self.precision, self.cuda_graphs, self.strict_ids
        )

    @property
    def device(self) -> torch.device:
        return first_parameter(self).device

    @property
    def dtype(self) -> torch.dtype:
        return first_parameter(self).dtype

    @property
    def longest_text(self) -> int:
        """Returns the greatest sequence length in tokens: the number of positions from that of the first token."""
        encoder: Any = self._modules.get("bert", self)
        table = encoder._modules["embeddings"]._modules.get("position_embeddings")
        n_positions: int = getattr(table, "num_embeddings", self.config.max_position_embeddings)  # not in an adapter
        return n_positions - self.config.position_offset

    def _check_tensors(self, device: torch.device, **tensors: Tensor | None) -> None:
        """Raises TypeError for an object that is not a tensor, ValueError for a tensor on a wrong device.

        Ids and masks of a model on a GPU may be on the host: they are checked there, and copied in one transfer.
        """
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if isinstance(tensor, torch.fx.Proxy):
                raise TypeError(
                    f"{name}: expected a tensor, got a Proxy of torch.fx.symbolic_trace, which cannot follow a model; "
                    "torch.export.export, make_fx of torch.fx.experimental.proxy_tensor and torch.jit.trace can"
                )
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.device != device and not (name != "inputs_embeds" and packing.takes_from_host(device, tensor)):
                raise ValueError(f"{name}: expected a tensor on the model's device {device}, got {tensor.device}")

    def blame_dtypes(self, error: RuntimeError) -> None:
        """Raises TypeError if the parameters have different dtypes, a likely reason of PyTorch's error."""
        dtypes = {p.dtype: name for name, p in reversed(list(self.named_parameters()))}  # the first name of each
        if type(error) is RuntimeError and len(dtypes) > 1:
            names = ", ".join(f"{name} has {dtype}" for dtype, name in dtypes.items())
            raise TypeError(f"the model's parameters: expected one dtype, but {names}: {error}") from error

    def tie_weights(self) -> None:
        """Makes the parameters that the config ties one tensor. A model without a decoder has no tied parameters."""

    def tied_pairs(self) -> dict[str, str]:
        """Maps each further name of a tied tensor, which is left out of files, to the tensor's own name."""
        return {}

    def _settle_ties(self, matched: Match, src: str) -> None:
        """Unties parameters that differ in the checkpoint. A model without a decoder has no tied parameters."""

    def train(self: Model, mode: bool = True) -> Model:
        ops.forget_packed(self.parameters())
        return super().train(mode)

    def init_weights(self) -> None:
        """Initialises weights as in BERT: normal with deviation initializer_range, biases 0, LayerNorm 1 and 0."""
        for name, parameter in self.named_parameters():
            parameter.data = self._fresh(name, parameter, parameter.dtype, parameter.device)
            if self.precision is not None:
                parameter.requires_grad_(False)
        self.tie_weights()

    def _fresh(self, name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        if name.endswith(("LayerNorm.weight", "norm.weight")):
            return torch.ones(like.shape, dtype=dtype, device=device)
        fresh = torch.zeros(like.shape, dtype=dtype, device=device)
        if not name.endswith("bias"):
            fresh.normal_(0.0, self.config.initializer_range)
            if name.endswith("word_embeddings.weight") and self.config.pad_token_id is not None:
                fresh[self.config.pad_token_id] = 0.0
        return fresh

    @classmethod
    def from_pretrained(
        cls: type[Model],
        src: str | os.PathLike[str] | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        backend: str = "auto",
        strict: bool = False,
        batch_invariant: bool = False,
        precision: str | None = None,
        cuda_graphs: bool = True,
        strict_ids: bool = False,
        **arguments: Any,
    ) -> Model:
        """Loads a checkpoint in Hugging Face layout, from a local folder or a hub id; the model is in eval mode.

        dtype: "auto" is the checkpoint's. device: the CPU by default. batch_invariant: the bits of a text's output do
        not depend on the other texts of the batch; it needs the Triton kernels, or on CPUs the C++ kernels without
        gradients (float32, bfloat16 and precision="int8"), and it never falls back. precision: "fp8" (GPUs of compute
        capability 8.9 or newer) or "int8" (GPUs of 8.0 or newer, CPUs with AVX-512 VNNI) multiplies 8-bit operands in
        the encoder's linear layers, for inference; without such kernels it falls back, see fastbert.engine.quantized.
        cuda_graphs: on a GPU, run short batches as CUDA graphs; the results are the same. strict_ids: on a GPU, each
        call waits for the check of its own ids; otherwise the next call, or `fastbert.wait_for_checks`, raises.

        arguments: fields of BertConfig and num_labels, which override the checkpoint's; and what from_pretrained of
        transformers takes (fastbert.checkpoint.loading_arguments): revision, subfolder, cache_dir, token,
        local_files_only, force_download, use_safetensors, variant, config, state_dict, torch_dtype, device_map (one
        device), ignore_mismatched_sizes, output_loading_info (returns the model and a dict), add_pooling_layer
        (BertModel), key_mapping. What of theirs has no effect here is ignored and logged, the rest is refused by name.

        A warning names the weights that the checkpoint lacks. Without a pooler in the checkpoint, a BertModel has none
        (pooler_output is None). A missing head is initialised (`missing_names` has its weights).

        Raises FileNotFoundError if there is no checkpoint, ValueError if it does not match the config or lacks weights
        of the encoder, TypeError for an unknown argument, and BackendError for batch_invariant if there are no kernels
        for the device, the dtype or the sizes of the model.
        """
        src = arguments.pop("pretrained_model_name_or_path", None) if src is None else src
        parsed = Arguments.of(arguments)
        unknown = sorted(parsed.model.keys() - cls._class_arguments)
        if unknown:
            raise TypeError(f"{unknown[0]}: {cls.__name__} has no choice of it, BertModel has")
        if device is not None and parsed.device not in (None, torch.device(device)):
            raise ValueError(f"device_map: got {parsed.device}, and device {device}; expected one of the two")
        device = parsed.device or torch.device("cpu" if device is None else device)
        options = Options(backend, strict, batch_invariant, precision, cuda_graphs, strict_ids)
        check_batch_invariant(options.policy, device, precision)
        folder = None
        if src is not None or parsed.config is None or parsed.state_dict is None:
            folder = resolve(src, weights=parsed.state_dict is None, **parsed.hub)
        config = parsed.read_config(folder or "")
        state = parsed.state_dict
        if state is None:
            state = read_state_dict(
                folder or "", use_safetensors=parsed.hub.get("use_safetensors"), variant=parsed.variant
            )
        state = parsed.renamed(state)
        dtype = resolve_dtype(parsed.dtype if dtype == "auto" and parsed.dtype is not None else dtype, config, state)
        if batch_invariant and device.type == "cpu" and backend != "triton":
            obstacle = cpu_encoder.invariant_obstacle(config, dtype)
            if obstacle is not None:
                raise BackendError(f"batch_invariant: {obstacle}")
        config.name_or_path = "" if src is None else src
        with torch.device("meta"):
            model = cls(config, **parsed.model, options=options)
        info = model._load(state, dtype, device, str(src), parsed.ignore_mismatched_sizes)
        model.eval()
        return (model, info) if parsed.output_loading_info else model  # type: ignore[return-value]

    def _load(
        self,
        state: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        src: str,
        ignore_mismatched: bool = False,
    ) -> dict[str, Any]:
        """Loads a checkpoint's tensors; returns the dict of transformers' output_loading_info."""
        expected = self.state_dict()
        state, stored = self._translated(state)
        shapes = {name: t.shape for name, t in expected.items()}
        matched = match(state, shapes, base_prefix=self.base_prefix, ignore_mismatched=ignore_mismatched)
        unused = [stored[name] for name in matched.unexpected]
        if unused:
            logger.info("%s: %s does not use %s", src, type(self).__name__, listed(unused))
        self._settle_ties(matched, src)
        wrong = {name: sizes for name, sizes in matched.mismatched.items() if name in matched.missing}
        for name, (came, wanted) in wrong.items():
            logger.warning("%s: %s is %s, not %s: freshly initialised", src, *self._stored_names([name]), came, wanted)
        missing = [name for name in matched.missing if name not in self.tied_pairs() and name not in wrong]
        gone = [name for name in missing if name.startswith("pooler.")]
        missing = self._report_missing(missing, src)
        self.missing_names = fresh = [*missing, *(name for name in wrong if name not in self.tied_pairs())]
        loaded = {name: t.to(device, dtype) for name, t in matched.state.items()}
        loaded.update({name: self._fresh(name, expected[name], dtype, device) for name in fresh})
        super().load_state_dict(loaded, strict=False, assign=True)
        self.tie_weights()
        self.config.dtype = str(dtype).removeprefix("torch.")
        return {
            "missing_keys": self._stored_names([*missing, *(name for name in gone if name not in missing)]),
            "unexpected_keys": unused,
            "mismatched_keys": [(*self._stored_names([name]), *sizes) for name, sizes in wrong.items()],
            "error_msgs": [],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Works as PyTorch's method; it also accepts the family's names, and a state dict without a tied tensor."""
        expected = self.state_dict().keys()
        names = {
            name: name if name in expected else self.config.family.state_to_ours(name, self.task) for name in state_dict
        }
        renamed = any(name != ours for name, ours in names.items())
        lacking = {name: other for name, other in self.tied_pairs().items() if name not in names.values()}
        if renamed or lacking:
            completed = OrderedDict((names[name], tensor) for name, tensor in state_dict.items())
            completed.update({name: completed[other] for name, other in lacking.items() if other in completed})
            completed._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
            state_dict = completed
        return super().load_state_dict(state_dict, strict, assign)

    def _translated(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns a checkpoint's tensors under fastbert's names, and the names in the checkpoint."""
        stored: dict[str, str] = {}
        for name in state:
            ours = self.config.family.state_to_ours(name, self.task)
            stored[name if ours in stored else ours] = name
        translated = self.config.family.cut({ours: state[name] for ours, name in stored.items()})
        return translated, {ours: stored.get(ours, ours) for ours in translated}

    def _stored_names(self, names: list[str]) -> list[str]:
        """Returns the names of these parameters in a checkpoint of the family."""
        return [self.config.family.state_to_theirs(name, self.task) for name in names]

    def _report_missing(self, missing: list[str], src: str) -> list[str]:
        """Raises for missing weights of the encoder, warns of the others; returns the names to initialise."""
        parts = "embeddings.", "embeddings_project.", "encoder."
        backbone = [name for name in missing if name.removeprefix("bert.").startswith(parts)]
        if backbone:
            names = listed(self._stored_names(backbone))
            raise ValueError(f"{src}: the checkpoint lacks {names}, which {type(self).__name__} needs")
        if missing:
            names = listed(self._stored_names(missing))
            logger.warning("%s: the checkpoint lacks %s: freshly initialised; train it before use", src, names)
        return missing

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        max_shard_size: int | str = 5 * 2**30,
        variant: str | None = None,
        **arguments: Any,
    ) -> None:
        """Writes config.json and safetensors that transformers and fastbert read, under the family's names.

        is_main_process: False writes no file. state_dict: other tensors under the model's names. max_shard_size: bytes,
        or text such as "5GB". variant: "fp16" writes model.fp16.safetensors. Arguments of transformers without an
        effect are logged; push_to_hub is an error.
        """
        check_saving(arguments)
        limit = n_bytes(max_shard_size)
        if not is_main_process:
            return
        chosen, reason = self.dtype_choice or (torch.float32, "")
        if self.dtype == chosen != torch.float32:  # which is the checkpoint's
            logger.warning("save_pretrained: writes %s weights: %s", self.dtype, reason)
        state = self.state_for_file(state_dict)
        self.save_config(save_directory)
        write_state_dict(state, save_directory, max_shard_size=limit, variant=variant)

    def save_config(self, folder: str | os.PathLike[str]) -> None:
        """Writes only config.json."""
        self.config.architectures = [self.config.family.class_name(type(self).__name__)]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)

    def state_for_file(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state dict, or the given one, under the family's names, without other names of tied tensors."""
        state = self.state_dict() if state_dict is None else state_dict
        tied = self.tied_pairs()
        kept = {name: tensor for name, tensor in state.items() if tied.get(name) not in state}
        family = self.config.family
        return {family.state_to_theirs(name, self.task): tensor for name, tensor in kept.items()}


def resolve_dtype(dtype: str | torch.dtype, config: BertConfig, state: Mapping[str, Tensor]) -> torch.dtype:
    """Returns the dtype of an argument; "auto" is the checkpoint's. Raises ValueError for an unsupported one."""
    resolved: Any
    if isinstance(dtype, torch.dtype):
        resolved = dtype
    elif dtype == "auto":
        stored = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
        resolved = stored if config.dtype is None else getattr(torch, config.dtype)
    else:
        resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
    if not isinstance(resolved, torch.dtype) or str(resolved).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype: expected 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return resolved


def any_in_training(module: nn.Module) -> bool:
    """Tells whether the module or one below it is in training mode, without a generator for each."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        one = waiting.pop()
        if one is None:
            continue
        if one.training:
            return True
        waiting += one._modules.values()
    return False


def listed(names: list[str], most: int = 10) -> str:
    """Joins names for a message."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
