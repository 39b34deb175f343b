"""SentencePiece models as transformers' `T5Tokenizer` uses them: the Japanese GPT-2 checkpoints.

``do_lower_case`` of the configuration is honoured; transformers reads that field, and then needs
``tokenizer.do_lower_case = True`` in the caller's code, as the model cards say.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Sequence

import sentencepiece

from pyengine.errors import TokenizerError
from pyengine.model.files import read_file
from pyengine.model.tokenization.config import TokenizerConfig, TokenSpec
from pyengine.model.tokenization.decoders import CleanUpDecoder, TextDecoder
from pyengine.model.tokenizer import Tokenizer

_SPACE = "▁"  # U+2581, how SentencePiece spells a space


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with added and special tokens that are split off before it sees the text."""

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        config: TokenizerConfig,
        model_vocab_size: int | None = None,
    ) -> None:
        self.kind = "SentencePiece"
        self.model_vocab_size = model_vocab_size
        self._processor = processor
        self._size = processor.get_piece_size()
        self._added = _number_added_tokens(processor, config)
        self._added_ids = {token.content: token_id for token_id, token in self._added.items()}
        self.vocab_size = max([self._size - 1, *self._added]) + 1
        self.special_contents = {token.content for token in config.all_special}
        self._special_ids = {self._token_id(content) for content in self.special_contents}
        additional = {token.content for token in config.additional}
        # Tokens that transformers sets apart with spaces when it decodes.
        self.separate = (self._added_ids.keys() - self.special_contents) | {
            content for content in additional if self._token_id(content) >= self._size
        }
        self.strips_prefix_space = config.flag("add_prefix_space", True)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = config.special.get(name)
            setattr(self, f"{name}_id", None if token is None else self._token_id(token.content))

        longest_first = sorted(self._added_ids, key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        kept = [*self.special_contents]
        kept += [t.content for t in self._added.values() if not t.special and t.normalized]
        self._keeps_case = re.compile(f"({'|'.join(map(re.escape, kept))})") if kept else None
        self._lower_case = config.flag("do_lower_case", False)
        self._clean_up = config.flag("clean_up_tokenization_spaces", False)
        self._pieces: dict[str, tuple[str, str]] = {}
        # Whether spaces at the start are dropped once, or all of them (remove_extra_whitespaces).
        self.drops_all_spaces = processor.decode([_SPACE, _SPACE]) == ""

    def _token_id(self, content: str) -> int:
        token_id = self._added_ids.get(content)
        return int(self._processor.piece_to_id(content)) if token_id is None else token_id

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split(self._lowered(text) if self._lower_case else text):
            token_id = self._added_ids.get(part)
            if token_id is not None:
                ids.append(token_id)
            elif part:
                ids += [self._token_id(piece) for piece in self._processor.encode(part, out_type=str)]
        return ids

    def _lowered(self, text: str) -> str:
        """Lower case, one character at a time ("Σ" always becomes "σ"), but not in special tokens."""
        parts = [text] if self._keeps_case is None else self._keeps_case.split(text)
        parts[::2] = ["".join(map(str.lower, part)) for part in parts[::2]]
        return "".join(parts)

    def _split(self, text: str) -> list[str]:
        """The text cut at added tokens, with the white space that they take with them removed."""
        if self._splitter is None:
            return [text]
        parts = [part for part in self._splitter.split(text) if part]
        for i, part in enumerate(parts):
            token_id = self._added_ids.get(part)
            if token_id is None:
                continue
            token = self._added[token_id]
            left = parts[i - 1] if i > 0 else ""
            right = parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = right.lstrip()
            if token.lstrip and left:
                parts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[i - 1] += part
                parts[i] = ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1] = part + parts[i + 1]
                parts[i] = ""
        return parts

    def decoder(self, skip_special_tokens: bool = True) -> TextDecoder:
        decoder = SentencePieceDecoder(self, bool(skip_special_tokens))
        return CleanUpDecoder(decoder) if self._clean_up else decoder

    def _piece(self, token_id: int) -> str | None:
        token = self._added.get(token_id)
        if token is not None:
            return token.content
        return self._processor.id_to_piece(token_id) if token_id < self._size else None

    def readable_piece(self, token_id: int) -> str:
        return self.id_to_piece(token_id).replace(_SPACE, " ")

    def is_special(self, token_id: int) -> bool:
        return self.find_piece(token_id) in self.special_contents or token_id in self._special_ids

    def byte_of(self, piece: str) -> int | None:
        """The byte that a piece of byte fallback ("<0xE3>") stands for."""
        if piece.startswith("<0x") and self._processor.is_byte(self._processor.piece_to_id(piece)):
            return int(piece[3:5], 16)
        return None

    def texts_of(self, piece: str) -> tuple[str, str]:
        """What a piece adds to the text: at its beginning, and elsewhere."""
        texts = self._pieces.get(piece)
        if texts is None:
            # Behind "a", which decodes to itself as a piece and as an unknown one alike.
            texts = self._processor.decode([piece]), self._processor.decode(["a", piece])[1:]
            self._pieces[piece] = texts
        return texts


