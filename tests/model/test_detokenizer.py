"""Streamed text adds up to the one-shot text, whatever the ids and however they are cut."""

from __future__ import annotations

import codecs
import os.path
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from pyengine import _C
from pyengine._C import ByteDecoder, ByteTable, TextStream
from pyengine.model.detokenizer import StreamingDetokenizer
from pyengine.model.tokenization.decoders import CleanUpDecoder, TextDecoder
from pyengine.model.tokenizer import Tokenizer, load_tokenizer
from tests.model.tokenizer_files import KINDS, TEXTS, id_lists, save_backend

CHEAP = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def _bpe_decoder(directory: Path) -> Path:
    """A decoder that is not done incrementally here."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "a", "b</w>", "ab", "c</w>", "猫"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(["<s>"])
    return save_backend(backend, directory)


def _no_decoder(directory: Path) -> Path:
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "a", "note_on_60", "'", "s", ".", "n't"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    return save_backend(backend, directory, clean_up_tokenization_spaces=True)


ALL = KINDS | {"json-bpe-decoder": _bpe_decoder, "json-no-decoder": _no_decoder}


@pytest.fixture(scope="module", params=sorted(ALL))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = load_tokenizer(ALL[request.param](tmp_path_factory.mktemp(request.param)))
    assert loaded is not None
    return loaded


def load(kind: str, directory: Path) -> Tokenizer:
    loaded = load_tokenizer(ALL[kind](directory))
    assert loaded is not None
    return loaded


@st.composite
def chunks(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@CHEAP
@given(data=st.data(), skip=st.booleans())
def test_deltas_add_up_to_the_one_shot_text(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(tokenizer))
    stream = StreamingDetokenizer(tokenizer, skip_special_tokens=skip)
    deltas = [stream.append(chunk) for chunk in data.draw(chunks(ids))]
    assert "".join(deltas) + stream.finish() == tokenizer.decode(ids, skip)


@CHEAP
@given(data=st.data(), skip=st.booleans())
def test_text_after_a_prompt(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    prompt, ids = data.draw(id_lists(tokenizer)), data.draw(id_lists(tokenizer))
    stream = StreamingDetokenizer(tokenizer, prompt, skip)
    text = "".join(stream.append(chunk) for chunk in data.draw(chunks(ids))) + stream.finish()
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + ids, skip)
    assert text == whole[len(os.path.commonprefix([before, whole])) :]


@CHEAP
@given(data=st.data())
def test_what_is_emitted_is_certain(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Text so far begins the text of every continuation; so a character is whole when it is emitted."""
    ids, rest = data.draw(id_lists(tokenizer)), data.draw(id_lists(tokenizer))
    text = StreamingDetokenizer(tokenizer).append(ids)
    assert tokenizer.decode(ids + rest).startswith(text)
    assert tokenizer.decode(ids).startswith(text)


