"""Our own models work in transformers' Trainer and pipelines, and in PEFT."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import fastbert

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
IDS, MASK = torch.arange(5, 13).view(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
ROW = {"input_ids": torch.arange(5, 13), "attention_mask": torch.tensor([1] * 6 + [0, 0])}
LABELS = {
    "BertForSequenceClassification": torch.tensor(1),
    "BertForMaskedLM": torch.arange(5, 13),
    "BertForTokenClassification": torch.tensor([0, 1] * 4),
}


def make(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fastbert, name)(fastbert.BertConfig.from_dict({**SIZES, **settings})).eval()


def train(model: Any, labels: Tensor, out: Path, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(out), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
        learning_rate=1e-2, **settings,
    )  # fmt: skip
    data = [{**ROW, "labels": labels}] * 4
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_trainer(name: str, family: str, tmp_path: Path) -> None:
    """Catches a checkpoint without config.json, under other names, or that cannot be written, resumed or loaded."""
    settings = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40} if family == "distilbert" else {}
    model = make(name, model_type=family, max_position_embeddings=40, num_labels=3, pad_token_id=1, **settings)
    arguments = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "num_train_epochs": 2,
        "load_best_model_at_end": True,
    }
    trainer = train(model, LABELS[name], tmp_path / "out", **arguments)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] >= 0
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(checkpoints) == 2
    trainer.save_model(str(tmp_path / "saved"))
    model.eval()
    with torch.no_grad():
        expected = model(IDS, MASK).logits
        for cls in (getattr(fastbert, name), getattr(transformers, f"AutoModelFor{name[7:]}")):
            again = cls.from_pretrained(tmp_path / "saved").eval()
            torch.testing.assert_close(
                again(IDS, MASK).logits[MASK.bool()] if expected.dim() == 3 else again(IDS, MASK).logits,
                expected[MASK.bool()] if expected.dim() == 3 else expected, rtol=1e-4, atol=1e-5,
            )  # fmt: skip
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["model_type"] == family and config["architectures"] == [model.config.family.class_name(name)]
    stored = load_file(tmp_path / "saved/model.safetensors")
    model.save_pretrained(tmp_path / "ours")
    assert stored.keys() == load_file(tmp_path / "ours/model.safetensors").keys()

    resumed = train(
        make(name, **model.config.to_dict()), LABELS[name], tmp_path / "out", **{**arguments, "num_train_epochs": 3}
    )
    resumed.train(resume_from_checkpoint=str(checkpoints[-1]))
    assert resumed.state.global_step == 6


def test_trainer_of_others_is_untouched(tmp_path: Path) -> None:
    """Catches our hand in Trainer that changes what it does for models of transformers, or for plain modules."""
    make("BertModel")

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    train(theirs, LABELS["BertForMaskedLM"], tmp_path / "a").save_model()
    train(Plain(), LABELS["BertForMaskedLM"], tmp_path / "b").save_model()
    assert (tmp_path / "a/config.json").exists() and not (tmp_path / "b/config.json").exists()
    assert load_file(tmp_path / "b/model.safetensors").keys() == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("first", ["import transformers.trainer", "", "import transformers"])
def test_trainer_imported_before_or_after(first: str, tmp_path: Path) -> None:
    """Catches help for Trainer that depends on the order of imports."""
    code = f"""
{first}
import fastbert, torch
model = fastbert.BertForMaskedLM(fastbert.BertConfig(**{SIZES}))
from transformers import Trainer, TrainingArguments
out = {str(tmp_path)!r}
Trainer(model=model, args=TrainingArguments(output_dir=out, report_to=[], use_cpu=True)).save_model()
import os
assert {{"config.json", "model.safetensors"}} <= set(os.listdir(out)), os.listdir(out)
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gradient_checkpointing() -> None:
    """Catches gradients that differ, or a switch that does nothing."""
    model = make("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    assert not model.is_gradient_checkpointing

    def gradient() -> tuple[Tensor, int]:
        model.zero_grad()
        calls = []
        handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda *args: calls.append(1))
        model(IDS, MASK, labels=torch.tensor([0, 1])).loss.backward()
        handle.remove()
        return model.bert.embeddings.word_embeddings.weight.grad.clone(), len(calls)

    expected, once = gradient()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    came, twice = gradient()
    torch.testing.assert_close(came, expected)
    assert (once, twice) == (1, 2)
    model.activation_checkpointing_enable(every_n_layers=2)
    layers = [model.bert.encoder.checkpoint_of(i) is not None for i in range(4)]
    assert layers == [True, False, True, False]
    model.gradient_checkpointing_disable()
    assert gradient()[1] == 1


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False, "every_n_layers": 2}])
def test_trainer_checkpoints(options: dict[str, Any], tmp_path: Path) -> None:
    """Catches names of arguments with which the installed Trainer turns checkpointing on, and we do not know."""
    if options and not hasattr(transformers.TrainingArguments, "activation_checkpointing_kwargs"):
        pytest.skip("Trainer of this transformers has no every_n_layers")
    model = make("BertForSequenceClassification")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=True, gradient_checkpointing_kwargs=options or None,
    )  # fmt: skip
    rows = [{"input_ids": IDS[0], "attention_mask": MASK[0], "labels": torch.tensor(1)}] * 4
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert model.is_gradient_checkpointing and model.bert.encoder.checkpointed_every == options.get("every_n_layers", 1)


