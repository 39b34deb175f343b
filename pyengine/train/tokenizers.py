"""Tokenizers trained from the data, written as a ``tokenizer.json`` that transformers and pyengine both load.

Every trained tokenizer has ``<|endoftext|>`` as token 0: BOS, EOS, and what stands between documents, as in
GPT-2. Whatever trained it, `tokenizers` runs it, so that both readers give the same tokens by construction:

- ``char``: one token per character of the data; other characters are unknown (``<|endoftext|>``).
- ``bpe``: byte-level BPE, as GPT-2's.
- ``sentencepiece``: pieces found by SentencePiece (unigram or BPE), without normalisation and with byte
  fallback, so that every text decodes to itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pyengine.errors import ConfigError, TokenizerError
from pyengine.model.tokenizer import Tokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 8192
TRAINED = ("char", "bpe", "sentencepiece")
_SPACE = "▁"  # U+2581, SentencePiece's spelling of a space
_SAMPLE_CHARS = 100_000_000  # of the data that a tokenizer is trained on, at most
_SENTENCE_CHARS = 1000
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)

Texts = Callable[[], Iterator[str]]


def train_tokenizer(kind: str, texts: Texts, vocab_size: int | None, sp_type: str, directory: Path) -> None:
    """Train on ``texts()`` and write the files to ``directory``.

    ConfigError if ``vocab_size`` was asked for and the data does not support so many tokens.
    """
    import tokenizers

    if kind == "char":
        backend = _characters(texts(), vocab_size)
    elif kind == "bpe":
        backend = _byte_level_bpe(_sample(texts()), vocab_size)
    else:
        backend = _sentencepiece(lambda: _sample(texts()), vocab_size, sp_type)
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=False), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "GPT2TokenizerFast" if kind == "bpe" else "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sample(texts: Iterator[str]) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= _SAMPLE_CHARS:
            return


def _too_large(asked: int, supported: int) -> ConfigError:
    return ConfigError(
        f"--vocab-size {asked}: the data supports {supported} tokens; "
        f"use --vocab-size {supported} or less, or more data"
    )


def _characters(texts: Iterator[str], vocab_size: int | None) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {END_OF_TEXT: 0} | {c: i for i, c in enumerate(sorted(characters), 1)}
    if vocab_size is not None and vocab_size != len(vocabulary):
        if vocab_size > len(vocabulary):
            raise _too_large(vocab_size, len(vocabulary))
        raise ConfigError(
            f"--vocab-size {vocab_size}: the data has {len(vocabulary) - 1} different characters; leave "
            "--vocab-size out, or use --tokenizer bpe"
        )
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _byte_level_bpe(texts: Iterator[str], vocab_size: int | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size is not None and vocab_size <= len(alphabet):
        raise ConfigError(
            f"--vocab-size {vocab_size}: byte-level BPE needs {len(alphabet) + 1} tokens or more "
            f"(every byte, and {END_OF_TEXT})"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or DEFAULT_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if vocab_size is not None and backend.get_vocab_size() < vocab_size:
        raise _too_large(vocab_size, backend.get_vocab_size())
    return backend


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines, the long ones in parts: what SentencePiece learns from. Line ends are a piece of their own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _SENTENCE_CHARS):
                sentence = line[start : start + _SENTENCE_CHARS].replace("\0", "").replace(_SPACE, " ")
                if sentence.strip():
                    yield sentence


def _sentencepiece(texts: Texts, vocab_size: int | None, sp_type: str) -> Any:
    import sentencepiece

    model = io.BytesIO()
    size = vocab_size or DEFAULT_VOCAB_SIZE
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts()),
            model_writer=model,
            model_type=sp_type,
            vocab_size=size,
            hard_vocab_limit=sp_type == "bpe" or vocab_size is not None,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 16,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            unk_piece=END_OF_TEXT,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
            num_threads=1,  # with more, the pieces depend on their number
        )
    except RuntimeError as error:
        supported = re.search(r"too high .*<= (\d+)", str(error))
        if supported and vocab_size is None:  # BPE has no soft limit
            return _sentencepiece(texts, int(supported[1]), sp_type)
        if supported:
            raise _too_large(size, int(supported[1])) from None
        reason = str(error).split("] ")[-1].strip()  # behind file, line and condition
        raise ConfigError(
            f"--vocab-size {size}: SentencePiece cannot train it on this data: {reason}"
        ) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return _from_sentencepiece(processor, sp_type)


def _from_sentencepiece(processor: Any, sp_type: str) -> Any:
    """A `tokenizers` tokenizer with the pieces and scores of a SentencePiece model."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    scores = [float(processor.get_score(i)) for i in range(len(pieces))]
    if sp_type == "unigram":
        # The line end is user-defined, with score 0: the best there is, so it always is a piece of its own.
        backend = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), 0, byte_fallback=True))
    else:
        ids = {piece: i for i, piece in enumerate(pieces)}
        merges = []
        for piece, token_id in ids.items():
            if processor.is_byte(token_id) or token_id == 0:
                continue
            for at in range(1, len(piece)):
                if piece[:at] in ids and piece[at:] in ids:
                    merges.append((token_id, ids[piece[:at]], ids[piece[at:]], (piece[:at], piece[at:])))
        merges.sort()  # in the order in which SentencePiece made the pieces
        backend = Tokenizer(
            models.BPE(
                ids, [pair for *_, pair in merges], unk_token=END_OF_TEXT, fuse_unk=True, byte_fallback=True
            )
        )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    # Words with the spaces before them, and line ends: what no piece reaches across.
    backend.pre_tokenizer = pre_tokenizers.Split(_word_pattern(), "isolated")
    # Spaces last: where the data has none, the piece of the space is spelled in bytes.
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(_SPACE, " ")]
    )
    return backend


def _word_pattern() -> Any:
    from tokenizers import Regex

    return Regex(rf"{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+|\n")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer files of a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [n for n in FILES if (source / n).is_file()]
    names += [f.name for f in source.glob("*.model") if f.name not in names]
    if not names:
        raise TokenizerError(f"{source}: no tokenizer files in this directory")
    for name in names:
        shutil.copyfile(source / name, directory / name)


def fingerprint(directory: Path) -> str:
    """SHA-256 over the tokenizer files of a directory."""
    digest = hashlib.sha256()
    for file in sorted(f for f in directory.iterdir() if f.name in FILES or f.suffix == ".model"):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class TextEncoder:
    """Encodes pieces of documents with a checkpoint's tokenizer, as generation will."""

    def __init__(self, directory: Path) -> None:
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise TokenizerError(f"{directory}: no tokenizer files in this directory")
        self.tokenizer: Tokenizer = tokenizer
        self._prefix = tokenizer.encode("")
        separator = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        self.document_start = self._prefix or separator  # what the model sees before a document
        self.vocab_size = tokenizer.vocab_size

    def encode(self, texts: Iterable[str]) -> list[list[int]]:
        """Tokens of each text, without those that the tokenizer puts in front."""
        return [ids[len(self._prefix) :] for ids in self.tokenizer.encode_batch(list(texts))]
