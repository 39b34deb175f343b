"""What the configuration files beside a vocabulary say, read as transformers 4.57 reads them.

``tokenizer_config.json``; where that has no ``added_tokens_decoder``, also ``special_tokens_map.json`` and
``added_tokens.json``; the tokenizer class from ``config.json`` where ``tokenizer_config.json`` names none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.errors import TokenizerError
from pyengine.model.json_file import read_json_object, show

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Special tokens that a class has unless its configuration says otherwise.
_CLASS_DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
}

# Classes that can be built from their vocabulary files alone.
_CLASS_FAMILY = {"GPT2Tokenizer": "bpe", "BertTokenizer": "wordpiece", "T5Tokenizer": "sentencepiece"}
_FAMILY_CLASS = {family: name for name, family in _CLASS_FAMILY.items()}
_FAMILY_FILES = {
    "bpe": "vocab.json and merges.txt",
    "wordpiece": "vocab.txt",
    "sentencepiece": "spiece.model",
}
_GENERIC_CLASSES = ("", "PreTrainedTokenizer")
_MAX_EXTRA_IDS = 10_000


class TokenSpec(NamedTuple):
    """A token outside the base vocabulary's rules: how it is found in text, and whether it is special."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # None where only the content is given; then, only if it is not special
    special: bool = False