class SentencePieceDecoder(TextDecoder):
    """`T5Tokenizer.decode`, incrementally.

    Tokens set apart divide the text into runs, joined by single spaces. A run is stripped of white space
    at both ends. Within a run, special tokens (if not skipped) stand as they are; SentencePiece decodes
    the stretches between them, and a space goes before a stretch *that a special token follows*. Such a
    stretch, from the second of a run on, is therefore certain only at its end.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, skip: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._wrote = False  # anything at all
        self._start_run()

    def _start_run(self) -> None:
        self._in_run = False
        self._run_has_text = False
        self._white = ""  # at the run's end so far
        self._after_special = False  # in this run
        self._last_special = False
        self._waiting = ""  # stretch that may get a space before it
        self._start_stretch()

    def _start_stretch(self) -> None:
        self._at_start = True  # spaces are still dropped
        self._bytes = b""

    def push(self, ids: Sequence[int]) -> str:
        tokenizer, out = self._tokenizer, []
        for token_id in ids:
            piece = tokenizer.find_piece(token_id)
            if piece is None or (self._skip and tokenizer.is_special(token_id)):
                continue
            if piece in tokenizer.separate:
                out.append(self._end_run())
                out.append(f" {piece}" if self._wrote else piece)
                self._wrote = True
                self._start_run()
            else:
                out.append(self._in_run_piece(piece))
        return "".join(out)

    def finish(self) -> str:
        in_run = self._in_run
        text = self._end_run()
        # A last run without text counts, unlike one in the middle.
        ending = " " if in_run and not self._run_has_text and self._wrote else ""
        self._start_run()
        return text + ending

    def _end_run(self) -> str:
        text = self._waiting + self._end_stretch()
        self._waiting = ""
        return self._stripped(text)

    def _in_run_piece(self, piece: str) -> str:
        if not self._in_run and self._tokenizer.strips_prefix_space:
            piece = piece.removeprefix(_SPACE)
        self._in_run = True
        if piece in self._tokenizer.special_contents:
            text = piece
            if not self._last_special:
                text = (
                    f" {self._waiting}{self._end_stretch()}{piece}"
                    if self._after_special
                    else (self._end_stretch() + piece)
                )
            self._waiting = ""
            self._after_special = self._last_special = True
            self._start_stretch()
            return self._stripped(text)
        self._last_special = False
        text = self._stretch_piece(piece)
        if self._after_special:
            self._waiting += text
            return ""
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        """What is certain of a run's text: white space at its beginning is dropped, at its end held."""
        if not self._run_has_text:
            text = text.lstrip()
        text = self._white + text
        body = text.rstrip()
        self._white = text[len(body) :]
        if body and not self._run_has_text:
            self._run_has_text = True
            if self._wrote:
                body = f" {body}"
            self._wrote = True
        return body

    def _stretch_piece(self, piece: str) -> str:
        byte = self._tokenizer.byte_of(piece)
        if byte is not None:
            self._bytes += bytes((byte,))
            return self._characters(final=False)
        text = self._characters(final=True)
        at_start, elsewhere = self._tokenizer.texts_of(piece)
        addition = at_start if self._at_start else elsewhere
        if addition or (piece == _SPACE and not self._tokenizer.drops_all_spaces):
            self._at_start = False
        return text + addition

    def _end_stretch(self) -> str:
        return self._characters(final=True)

    def _characters(self, final: bool) -> str:
        """Whole characters from the bytes so far; each byte that cannot be part of one is U+FFFD."""
        text, data = "", self._bytes
        while data:
            try:
                characters, used = utf_8_decode(data, "strict", final)
                text, data = text + characters, data[used:]
                break
            except UnicodeDecodeError as e:
                text += data[: e.start].decode("utf-8") + "\ufffd"
                data = data[e.start + 1 :]
        self._bytes = data
        if text:
            self._at_start = False
        return text


def load_sentencepiece(config: TokenizerConfig, model_vocab_size: int | None) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model; TokenizerError if it is not one."""
    path = config.vocabulary
    if config.values.get("legacy") is False:
        raise config.error(
            "legacy",
            "is false, which is not supported from a SentencePiece model; with transformers, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a tokenizer.json, which is",
        )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        data = read_file(path, TokenizerError)
        if not data:
            raise TokenizerError(f"{path} is empty; copy the file again")
        processor.LoadFromSerializedProto(data)
        size = processor.get_piece_size()
    except RuntimeError as e:
        raise TokenizerError(f"{path} is not a SentencePiece model: {e}; copy the file again") from None
    if size == 0:
        raise TokenizerError(f"{path} is a SentencePiece model without pieces; copy the file again")
    try:
        return SentencePieceTokenizer(processor, config, model_vocab_size)
    except (IndexError, RuntimeError) as e:
        raise TokenizerError(f"{path} is a damaged SentencePiece model: {e}; copy the file again") from None


def _number_added_tokens(
    processor: sentencepiece.SentencePieceProcessor, config: TokenizerConfig
) -> dict[int, TokenSpec]:
    """Ids of added and special tokens, given in transformers' order."""
    size = processor.get_piece_size()
    added: dict[int, TokenSpec] = {}
    given = config.values.get("additional_special_tokens")
    sentinels = [t for t in config.additional if "<extra_id_" in t.content]
    if given is None or any("<extra_id_" in str(token) for token in given):
        for i in range(len(sentinels)):
            added[size - 1 + len(sentinels) - i] = TokenSpec(
                f"<extra_id_{i}>", lstrip=True, rstrip=True, normalized=False, special=True
            )
    added.update(config.added)
    ids = {token.content: token_id for token_id, token in added.items()}
    contents = set(ids)
    length = size + sum(_find(processor, content) is None for content in contents)
    for token in config.all_special:
        if token.content and (token.content not in contents or token.normalized is not None):
            token_id = ids.get(token.content, _find(processor, token.content))
            if token_id is None:
                token_id = length
                length += 1
            added[token_id] = TokenSpec(
                token.content, token.single_word, token.lstrip, token.rstrip, bool(token.normalized), True
            )
            contents.add(token.content)
    return added


def _find(processor: sentencepiece.SentencePieceProcessor, content: str) -> int | None:
    """The id of a piece; None where SentencePiece would say "unknown"."""
    token_id = int(processor.piece_to_id(content))
    return token_id if processor.id_to_piece(token_id) == content else None
