"""Reading prompts, and the small forms of printing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.cli import _text
from pyengine.errors import RequestError

TEXTS = st.text(st.characters(codec="utf-8"))


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Standard input, to be written before it is read."""
    stream = io.BytesIO()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stream))
    return stream


def put(stream: io.BytesIO, data: bytes) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(data)
    stream.seek(0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"one\n", "one"),
        (b"one\r\n", "one"),
        (b"one\n\n", "one\n"),
        (b"one\ntwo", "one\ntwo"),
        (b"\xef\xbb\xbfone", "one"),
    ],
)
def test_dash_is_all_of_standard_input(stdin: io.BytesIO, data: bytes, text: str) -> None:
    put(stdin, data)
    assert _text.argument_texts(["a", "-"]) == ["a", text]


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf"])
def test_empty_standard_input_is_not_a_prompt(stdin: io.BytesIO, data: bytes) -> None:
    put(stdin, data)
    with pytest.raises(RequestError, match="standard input is empty"):
        _text.argument_texts(["-"])


@given(TEXTS.filter(lambda text: not text.startswith("\ufeff")))
def test_decode_round_trip(text: str) -> None:
    assert _text.decode(text.encode(), "x") == text
    assert _text.decode(b"\xef\xbb\xbf" + text.encode(), "x") == text


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8_names_the_byte(stdin: io.BytesIO, mark: bytes) -> None:
    put(stdin, mark + b"caf\xe9 au lait")
    with pytest.raises(
        RequestError, match=rf"standard input: not UTF-8 text: byte 0xe9 at offset {len(mark) + 3};"
    ):
        _text.read_text("-")


def test_not_utf8_argument() -> None:
    with pytest.raises(RequestError, match="argument 2: not UTF-8 text: byte 0xff at offset 1"):
        _text.argument_texts(["a", "b\udcff"])


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\r\n\n  \n two \u2028 still two\x0b\n{3}".encode())
    assert _text.file_prompts(str(path)) == ["one", " two \u2028 still two\x0b", "{3}"]


@given(st.lists(st.one_of(TEXTS, st.lists(st.integers(0, 9)))).filter(bool))
def test_json_lines_round_trip(prompts: list[str | list[int]]) -> None:
    lines = "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(lines.encode())))
        assert _text.file_prompts("-") == prompts


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": ', "not JSON"),
        ('["a"]', 'expected an object with "prompt"'),
        ('{"text": "a"}', 'expected an object with "prompt"'),
        ('{"prompt": [1, true]}', 'expected an object with "prompt"'),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line)
    with pytest.raises(RequestError, match=f"prompts.jsonl, line 3: {complaint}"):
        _text.file_prompts(str(path))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(RequestError, match="empty.txt: no prompt in it"):
        _text.file_prompts(str(path))
    with pytest.raises(RequestError, match="missing.txt: No such file"):
        _text.file_prompts(str(tmp_path / "missing.txt"))


def test_parse_ids() -> None:
    assert _text.parse_ids("15496,11 616\n") == [15496, 11, 616]
    assert _text.parse_ids("[1, 2]") == [1, 2]
    with pytest.raises(click.UsageError, match="none in an empty text"):
        _text.parse_ids(" ")
    with pytest.raises(click.UsageError, match="1.5"):
        _text.parse_ids("1.5")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_json_is_valid_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    _text.prepare_output()
    _text.print_json({"text": "é 犬"})
    data = raw.getvalue()
    assert json.loads(data.decode(encoding)) == {"text": "é 犬"}
    assert ("犬".encode() in data) == (encoding == "utf-8")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 29, "2.5 GiB"),
        (1 << 50, "1048576.0 GiB"),
    ],
)
def test_binary_size(count: int, text: str) -> None:
    assert _text.binary_size(count) == text


def test_heading_is_one_short_line() -> None:
    heading = _text.heading(3, "line\n" * 50)
    assert "\n" not in heading and len(heading) < 80
    assert _text.heading(1, [1, 2]) == "==> 1: [1, 2] <=="
