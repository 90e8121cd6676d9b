"""Layers of every family are launched without a call of their modules, and compute the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from family_cases import config_of_transformers, randomised
from fastbert.engine.launched import LaunchedLayers
from fastbert_kernels import launch
from helpers import cu_seqlens_of, rms_error
from model_cases import VOCAB, generator

LENGTHS = [3, 1, 14]
V3: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "max_relative_positions": 16,
                      "share_att_key": True, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm",
                      "position_biased_input": False, "type_vocab_size": 0, "embedding_size": 32}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("mpnet", {}),
    "albert": ("albert", {}),
    "nomic": ("nomic_bert", {}),
    "gte": ("gte", {}),
    "modernbert": ("modernbert", {}),
    "modernbert, biases": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    "deberta": ("deberta-v2", V3),
    "deberta, convolution": ("deberta-v2", {**V3, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta, one term": ("deberta-v2", {**V3, "pos_att_type": "c2p", "position_buckets": -1}),
    "jina": ("jina", {}),
    "jina code": ("jina", {"_name_or_path": "jinaai/jina-bert-v2-qk-post-norm"}),
    "bert": ("bert", {}),
}
# Kernels and library products of one layer: those of a norm that reads the sum before it among them.
LAUNCHES = {"bert": 7, "mpnet": 7, "albert": 7, "nomic": 8, "gte": 8, "modernbert": 8, "deberta": 9, "jina": 7,
            "jina code": 10}  # fmt: skip


def config_of(family: str, n_layers: int = 2, **sizes: int) -> fastbert.BertConfig:
    """A small config of the family, with a head size that kernels take."""
    model_type, options = FAMILIES[family]
    sizes["num_hidden_layers"] = n_layers
    if model_type in ("bert", "jina"):
        alibi = {"position_embedding_type": "alibi", "feed_forward_type": "geglu", "emb_pooler": "mean"}
        settings = {"model_type": "bert", "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 2,
                    "intermediate_size": 37, "max_position_embeddings": 128, **sizes}  # fmt: skip
        return fastbert.BertConfig.from_dict({**settings, **(alibi if model_type == "jina" else {}), **options})
    theirs = config_of_transformers(model_type, **{**options, **sizes})
    return fastbert.BertConfig.from_dict(theirs.to_dict())


def make(family: str, device: torch.device, dtype: torch.dtype, invariant: bool = False) -> Any:
    """A random model that captures no graphs."""
    model: Any = fastbert.BertModel(config_of(family), backend="triton", strict=True, batch_invariant=invariant)
    model.cuda_graphs = False
    return randomised(model).to(device, dtype).eval()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the layers' kernels were launched without their modules, call by call."""
    taken: list[bool] = []
    run = LaunchedLayers.run

    def noted(*arguments: Any) -> list[Tensor] | None:
        states = run(*arguments)
        taken.append(states is not None)
        return states

    monkeypatch.setattr(LaunchedLayers, "run", noted)
    return taken


def states_of(model: Any) -> list[Tensor]:
    """The last state of packed texts, and all states of a padded batch whose mask has holes."""
    device = model.device
    ids = torch.randint(1, VOCAB, (sum(LENGTHS),), generator=generator(3)).to(device)
    mask = torch.rand(2, 20, generator=generator(5)) < 0.7
    mask[:, 0] = True
    padded = torch.randint(1, VOCAB, mask.shape, generator=generator(6)).to(device)
    with torch.no_grad():
        packed = model.forward_packed(ids, cu_seqlens_of(LENGTHS, device))
        states = model(padded, mask.long().to(device), output_hidden_states=True).hidden_states
    return [packed, *states]


