"""Tokenizers of every kind against transformers' classes on the same files, and damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine.errors import TokenizerError
from pyengine.model.tokenizer import Tokenizer, load_tokenizer
from tests.model import tokenizer_files as files
from tests.model.tokenizer_files import KINDS, TEXTS, id_lists, write_json

transformers = pytest.importorskip("transformers", reason="transformers is the reference")

FRAGMENTS = [
    *("Hello,", " my dog", "<s>", "</s>", "<unk>", "[PAD]", "[CLS]", "[SEP]", "<extra_id_0>", "<extra_id_4>"),
    *(
        "<|endoftext|>",
        "<|x|>",
        "<|user|>",
        "<user>",
        "<tool>",
        " new ",
        "word",
        "dog",
        "<pad>",
        "<sep>",
        "[MASK]",
        "▁",
        "  ",
    ),
    *(
        " .",
        " n't",
        " 's",
        " ' ",
        " 'm",
        "\n",
        "\t",
        "\u3000",
        "猫",
        "気",
        "🤗",
        "e\u0301",
        "Σ",
        "İ",
        "DOG",
        "Ｈｉ",
    ),
]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6) | st.sampled_from(TEXTS), max_size=8).map(
    "".join
)
CHEAP = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def reference(directory: Path) -> Any:
    """The tokenizer of transformers for a directory of `tokenizer_files`."""
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "T5Tokenizer":
        tokenizer = transformers.T5Tokenizer.from_pretrained(directory, legacy=True)
        if config.get("do_lower_case"):
            tokenizer.do_lower_case = True  # as the model cards of rinna say
        return tokenizer
    return transformers.AutoTokenizer.from_pretrained(directory)


Pair = tuple[Tokenizer, Any]


def load_pair(directory: Path) -> Pair:
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer, reference(directory)


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(KINDS[request.param](tmp_path_factory.mktemp(request.param)))


def check_encoding(pair: Pair, text: str) -> None:
    """Ours is transformers' encoding without the special tokens at its end."""
    ours, theirs = pair
    ids = ours.encode(text)
    bare = theirs.encode(text, add_special_tokens=False)
    full = theirs.encode(text)
    assert ids == full[: len(ids)]
    front = len(ids) - len(bare)
    assert front >= 0 and ids[front:] == bare
    assert set(full[len(ids) :]) <= {theirs.eos_token_id, theirs.sep_token_id}


def test_encode_equals_transformers(pair: Pair) -> None:
    for text in ["", " ", *TEXTS, *FRAGMENTS, *(f"a{f}b {f} c" for f in FRAGMENTS)]:
        check_encoding(pair, text)


@CHEAP
@given(text=TEXT)
def test_encode_equals_transformers_on_any_text(pair: Pair, text: str) -> None:
    check_encoding(pair, text)


@CHEAP
@given(texts=st.lists(TEXT, max_size=3))
def test_batch_equals_single(pair: Pair, texts: list[str]) -> None:
    assert pair[0].encode_batch(texts) == [pair[0].encode(text) for text in texts]


@pytest.mark.parametrize("skip", [True, False])
@CHEAP
@given(data=st.data())
def test_decode_equals_transformers_on_any_ids(pair: Pair, skip: bool, data: st.DataObject) -> None:
    ours, theirs = pair
    ids = data.draw(id_lists(ours))
    assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(data=st.lists(st.binary(max_size=3) | st.text(max_size=2).map(str.encode), max_size=8).map(b"".join))