@pytest.mark.parametrize(
    ("arguments", "name"), [({"offload": True}, "offload"), ({"every_n_layers": 0}, "every_n_layers")]
)
def test_refused_checkpointing(arguments: dict[str, Any], name: str) -> None:
    """Catches an argument of transformers' method that is taken and does nothing."""
    with pytest.raises(ValueError, match=name):
        make("BertModel").activation_checkpointing_enable(**arguments)


def test_embeddings() -> None:
    """Catches a vocabulary that grows in one place alone, or names that tools ask for and nobody has."""
    model = make("BertForMaskedLM")
    before = model(IDS, MASK).logits
    assert model.base_model is model.bert and model.bert.base_model is model.bert and not model.can_generate()
    table = model.resize_token_embeddings(60)
    assert table is model.get_input_embeddings() and table.weight.shape == (60, 32) and model.config.vocab_size == 60
    assert model.get_output_embeddings().weight is table.weight and model.cls.predictions.bias.shape == (60,)
    torch.testing.assert_close(model(IDS, MASK).logits[..., :50], before)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, MASK).logits[..., :50], before)
        assert model(torch.tensor([[59]])).logits.shape == (1, 1, 60)
    torch.testing.assert_close(table.weight[55], table.weight[:50].mean(0))
    model.resize_token_embeddings(40, pad_to_multiple_of=16)
    assert model.config.vocab_size == 48 and model.resize_token_embeddings().num_embeddings == 48
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**{**SIZES, "vocab_size": 48}))
    assert model.num_parameters() == theirs.num_parameters()
    assert set(model.all_tied_weights_keys) <= set(model.state_dict())
    model.load_state_dict(theirs.state_dict())
    del (state := theirs.state_dict())["cls.predictions.decoder.weight"]
    model.load_state_dict(state)  # as files have it


