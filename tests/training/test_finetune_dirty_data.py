"""What real files hold is an error with its line, or a warning with counts and lines, on the command line."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from fastbert.cli.main import main
from finetune_cases import moods, save_encoder

pytest.importorskip("transformers", reason="fine-tuning needs transformers")
pytest.importorskip("accelerate", reason="Trainers need accelerate")

ROWS = [(row["text"], row["label"]) for row in moods(16)]
TABLE = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)  # 17 lines


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def run(encoder: str, folder: Path, task: str, train: str, evaluation: str, suffix: str, *options: str) -> int:
    """The exit status of a dry run, which reads and checks all that a run does."""
    for name, text in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    data = ["--train", str(folder / f"train.{suffix}"), "--eval", str(folder / f"eval.{suffix}")]
    more = ["--model", encoder, "--output", str(folder / "out"), "--device", "cpu", "--batch-size", "2", *options]
    return main(["finetune", task, *data, *more, "--dry-run"])


def numbers(*labels: object) -> str:
    return "text,label\n" + "".join(f"the film was great,{label}\n" for label in labels)


def asked(context: str, answer: str) -> str:
    return json.dumps({"question": "the film ?", "context": context, "answers": answer}) + "\n"


CONLL = "the\tDT\nfilm\tNN\n\nwas\tVB\nfine\tJJ\n"
SPANS = "film\tB-ART\nday\tO\n\n"
ANSWERED = asked("the room was dark", "dark")


@pytest.mark.parametrize(
    ("task", "suffix", "train", "evaluation", "message"),
    [
        ("classify", "csv", TABLE, TABLE + "the film,odd\n", r"eval.csv, line 18: label 'odd' is not among .*'good'"),
        ("classify", "csv", numbers(0, 1, 0.5), TABLE, r"train.csv, line 4: label 0.5 is a number with a fraction"),
        ("classify", "csv", TABLE + "the film,\n", TABLE, r"train.csv, line 18: column 'label' is empty"),
        ("classify", "csv", TABLE + "NaN,good\n", TABLE, r"train.csv, line 18: column 'text' is empty"),
        ("classify", "csv", "text,label,text\na,b,c\n", TABLE, r"train.csv, line 1: column 'text' is there twice"),
        ("classify", "csv", TABLE + '"the\nfilm",good\nthe\n', TABLE, r"train.csv, line 20: got 1 cells, expected 2"),
        ("classify", "csv", TABLE + '"the film,good\n', TABLE, r"train.csv, line 18.*unexpected end of data"),
        ("regress", "csv", numbers(0.5, "NaN"), numbers(0.5), r"train.csv, line 3: column 'label' is empty"),
        ("multilabel", "csv", TABLE.replace("label", "labels"), "text,labels\nthe,odd\n",
         r"eval.csv, line 2: labels 'odd' is not"),
        ("tokens", "conll", CONLL, "the\tDT\nday\tODD\n",
         r"eval.conll, line 1: 'ODD' is not among the tags .*\(word 2, 'day'\)"),
        ("tokens", "conll", SPANS, "film\tB-ART\n\nday\tB-DAY\n", r"eval.conll, line 3: 'DAY' is not among the types"),
        ("tokens", "conll", SPANS + "day\tNN\n", SPANS,
         r"train.conll, line 4: labels: got 'NN', .*'B-ART' in train.conll, line 1"),
        ("qa", "jsonl", asked("the room", "film"), ANSWERED, r"answers: none of 1 records has an answer"),
    ],
)  # fmt: skip
def test_errors_name_the_line(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    task: str, suffix: str, train: str, evaluation: str, message: str,
) -> None:  # fmt: skip
    """Catches a record that a run takes for something else, and an error without the line of the file."""
    status = run(encoder, tmp_path, task, train, evaluation, suffix)
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert status == 1


@pytest.mark.parametrize(
    ("task", "suffix", "train", "evaluation", "message"),
    [
        ("classify", "csv", TABLE + "the film,odd\n", TABLE,
         "label: 1 classes have one record each: 'odd' (train.csv, line 18)"),
        ("classify", "csv", TABLE + "the film,odd\na,odd\n", TABLE,
         "label: 1 classes have no record for evaluation: 'odd'"),
        ("multilabel", "csv", numbers("a", "b").replace("label", "labels"), "text,labels\nthe,a\n",
         "labels: 1 classes have no record for evaluation: 'b'"),
        ("regress", "csv", numbers(1, 2, 2), numbers(1),
         "all are whole numbers, 2 different ones, from train.csv, line 2 on"),
        ("classify", "csv", TABLE.replace("text,label", "text,label,more").replace("d\n", "d,x\n") + "the,good,\n",
         TABLE, "train.csv: column 'more' is empty in 1 record (train.csv, line 18)"),
        ("tokens", "conll", CONLL + "\nday\tNN\n", CONLL,
         "labels: 3 tags have one word each: DT (train.conll, line 1), JJ"),
        ("qa", "jsonl", ANSWERED + asked("the room", "film"), ANSWERED,
         "those of 1 of 2 records are not in their context"),
        ("qa", "jsonl", ANSWERED, ANSWERED + asked("the room", "film"),
         "those of 1 of 2 records for evaluation are not in their context, and no answer to them is right: "
         "eval.jsonl, line 2"),
    ],
)  # fmt: skip
def test_warnings_have_counts_and_lines(
    encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    task: str, suffix: str, train: str, evaluation: str, message: str,
) -> None:  # fmt: skip
    """Catches data that are odd and of which nobody is told how many and where."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert run(encoder, tmp_path, task, train, evaluation, suffix) == 0
    assert message in caplog.text


def test_a_byte_order_mark_and_quoted_newlines(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mark that becomes part of a column's name, and a cell of two lines that becomes two records."""
    table = "\ufeff" + TABLE + '"the ""film""\nwas great",good\n'
    assert run(encoder, tmp_path, "classify", table, TABLE, "csv") == 0
    assert "records of training: 17" in capsys.readouterr().out