@CHEAP
def test_byte_fallback_equals_transformers(sentencepiece_bytes: Pair, data: bytes) -> None:
    """SentencePiece has one U+FFFD for each stray byte, not for each maximal subpart."""
    ours, theirs = sentencepiece_bytes
    ids = [theirs.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def sentencepiece_bytes(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(KINDS["sp-bytes"](tmp_path_factory.mktemp("bytes")))


def test_ids_and_pieces_equal_transformers(pair: Pair) -> None:
    ours, theirs = pair
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    vocabulary = theirs.get_vocab()
    assert ours.vocab_size >= len(vocabulary)
    for piece, token_id in vocabulary.items():
        if token_id not in (theirs.added_tokens_decoder or {}):
            assert ours.id_to_piece(token_id) == piece
    special = set(theirs.all_special_ids)
    if theirs.is_fast:
        special |= {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert {i for i in vocabulary.values() if ours.is_special(i)} == special
    assert ours.encode_batch([]) == []


# ---- The vocabulary of GPT-2 itself


@pytest.fixture(scope="module")
def gpt2(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    source = shared_data / "gpt2-tokenizer"
    if not source.is_dir():
        pytest.skip("GPT-2's vocabulary is not in shared/data/gpt2-tokenizer")
    directory = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, directory / name)
    write_json(directory / "config.json", {"model_type": "gpt2"})
    tokenizer = load_tokenizer(directory, 50257)
    assert tokenizer is not None
    return tokenizer, transformers.GPT2TokenizerFast.from_pretrained(directory)


def test_gpt2_known_ids(gpt2: Pair) -> None:
    assert gpt2[0].kind == "byte-level BPE"
    assert gpt2[0].vocab_size == 50257
    assert gpt2[0].encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2[0].encode("") == []
    assert gpt2[0].encode("a<|endoftext|>b") == [64, 50256, 65]
    assert gpt2[0].id_to_piece(3290) == "Ġdog"


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_round_trip(gpt2: Pair, text: str) -> None:
    check_encoding(gpt2, text)
    assert gpt2[0].decode(gpt2[0].encode(text)) == text


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=30) | TEXT)
def test_gpt2_encode_equals_transformers(gpt2: Pair, text: str) -> None:
    ids = gpt2[0].encode(text)
    assert ids == gpt2[1].encode(text)
    assert gpt2[0].decode(ids, skip_special_tokens=False) == text


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(ids=st.lists(st.integers(0, 50256), max_size=40), skip=st.booleans())
def test_gpt2_decode_equals_transformers(gpt2: Pair, ids: list[int], skip: bool) -> None:
    assert gpt2[0].decode(ids, skip) == gpt2[1].decode(ids, skip_special_tokens=skip)


# ---- Which files, which tokens in front


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    files.byte_level_bpe(tmp_path)
    files.sentencepiece_model(tmp_path)
    files.tokenizer_json(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.kind == "Unigram"


def test_no_tokenizer_files(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(("kind", "name"), [("bpe", "GPT2Tokenizer"), ("wordpiece", "BertTokenizerFast")])
def test_class_from_files_or_model_configuration(tmp_path: Path, kind: str, name: str) -> None:
    KINDS[kind](tmp_path)
    named = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    unnamed = load_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {"tokenizer_class": name})
    by_model = load_tokenizer(tmp_path)
    assert named and unnamed and by_model
    assert named.encode(TEXTS[0]) == unnamed.encode(TEXTS[0]) == by_model.encode(TEXTS[0])


@pytest.mark.parametrize(
    ("kind", "front"),
    [
        ("bpe", []),
        ("bpe-prefix-space-bos", ["<|endoftext|>"]),
        ("wordpiece", ["[CLS]"]),
        ("json", ["<s>"]),
        ("sp", []),
    ],
)
def test_special_tokens_in_front_and_none_behind(tmp_path: Path, kind: str, front: list[str]) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    assert tokenizer is not None
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode("")] == front
    ids = tokenizer.encode("dog")
    assert [tokenizer.id_to_piece(i) for i in ids[: len(front)]] == front
    assert not tokenizer.is_special(ids[-1])


@pytest.mark.parametrize(
    ("processor", "front"),
    [
        ({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}, [1]),
        (
            {
                "type": "RobertaProcessing",
                "sep": ["</s>", 2],
                "cls": ["<s>", 1],
                "trim_offsets": True,
                "add_prefix_space": False,
            },
            [1],
        ),
        (None, []),
        ("sequence", [1]),
    ],
)
def test_post_processors(tmp_path: Path, processor: Any, front: list[int]) -> None:
    files.tokenizer_json(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if processor == "sequence":
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        processor = {"type": "Sequence", "processors": [byte_level, state["post_processor"]]}
    state["post_processor"] = processor
    write_json(tmp_path / "tokenizer.json", state)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.encode("") == front
    check_encoding((tokenizer, reference(tmp_path)), "dog")


@pytest.mark.parametrize("space", [True, False])
def test_tokenizer_json_takes_prefix_space_from_its_configuration(tmp_path: Path, space: bool) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(files.byte_level_bpe(tmp_path / "a"))
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": space, "add_bos_token": True},
    )
    check_encoding(load_pair(tmp_path), "dog")
    check_encoding(load_pair(tmp_path), " dog")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"tokenize_chinese_chars": False, "strip_accents": True},
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_bert_options_win_over_tokenizer_json(tmp_path: Path, config: files.Config) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(files.wordpiece(tmp_path / "a"))
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ref = reference(tmp_path)
    for text in (*TEXTS, "a [SEP] b"):
        ids = tokenizer.encode(text)
        assert ids == ref.encode(text)[:-1]
        assert tokenizer.decode(ids) == ref.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("change", ["no newline at the end", "no version line", "Windows line ends"])
