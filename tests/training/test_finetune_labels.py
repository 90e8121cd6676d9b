"""Labels are numbered by name, in the order that the training data decides on, and misfits are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.training.finetuning.class_weights import parse
from fastbert.training.finetuning.labels import find_labels, names_of, numbers_of, warn_of_unseen
from fastbert.training.finetuning.records import Record, RecordError, read_records


def records(*labels: Any, column: str = "label") -> list[Record]:
    """Records with these labels."""
    return read_records([{"text": "a", column: label} for label in labels])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")), ([10, 9, 1, 9], ("1", "9", "10")), (["10", "9"], ("9", "10")),
        ([1.0, 0.0], ("0", "1")), (["1.0", "0.0"], ("0", "1")), ([True, False], ("False", "True")),
        ([" a", "a ", "b"], ("a", "b")), (["0.5", "half"], ("0.5", "half")),
    ],
)  # fmt: skip
def test_order(labels: list[Any], names: tuple[str, ...]) -> None:
    """Catches numbers that depend on the order of the data, and class 10 before class 9."""
    found = find_labels(records(*labels))
    assert found.names == names and sum(found.counts) == len(labels)
    assert [found.number(r) for r in records(*names)] == list(range(len(names)))


def test_a_given_order() -> None:
    """Catches an order of one's own that is sorted or that loses a class without records."""
    found = find_labels(records("b", "a"), order=("b", "c", "a"))
    assert found.names == ("b", "c", "a") and found.counts == (1, 0, 1)
    assert find_labels(records("0.5", "1.5"), order=("1.5", "0.5")).names == ("1.5", "0.5")
    with pytest.raises(ValueError, match=r"the training data has \['a'\] too, at record 2"):
        find_labels(records("b", "a"), order=("b", "c"))


def test_misfits() -> None:
    """Catches fractions taken as classes, a label of evaluation that training has not, and a record without one."""
    with pytest.raises(RecordError, match="record 2: label 0.5 is a number with a fraction"):
        find_labels(records(1.0, 0.5))
    with pytest.raises(RecordError, match="record 2: label 0.5 is a number with a fraction, and all are numbers"):
        find_labels(records("1", "0.5"))
    with pytest.raises(RecordError, match="record 1: label 'c' is not among those of the training data: 'a', 'b'"):
        find_labels(records("a", "b")).number(records("c")[0])
    with pytest.raises(RecordError, match="record 2: column 'label' is empty"):
        find_labels(records("a", None))
    with pytest.raises(RecordError, match="record 1: label is a list"):
        find_labels(records(["a"]))
    with pytest.raises(ValueError, match=r"got the classes \['a'\], expected 2"):
        find_labels(records("a", "a"))


def test_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a rare class, two spellings of one class, or a class without evaluation that nobody hears of."""
    found = find_labels(records("a", "a", "A", "b", "b"))
    assert "1 classes have one record each: 'A' (record 3)" in caplog.text
    assert "differ in case alone: 'A', 'a'" in caplog.text
    warn_of_unseen(found.names, {"a", "b"})
    assert "1 classes have no record for evaluation: 'A'" in caplog.text


def test_many() -> None:
    """Catches labels of a cell that are not parted, and a record without labels that is refused."""
    rows = records("a, b", ["c", "a"], "", [], None, column="labels")
    assert [names_of(r) for r in rows] == [["a", "b"], ["c", "a"], [], [], []]
    found = find_labels(rows, many=True)
    assert found.names == ("a", "b", "c") and found.counts == (2, 1, 1)
    assert np.array_equal([found.numbers(r) for r in rows[:3]], [[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    with pytest.raises(RecordError, match="no column 'labels'"):
        names_of(Record({"text": "a"}, "record 1"))


def test_numbers(caplog: pytest.LogCaptureFixture) -> None:
    """Catches float targets cast to integers, whole numbers that are taken silently, and a NaN target."""
    assert np.array_equal(numbers_of(records("0.5", 2, 1.25)), [0.5, 2.0, 1.25]) and not caplog.text
    assert np.array_equal(numbers_of(records(1, "2")), [1, 2])
    assert "all are whole numbers, 2 different ones" in caplog.text
    for bad in ("x", "inf", True, [1]):
        with pytest.raises(RecordError, match="record 2: label is .*expected a finite number"):
            numbers_of(records(0.5, bad))


def test_weights_as_they_are_written(tmp_path: Path) -> None:
    """Catches weights of a command line or a file that are lost, doubled or no numbers, and pass."""
    assert parse("balanced") == "balanced"
    assert parse("a=2, b c=0.5,d=e=1") == {"a": 2.0, "b c": 0.5, "d=e": 1.0} == parse({"a": 2, "b c": "0.5", "d=e": 1})
    path = tmp_path / "weights.json"
    path.write_text('{"a,b": 3}')
    assert parse(str(path)) == {"a,b": 3.0}
    for bad in ("equal", "a=", "a=x", "a=-1", "a=nan", "a=1,a=2", "", {}, {"a": None}, 3, ["a"]):
        with pytest.raises((ValueError, TypeError), match="class_weights: "):
            parse(bad)
    for text, message in (("[1]", "holds a JSON list"), ("{", "is no JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(path))
    with pytest.raises(FileNotFoundError):
        parse(str(tmp_path / "nowhere.json"))


def test_weights() -> None:
    """Catches balanced weights that differ from scikit-learn's, and a weight for no class."""
    utils = pytest.importorskip("sklearn.utils", reason="is the reference")
    labels = ["a", "a", "a", "b", "c", "c"]
    found = find_labels(records(*labels))
    expected = utils.compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    assert np.allclose(found.weights("balanced"), expected, rtol=1e-6)
    assert found.weights("none") is None
    assert np.array_equal(found.weights({"b": 3.0}), [1, 3, 1])
    for bad in ({"d": 1.0}, {"a": -1.0}, {"a": float("nan")}, "equal"):
        with pytest.raises(ValueError, match="class_weights"):
            found.weights(bad)