@pytest.mark.parametrize("text", TEXTS)
def test_whole_characters_only(tmp_path: Path, text: str) -> None:
    tokenizer = load("bpe", tmp_path)
    stream = StreamingDetokenizer(tokenizer)
    deltas = [stream.append([i]) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == text and stream.finish() == ""


def test_bytes_that_never_become_a_character(tmp_path: Path) -> None:
    tokenizer = load("bpe", tmp_path)
    byte = {tokenizer.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
    first, second, third = (byte[c] for c in "çĮ«")  # E7 8C AB, 猫
    stream = StreamingDetokenizer(tokenizer)
    assert [stream.append([i]) for i in (first, second)] == ["", ""]
    assert stream.append([byte["a"]]) == "\ufffda"
    assert [stream.append([i]) for i in (third, first, second, third)] == ["\ufffd", "", "", "猫"]
    assert stream.append([first]) == "" and stream.finish() == "\ufffd"


BYTES = st.lists(
    st.one_of(
        st.binary(max_size=5),
        st.text(max_size=3).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(min_size=1, max_size=2).map(lambda text: text.encode("utf-8", "surrogatepass")[:-1]),
    ),
    max_size=20,
)


@settings(max_examples=1000, deadline=None)
@given(pieces=BYTES)
def test_bytes_become_what_python_makes_of_them(pieces: list[bytes]) -> None:
    decoder = ByteDecoder(ByteTable(pieces.__getitem__))
    python = codecs.getincrementaldecoder("utf-8")("replace")
    whole = b"".join(pieces).decode("utf-8", "replace")
    shown = told = ""
    for number, piece in enumerate(pieces):
        twin, before = decoder.copy(), shown
        shown += decoder.push([number])
        told += python.decode(piece)
        # Python holds back ED A0, half a surrogate, although it cannot become a character any more.
        assert shown.startswith(told) and set(shown[len(told) :]) <= {"\ufffd"}
    if pieces:  # the copy goes on by itself
        assert before + twin.push(iter([len(pieces) - 1])) + twin.finish() == whole
    assert shown + decoder.finish() == whole


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab€猫", min_size=1, max_size=3), min_size=1, max_size=12),
    stop=st.lists(st.text("ab€猫", min_size=1, max_size=4), max_size=3),
    include_stop=st.booleans(),
    prompt=st.integers(0, 3),
)
def test_texts_of_bytes_and_of_pieces_are_the_same(
    pieces: list[str], stop: list[str], include_stop: bool, prompt: int
) -> None:
    """Tokens that are single bytes in ``_C``, and a detokenizer that is Python; stop strings of both."""

    class Pieces:
        def append(self, numbers: Sequence[int]) -> str:
            return "".join(pieces[number] for number in numbers)

        def finish(self) -> str:
            return ""

    echo = "".join(pieces[:prompt])
    single = _C.StreamingDetokenizer(ByteDecoder(ByteTable(lambda byte: bytes([byte]))), list(echo.encode()))
    ours = TextStream(single, stop, include_stop, echo)
    python = TextStream(Pieces(), stop, include_stop, echo)
    for number in range(prompt, len(pieces)):
        stopped = None
        for byte in pieces[number].encode():
            stopped = ours.append(byte)
            if stopped is not None:
                break
        assert stopped == python.append((number,))
        if stopped is not None:
            break
        assert ours.text == python.text
    assert (ours.finish(), ours.text, ours.take()) == (python.finish(), python.text, python.take())


def test_character_begun_by_the_prompt(tmp_path: Path) -> None:
    tokenizer = load("bpe", tmp_path)
    byte = {tokenizer.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
    first, second, third = (byte[c] for c in "çĮ«")
    stream = StreamingDetokenizer(tokenizer, [byte["a"], first, second])
    assert stream.append([third]) == "猫"
    stream = StreamingDetokenizer(tokenizer, [byte["a"], first, second])
    assert stream.append([byte["b"]]) + stream.finish() == "b"  # the prompt's own U+FFFD is not repeated


@pytest.mark.parametrize(("kind", "expected"), [("sp", " dog"), ("wordpiece", " dog"), ("json", " dog")])
def test_space_of_a_word_that_continues_the_prompt(tmp_path: Path, kind: str, expected: str) -> None:
    tokenizer = load(kind, tmp_path)
    ids = [i for i in tokenizer.encode("hello dog") if not tokenizer.is_special(i)]
    cut = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]) == "hello")
    alone = StreamingDetokenizer(tokenizer)
    assert alone.append(ids[cut:]) + alone.finish() == "dog"
    stream = StreamingDetokenizer(tokenizer, ids[:cut])
    assert stream.append(ids[cut:]) + stream.finish() == expected


def test_clean_up_holds_back_what_the_next_token_may_change(tmp_path: Path) -> None:
    tokenizer = load("wordpiece", tmp_path)
    piece = {tokenizer.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
    stream = StreamingDetokenizer(tokenizer)
    deltas = [stream.append([piece[p]]) for p in ("he", "'", "s", "cute", ".", "hello")]
    assert deltas == ["he", "", "'s", " cute", ".", " hello"]
    assert stream.finish() == ""


class _Characters(TextDecoder):
    def push(self, ids: object) -> str:
        return "".join(map(chr, ids))  # type: ignore[call-overload]

    def finish(self) -> str:
        return ""


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(alphabet=" .?!,'ntmsvre ' ' x", max_size=24), data=st.data())
def test_clean_up_equals_transformers(text: str, data: st.DataObject) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    expected = transformers.PreTrainedTokenizerBase.clean_up_tokenization(text)
    decoder = CleanUpDecoder(_Characters())
    pieces = data.draw(chunks([ord(c) for c in text]))
    assert "".join(decoder.push(piece) for piece in pieces) + decoder.finish() == expected
