"""attn_implementation="fastbert" refuses a model of transformers by name, or gives the numbers of eager."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

from fastbert.adapters import attention, register_attention, versions
from model_cases import assert_close, randomise

pytestmark = pytest.mark.skipif(
    versions.transformers_version()[0] < 5, reason="encoders of transformers 4 do not read the interface"
)
B, S, VOCAB = 3, 10, 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
SHORT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
XLM = {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "pad_index": 1}
# Class -> what its config takes beside SIZES, or instead where it names the vocabulary itself.
READ: dict[str, dict[str, Any]] = {
    "AlbertModel": {"embedding_size": 16},
    "BertModel": {},
    "BertGenerationEncoder": {},
    "CamembertModel": {},
    "Data2VecTextModel": {},
    "DistilBertModel": {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "ElectraModel": {"embedding_size": 16},
    "ErnieModel": {},
    "EsmModel": {"mask_token_id": 5},
    "LayoutLMModel": {},
    "MarkupLMModel": {"max_depth": 4},
    "MobileBertModel": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "ModernBertModel": {"local_attention": 4, "cls_token_id": 0, "sep_token_id": 2},
    "RobertaModel": {},
    "RobertaPreLayerNormModel": {},
    "RoCBertModel": {"enable_pronunciation": False, "enable_shape": False},
    "SplinterModel": {},
    "XLMRobertaModel": {},
    "XLMRobertaXLModel": {},
    "BartModel": SEQ2SEQ,
    "MarianModel": {**SEQ2SEQ, "pad_token_id": 1},
    "GPT2Model": SHORT,
    "LlamaModel": {},
}
if hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS"):  # not in the first 5.x
    READ["T5Model"] = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "BigBirdModel": {"attention_type": "original_full"},
    "CanineModel": {},
    "ConvBertModel": {"embedding_size": 32},
    "DebertaModel": {},
    "DebertaV2Model": {},
    "FlaubertModel": XLM,
    "IBertModel": {},
    "LongformerModel": {"attention_window": 4},
    "LukeModel": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "MegatronBertModel": {},
    "MPNetModel": {},
    "MraModel": {},
    "NystromformerModel": {},
    "RemBertModel": {"input_embedding_size": 32, "output_embedding_size": 32},
    "RoFormerModel": {},
    "SqueezeBertModel": {"embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
                         "intermediate_groups": 1, "output_groups": 1},
    "TapasModel": {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4]},
    "VisualBertModel": {},
    "XLMModel": XLM,
    "YosoModel": {},
    "CodeGenModel": SHORT,
    "GPTJModel": SHORT,
    "GPTNeoModel": {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
                    "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "XGLMModel": {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}  # fmt: skip


def config_of(name: str, implementation: str) -> Any:
    options = {**READ, **OWN}[name]
    kind = getattr(transformers, name).config_class
    config = kind(**(options if "vocab_size" in options else {**SIZES, **options}))
    config._attn_implementation = implementation
    return config


def pair(name: str) -> tuple[Any, Any]:
    """The same weights with eager attention and with ours."""
    kind = getattr(transformers, name)
    register_attention()
    plain, ours = (kind(config_of(name, each)).eval() for each in ("eager", "fastbert"))
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def compare(name: str, plain: Any, ours: Any) -> None:
    """Compares at the real tokens, with padding on the right, on the left and none."""
    ids = torch.randint(5, VOCAB, (B, S), generator=torch.Generator().manual_seed(0))
    right = (torch.arange(S)[None] < torch.tensor([10, 4, 1])[:, None]).long()
    decodes = "decoder_input_ids" in inspect.signature(plain.forward).parameters
    for mask in (right, right.flip(1), torch.ones_like(right), None):
        batch = {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids} if decodes else {})}
        with torch.no_grad():
            expected, output = (each(**batch)[0] for each in (plain, ours))
        real = torch.ones(B, S, dtype=torch.bool) if decodes or mask is None else mask.bool()
        assert_close(name, output[:, :S][real], expected[:, :S][real], 2e-5)


@pytest.mark.parametrize("name", READ)
def test_what_reads_the_interface(name: str) -> None:
    """Catches a class that is refused without need, and padding, causality or biases that get lost in ours."""
    attention.counts.clear()
    compare(name, *pair(name))
    assert sum(attention.counts.values()) > 0


@pytest.mark.parametrize("name", OWN)
def test_what_does_not_read_it_is_refused_by_name(name: str) -> None:
    """Catches attention that never runs, in silence."""
    with pytest.raises(ValueError, match=rf'attn_implementation="fastbert": {name} .*use attn_implementation="eager"'):
        pair(name)


@pytest.mark.parametrize("name", OWN)
def test_attention_of_their_own_gets_the_mask_of_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mask of bools that a model adds to its scores, so that it attends to padding."""
    monkeypatch.setattr(versions, "reads_attention_interface", lambda kind: True)
    try:
        plain, ours = pair(name)
    except KeyError:  # attention by a table of names, which ours is not in
        assert name in ("GPTJModel", "GPTNeoModel")
        return
    compare(name, plain, ours)