def test_merges_are_read_as_transformers_reads_them(tmp_path: Path, change: str) -> None:
    files.byte_level_bpe(tmp_path)
    path = tmp_path / "merges.txt"
    data = path.read_bytes()
    if change == "no newline at the end":
        data = data.rstrip(b"\n")
    elif change == "no version line":
        data = data.split(b"\n", 1)[1]
    else:
        data = data.replace(b"\n", b"\r\n")
    path.write_bytes(data)
    for text in TEXTS:
        check_encoding(load_pair(tmp_path), text)


# ---- Vocabularies of another size than the model's


def test_ids_without_a_piece_decode_to_nothing(pair: Pair) -> None:
    tokenizer, ids = pair[0], pair[0].encode("hello dog")
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    for outside in (-1, 2**31, 2**40):
        with pytest.raises(TokenizerError, match=f"token id {outside} is outside"):
            tokenizer.decode([*ids, outside])
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.id_to_piece(outside)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "json", "sp"])
def test_padded_model_vocabulary(tmp_path: Path, kind: str) -> None:
    directory = KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(directory, 10_000)
    assert tokenizer is not None
    ids = tokenizer.encode("hello dog")
    padded = [9_999, *ids[:2], 9_000, *ids[2:], 9_999]
    assert tokenizer.decode(padded) == tokenizer.decode(ids)
    assert tokenizer.id_to_piece(9_999) == ""
    assert not tokenizer.is_special(9_999)
    with pytest.raises(TokenizerError, match="ids run from 0 to 9999"):
        tokenizer.decode([10_000])


@pytest.mark.parametrize("kind", ["bpe-added-legacy", "sp-added"])
def test_token_that_the_model_does_not_have(tmp_path: Path, kind: str) -> None:
    directory = KINDS[kind](tmp_path)
    content = {"bpe-added-legacy": "<|user|>", "sp-added": "<user>"}[kind]
    whole = load_tokenizer(directory)
    assert whole is not None
    (token_id,) = (i for i in range(whole.vocab_size) if whole.id_to_piece(i) == content)
    tokenizer = load_tokenizer(directory, token_id)
    assert tokenizer is not None
    assert tokenizer.encode("cat") == whole.encode("cat")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["cat", text])):
        with pytest.raises(
            TokenizerError, match=f"id {token_id}, but the model has only {token_id} embeddings"
        ):
            encode(f"cat {content}")


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\ud83e\udd17"])
def test_lone_surrogates(pair: Pair, text: str) -> None:
    for encode in (pair[0].encode, lambda text: pair[0].encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match="lone surrogate U\\+D"):
            encode(text)


def test_loading_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    files.byte_level_bpe(tmp_path)
    code = (
        "import sys; from pyengine.model.tokenizer import load_tokenizer; "
        "assert 'tokenizers' not in sys.modules; "
        "load_tokenizer(sys.argv[1]).encode('Hello'); "
        "slow = {'numpy', 'torch', 'transformers', 'sentencepiece', 'huggingface_hub', 'rich'}; "
        "print(sorted(slow & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["bpe", "json", "sp", "sp-bytes", "wordpiece"])
def test_readable_pieces_are_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path / kind))
    assert tokenizer is not None
    readable = "".join(tokenizer.readable_piece(i) for i in tokenizer.encode("my dog"))
    assert readable.replace("##", "").endswith("dog")
    assert not set(readable) & {"Ġ", "▁"}
    if kind == "bpe":
        assert [tokenizer.readable_piece(i) for i in tokenizer.encode("\x7fé")][0] == "\x7f"
    if kind.startswith("sp"):
        spelled = [tokenizer.readable_piece(i) for i in tokenizer.encode("😈")]
        assert ("<0xF0>" in spelled) == (kind == "sp-bytes")


def test_number_ids_are_the_pieces_of_digits(pair: Pair) -> None:
    tokenizer, _ = pair
    numbers = tokenizer.number_ids()
    assert numbers == sorted(set(numbers)) and all(0 <= token < tokenizer.vocab_size for token in numbers)
    assert all(tokenizer.decode([token]).strip(" #").isdecimal() for token in numbers)
    for text in ("1", " 7", "0"):
        pieces = tokenizer.encode(text)
        known = [token for token in pieces if tokenizer.decode([token]).strip().isdecimal()]
        assert set(known) <= set(numbers)