@dataclass
class TokenizerConfig:
    """Configuration of the tokenizer in ``directory``; ``family`` is None where there is no vocabulary."""

    directory: Path
    values: dict[str, Any]
    class_name: str  # without "Fast"
    family: str | None  # "json", "bpe", "wordpiece" or "sentencepiece"
    vocabulary: Path  # the file of the vocabulary
    special: dict[str, TokenSpec] = field(default_factory=dict)  # by name, "bos_token" and so on
    additional: list[TokenSpec] = field(default_factory=list)  # special tokens without a name
    added: dict[int, TokenSpec] = field(default_factory=dict)

    @property
    def all_special(self) -> list[TokenSpec]:
        """Special tokens in transformers' order, each content once."""
        named = [self.special[name] for name in SPECIAL_TOKEN_NAMES if name in self.special]
        first: dict[str, TokenSpec] = {}
        for token in (*named, *self.additional):
            first.setdefault(token.content, token)
        return list(first.values())

    def flag(self, name: str, default: bool) -> bool:
        """A boolean field of ``tokenizer_config.json``."""
        value = self.values.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {show(value)}")
        return value

    def error(self, name: str, problem: str) -> TokenizerError:
        return TokenizerError(f"{self.directory / 'tokenizer_config.json'}: {name} {problem}")


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read and check the configuration; TokenizerError names the file and field at fault."""
    path = directory / "tokenizer_config.json"
    values = read_json_object(path, TokenizerError) if path.is_file() else {}
    class_name = _class_name(directory, values)
    family, vocabulary = _find_vocabulary(directory, class_name, named="tokenizer_class" in values)
    if class_name in _GENERIC_CLASSES and family is not None:
        # A checkpoint of this engine is a GPT-2 model, whose tokenizer class is GPT2Tokenizer by default.
        default = "" if class_name else "GPT2Tokenizer"
        class_name = _FAMILY_CLASS.get(family, default)
    config = TokenizerConfig(directory, values, class_name, family, vocabulary)
    if family is not None:
        _read_tokens(config)
    return config


def _class_name(directory: Path, values: dict[str, Any]) -> str:
    name, path = values.get("tokenizer_class"), directory / "tokenizer_config.json"
    if name is None and (directory / "config.json").is_file():
        path = directory / "config.json"
        name = read_json_object(path, TokenizerError).get("tokenizer_class")
    if name is None:
        return ""
    if not isinstance(name, str):
        raise TokenizerError(f"{path}: tokenizer_class must be a string, not {show(name)}")
    return name.removesuffix("Fast")


def _find_vocabulary(directory: Path, class_name: str, named: bool) -> tuple[str | None, Path]:
    """The family of the tokenizer and the file of its vocabulary."""
    candidates = {
        "json": directory / "tokenizer.json",
        "bpe": directory / "vocab.json",
        "sentencepiece": _sentencepiece_model(directory),
        "wordpiece": directory / "vocab.txt",
    }
    present = {family: path for family, path in candidates.items() if path is not None and path.is_file()}
    if "json" in present:
        return "json", present["json"]
    if not present and not named:
        if (directory / "merges.txt").is_file():
            raise TokenizerError(
                f"{directory} has merges.txt, but not vocab.json, which belongs to it: copy it from the "
                "original checkpoint, or remove merges.txt to work with token ids only"
            )
        return None, directory
    if class_name not in _GENERIC_CLASSES:
        wanted = _CLASS_FAMILY.get(class_name)
        if wanted is None:
            raise TokenizerError(
                f"{directory}: tokenizer class {show(class_name)} is not supported from its own files "
                f"(supported: {', '.join(_CLASS_FAMILY)}, and any class with a tokenizer.json); where "
                "transformers can load it, AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
            )
        if wanted not in present:
            raise TokenizerError(
                f"{directory}: tokenizer_class is {class_name}, but there is neither tokenizer.json nor "
                f"{_FAMILY_FILES[wanted]}; copy the tokenizer's files here, or remove tokenizer_config.json "
                "to work with token ids only"
            )
        return wanted, present[wanted]
    if not present:
        raise TokenizerError(
            f"{directory}: tokenizer_config.json names a tokenizer, but there is no tokenizer.json or other "
            "vocabulary file; copy it here, or remove tokenizer_config.json to work with token ids only"
        )
    return next(iter(present.items()))


def _sentencepiece_model(directory: Path) -> Path | None:
    for name in ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"):
        if (directory / name).is_file():
            return directory / name
    others = sorted(directory.glob("*.model")) if directory.is_dir() else []
    return others[0] if len(others) == 1 else None


def _read_tokens(config: TokenizerConfig) -> None:
    """Fill in special and added tokens, in the order and with the precedence of transformers."""
    values = dict(config.values)
    source = dict.fromkeys(values, config.directory / "tokenizer_config.json")
    decoder = values.get("added_tokens_decoder")
    if decoder is None:
        _merge_special_tokens_map(config, values, source)

    special: dict[str, TokenSpec] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = values.get(name, _CLASS_DEFAULTS.get(config.class_name, {}).get(name))
        if value is not None:
            special[name] = _token(value, source.get(name, config.directory), name)
    additional = _token_list(config, values, source)

    if decoder is not None:
        path = config.directory / "tokenizer_config.json"
        config.added = _added_tokens(decoder, path)
        known = {token.content: token for token in config.added.values()}
        special = {name: known.get(token.content, token) for name, token in special.items()}
    else:
        path = config.directory / "added_tokens.json"
        names = {token.content for token in (*special.values(), *additional)}
        entries = read_json_object(path, TokenizerError) if path.is_file() else {}
        for content, token_id in entries.items():
            checked = _token_id(token_id, path, content)
            is_special = content in names
            config.added[checked] = TokenSpec(content, normalized=not is_special, special=is_special)
    config.special = special
    config.additional = additional


def _merge_special_tokens_map(
    config: TokenizerConfig, values: dict[str, Any], source: dict[str, Path]
) -> None:
    path = config.directory / "special_tokens_map.json"
    if not path.is_file():
        return
    for name, value in read_json_object(path, TokenizerError).items():
        if name == "additional_special_tokens" and isinstance(value, list):
            earlier = values.get(name) or []
            value = (
                [*earlier, *(v for v in value if v not in earlier)] if isinstance(earlier, list) else value
            )
        values[name], source[name] = value, path


def _token_list(config: TokenizerConfig, values: dict[str, Any], source: dict[str, Path]) -> list[TokenSpec]:
    """``additional_special_tokens``, the sentinels of T5, and ``extra_special_tokens``."""
    name = "additional_special_tokens"
    path = source.get(name, config.directory)
    value = values.get(name)
    if value is not None and not isinstance(value, list):
        raise TokenizerError(f"{path}: {name} must be a list of tokens, not {show(value)}")
    tokens = [_token(v, path, name) for v in value or []]
    if config.class_name == "T5Tokenizer":
        count = values.get("extra_ids", 100)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MAX_EXTRA_IDS:
            raise config.error("extra_ids", f"must be a number from 0 to {_MAX_EXTRA_IDS}, not {show(count)}")
        given = sum("<extra_id_" in token.content for token in tokens)
        if given == 0:
            tokens += [TokenSpec(f"<extra_id_{i}>") for i in range(count)]
        elif count not in (0, given):
            raise config.error(
                "extra_ids", f"is {count}, but additional_special_tokens has {given} <extra_id_…>"
            )
    extra = values.get("extra_special_tokens")
    if extra:
        if not isinstance(extra, dict):
            raise config.error("extra_special_tokens", f"must be an object of tokens, not {show(extra)}")
        tokens += [
            _token(v, config.directory / "tokenizer_config.json", "extra_special_tokens")
            for v in extra.values()
        ]
    return tokens


def _added_tokens(decoder: object, path: Path) -> dict[int, TokenSpec]:
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object, not {show(decoder)}")
    added = {}
    for key, value in decoder.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 9):
            raise TokenizerError(
                f"{path}: added_tokens_decoder has the key {show(key)}, which is no token id"
            )
        if not isinstance(value, dict):
            raise TokenizerError(f"{path}: added_tokens_decoder[{key}] must be an object, not {show(value)}")
        added[int(key)] = _token(value, path, f"added_tokens_decoder[{key}]")
    return dict(sorted(added.items()))


def _token_id(value: object, path: Path, content: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise TokenizerError(f"{path}: the id of {show(content)} must be a number >= 0, not {show(value)}")
    return value


def _token(value: object, path: Path, where: str) -> TokenSpec:
    """A token written as a string, or as an object with ``content`` and flags."""
    if isinstance(value, str):
        token = TokenSpec(value)
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {}
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            flag = value.get(name)
            if flag is not None:
                if not isinstance(flag, bool):
                    raise TokenizerError(f"{path}: {where}.{name} must be true or false, not {show(flag)}")
                flags[name] = flag
        token = TokenSpec(value["content"], **flags)
        if token.normalized is None:
            token = token._replace(normalized=not token.special)
    else:
        raise TokenizerError(
            f"{path}: {where} must be a string or an object with 'content', not {show(value)}"
        )
    try:
        token.content.encode("utf-8")
    except UnicodeEncodeError:
        raise TokenizerError(f"{path}: {where} holds a lone surrogate: {show(token.content)}") from None
    return token
