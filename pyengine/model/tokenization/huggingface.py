"""Tokenizers of the `tokenizers` library: ``tokenizer.json``, byte-level BPE and WordPiece from their files.

They are put together as transformers' fast tokenizer classes do it. Encoding is the library's; decoding is
done here, incrementally, from the text of single tokens (see `pyengine.model.tokenization.decoders`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pyengine._C import ByteDecoder, ByteTable
from pyengine.errors import TokenizerError
from pyengine.model.files import read_file, require_small
from pyengine.model.json_file import read_json_object, show
from pyengine.model.tokenization.config import TokenizerConfig, TokenSpec
from pyengine.model.tokenization.decoders import (
    ByteFallbackDecoder,
    CleanUpDecoder,
    PieceDecoder,
    TextDecoder,
    TokenTable,
    WholeDecoder,
)
from pyengine.model.tokenizer import Tokenizer, check_text


def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the other 68 from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizers.Tokenizer`` with the special tokens and the clean-up of a checkpoint's configuration."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        prefix: Sequence[int] = (),
        special: dict[str, str] | None = None,
        clean_up: bool = False,
        model_vocab_size: int | None = None,
    ) -> None:
        """``prefix``: ids put in front of every text. ``special``: contents by name ("bos_token" …)."""
        self._backend = backend
        self._prefix = list(prefix)
        self._clean_up = clean_up
        self.model_vocab_size = model_vocab_size
        ids = {name: backend.token_to_id(content) for name, content in (special or {}).items()}
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.unk_token_id = ids.get("unk_token")
        self.pad_token_id = ids.get("pad_token")
        added = backend.get_added_tokens_decoder().values()
        self._special_contents = {token.content for token in added if token.special}
        # get_vocab_size(with_added_tokens=True) would copy the vocabulary to count it: 6 ms for GPT-2's.
        self.vocab_size = backend.get_vocab_size(with_added_tokens=False) + sum(
            backend.model.token_to_id(token.content) is None for token in added
        )

        state = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._decoder_type = "" if state is None else state.get("type", "?")
        self._fallback_space = _fallback_space(state)
        model = type(backend.model).__name__
        self.kind = "byte-level BPE" if (model, self._decoder_type) == ("BPE", "ByteLevel") else model
        plain = copy(self)  # no collector sees through a ByteTable: it must not lead back to itself
        self._bytes = {skip: ByteTable(plain._bytes_lookup(skip)) for skip in (False, True)}
        self._texts = {
            (skip, first): TokenTable(self._text_lookup(skip, first))
            for skip in (False, True)
            for first in (False, True)
        }
        self._pieces = {skip: TokenTable(self._piece_lookup(skip)) for skip in (False, True)}

    def _encode(self, text: str) -> list[int]:
        with _library_errors("the text cannot be encoded"):
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return self._prefix + ids if self._prefix else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_text(text)
        with _library_errors("a text cannot be encoded"):
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._check_ids(self._prefix + encoding.ids) for encoding in encodings]

    def decoder(self, skip_special_tokens: bool = True) -> TextDecoder:
        skip = bool(skip_special_tokens)
        decoder: TextDecoder
        if self._decoder_type == "ByteLevel":
            decoder = ByteDecoder(self._bytes[skip])
        elif self._decoder_type in ("", "WordPiece", "Metaspace", "Fuse"):
            decoder = PieceDecoder(self._texts[skip, True], self._texts[skip, False])
        elif self._fallback_space is not None:
            decoder = ByteFallbackDecoder(self._pieces[skip], self._fallback_space)
        else:
            decoder = WholeDecoder(lambda ids: self._decode_whole(ids, skip), self.find_piece)
        return CleanUpDecoder(decoder) if self._clean_up else decoder

    def token_bytes(self) -> list[bytes]:
        if self._decoder_type != "ByteLevel" or self._clean_up:
            return super().token_bytes()
        table = self._bytes[False]
        return [table[token_id] for token_id in range(self.model_vocab_size or self.vocab_size)]

    def _decode_whole(self, ids: list[int], skip: bool) -> str:
        with _library_errors("the tokens cannot be decoded"):
            return self._backend.decode(ids, skip_special_tokens=skip)

    def _piece(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if token_id < 2**32 else None

    def readable_piece(self, token_id: int) -> str:
        if self._decoder_type == "ByteLevel":
            data = self._bytes[False][token_id]
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                return "".join(f"<0x{byte:02X}>" for byte in data)
        piece = self.id_to_piece(token_id)
        return piece.replace("▁", " ") if self._decoder_type == "Metaspace" else piece

    def is_special(self, token_id: int) -> bool:
        return self.find_piece(token_id) in self._special_contents

    def _bytes_lookup(self, skip: bool) -> Any:
        def lookup(token_id: int) -> bytes:
            piece = self.find_piece(token_id)
            if piece is None or (skip and piece in self._special_contents):
                return b""
            try:
                return bytes([_BYTE_OF_CHAR[c] for c in piece])
            except KeyError:  # an added token with a space, say: not spelled in bytes
                return piece.encode("utf-8")

        return lookup

    def _piece_lookup(self, skip: bool) -> Any:
        def lookup(token_id: int) -> str | None:
            piece = self.find_piece(token_id)
            return None if skip and piece in self._special_contents else piece

        return lookup

    def _text_lookup(self, skip: bool, first: bool) -> Any:
        """What a token adds to the text, as the library's own decoder has it behind no or another token."""

        def lookup(token_id: int) -> str | None:
            piece = self.find_piece(token_id)
            if piece is None or (skip and piece in self._special_contents):
                return None
            if self._backend.decoder is None:
                return piece if first else f" {piece}"
            before = [] if first else ["a"]
            with _library_errors(f"token {token_id} cannot be decoded"):
                return self._backend.decoder.decode([*before, piece])[len(before) :]

        return lookup


