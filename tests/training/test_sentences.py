"""Running text is split by the stated rule, in English, Korean and Chinese, and no input makes it slow."""

from __future__ import annotations

import time

import pytest

from fastbert.training.data.sentences import LONGEST, cut, split_off, split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One.", "Two!", "Three?", "Four…", "Five"],
        ["Really?!", "Yes!!", "So..."],
        ['"Stop."', "(He left.)", "“Why?”", "‘No!’", "Well."],
        ["Dr. Kim met Mr. Lee (see Fig. 3, e.g. the left part) vs. Mrs. Park.", "They spoke."],
        ["J. R. R. Tolkien wrote it in the U.S. Army.", "So did I.", "Then we left."],
        ["It costs 3.5 dollars, v1.2.3, at 10.30.", "In 1984.", "Then more."],
        ["No. 5 is alive.", "He said no.", "Apples, pears, etc. are fruit.", "Apples, etc.", "Next."],
        ["Well... maybe not… or so.", "Wait...", "Then."],
        ['"Stop!" he said.', "(Why?) asked nobody."],
        ["나는 밥을 먹었다.", "정말요?", "네, 맞아요!", '그는 "가자."라고 말했다.', "3.5킬로미터를 걸었다."],
        ["visit www.example.com/a.b?c=d today.", "Bye."],
    ],
    ids=lambda sentences: sentences[0],
)
def test_sentences_between_spaces(sentences: list[str]) -> None:
    """Catches a missed end, or one after an abbreviation, initials, a number, or before a quotation goes on."""
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\t\n ".join(sentences) + " \n") == sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["今日は晴れ。", "明日は？", "「雨です。」", "はい！"],
        ["他说：“好。”", "我走了！！", "真的吗？", "对"],
        ["끝。", "더"],
    ],
    ids=lambda sentences: sentences[0],
)
def test_full_width_marks_need_no_space(sentences: list[str]) -> None:
    """Catches full-width punctuation that waits for white space, which there is none of."""
    assert split_sentences("".join(sentences)) == sentences


@pytest.mark.parametrize("text", ["1. First", "가. 항목", "2.1. Part", "A. Part", "12.3. Section"])
def test_items_of_lists_keep_their_numbers(text: str) -> None:
    """Catches a number of a list that becomes a sentence of its own."""
    assert split_sentences(f"Before this.\n{text} goes on. After it.") == [
        "Before this.",
        f"{text} goes on.",
        "After it.",
    ]


def test_blank_lines_end_sentences_and_line_breaks_do_not() -> None:
    """Catches a heading that runs into the next paragraph, and a sentence torn where a line was wrapped."""
    assert split_sentences("A heading\n\nIt is\n  wrapped\r\nhere.\n \t\nNext") == [
        "A heading",
        "It is wrapped here.",
        "Next",
    ]
    assert split_sentences("") == split_sentences(" \n\n\t ") == []


def test_text_is_left_as_it_is() -> None:
    """Catches normalisation: NFD, control characters and inner spaces belong to the text."""
    text = "e\u0301  \x00x\u00a0y \u1112\u1161\u11ab. Z"
    assert split_sentences(text) == [text[:-2], "Z"]


def test_parts_of_a_text_give_the_sentences_of_the_whole() -> None:
    """Catches a sentence that ends or goes on because a read ended there."""
    text = 'Dr. A. left... but (so it is.) "Yes!" he said.\n\nHead\n\n今日は。」 No. 5. 3.5 of it.  The end. 1. One'
    whole = split_sentences(text)
    for size in range(1, 12):
        sentences, rest = [], ""
        for start in range(0, len(text), size):
            more, rest = split_off(rest + text[start : start + size])
            sentences += more
        assert [*sentences, *split_sentences(rest)] == whole, size


@pytest.mark.parametrize("text", ["!", "!)", "\n", "\n ", ". ", ".\n\n", "a. ", "x", "。", "1. "], ids=repr)
def test_no_text_takes_long(text: str) -> None:
    """Catches a pattern that takes quadratic time: a megabyte is split within seconds."""
    start = time.perf_counter()
    split_sentences(text * (2**20 // len(text)) + "x")
    assert time.perf_counter() - start < 20


def test_long_sentences_are_cut_at_white_space() -> None:
    """Catches a piece above the limit, a word that is cut or lost, and a text without white space that is not cut."""
    text = "word " * 9_999
    pieces, rest = cut(text)
    assert max(map(len, pieces)) <= LONGEST and len(rest) <= LONGEST
    assert " ".join([*pieces, rest]).split() == text.split()
    pieces, rest = cut("x" * (2 * LONGEST + 1))
    assert [len(piece) for piece in pieces] == [LONGEST, LONGEST] and rest == "x"
    assert cut(" " * 3 * LONGEST) == ([], "")
    assert [len(piece) for piece in split_sentences("y" * (LONGEST + 5) + ". Z.")] == [LONGEST, 6, 2]
