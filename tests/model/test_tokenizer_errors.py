"""Damaged and unfitting tokenizer files: TokenizerError with the place of the fault, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine.errors import TokenizerError
from pyengine.model.tokenization.huggingface import HuggingFaceTokenizer
from pyengine.model.tokenizer import load_tokenizer
from tests.model import tokenizer_files as files
from tests.model.tokenizer_files import KINDS, write_json


def test_what_the_library_cannot_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that is not done incrementally here, and a panic of the library, which is a BaseException."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b</w>": 1}, []))
    backend.decoder = tokenizers.decoders.BPEDecoder()
    tokenizer = load_tokenizer(files.save_backend(backend, tmp_path))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    decoder = tokenizer.decoder()
    assert decoder.push([0]) == ""
    twin = decoder.copy()
    decoder.push([1])
    assert (twin.finish(), decoder.finish()) == ("a", "ab")

    class PanicException(BaseException):
        pass

    class Panicking:
        def decode(self, *_: object, **__: object) -> str:
            raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizer, "_backend", Panicking())
    decoder = tokenizer.decoder()
    with pytest.raises(TokenizerError, match="the tokens cannot be decoded: index out of bounds"):
        decoder.finish()


def load_error(directory: Path) -> str:
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(directory)
    return str(error.value)


def test_bad_merges_name_the_line(tmp_path: Path) -> None:
    files.byte_level_bpe(tmp_path)
    path = tmp_path / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    for bad in ("one", "a b c", "", "no such"):
        path.write_text("\n".join([*lines[:3], bad, *lines[3:]]), encoding="utf-8")
        message = load_error(tmp_path)
        assert "merges.txt, line 4" in message
    path.write_bytes(b"#version: 0.2\n\xff\xfe x\n")
    assert "merges.txt is not UTF-8" in load_error(tmp_path)
    path.unlink()
    assert "merges.txt is missing" in load_error(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": "b"}', '{"a": -1}', '{"a": 1.5}', '{"a": 99999999999}']
)
def test_bad_vocab_json(tmp_path: Path, content: str) -> None:
    files.byte_level_bpe(tmp_path)
    (tmp_path / "vocab.json").write_text(content, encoding="utf-8")
    assert "vocab.json" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bos_token", 5),
        ("eos_token", {"text": "x"}),
        ("unk_token", {"content": "x", "lstrip": "yes"}),
        ("additional_special_tokens", "x"),
        ("additional_special_tokens", [None]),
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"x": {"content": "y"}}),
        ("added_tokens_decoder", {"5": "y"}),
        ("added_tokens_decoder", {"5": {"content": "\ud800"}}),
        ("extra_special_tokens", [1]),
        ("add_prefix_space", "yes"),
        ("add_bos_token", 1),
        ("clean_up_tokenization_spaces", []),
        ("split_special_tokens", {}),
        ("tokenizer_class", 3),
    ],
)
def test_bad_configuration_names_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    files.byte_level_bpe(tmp_path)
    config = {"tokenizer_class": "GPT2Tokenizer", field: value}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    message = load_error(tmp_path)
    assert "tokenizer_config.json" in message and field in message


def test_class_and_files_that_do_not_fit(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert "vocab.json and merges.txt" in load_error(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert "no tokenizer.json" in load_error(tmp_path)
    files.wordpiece(tmp_path, tokenizer_class="BertJapaneseTokenizer")
    message = load_error(tmp_path)
    assert "'BertJapaneseTokenizer' is not supported" in message and "tokenizer.json" in message
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    assert "spiece.model" in load_error(tmp_path)


def test_wordpiece_without_unknown_token(tmp_path: Path) -> None:
    files.wordpiece(tmp_path, unk_token="[NONE]")
    assert "vocab.txt" in load_error(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    assert "vocab.txt is not UTF-8" in load_error(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", b"\x00" * 64])
def test_bad_sentencepiece_model(tmp_path: Path, data: bytes) -> None:
    files.sentencepiece_model(tmp_path)
    (tmp_path / "spiece.model").write_bytes(data)
    assert "spiece.model" in load_error(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("legacy", False), ("extra_ids", -1), ("extra_ids", "many")])
def test_bad_sentencepiece_configuration(tmp_path: Path, field: str, value: Any) -> None:
    files.sentencepiece_model(tmp_path, **{field: value})
    assert f"tokenizer_config.json: {field} " in load_error(tmp_path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for kind in ("bpe-added-legacy", "wordpiece", "json", "sp-bytes"):
        KINDS[kind](root / kind)
    return root


@pytest.mark.parametrize("kind", ["bpe-added-legacy", "wordpiece", "json", "sp-bytes"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_raise_nothing_else(
    originals: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("damaged") / kind
    shutil.copytree(originals / kind, directory)
    path = data.draw(st.sampled_from(sorted(directory.iterdir())))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 40) | st.just(len(content)))
    patch = data.draw(
        st.binary(max_size=8) | st.sampled_from([b"null", b"[]", b"{}", b'"x"', b"-1", b"1e999", b"\n"])
    )
    content[start : start + length] = patch
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(directory, 1000)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("Hello dog 猫 <s>"))
    except TokenizerError as error:
        assert str(error)
    finally:
        shutil.rmtree(directory.parent)
