"""Tiny tokenizers of every kind, written as checkpoints hold them."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pyengine.model.tokenizer import Tokenizer

TEXTS = [
    "Hello, my dog is cute. Isn't it? I'm sure you've seen how they're running; do not tell her he's here!",
    "The quick brown fox jumps over the lazy dog 1234567890 times (or so) -- and nobody's ' quoted ' it.",
    "Привет, как дела? Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今天天气很好，我们去公园散步吧。人工智能正在改变世界。",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "안녕하세요 세계, Ça va très bien — naïve café, Ångström, İstanbul, ΣΊΣΥΦΟΣ",
    "emoji 🤗👩‍👩‍👧‍👦🇯🇵👍🏽 and combining e\u0301 a\u0308\u0323 हिन्दी ไทย عربى עברית",
    "  leading\tand   inner \n\n whitespace\u3000ideographic  ",
]
WORDS = "hello my dog is cute the quick brown fox isn it don t re ve s m he do not".split()
Config = dict[str, Any]


@functools.cache
def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids, special ones and single characters or bytes often among them, and encoded text."""
    valid = [i for i in range(tokenizer.vocab_size) if tokenizer.find_piece(i) is not None]
    special = [i for i in valid if tokenizer.is_special(i)] or valid
    short = [i for i in valid if len(tokenizer.id_to_piece(i)) == 1] or valid
    some = st.sampled_from(valid) | st.sampled_from(special) | st.sampled_from(short)
    return st.lists(some, max_size=25) | st.sampled_from([tokenizer.encode(text) for text in TEXTS])


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def byte_level_bpe(directory: Path, vocab_size: int = 420, **config: Any) -> Path:
    """``vocab.json`` + ``merges.txt``, with GPT-2's special token last."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    trained.train_from_iterator(TEXTS * 2, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    trained.model.save(str(directory))
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    write_json(directory / "vocab.json", vocab | {"<|endoftext|>": len(vocab)})
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"} | config)
    return directory


def wordpiece(directory: Path, **config: Any) -> Path:
    """``vocab.txt`` of the characters of TEXTS, alone and inside words, and some words."""
    characters = sorted({c for text in TEXTS for c in text + text.lower() if not c.isspace()} | set("'.,!?"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    pieces += [word for word in WORDS if word not in pieces] + ["##ing", "##n't", "##'s"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
    return directory


def sentencepiece_model(directory: Path, train: Config | None = None, **config: Any) -> Path:
    """``spiece.model`` with the special tokens of the Japanese GPT-2 checkpoints."""
    model = io.BytesIO()
    options: Config = {
        "sentence_iterator": iter([text.lower() for text in TEXTS] * 4),
        "model_writer": model,
        "minloglevel": 2,
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "character_coverage": 0.98,
        "pad_id": 3,
        "pad_piece": "[PAD]",
        "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
    }
    sentencepiece.SentencePieceTrainer.train(**options | (train or {}))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spiece.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    fields = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}
    write_json(directory / "tokenizer_config.json", fields | special | config)
    return directory


def tokenizer_json(directory: Path, **config: Any) -> Path:
    """``tokenizer.json``: Unigram with Metaspace, BOS in front and EOS behind."""
    pieces = sorted({c for text in TEXTS for c in text if not c.isspace()}) + [f"▁{w}" for w in WORDS] + ["▁"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [
        (piece, -2.0 - len(piece) / 9) for piece in pieces
    ]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save_backend(backend, directory, **config)


def save_backend(backend: tokenizers.Tokenizer, directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(directory / "tokenizer_config.json", fields | config)
    return directory


def _added(content: str, **flags: bool) -> Config:
    return dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False) | {
        "content": content,
        **flags,
    }


def _legacy_added(directory: Path) -> Path:
    byte_level_bpe(directory, pad_token="<pad>")
    write_json(directory / "added_tokens.json", {"<pad>": 421, "<|user|>": 422, "<sep>": 423})
    special: Config = {"bos_token": "<|endoftext|>", "additional_special_tokens": ["<|user|>"]}
    write_json(directory / "special_tokens_map.json", special | {"sep_token": _added("<sep>", lstrip=True)})
    return directory


_ADDED = {
    "420": _added("<|endoftext|>", special=True),
    "421": _added(" new ", rstrip=True),
    "422": _added("<|x|>", special=True, lstrip=True),
    "423": _added("word", single_word=True),
}
_SP_ADDED = {
    "1": _added("<s>", special=True),
    "2": _added("</s>", special=True),
    "0": _added("<unk>", special=True),
    "3": _added("[PAD]", special=True),
    "900": _added("<user>"),
    "901": _added("<tool>", special=True, lstrip=True, rstrip=True),
    "902": _added("dog", single_word=True, normalized=True),
}
_BYTES: Config = {"byte_fallback": True, "vocab_size": 600}

# Name -> maker. The names' first parts are the kinds.
KINDS: dict[str, Callable[[Path], Path]] = {
    "bpe": byte_level_bpe,
    "bpe-prefix-space-bos": lambda d: byte_level_bpe(d, add_prefix_space=True, add_bos_token=True),
    "bpe-clean-up": lambda d: byte_level_bpe(d, clean_up_tokenization_spaces=True),
    "bpe-added": lambda d: byte_level_bpe(d, added_tokens_decoder=_ADDED),
    "bpe-added-legacy": _legacy_added,
    "wordpiece": wordpiece,
    "wordpiece-cased": lambda d: wordpiece(d, do_lower_case=False, tokenize_chinese_chars=False),
    "wordpiece-accents": lambda d: wordpiece(d, do_lower_case=False, strip_accents=True),
    "wordpiece-no-clean-up": lambda d: wordpiece(d, clean_up_tokenization_spaces=False),
    "json": tokenizer_json,
    "json-clean-up": lambda d: tokenizer_json(d, clean_up_tokenization_spaces=True),
    "json-added": lambda d: tokenizer_json(d, pad_token="<pad>", additional_special_tokens=["<|x|>"]),
    "sp": sentencepiece_model,
    "sp-lower": lambda d: sentencepiece_model(d, do_lower_case=True),
    "sp-extra-ids": lambda d: sentencepiece_model(d, extra_ids=5, additional_special_tokens=None),
    "sp-added": lambda d: sentencepiece_model(d, added_tokens_decoder=_SP_ADDED),
    "sp-bytes": lambda d: sentencepiece_model(d, _BYTES),
    "sp-bpe": lambda d: sentencepiece_model(d, {"model_type": "bpe"}, clean_up_tokenization_spaces=True),
    "sp-all-spaces": lambda d: sentencepiece_model(d, {"remove_extra_whitespaces": False}),
    "sp-no-prefix": lambda d: sentencepiece_model(d, {"add_dummy_prefix": False}, add_prefix_space=False),
}