METHODS = {
    "lora": peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"),
    "lora on embeddings": peft.LoraConfig(target_modules=["word_embeddings", "dense"], task_type="SEQ_CLS"),
    "dora": peft.LoraConfig(target_modules=["query"], use_dora=True, task_type="SEQ_CLS"),
    "ia3": peft.IA3Config(
        target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
    ),
    "adalora": peft.AdaLoraConfig(target_modules=["query"], total_step=10, task_type="SEQ_CLS"),
    "boft": peft.BOFTConfig(target_modules=["query"], boft_block_size=4, task_type="SEQ_CLS"),
    "oft": peft.OFTConfig(target_modules=["query"], oft_block_size=4, task_type="SEQ_CLS"),
    "loha": peft.LoHaConfig(target_modules=["query"], task_type="SEQ_CLS"),
    "lokr": peft.LoKrConfig(target_modules=["query"], task_type="SEQ_CLS"),
    "vera": peft.VeraConfig(target_modules=["query"], r=4, task_type="SEQ_CLS"),
    "layer norms": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("method", METHODS)
def test_peft(method: str, tmp_path: Path) -> None:
    """Catches a method of PEFT that fails on our models, or gives other logits or gradients than on transformers'."""
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    ours = make("BertForSequenceClassification")
    ours.load_state_dict(theirs.state_dict())
    base = copy.deepcopy(ours)
    wrapped = [peft.get_peft_model(model, copy.deepcopy(METHODS[method])).eval() for model in (theirs, ours)]
    torch.manual_seed(1)
    tuned = {name: torch.randn_like(t) * 0.1 for name, t in peft.get_peft_model_state_dict(wrapped[0]).items()}
    grads = []
    if method == "p-tuning":  # whose encoder of prompts is no part of that
        wrapped[1].prompt_encoder.load_state_dict(wrapped[0].prompt_encoder.state_dict())
    for model in wrapped:
        peft.set_peft_model_state_dict(model, copy.deepcopy(tuned))
        model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    with torch.no_grad():
        expected, came = (model(input_ids=IDS, attention_mask=MASK).logits for model in wrapped)
    torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-3, atol=1e-6)

    wrapped[1].save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS, attention_mask=MASK).logits, came)
        if hasattr(wrapped[1], "merge_and_unload"):
            merged = wrapped[1].merge_and_unload()
            torch.testing.assert_close(merged(IDS, MASK).logits, came, rtol=1e-4, atol=1e-5)


def test_prefix_tuning_is_refused_by_name() -> None:
    """Catches prefix tuning that fails somewhere inside, or that runs without its prefix."""
    model = peft.get_peft_model(
        make("BertForSequenceClassification"), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="past_key_values: .*prefix tuning"):
        model(input_ids=IDS)


def test_attentions_of_an_adapter() -> None:
    """Catches output_attentions that leaves the adapter out."""
    config = transformers.BertConfig(**SIZES, attn_implementation="eager")
    theirs = transformers.BertForSequenceClassification(config).eval()
    ours = make("BertForSequenceClassification")
    ours.load_state_dict(theirs.state_dict())
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        )
        outputs.append(wrapped.eval()(input_ids=IDS, output_attentions=True))
    for expected, came in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-6)


def test_pipelines(tmp_path: Path) -> None:
    """Catches a pipeline of transformers that does not take our models."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    texts = ["w1 w2 w3", "w4"]
    for task, name in {
        "text-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "fill-mask": "BertForMaskedLM",
    }.items():
        ours = make(name)
        theirs = getattr(transformers, name)(transformers.BertConfig(**SIZES)).eval()
        theirs.load_state_dict(ours.state_dict())
        inputs = [f"{text} [MASK]" for text in texts] if task == "fill-mask" else texts
        expected, came = (transformers.pipeline(task, model=m, tokenizer=tokenizer)(inputs) for m in (theirs, ours))
        assert type(came) is type(expected) and len(came) == len(expected)
        if task == "text-classification":
            assert [row["label"] for row in came] == [row["label"] for row in expected]


def test_feature_extraction_pipeline(tmp_path: Path) -> None:
    """Catches outputs that this pipeline, which copies them into plain dicts, cannot take."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    ours = make("BertModel")
    ours.config.return_dict = False
    vectors = transformers.pipeline("feature-extraction", model=ours, tokenizer=tokenizer)("w1 w2")
    torch.testing.assert_close(torch.tensor(vectors), ours(**tokenizer("w1 w2", return_tensors="pt"))[0])
