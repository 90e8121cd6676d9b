"""Other encoders give with attn_implementation="fastbert" what they give with SDPA, and padding stays out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastbert.adapters import attention, register_attention, versions
from model_cases import assert_close, randomise

MODERN = versions.transformers_version()[0] >= 5
needs_5 = pytest.mark.skipif(not MODERN, reason="encoders of transformers 4 do not read the interface")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "max_position_embeddings": 40},
    "Electra": {**SIZES, "embedding_size": 16},
    "Albert": {**SIZES, "embedding_size": 16},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 37},
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    attention.counts.clear()
    yield
    attention.counts.clear()


def model_of(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(vocab_size=99, **{**MODELS.get(name, SIZES), **options})
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{name}Model")(config).double().eval()
    randomise(model)
    return model


def mask() -> Tensor:
    lengths, columns = torch.tensor([11, 6, 1])[:, None], torch.arange(11)[None]
    rows = (columns < lengths).long()
    return torch.cat([rows, (columns >= 4).long(), torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0]])])


def outputs(model: Any, attention_mask: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The last hidden states by us, and by SDPA."""
    ids = torch.randint(3, 90, (5, 11), generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(model)
    model.set_attn_implementation(register_attention())
    with torch.no_grad():
        return tuple(each(ids, attention_mask=attention_mask, **options)[0] for each in (model, twin))  # type: ignore[return-value]


@needs_5
@pytest.mark.parametrize("name", MODELS)
def test_other_encoders(name: str) -> None:
    """Catches padding that leaks into tokens (differences of 0.01), and a layer that falls back without a reason."""
    model = model_of(name)
    for attention_mask in (mask(), mask().bool(), None, torch.ones(5, 11)):
        ours, expected = outputs(copy.deepcopy(model), attention_mask)
        real = torch.ones(5, 11, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        assert_close(name, ours[real], expected[real])
    assert set(attention.counts) == {"fastbert"} and attention.counts["fastbert"] == 8


@needs_5
def test_padding_does_not_matter() -> None:
    """Catches a mask function that is not registered, so that what stands at padding changes tokens."""
    model = model_of("Roberta")
    model.set_attn_implementation(register_attention())
    ids = torch.randint(3, 90, (5, 11))
    changed = torch.where(mask().bool(), ids, 17)
    positions = torch.arange(11).expand(5, 11) + 2
    with torch.no_grad():
        one, two = (model(x, attention_mask=mask(), position_ids=positions)[0][mask().bool()] for x in (ids, changed))
    assert torch.equal(one, two)


@needs_5
def test_gradients_and_one_packing_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gradients that stop, and a look at the mask in every layer, which waits for a GPU."""
    from fastbert.ops import packing

    looks = []
    unpad = packing.unpad
    monkeypatch.setattr(packing, "unpad", lambda m: looks.append(1) or unpad(m))
    model, ids, real = model_of("Roberta"), torch.randint(3, 90, (5, 11)), mask().bool()
    gradients = []
    for name in (register_attention(), "sdpa"):
        each = copy.deepcopy(model)
        each.set_attn_implementation(name)
        (each(ids, attention_mask=mask())[0][real] ** 2).sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert len(looks) == 1
    for name, gradient in gradients[1].items():
        if "key.bias" not in name:
            assert_close(name, gradients[0][name], gradient, 1e-8)


@needs_5
@pytest.mark.parametrize("case", ["training", "4-D mask", "causal", "windows", "traced", "attentions"])
def test_what_is_not_plain_goes_to_sdpa(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches dropout, a mask of pairs, causality or windows that are passed over in silence."""
    attention_mask: Any = mask()
    if case == "windows":
        if not hasattr(transformers.models.modernbert.modeling_modernbert, "ALL_ATTENTION_FUNCTIONS"):
            pytest.skip("ModernBERT of this version does not read the interface")
        model = model_of("ModernBert", pad_token_id=0, local_attention=4, global_attn_every_n_layers=2,
                         eos_token_id=1, bos_token_id=1, cls_token_id=1, sep_token_id=1)  # fmt: skip
    else:
        model = model_of("Bert", **({"is_decoder": True, "use_cache": False} if case == "causal" else {}))
    if case == "training":
        model.train()
    if case == "4-D mask":
        attention_mask = (mask()[:, None, :, None] & mask()[:, None, None, :]).bool()
    reasons = {
        "training": "dropout of the probabilities",
        "4-D mask": "a mask with more than padding",
        "causal": "a mask with more than padding",
        "windows": "a mask with more than padding",
    }
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "fastbert"):
        if case == "traced":
            twin = copy.deepcopy(model)
            twin.set_attn_implementation(register_attention())
            ids = torch.randint(3, 90, (5, 11))
            exported = torch.export.export(twin, (ids, mask().flip(1))).module()
            with torch.no_grad():
                real = mask().bool()
                assert_close(case, exported(ids, mask())[0][real], model(ids, attention_mask=mask())[0][real])
            assert not attention.counts
            return
        if case == "training":
            model.set_attn_implementation(register_attention())
            model(torch.ones(1, 4, dtype=torch.int64))
        elif case == "attentions":
            ours, expected = outputs(model, attention_mask, output_attentions=True)
            assert_close(case, ours[mask().bool()], expected[mask().bool()])
            return
        else:
            ours, expected = outputs(model, attention_mask)
            assert_close(case, ours[mask().bool()], expected[mask().bool()])
    assert attention.counts[reasons[case]] >= 1
    assert f"falls back to sdpa: {reasons[case]}" in caplog.text


@needs_5
def test_registering_again() -> None:
    """Catches a name that transformers takes for flash attention, or a model that does not load by the name."""
    assert register_attention() == register_attention() == "fastbert"
    config = transformers.BertConfig(**SIZES, vocab_size=99, attn_implementation="fastbert")
    model = transformers.AutoModel.from_config(config, attn_implementation="fastbert").eval()
    with torch.no_grad():
        model(torch.ones(2, 3, dtype=torch.int64))
    assert model.config._attn_implementation == "fastbert" and attention.counts == {"fastbert": 2}


@pytest.mark.skipif(MODERN, reason="transformers 5 has the interface")
def test_transformers_4_has_no_interface() -> None:
    """Catches a registration that no encoder reads, so that models run by something else in silence."""
    with pytest.raises(RuntimeError, match="needs transformers 5.0"):
        register_attention()


def other_obstacles() -> dict[str, dict[str, Any]]:
    x = torch.zeros(2, 4, 5, 8)
    return {
        "queries and keys of different lengths": {"query": x[:, :, :3]},
        "keys or values whose shape differs from the queries'": {"key": x[:, :2], "value": x[:, :2]},
        "causal attention": {"is_causal": True},
        "the argument sliding_window": {"sliding_window": 4},
        "the argument softcap": {"softcap": 1.0},
    }


@pytest.mark.parametrize("reason", other_obstacles())
def test_other_obstacles(reason: str) -> None:
    """Catches an argument of the interface that changes the attention, taken for one that does not."""
    x = torch.zeros(2, 4, 5, 8)
    call: dict[str, Any] = {"query": x, "key": x, "value": x, "is_causal": False, **other_obstacles()[reason]}
    query, key, value, causal = (call.pop(name) for name in ("query", "key", "value", "is_causal"))
    assert attention._obstacle(query, key, value, None, 0.0, causal, call) == reason
    harmless = {"position_ids": torch.arange(5), "sliding_window": None, "output_attentions": False}
    assert attention._obstacle(x, x, x, None, 0.0, False, harmless) is None
