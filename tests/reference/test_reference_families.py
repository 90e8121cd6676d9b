"""The reference of rotary encoders and of DeBERTa gives what transformers gives, in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from fastbert.reference import deberta as deberta_text
from fastbert.reference import rotary
from reference_cases import error, generator

BOUND = 1e-10
BATCH, VOCAB = 4, 101
MASKS = ("none", "right", "left", "holes", "empty row")
SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 3,
         "max_position_embeddings": 64, "pad_token_id": 0, "attn_implementation": "eager"}  # fmt: skip


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with every parameter random."""
    model, random = model.double().eval(), generator(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 2 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.normal_(generator=random).mul_(scale)
    return model


def mask_of(kind: str, length: int) -> Tensor | None:
    """(BATCH, length) int64; None for no mask."""
    lengths = torch.tensor([length, length * 2 // 3, 1, 5])[:, None]
    columns = torch.arange(length)[None]
    if kind == "none":
        return None
    if kind == "holes":
        mask = torch.rand(BATCH, length, generator=generator(9)) < 0.7
        mask[:, 0] = True
        return mask.long()
    mask = columns < lengths if kind != "left" else columns >= length - lengths
    if kind == "empty row":
        mask = mask & (torch.arange(BATCH) != 2)[:, None]
    return mask.long()


def ids_of(length: int) -> Tensor:
    return torch.randint(1, VOCAB, (BATCH, length), generator=generator(4))


def rotated_in_any_dtype(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    """transformers' own function without its cast to float32, which would hide errors below 1e-8."""
    from transformers.models.gte.modeling_gte import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def compare(reference: rotary.RotaryReference, theirs: object, mask: Tensor | None, last: Tensor | None = None) -> None:
    """Compares the last hidden state, and those before it, where tokens are."""
    valid = torch.ones(BATCH, reference.last_hidden_state.shape[1], dtype=torch.bool) if mask is None else mask != 0
    assert (reference.last_hidden_state[~valid] == 0).all()
    assert error(reference.last_hidden_state[valid], theirs.last_hidden_state[valid]) < BOUND
    for ours, other in list(zip(reference.hidden_states, theirs.hidden_states, strict=True))[:-1]:
        assert error(ours[valid], other[valid]) < BOUND


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [5, 13, 14, 15, 40])
def test_modernbert(mask: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong base, window, norm, gate or half in the reference of ModernBERT; its window reaches 6 columns."""
    from transformers.models.modernbert import modeling_modernbert

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", rotated_in_any_dtype)
    config = transformers.ModernBertConfig(
        **(SIZES | {"attn_implementation": "sdpa"}),  # its eager attention has a softmax in float32
        num_hidden_layers=4, local_attention=12, global_attn_every_n_layers=3, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = randomized(transformers.ModernBertModel(config))
    bases = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
    kinds = config.layer_types
    layers = rotary.RotaryLayers(
        num_heads=3, activation="gelu", eps=config.norm_eps,
        inverse_frequencies=tuple(rotary.inverse_frequencies(16, bases[kind]) for kind in kinds),
        windows=tuple(6 if kind == "sliding_attention" else None for kind in kinds),
    )  # fmt: skip
    assert [window is None for window in layers.windows] == [True, False, False, True]
    ids, attention_mask = ids_of(length), mask_of(mask, length)
    with torch.no_grad():
        theirs = model(ids, attention_mask, output_hidden_states=True)
    compare(rotary.modernbert(model.state_dict(), layers, ids, attention_mask), theirs, attention_mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", ["gte", "gte without segments", "nomic"])
def test_gated_rotary_bert(family: str, mask: str) -> None:
    """Catches a wrong gate, bias, segment or norm in the reference of Nomic and GTE."""
    length = 13
    if family == "nomic":
        config = transformers.NomicBertConfig(**SIZES, num_hidden_layers=2, type_vocab_size=2)
        model, base, activation = transformers.NomicBertModel(config), 1000.0, "silu"
    else:
        segments = 0 if "without" in family else 2
        config = transformers.GteConfig(**SIZES, num_hidden_layers=2, type_vocab_size=segments)
        model, base, activation = transformers.GteModel(config), 160_000.0, "gelu"
    model = randomized(model)
    layers = rotary.RotaryLayers(
        3, activation, config.layer_norm_eps, (rotary.inverse_frequencies(16, base),) * 2, (None,) * 2
    )
    ids, attention_mask = ids_of(length), mask_of(mask, length)
    segments = None if "without" in family else torch.randint(0, 2, ids.shape, generator=generator(8))
    with torch.no_grad():
        theirs = model(ids, attention_mask, token_type_ids=segments, output_hidden_states=True)
    ours = rotary.gated_rotary_bert(model.state_dict(), layers, ids, attention_mask, segments)
    compare(ours, theirs, attention_mask)


DEBERTA = {
    "v3": {"position_buckets": 8, "share_att_key": True, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm",
           "position_biased_input": False, "type_vocab_size": 0, "max_relative_positions": -1},
    "v2 xlarge": {"position_buckets": 8, "share_att_key": True, "pos_att_type": "p2c|c2p",
                  "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
                  "conv_kernel_size": 3, "conv_act": "gelu", "max_relative_positions": -1},
    "own projections": {"position_buckets": 8, "share_att_key": False, "pos_att_type": "c2p|p2c",
                        "norm_rel_ebd": "none", "position_biased_input": True, "type_vocab_size": 2,
                        "max_relative_positions": 24},
    "without buckets": {"position_buckets": -1, "share_att_key": False, "pos_att_type": "c2p",
                        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
                        "max_relative_positions": 10},
    "narrow embeddings": {"position_buckets": 8, "share_att_key": True, "pos_att_type": "p2c",
                          "norm_rel_ebd": "none", "position_biased_input": True, "type_vocab_size": 0,
                          "embedding_size": 20, "max_relative_positions": -1},
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", DEBERTA)
def test_deberta(kind: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong bucket, term, scale, projection or convolution in the reference of DeBERTa."""
    from transformers.models.deberta_v2 import modeling_deberta_v2

    def exact_scale(q: Tensor, n_terms: int) -> Tensor:  # theirs is rounded to float32
        return torch.tensor(float(q.shape[-1] * n_terms), dtype=torch.float64).sqrt()

    monkeypatch.setattr(modeling_deberta_v2, "scaled_size_sqrt", exact_scale)
    options, length = DEBERTA[kind], 40
    config = transformers.DebertaV2Config(**SIZES, num_hidden_layers=2, relative_attention=True, **options)
    model = randomized(transformers.DebertaV2Model(config))
    reach = options["max_relative_positions"]
    settings = deberta_text.DebertaSettings(
        num_hidden_layers=2, num_attention_heads=3, layer_norm_eps=config.layer_norm_eps, activation="gelu",
        position_buckets=options["position_buckets"],
        max_relative_positions=reach if reach > 0 else config.max_position_embeddings,
        pos_att_type=tuple(options["pos_att_type"].split("|")), share_att_key=options["share_att_key"],
        norm_rel_ebd=options["norm_rel_ebd"] == "layer_norm", position_biased_input=options["position_biased_input"],
        conv_kernel_size=options.get("conv_kernel_size", 0), conv_act=options.get("conv_act", "tanh"),
    )  # fmt: skip
    ids, attention_mask = ids_of(length), mask_of(mask, length)
    segments = torch.randint(0, 2, ids.shape, generator=generator(8)) if options["type_vocab_size"] else None
    with torch.no_grad():
        theirs = model(ids, attention_mask, token_type_ids=segments, output_hidden_states=True)
    ours = deberta_text.deberta(model.state_dict(), settings, ids, attention_mask, segments)
    valid = torch.ones(BATCH, length, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    assert (ours.last_hidden_state[~valid] == 0).all()
    for state, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert error(state[valid], other[valid]) < BOUND


def test_deberta_buckets() -> None:
    """Catches a bucket that differs from transformers' at any distance, also beyond the largest one."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(-700, 701)
    for n_buckets, reach in ((256, 512), (8, 64), (32, 128)):
        theirs = make_log_bucket_position(distances, n_buckets, reach).long()
        assert torch.equal(deberta_text.bucket(distances, n_buckets, reach), theirs)
