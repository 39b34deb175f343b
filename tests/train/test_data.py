"""Documents, split, shards, and the order of the sequences."""

from __future__ import annotations

import io
import json
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import ConfigError
from pyengine.train import corpus, data
from pyengine.train.corpus import find_sources, pieces, read_split, scan, split
from pyengine.train.data import Batches, Dataset, TokenStore, prepare
from pyengine.train.tokenizers import TextEncoder
from tests.train.helpers import make_text, tiny_options, write_text


def quietly(_what: str, _part: float) -> None:
    pass


def sources_of(*patterns: str, spool: Path) -> list[corpus.Source]:
    return find_sources(patterns, "text", spool, "--data")


def part(sources: list[corpus.Source], fraction: float, validation: bool) -> list[str]:
    """Documents of one part; a cut document's end counts as one."""
    documents: list[str] = []
    for begins, piece in read_split(sources, split(scan(sources), fraction), validation):
        if begins or not documents:
            documents.append("")
        documents[-1] += piece
    return documents


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n\u3000é", max_size=200), st.integers(1, 20))
def test_pieces_are_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_CHARS", size)
        cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= size for piece in cut)


def test_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARS", 50)
    monkeypatch.setattr(corpus, "_READ_BYTES", 7)  # cuts characters in two
    text = "\ufeff" + "吾輩は猫 である é" * 40
    (source,) = sources_of(write_text(tmp_path / "a.txt", text), spool=tmp_path / "s")
    (document,) = source.documents()
    assert "".join(document) == text[1:]


def test_globs_directories_and_duplicates(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "d.bin"):
        (tmp_path / name).write_text(name)
    found = sources_of(str(tmp_path / "*.txt"), str(tmp_path), spool=tmp_path / "s")
    assert [s.path.name for s in found] == ["a.txt", "b.txt", "c.md"]


def test_json_lines_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b'{"text": "one"}\n\n{"text": "two\\n"}\n'
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(rows)))
    (source,) = sources_of("-", spool=tmp_path / "input")
    assert [list(d) for d in source.documents()] == [["one"], ["two\n"]]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"plain text")))
    (source,) = sources_of("-", spool=tmp_path / "input")
    assert [list(d) for d in source.documents()] == [["plain text"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a.txt: not UTF-8 text: byte 0xff at offset 3; convert it"),
        ("a.txt", b"", "the corpus is empty"),
        ("a.txt", "é".encode()[:1], "byte 0xc3 at offset 0"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', 'line 2: no text in the field "text"'),
        ("a.jsonl", b'{"text": "x"\n', "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
    ],
)
def test_what_is_not_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        scan(sources_of(str(tmp_path / name), spool=tmp_path / "s"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        sources_of(str(tmp_path / "none.txt"), spool=tmp_path / "s")
    with pytest.raises(ConfigError, match="no file matches"):
        sources_of(str(tmp_path / "*.txt"), spool=tmp_path / "s")


def test_one_document_is_cut_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARS", 64)
    text = make_text(300)
    sources = sources_of(write_text(tmp_path / "a.txt", text), spool=tmp_path / "s")
    cut = int(0.9 * len(text))
    assert part(sources, 0.1, False) == [text[:cut]]
    assert part(sources, 0.1, True) == [text[cut:]]


def test_documents_are_split_whole_and_deterministically(tmp_path: Path) -> None:
    texts = [make_text(50, seed) for seed in range(40)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    sources = sources_of(str(file), spool=tmp_path / "s")
    validation, training = part(sources, 0.2, True), part(sources, 0.2, False)
    assert sorted(validation + training) == sorted(texts)
    assert 0.1 < sum(map(len, validation)) / sum(map(len, texts)) <= 0.2
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in reversed(texts)))
    assert sorted(part(sources, 0.2, True)) == sorted(validation)


def test_two_documents_leave_one_for_each_part(tmp_path: Path) -> None:
    paths = [write_text(tmp_path / f"{n}.txt", make_text(100 + n, n)) for n in range(2)]
    sources = sources_of(*paths, spool=tmp_path / "s")
    assert len(part(sources, 0.1, True)) == len(part(sources, 0.1, False)) == 1


def test_dataset_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(corpus, "PIECE_CHARS", 300)
    text = make_text(1000)
    options = tiny_options(write_text(tmp_path / "a.txt", text), tmp_path / "out")
    cache = tmp_path / "cache"
    cache.mkdir()
    first = prepare(options, cache, None, quietly)
    assert len(first.manifest["splits"]["train"]["shards"]) > 2
    whole = first.store("train").slice(0, len(first.store("train")))
    tokenizer = TextEncoder(first.tokenizer).tokenizer
    assert tokenizer.decode(whole.tolist()) == text[: int(0.9 * len(text))]

    def refuse(_self: object) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(data._Texts, "scan", refuse)
        assert prepare(options, cache, None, quietly).identity == first.identity
    write_text(tmp_path / "a.txt", text + "more")
    assert prepare(options, cache, None, quietly).identity != first.identity
    next(cache.glob("train-*.bin")).write_bytes(b"")  # a damaged shard is made again
    again = prepare(options, cache, None, quietly)
    assert len(again.store("train")) == again.manifest["splits"]["train"]["tokens"]


def store_of(tokens: int, directory: Path, shard: int) -> TokenStore:
    shards = []
    for number, start in enumerate(range(0, tokens, shard)):
        part_of = np.arange(start, min(tokens, start + shard), dtype="<u2")
        part_of.tofile(directory / f"{number}.bin")
        shards.append({"file": f"{number}.bin"})
    return TokenStore(directory, shards, "<u2")


@pytest.mark.parametrize("shard", [50, 1000])
def test_an_epoch_takes_every_window_once(tmp_path: Path, shard: int) -> None:
    store = store_of(1000, tmp_path, shard)
    batches = Batches(store, 10, 3, 1, seed=1)
    assert batches.per_epoch == 98
    starts = batches.starts(range(98))
    assert len(set(starts.tolist())) == 98 and len(set((starts % 10).tolist())) == 1
    assert starts.min() >= 0 and starts.max() + 11 <= 1000
    assert starts.tolist() != batches.starts(range(98, 196)).tolist()
    window = batches.batch(5, 0)
    assert (window == window[:, :1] + np.arange(11)).all()


def test_processes_share_the_global_batch(tmp_path: Path) -> None:
    store = store_of(500, tmp_path, 500)
    batches = Batches(store, 10, 4, 2, seed=3)
    for step in (0, 7, 30):
        whole = [batches.batch(step, micro) for micro in range(2)]
        for micro in range(2):
            shared = [batches.batch(step, micro, rank, 2) for rank in range(2)]
            assert np.array_equal(np.concatenate(shared), whole[micro])
        other = Batches(store, 8 + 2, 8, 1, seed=3).batch(step, 0)  # one large batch instead of two
        assert np.array_equal(other, np.concatenate(whole))


def test_the_smallest_data(tmp_path: Path) -> None:
    store = store_of(11, tmp_path, 100)
    batches = Batches(store, 10, 2, 1, seed=0)
    assert batches.per_epoch == 1
    assert batches.batch(3, 0).tolist() == [list(range(11))] * 2
    dataset = Dataset(tmp_path, {"splits": {"train": {"tokens": 10}, "val": {"tokens": 0}}})
    with pytest.raises(ConfigError, match="--block-size 10: the training data has only 10 tokens"):
        data.check_lengths(dataset, 10)