@pytest.mark.parametrize(
    ("family", "invariant"),
    [*((family, False) for family in FAMILIES if family != "bert"), ("gte", True), ("modernbert", True),
     ("jina code", True),      ("deberta", True)],
)  # fmt: skip
def test_same_bits(
    family: str, invariant: bool, device: torch.device, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another kernel, order of sums, place of a bias, angle, window or distance than the operations have."""
    dtype = torch.bfloat16 if invariant else torch.float32
    model = make(family, device, dtype, invariant)
    ours = states_of(model)
    assert runs == [True, True] and all(state.isfinite().all() for state in ours)
    monkeypatch.setattr(LaunchedLayers, "run", lambda *arguments: None)
    expected = states_of(model)
    assert len(ours) == len(expected) == 4
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mpnet", "encoder.relative_attention_bias.weight"),
        ("gte", "encoder.layer.0.mlp.up_proj.weight"),
        ("modernbert", "encoder.final_norm.weight"),
        ("jina code", "encoder.layer.1.mlp.up_gated_layer.weight"),
        ("deberta", "encoder.layer.1.attention.self.key_proj.weight"),
        ("deberta", "encoder.rel_embeddings.weight"),
    ],
)
def test_weights_are_followed(family: str, name: str, device: torch.device, runs: list[bool]) -> None:
    """Catches what is derived, a fused weight or a table of distances, that stays behind the weights."""
    model = make(family, device, torch.float32)
    ids = torch.randint(1, VOCAB, (12,), generator=generator(3)).to(device)

    def encode() -> Tensor:
        with torch.no_grad():
            return model.forward_packed(ids, cu_seqlens_of([12]))

    before = encode()
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    after = encode()
    assert runs == [True, True] and not torch.equal(before, after)
    assert torch.equal(after, encode())
    model.engine.modules.launched.clear()
    assert torch.equal(after, encode())


@pytest.mark.parametrize("family", ["gte", "modernbert", "mpnet", "jina", "jina code", "deberta"])
def test_a_part_that_is_not_plain(family: str, device: torch.device, runs: list[bool]) -> None:
    """Catches a hook inside a layer of another form that is passed by."""
    model = make(family, device, torch.float32)
    before = states_of(model)[0]
    linears = [m for m in model.encoder.layer[1].modules() if isinstance(m, torch.nn.Linear)]
    for linear in (linears[0], linears[-1]):
        handle = linear.register_forward_hook(lambda module, inputs, output: output.abs())
        assert not torch.equal(states_of(model)[0], before)
        handle.remove()
    assert not any(runs[2:])


@pytest.mark.parametrize("family", ["gte", "modernbert", "jina", "jina code"])
def test_a_product_with_its_gate(
    family: str, device: torch.device, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a listener that does not see the whole product, where one kernel would multiply and gate."""
    model = make(family, device, torch.bfloat16)
    kernels = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda k, *a, **b: kernels.append(k.__name__) or run(k, *a, **b))
    before = states_of(model)[0]
    assert "_gated_linear_kernel" in kernels and "_gated_kernel" not in kernels
    up = next(m for m in model.encoder.layer[1].mlp.modules() if isinstance(m, torch.nn.Linear))
    seen: list[Tensor] = []
    handle = up.register_forward_hook(lambda module, inputs, output: seen.append(output))
    heard = states_of(model)[0]
    handle.remove()
    assert seen[0].shape[-1] == up.weight.shape[0] and "_gated_kernel" in kernels
    assert rms_error(heard, before) < 0.03  # the product is rounded before its gate
    assert torch.equal(states_of(model)[0], before)


def launches_of(model: Any, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels and library products of a batch, with their block sizes, in order; the batch runs twice."""
    seen: list[Any] = []
    linear = torch.nn.functional.linear

    def product(*arguments: Any) -> Tensor:
        seen.append("library")
        return linear(*arguments)

    def launched(kernel: Any, grid: Any, config: Any, **arguments: Any) -> None:
        seen.append((kernel.__name__, grid, config))

    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(launch, "run", launched)
        model.forward_packed(ids, cu_seqlens_of(lengths))
        seen.clear()
        patch.setattr(torch.nn.functional, "linear", product)
        model.forward_packed(ids, cu_seqlens_of(lengths))
    return seen


@pytest.fixture
def make_wide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a model of a family with the tiles of compute capability 9.0, of sizes for which there are several."""
    monkeypatch.setattr(launch, "_recorded_arch", 90)

    def make_model(family: str, n_layers: int) -> Any:
        narrow = {"embedding_size": 128} if family == "deberta" else {}
        config = config_of(
            family, n_layers, hidden_size=128, intermediate_size=256, max_position_embeddings=128, **narrow
        )
        model: Any = fastbert.BertModel(config, backend="triton", strict=True)
        model.cuda_graphs = False
        return model.eval().to(torch.bfloat16)

    return make_model


@pytest.mark.parametrize("family", LAUNCHES)
def test_launches_of_a_layer(family: str, make_wide: Any, runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel more a layer than NOTES counts."""
    counts = [len(launches_of(make_wide(family, n_layers), [9], monkeypatch)) for n_layers in (2, 4)]
    assert all(runs) and counts[1] - counts[0] == 2 * LAUNCHES[family]


@pytest.mark.parametrize("family", ["bert", "mpnet", "gte", "jina", "deberta"])
def test_tiles_of_the_operations(
    family: str, make_wide: Any, runs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches layers without the tiles for few rows or short texts that the operations choose."""
    model = make_wide(family, 2)
    for lengths in ([9], [100] * 6):
        ours = launches_of(model, lengths, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(LaunchedLayers, "run", lambda *arguments: None)
            expected = launches_of(model, lengths, monkeypatch)
        assert ours == expected
    assert all(runs)
