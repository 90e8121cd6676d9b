"""`pretrain` makes a model of text: it learns, its folder is read by others, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pretraining_cases as cases
from fastbert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, Tokenizer
from fastbert.training import loop
from fastbert.training.data.plan import Plan
from fastbert.training.pretrain import pretrain
from fastbert.training.run import BEST, CHECKPOINTS, Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end."""
    output = tmp_path_factory.mktemp("finished") / "model"
    pretrain(cases.settings(output))
    return output


def test_model_learns_more_than_frequencies(tmp_path: Path) -> None:
    """Catches a loop that does not learn: the loss of held-out docstrings falls below that of their frequencies."""
    texts = cases.docstrings()
    assert len(texts) > 1000
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, vocab_size=1500).save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = BertConfig(vocab_size=1500, max_position_embeddings=64, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    settings = cases.settings(
        tmp_path / "model", text=(str(tmp_path / "text.jsonl"),), tokenizer=str(tmp_path / "tokenizer"),
        model_config=str(tmp_path / "config.json"), steps=150, tokens_per_step=4096, tokens_per_batch=4096, nsp=False,
        learning_rate=3e-3, warmup=0.1, dropout=0.0, evaluate_every=50, evaluation_tokens=16384,
    )  # fmt: skip
    scores = pretrain(settings).scores
    start = cases.journal(tmp_path / "model")[0]
    assert scores is not None and scores.mlm_loss is not None and scores.mlm_accuracy is not None
    assert scores.mlm_loss < start["unigram_loss"] - 0.2
    assert scores.mlm_accuracy > 1.5 * start["unigram_accuracy"]


def test_transformers_reads_the_result(finished: Path) -> None:
    """Catches a folder that transformers reads with missing weights, with other logits, or with an untied decoder."""
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.BertForPreTraining.from_pretrained(finished, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    inputs = tokenizer(["The [MASK] statement raises an error."], return_tensors="pt")
    ours = BertForPreTraining.from_pretrained(finished, device="cpu").eval()
    with torch.no_grad():
        expected, output = theirs.eval()(**inputs), ours(**inputs)
    torch.testing.assert_close(output.prediction_logits, expected.prediction_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.seq_relationship_logits, expected.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    from safetensors import safe_open

    with safe_open(finished / "model.safetensors", "pt") as file:
        assert "cls.predictions.decoder.weight" not in file.keys()  # noqa: SIM118


def test_commands_read_the_result(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a folder without its tokenizer, or a head that the commands do not find."""
    from fastbert.cli import main

    assert main(["fill-mask", "The [MASK] statement.", "--model", str(finished), "--device", "cpu"]) == 0
    assert main(["next-sentence", "A sentence.", "Another one.", "--model", str(finished), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_folder_has_all_that_a_run_leaves(finished: Path) -> None:
    """Catches a missing curve, card, journal or best model, and more checkpoints than are kept."""
    names = {path.name for path in finished.iterdir()}
    assert {"README.md", "curve.html", "training.jsonl", "run.json", "config.json", BEST} <= names
    assert [path.name for path in sorted((finished / CHECKPOINTS).iterdir())] == ["step-00000008", "step-00000012"]
    lines = cases.journal(finished)
    assert [line["kind"] for line in lines[:2]] == ["start", "train"] and lines[-1]["kind"] == "end"
    assert {"parameters", "steps", "tokens_per_step", "unigram_loss", "unigram_accuracy"} <= lines[0].keys()
    train = [line for line in lines if line["kind"] == "train"]
    assert {"mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "learning_rate", "gradient_norm"} <= train[0].keys()
    best = json.loads((finished / BEST / "complete.json").read_text())["step"]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation"}
    assert losses[best] == min(losses.values())


def test_best_and_last_are_apart(finished: Path) -> None:
    """Catches a best model that holds the state of the optimiser, or cannot be loaded."""
    BertForPreTraining.from_pretrained(finished / BEST)
    Tokenizer.from_pretrained(finished / BEST)
    assert not (finished / BEST / "optimizer.pt").exists()


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_change_no_bit(finished: Path, tmp_path: Path, workers: int) -> None:
    """Catches data that depends on the threads that make it."""
    pretrain(cases.settings(tmp_path / "model", workers=workers))
    assert cases.weights(tmp_path / "model") == cases.weights(finished)
    assert cases.journal(tmp_path / "model") == cases.journal(finished)


def test_another_seed_is_another_run(finished: Path, tmp_path: Path) -> None:
    """Catches a seed that nothing reads."""
    pretrain(cases.settings(tmp_path / "model", seed=1))
    assert cases.weights(tmp_path / "model") != cases.weights(finished)


def test_masked_tokens_alone(tmp_path: Path) -> None:
    """Catches a pooler that gets no gradient, or a head that is not there, where next sentences are not asked for."""
    pretrain(cases.settings(tmp_path / "model", nsp=False, whole_words=True, steps=4))
    model = BertForMaskedLM.from_pretrained(tmp_path / "model")
    assert model.bert.pooler is None
    assert not any("nsp" in name for line in cases.journal(tmp_path / "model") for name in line if name != "nsp")


def test_goes_on_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Catches domain adaptation that does not begin with the checkpoint's weights."""
    first = {}
    for name, source in (("on", str(finished)), ("anew", str(cases.folder() / "model.json"))):
        settings = cases.settings(tmp_path / name, model_config=source, steps=1, learning_rate=1e-9, seed=3)
        first[name] = pretrain(settings).scores.loss
    assert first["on"] < first["anew"] - 0.2


def test_encoder_without_heads_gets_new_ones(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches heads of random weights that nobody hears of, where the checkpoint is an encoder alone."""
    BertModel.from_pretrained(finished).save_pretrained(tmp_path / "encoder")
    pretrain(cases.settings(tmp_path / "model", model_config=str(tmp_path / "encoder"), steps=2))
    assert "cls.predictions" in caplog.text


def test_text_of_its_own_for_evaluation(tmp_path: Path) -> None:
    """Catches documents that are held out although others are there to evaluate."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("A first sentence.\nA second one.\n\nThe other document.\nIt has a second sentence, too.\n")
    pretrain(cases.settings(tmp_path / "model", evaluation_text=(str(held_out),), steps=2))
    start, *_, end = cases.journal(tmp_path / "model")
    assert start["held_out_documents"] == 2 and "mlm_loss" in end


def test_nothing_is_held_out_where_nobody_asks(tmp_path: Path) -> None:
    """Catches an evaluation of nothing."""
    result = pretrain(cases.settings(tmp_path / "model", evaluation_share=0.0, steps=2))
    assert result.scores is None and not (tmp_path / "model" / BEST).exists()


REFUSED = {
    "resume": ({}, "holds a run"),
    "max_length": ({"max_length": 65}, "reads at most 64"),
    "batch": ({"text": ("nowhere.txt",)}, "nowhere.txt"),
    "model": ({"model_config": "giant"}, "model_config: got 'giant'"),
    "one document": ({"evaluation_share": 0.01}, "--no-nsp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, finished: Path, tmp_path: Path) -> None:
    """Catches a run that fails late, or with an error that does not name what is wrong."""
    changed, message = REFUSED[name]
    output = finished if name == "resume" else tmp_path / "model"
    if name == "one document":
        (tmp_path / "one.txt").write_text("One sentence.\nAnother sentence.\n")
        changed = {**changed, "text": (str(tmp_path / "one.txt"),)}
    with pytest.raises((ValueError, OSError), match=message):
        pretrain(cases.settings(output, **changed))


def test_vocabulary_above_the_embedding_is_refused(tmp_path: Path) -> None:
    """Catches ids that the embedding does not hold."""
    config = json.loads((cases.folder() / "model.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hold 100"):
        pretrain(cases.settings(tmp_path / "model", model_config=str(tmp_path / "config.json")))


def test_loss_that_is_not_finite_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that trains on after NaN, loses its good checkpoint, or does not say which documents it was."""
    forward = loop.arguments_of
    seen: list[Any] = []

    def spoiled(batch: Any, device: Any) -> Any:
        seen.append(batch)
        if len(seen) == 12:  # the second batch of step 6; no evaluation is before it
            with torch.no_grad():
                run[0].parts.model.bert.embeddings.LayerNorm.weight.fill_(math.nan)
        return forward(batch, device)

    monkeypatch.setattr(loop, "arguments_of", spoiled)
    run: list[Run] = []
    make = Run.__init__

    def remembered(self: Run, *args: Any) -> None:
        run.append(self)
        make(self, *args)

    monkeypatch.setattr(Run, "__init__", remembered)
    with pytest.raises(FloatingPointError, match="step 6: the loss is not finite; the documents") as error:
        pretrain(cases.settings(tmp_path / "model", evaluate_every=100))
    assert str(seen[11].documents.max()) in str(error.value)
    checkpoint = tmp_path / "model" / CHECKPOINTS / "step-00000004"
    assert all(torch.isfinite(p).all() for p in BertForPreTraining.from_pretrained(checkpoint).parameters())


def test_each_document_is_seen_once_an_epoch(finished: Path) -> None:
    """Catches a run whose plan leaves documents out, or reads held-out ones."""
    from fastbert.training.distributed import Processes

    settings = dataclasses.replace(cases.settings(finished), resume=True)
    run = Run(settings, Processes.start("cpu"))
    plan: Plan = run.parts.plan
    seen = [int(d) for b in range(plan.n_blocks) for s in plan.block(0, b) for e in s for d in e.documents]
    assert len(set(seen)) == run.parts.corpora.training.n_documents - run.parts.corpora.held_out