def test_cross_attention_of_equal_lengths() -> None:
    """Catches the padding of an encoder's states taken for that of a decoder's tokens, whose rows become zeros."""
    name = register_attention()
    plain, ours = (
        transformers.BertLMHeadModel(
            transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True, use_cache=False,
                                    attn_implementation=each)).eval()
        for each in ("eager", name)
    )  # fmt: skip
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    batch = {"input_ids": torch.randint(5, VOCAB, (2, S)), "encoder_hidden_states": torch.randn(2, S, 32),
             "encoder_attention_mask": (torch.arange(S)[None] < torch.tensor([[S], [3]])).long()}  # fmt: skip
    with torch.no_grad():
        assert_close("cross", ours(**batch).logits, plain(**batch).logits, 2e-5)


def test_loading_and_setting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a way to the name past the check: a folder, AutoModel, a config, set_attn_implementation."""
    name = register_attention()
    plain = transformers.MPNetModel(config_of("MPNetModel", "eager")).eval()
    plain.save_pretrained(tmp_path)
    refusals: list[Any] = [
        lambda: transformers.MPNetModel.from_pretrained(tmp_path, attn_implementation=name),
        lambda: transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=name),
        lambda: transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation={"": name}),
        lambda: transformers.AutoModel.from_config(plain.config, attn_implementation=name),
        lambda: transformers.MPNetForMaskedLM(transformers.MPNetConfig(attn_implementation=name)),
    ]
    for load in refusals:
        with pytest.raises(ValueError, match=r"MPNet(Model|ForMaskedLM) has its own attention"):
            load()
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    model.set_attn_implementation(name)  # of which transformers says that it has no effect
    compare("set", plain, model)


def test_saving(tmp_path: Path) -> None:
    """Catches a folder that nobody can load without us."""
    model = transformers.BertModel(config_of("BertModel", register_attention()))
    model.save_pretrained(tmp_path)
    assert "fastbert" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModel.from_pretrained(tmp_path).config._attn_implementation != "fastbert"


def composite(implementation: Any) -> Any:
    text = transformers.MPNetConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                           num_attention_heads=4, image_size=8, patch_size=4)  # fmt: skip
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    config._attn_implementation = implementation
    return transformers.VisionTextDualEncoderModel(config).double().eval()


def test_parts_of_a_model() -> None:
    """Catches a tower that reads no interface inside a model whose other towers do."""
    name = register_attention()
    with pytest.raises(ValueError, match="MPNetModel has its own attention"):
        composite(name)
    plain, ours = composite("eager"), composite({"": "eager", "vision_config": name, "text_config": "eager"})
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    attention.counts.clear()
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
             "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}  # fmt: skip
    with torch.no_grad():
        output, expected = ours(**batch), plain(**batch)
    assert_close("text", output.text_embeds, expected.text_embeds)
    assert_close("vision", output.image_embeds, expected.image_embeds, 1e-7)
    assert attention.counts == {"fastbert": 2}


class Mine(transformers.BertPreTrainedModel):
    """A user's model that makes the mask by transformers' function, and adds it to its scores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> tuple[Tensor]:
        from transformers.masking_utils import create_bidirectional_mask

        x = self.embeddings(input_ids)
        mask: Any = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        scores = (x @ x.transpose(1, 2))[:, None]
        return ((scores if mask is None else scores + mask).softmax(-1)[:, 0] @ x,)


def test_a_user_s_model_that_adds_the_mask(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a mask that only our attention understands."""
    register_attention()
    plain, ours = (Mine(config_of("BertModel", each)).eval() for each in ("eager", "fastbert"))
    ours.load_state_dict(plain.state_dict())
    with caplog.at_level(logging.WARNING, "fastbert"):
        compare("a user's", plain, ours)


def test_a_mask_that_was_written_to() -> None:
    """Catches the padding of before kept for a mask that a layer has changed."""
    from transformers.masking_utils import bidirectional_mask_function

    mask = attention.attention_mask(
        batch_size=2, q_length=3, kv_length=3, mask_function=bidirectional_mask_function, dtype=torch.float32,
        attention_mask=torch.tensor([[True, True, True], [True, True, False]]),
    )  # fmt: skip
    assert mask is not None and mask.shape == (2, 1, 3, 3) and mask[1, 0, 0, 2] == torch.finfo(torch.float32).min
    mask_facts = attention._made(mask)
    assert (
        mask_facts is not None
        and mask_facts.padding
        and mask_facts.bools is not None
        and mask_facts.bools.stride(2) == 0
    )
    mask[:, :, :1, 0].fill_(-1.0)
    assert attention._made(mask) is None and attention._made(mask + 1) is None
