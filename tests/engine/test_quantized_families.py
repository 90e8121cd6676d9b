"""Families with other layers than BERT's run in 8 bits on Triton kernels: accurate, in graphs, without waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from device_stand_in import META, install
from family_cases import config_of_transformers, randomised
from graph_cases import StandIn
from helpers import cu_seqlens_of, rms_error
from model_cases import VOCAB, generator

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("modernbert", {"local_attention": 8}),
    "modernbert, biases": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    "nomic": ("nomic_bert", {}),
    "gte": ("gte", {}),
    "mpnet": ("mpnet", {}),
    "albert": ("albert", {"num_hidden_layers": 4}),
    "electra": ("electra", {}),
    "jina": ("jina", {}),
    "jina code": ("jina", {"_name_or_path": "jinaai/jina-bert-v2-qk-post-norm"}),
    "deberta": ("deberta-v2", {
        "relative_attention": True, "position_buckets": 8, "max_relative_positions": 16, "share_att_key": True,
        "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
        "embedding_size": 64,
    }),
    "deberta, convolution": ("deberta-v2", {
        "relative_attention": False, "position_biased_input": True, "type_vocab_size": 0, "embedding_size": 64,
        "conv_kernel_size": 3, "conv_act": "gelu",
    }),
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str) -> fastbert.BertConfig:
    model_type, options = FAMILIES[family]
    if model_type == "jina":
        settings = {"position_embedding_type": "alibi", "feed_forward_type": "geglu", "emb_pooler": "mean"}
        sizes = {**SIZES, "model_type": "bert", "vocab_size": VOCAB, "max_position_embeddings": 128}
        return fastbert.BertConfig.from_dict({**sizes, **settings, **options})
    return fastbert.BertConfig.from_dict(config_of_transformers(model_type, **{**SIZES, **options}).to_dict())


def twins(family: str, device: torch.device, dtype: torch.dtype, *settings: dict[str, Any]) -> list[Any]:
    """Models with equal weights, one for each settings."""
    models = [fastbert.BertModel(config_of(family), strict=True, **each) for each in settings]
    randomised(models[0])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return [model.eval().to(device, dtype) for model in models]


def states_of(model: Any) -> list[Tensor]:
    """All states of a padded batch whose mask has holes, in one list with those of padding on the right."""
    mask = torch.rand(3, 30, generator=generator(5)) < 0.7
    mask[:, 0], mask[2] = True, torch.arange(30) < 11
    ids = torch.randint(1, VOCAB, mask.shape, generator=generator(6)).to(model.device)
    with torch.no_grad():
        padded = model(ids, mask.long().to(model.device), output_hidden_states=True).hidden_states
    return [state.cpu()[mask] for state in padded]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, of the exponential far on the left
@pytest.mark.parametrize(
    ("family", "precision", "dtype"),
    [*((family, "int8", torch.bfloat16) for family in FAMILIES),
     *((family, "fp8", torch.float32) for family in ("modernbert", "gte", "deberta"))],
    ids=str,
)  # fmt: skip
def test_kernels_give_what_the_emulation_does(
    family: str, precision: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Catches an operand in the wrong place, a gate, a norm, an angle or a window of another layer, or none at all."""
    options = {"precision": precision}
    plain, emulated, ours = twins(
        family, device, dtype, {"backend": "cpu"}, {"backend": "torch", **options}, {"backend": "triton", **options}
    )
    expected = states_of(plain.to("cpu", torch.float64))
    twin, kernels = states_of(emulated), states_of(ours)
    assert len(kernels) == len(expected) > 2
    for state, (mine, theirs, exact) in enumerate(zip(kernels, twin, expected, strict=True)):
        assert mine.dtype == dtype
        error, emulations = rms_error(mine, exact), rms_error(theirs, exact)
        assert error <= 1.25 * emulations + 0.5 * torch.finfo(dtype).eps, f"state {state}: {error}, {emulations}"
        if state:
            assert 1e-3 < emulations < 0.3, f"state {state}: {emulations}"
        if dtype == torch.float32:  # only values that a rounding error takes over a boundary differ
            assert rms_error(mine, theirs) <= 0.2 * emulations + 1e-6, f"state {state}"


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # rows of no text
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("modernbert", "encoder.final_norm.weight"),
        ("gte", "encoder.layer.1.mlp.up_proj.weight"),
        ("mpnet", "encoder.relative_attention_bias.weight"),
        ("deberta", "encoder.rel_embeddings.weight"),
    ],
)
def test_graphs(family: str, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a graph that keeps angles, columns or lengths, or that stays behind a weight or a position bias."""
    from fastbert.engine import capture

    stand_in = StandIn()
    (ours,) = twins(family, device, torch.float32, {"backend": "triton", "precision": "int8"})

    def encode(lengths: list[int], graphs: bool = True) -> Tensor:
        ours.cuda_graphs = graphs
        ids = torch.randint(1, VOCAB, (sum(lengths),), generator=generator(3)).to(device)
        with torch.inference_mode():
            return ours.forward_packed(ids, cu_seqlens_of(lengths, device))

    monkeypatch.setattr(capture, "capturer", lambda device: stand_in)
    first, other = encode([3, 11]), encode([14])
    assert stand_in.captures == 1 and stand_in.replays == 2 and not stand_in.errors
    with torch.no_grad():
        ours.get_parameter(name).mul_(1.5)
    changed = encode([14])
    assert stand_in.captures == 2 and not torch.equal(changed, other) and not torch.equal(first, other)
    assert torch.equal(changed, encode([14], graphs=False))


@pytest.mark.parametrize("family", ["modernbert", "nomic", "gte", "mpnet", "jina"])
def test_no_call_waits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a look at numbers of the device, which "meta" has none of, on the way to a graph or beside one."""
    graphs = install(monkeypatch.setattr)
    with META:
        model: Any = fastbert.BertModel(config_of(family), backend="triton", strict=True, precision="int8")
    model = model.eval().to(torch.bfloat16)
    with torch.inference_mode():
        for i in range(8):
            lengths = [1 + i, 7, 0, 20]
            ids = torch.zeros(sum(lengths), dtype=torch.int64, device=META)
            model.cuda_graphs = i % 4 != 0
            assert model.forward_packed(ids, cu_seqlens_of(lengths)).device == META
    assert graphs.replays == 6


@FAMILY
def test_kernels_are_named(family: str) -> None:
    """Catches an operation that `explain` does not give to its kernel, or a family that falls back on a GPU."""
    (ours,) = twins(family, torch.device("cpu"), torch.bfloat16, {"backend": "triton", "precision": "fp8"})
    report = fastbert.explain(ours, device="cuda:0", arch=90)
    rows = report.rows
    assert not any(row.raises for row in rows) and {row.backend for row in rows} == {"triton"}
    kernels = {row.kernel.removeprefix("fastbert_kernels.") for row in rows}
    wanted = {"quantized_linear_persistent"}
    if family.startswith("modernbert"):
        wanted |= {"quantized_gated_linear_persistent", "rotary", "sum_norm", "attention"}
    if family in ("nomic", "gte", "jina", "jina code"):
        wanted |= {"quantized_gated_linear_persistent", "layer_norm"}
    if family in ("albert", "electra", "deberta"):
        wanted |= {"quantized_rows"}
    assert wanted <= kernels, kernels


def test_what_no_kernel_does_is_named() -> None:
    """Catches an activation that is computed as another one in 8 bits, or a reason that does not name it."""
    options = {"conv_kernel_size": 3, "conv_act": "tanh", **FAMILIES["deberta"][1]}
    config = config_of_transformers("deberta-v2", **{**SIZES, **options})
    model: Any = fastbert.BertModel(
        fastbert.BertConfig.from_dict(config.to_dict()), backend="triton", precision="int8"
    ).eval()
    notes = fastbert.explain(model, device="cuda:0", arch=90).notes
    assert any("there is no Triton kernel for 'tanh'" in note for note in notes)
    gated = fastbert.BertConfig.from_dict(
        config_of_transformers("modernbert", **{**SIZES, "hidden_activation": "mish"}).to_dict()
    )
    model = fastbert.BertModel(gated, backend="triton", precision="int8").eval()
    notes = fastbert.explain(model, device="cuda:0", arch=90).notes
    assert any("there is no Triton kernel for 'mish'" in note for note in notes)
