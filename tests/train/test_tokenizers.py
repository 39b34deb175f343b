"""Trained tokenizers: transformers and pyengine read the same tokens, and every text comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyengine.errors import ConfigError
from pyengine.train.tokenizers import END_OF_TEXT, TextEncoder, train_tokenizer
from tests.train.helpers import CHINESE, JAPANESE, make_text

TEXTS = {"english": make_text(3000), "japanese": JAPANESE * 30, "chinese": CHINESE * 30}
OTHER = [
    "",
    "a",
    "  a   b\n c ",
    "hello  world 東京 é \n\n \tx",
    f"x{END_OF_TEXT}y",
    "▁ \u3000🙂🙂",
    JAPANESE,
]


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", ["char", "bpe", "unigram", "sp-bpe"])
def test_both_readers_agree(tmp_path: Path, kind: str, language: str) -> None:
    from transformers import AutoTokenizer

    text = TEXTS[language]
    name = kind if kind in ("char", "bpe") else "sentencepiece"
    sp_type = "bpe" if kind == "sp-bpe" else "unigram"
    train_tokenizer(name, lambda: iter([text]), 300 if kind == "bpe" else None, sp_type, tmp_path)
    ours = TextEncoder(tmp_path).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.bos_token_id == ours.eos_token_id == 0
    assert len(theirs) == ours.vocab_size
    for sample in [text, *OTHER]:
        ids = ours.encode(sample)
        assert theirs(sample)["input_ids"] == ids
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        if kind != "char" or sample == text:  # characters that are not in the data are unknown
            assert ours.decode(ids, skip_special_tokens=False) == sample.replace(
                "▁", " " if name != kind else "▁"
            )


def test_bytes_are_decoded_incrementally(tmp_path: Path) -> None:
    train_tokenizer("sentencepiece", lambda: iter([make_text(500)]), None, "unigram", tmp_path)
    tokenizer = TextEncoder(tmp_path).tokenizer
    ids = tokenizer.encode("the 東🙂 fox")
    decoder = tokenizer.decoder()
    texts = [decoder.push([i]) for i in ids]
    assert "".join(texts) + decoder.finish() == "the 東🙂 fox"
    assert sum(map(bool, texts)) > 2
    for start in range(len(ids)):  # in the middle of a character
        assert tokenizer.decode(ids[start:]) == tokenizer._backend.decode(ids[start:])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("char", 1000, "the data supports 2. tokens"),
        ("char", 10, "leave --vocab-size out"),
        ("bpe", 100, "needs 257 tokens or more"),
        ("bpe", 50_000, r"--vocab-size 50000: the data supports \d+ tokens; use --vocab-size \d+ or less"),
        ("sentencepiece", 50_000, r"--vocab-size 50000: the data supports \d+ tokens"),
    ],
)
def test_vocabularies_that_the_data_does_not_support(
    tmp_path: Path, kind: str, size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(kind, lambda: iter([TEXTS["english"]]), size, "unigram", tmp_path)