def _fallback_space(state: dict[str, Any] | None) -> str | None:
    """The spelling of a space in a decoder of ByteFallback, Fuse, Replace; None for any other."""
    parts = (state or {}).get("decoders", [])
    if [part.get("type") for part in parts] != ["ByteFallback", "Fuse", "Replace"]:
        return None
    space, content = parts[2].get("pattern", {}).get("String"), parts[2].get("content")
    return space if isinstance(space, str) and len(space) == 1 and content == " " else None


def load_huggingface(config: TokenizerConfig, model_vocab_size: int | None) -> HuggingFaceTokenizer:
    """The tokenizer of a ``tokenizer.json``, ``vocab.json`` + ``merges.txt`` or ``vocab.txt``."""
    require_small(config.vocabulary, TokenizerError)
    with _library_errors(f"{config.vocabulary} cannot be read"):
        if config.family == "json":
            # Quickest for this file: parsing it in Python takes longer than all the library does with it.
            backend = tokenizers.Tokenizer.from_buffer(read_file(config.vocabulary, TokenizerError))
            backend.no_truncation()
            backend.no_padding()
        elif config.family == "bpe":
            backend = _byte_level_bpe(config)
        else:
            backend = _wordpiece(config)
    with _library_errors(f"{config.directory}: the tokenizer's configuration does not fit its vocabulary"):
        _set_options(backend, config)
        _add_tokens(backend, config)
        prefix = _prefix(backend, config)
        return HuggingFaceTokenizer(
            backend,
            prefix=prefix,
            special={name: token.content for name, token in config.special.items()},
            clean_up=config.flag("clean_up_tokenization_spaces", config.family == "wordpiece"),
            model_vocab_size=model_vocab_size,
        )


@contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """What the library raises (Exception, and PanicException below BaseException) becomes TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise TokenizerError(f"{problem}: {e}") from e
        raise


def _byte_level_bpe(config: TokenizerConfig) -> tokenizers.Tokenizer:
    vocab, merges = config.vocabulary, config.directory / "merges.txt"
    if not merges.is_file():
        raise TokenizerError(f"{merges} is missing: {vocab} needs it; copy it from the original checkpoint")
    try:
        text = read_file(merges, TokenizerError)
        # transformers leaves out the first line and what follows the last newline, whatever they hold; the
        # library's own reader leaves out "#version" lines and is half again as quick.
        plain = text.startswith(b"#version") and text.endswith(b"\n") and text.count(b"#version") == 1
        if plain and "\ud800" > max(str(merges)):  # the library takes no names that are not UTF-8
            model = models.BPE.from_file(str(vocab), str(merges))
        else:
            model = models.BPE(vocab=_read_vocab_json(vocab), merges=_read_merges(merges))
    except Exception as e:
        raise _bpe_error(vocab, merges, e) from e
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.flag("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    return backend


def _bpe_error(vocab: Path, merges: Path, cause: Exception) -> TokenizerError:
    """What is wrong with the two files: the first fault found by reading them slowly."""
    try:
        pieces = _read_vocab_json(vocab)
        for number, pair in enumerate(_read_merges(merges), start=2):
            for piece in (*pair, "".join(pair)):
                if piece not in pieces:
                    return TokenizerError(
                        f"{merges}, line {number}: {show(piece)} is not in {vocab.name}; the two files do "
                        "not belong together, or one of them is damaged: copy both again"
                    )
    except TokenizerError as e:
        return e
    return TokenizerError(f"{vocab} and {merges.name} cannot be read: {cause}")


def _read_vocab_json(path: Path) -> dict[str, int]:
    pieces = read_json_object(path, TokenizerError)
    for piece, token_id in pieces.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < 2**31:
            raise TokenizerError(
                f"{path}: the id of {show(piece)} must be a number >= 0, not {show(token_id)}"
            )
    return pieces


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n")[1:-1], start=2):
        pair = line.split()
        if len(pair) != 2:
            raise TokenizerError(
                f"{path}, line {number}: a merge is two pieces with a space between, not {show(line)}"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _read_text(path: Path) -> str:
    try:
        return read_file(path, TokenizerError).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise TokenizerError(
            f"{path} is not UTF-8: {e.reason} at byte {e.start}; copy the file again"
        ) from None


def _wordpiece(config: TokenizerConfig) -> tokenizers.Tokenizer:
    path = config.vocabulary
    lines = _read_text(path).split("\n")
    pieces = {piece: token_id for token_id, piece in enumerate(lines if lines[-1] else lines[:-1])}
    unknown = config.special["unk_token"].content if "unk_token" in config.special else "[UNK]"
    if unknown not in pieces:
        raise TokenizerError(
            f"{path}: the unknown token {show(unknown)} is missing; this is not a WordPiece vocabulary (one "
            "piece a line), or unk_token of tokenizer_config.json is wrong"
        )
    backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _set_options(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Options of ``tokenizer_config.json`` that transformers prefers to those of ``tokenizer.json``."""
    backend.encode_special_tokens = config.flag("split_special_tokens", False)
    if isinstance(backend.normalizer, normalizers.BertNormalizer) and config.class_name == "BertTokenizer":
        accents = (
            config.flag("strip_accents", False) if config.values.get("strip_accents") is not None else None
        )
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=json.loads(backend.normalizer.__getstate__())["clean_text"],
            handle_chinese_chars=config.flag("tokenize_chinese_chars", True),
            strip_accents=accents,
            lowercase=config.flag("do_lower_case", True),
        )
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and config.class_name != "LlamaTokenizer":
        state = json.loads(backend.pre_tokenizer.__getstate__())
        space = config.flag("add_prefix_space", False)
        if state["add_prefix_space"] != space:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=space, use_regex=state.get("use_regex", True)
            )


def _add_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Added and special tokens that the vocabulary's file does not know yet, in transformers' order."""
    specials = config.all_special
    names = {token.content for token in specials}
    tokens = list(config.added.values())
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    # A special token given with its flags replaces those of an added token; a plain string does not.
    tokens += [
        token
        for token in specials
        if (token.content not in known if token.normalized is None else token not in tokens)
    ]
    if tokens:
        backend.add_tokens([_added_token(token, token.special or token.content in names) for token in tokens])


def _added_token(token: TokenSpec, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=not special if token.normalized is None else token.normalized,
        special=special,
    )


def _prefix(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> list[int]:
    """Ids that the configuration puts in front of a text."""
    name = None
    if config.class_name in (
        "LlamaTokenizer",
        "GPTNeoXTokenizer",
    ):  # these classes set it whatever the file says
        name = "bos_token" if config.flag("add_bos_token", config.class_name == "LlamaTokenizer") else None
    elif config.family == "bpe":
        name = "bos_token" if config.flag("add_bos_token", False) else None
    elif config.family == "wordpiece":
        name = "cls_token"
    elif backend.post_processor is not None:
        return _template_prefix(json.loads(backend.post_processor.__getstate__()))
    if name is None:
        return []
    if name not in config.special:
        raise config.error(name, "is missing, but the tokenizer class puts it in front of every text")
    token_id = backend.token_to_id(config.special[name].content)
    return [] if token_id is None else [token_id]


def _template_prefix(state: dict[str, Any]) -> list[int]:
    """Ids in front of the text in a post-processor of ``tokenizer.json``."""
    kind = state.get("type")
    if kind == "Sequence":
        # Each processor wraps what the one before has made, so that the last one's tokens come first.
        return [i for processor in reversed(state["processors"]) for i in _template_prefix(processor)]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [state["cls"][1]]
    prefix: list[int] = []
    if kind == "TemplateProcessing":
        for part in state["single"]:
            if "SpecialToken" not in part:
                break
            prefix += state["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return prefix
