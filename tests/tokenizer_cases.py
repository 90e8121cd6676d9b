"""The tests of the tokenizer share texts and a comparison with transformers' tokenizer."""

from __future__ import annotations

from typing import Any

from fastbert.text.tokenizer import Tokenizer

KEYS = ("input_ids", "token_type_ids", "attention_mask")
NASTY = [
    "",
    " \t\n ",
    "emoji 😀 👩‍👩‍👧 🇰🇷 ❤️",
    "漢字とかな交じり文、中文字符。𠀀𪚥",
    "e\u0301 n\u0303 o\u0308\u0323 Å ﬁ ǅ İstanbul ΣΊΣΥΦΟΣ",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "bell\x07 nul\x00l del\x7f soft\xadhyphen zero\u200bwidth \ufffd \u2028 \x85 \ue000 \U000e0001",
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101 + " " + "한" * 150,
    "한국어 문장입니다. 값이 없다 \u1112\u1161\u11ab",
    "[CLS] not special? [SEP] [MASK] [mask] [UNK][PAD] ##ing [ SEP ]",
    "don't can't I'm U.S.A. 3.14 $5 a_b a-b http://x.y/?q=1&r=2 ``quoted'' …",
    "नमस्ते दुनिया ไทย ქართული ǆ ß ſ",
]
KOREAN = [
    "다람쥐 헌 쳇바퀴에 타고파. 키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "닭 잡아먹고 오리발 내민다; 값싼 것이 비지떡이다. 넓은 밭에 삶은 밤과 읽던 책을 두었다.",
    "The quick brown fox jumps over the lazy dog at the Café, 서울 2024.",
    "한국어와 English를 섞어 쓴 문장도 있습니다: PyTorch로 모델을 학습합니다.",
]
FIVE = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def assert_same_ids(ours: Tokenizer, theirs: Any, texts: list[str], **options: Any) -> None:
    expected = theirs(texts, truncation=True, **options)
    encoding = ours(texts, **options)
    for text, a, b in zip(texts, encoding["input_ids"], expected["input_ids"], strict=True):
        assert a == b, f"{text[:80]!r}: {ours.convert_ids_to_tokens(a)[:40]}"
    assert encoding == {key: expected[key] for key in KEYS}
