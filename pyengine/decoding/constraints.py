"""Text that follows a regular expression, a list of choices, a JSON schema or a grammar.

llguidance parses the text so far and says which tokens may follow; the sampler applies that as a bit mask. A
request's matcher sees the new tokens only, the prompt is not part of the constrained text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyengine.decoding import checks
from pyengine.errors import ConfigError, InternalError, RequestError, TokenizerError

if TYPE_CHECKING:
    from pyengine.model.tokenizer import Tokenizer

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
# Between the parts of JSON: what pretty-printers put there, as in llama.cpp. Without a bound, small models go
# on with white space until they run out of tokens.
_WHITESPACE = r"( |\n{1,2}[ \t]{0,20})?"


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a text has to be: exactly one of the first five. Names as in vLLM.

    json: a JSON value that follows this JSON schema (a dict, or JSON text).
    regex: the whole text matches this regular expression (syntax of Rust's regex crate).
    choice: one of these strings.
    grammar: a Lark grammar (rule ``start``), or one in the EBNF of llama.cpp (rule ``root``).
    json_object: True: any JSON object.
    disable_any_whitespace: JSON on one line, without white space between its parts but after "," and ":".

    Raises RequestError naming the field and its value.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False) or
                 (name == "json" and self.json is False)]  # fmt: skip
        if len(given) != 1:
            shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none of them"
            raise RequestError(f"structured outputs: give exactly one of {', '.join(_KINDS)}, not {shown}")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"{name}={value!r}: must be a string of one character or more")
        if self.choice is not None and (
            isinstance(self.choice, str) or not checks.strings("choice", self.choice)
        ):
            raise RequestError(f"choice={self.choice!r}: must be a list of one string or more")
        if self.json_object is not None:
            checks.check_bool("json_object", self.json_object)
        checks.check_bool("disable_any_whitespace", self.disable_any_whitespace)
        if self.json is not None:
            self._schema()

    def _schema(self) -> str:
        schema: Any = self.json
        try:
            if isinstance(schema, str):
                schema = json.loads(schema)
            if not isinstance(schema, (Mapping, bool)):
                raise ValueError("a schema is an object, true or false")
            return json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise RequestError(f"json={self.json!r}: must be a JSON schema: {error}") from None

    @property
    def source(self) -> tuple[str, str]:
        """llguidance's name of the format, and the text of the grammar."""
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        if self.grammar is not None:
            # llama.cpp's EBNF defines rules with ::=, Lark with a colon.
            return "gbnf" if "::=" in self.grammar else "lark", self.grammar
        return "json_schema", '{"type": "object"}' if self.json_object else self._schema()


class Constraint:
    """Where one text stands in its grammar."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())

    def mask(self) -> memoryview:
        """Which tokens may come next: bits of int32 words (``_C.Sampler.set_mask``)."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed any further: {self._matcher.get_error()}")
        return memoryview(bits).cast("i")

    def masks(self, drafts: Sequence[int]) -> tuple[memoryview, int]:
        """What may come next, and what after each of the drafts, one mask after the other; how many of the
        drafts may come, as far as the grammar is concerned, with something after them."""
        if not drafts:
            return self.mask(), 0
        matcher = self._matcher
        masks = [self.mask()]
        try:
            for draft in drafts:
                if matcher.try_consume_tokens([draft]) == 0:
                    break
                if matcher.is_stopped():
                    matcher.rollback(1)
                    break
                masks.append(self.mask())
        finally:
            if len(masks) > 1:
                matcher.rollback(len(masks) - 1)
        return memoryview(b"".join(masks)).cast("i"), len(masks) - 1

    def take(self, token: int) -> bool:
        """Go on with a token that the mask allowed; whether the text is complete and nothing may follow."""
        if not self._matcher.consume_token(token):
            raise InternalError(f"token {token} does not follow the grammar: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())


class ConstraintCompiler:
    """Constraints of one checkpoint. The vocabulary is prepared when the first one is asked for."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._token_bytes: list[bytes] = []
        self._vocabularies: dict[tuple[int, ...], Any] = {}  # by EOS
        self._compiled: dict[tuple[Any, ...], Constraint] = {}  # of the grammars used last

    def compile(
        self, params: StructuredOutputsParams, tokenizer: Tokenizer | None, eos: Sequence[int]
    ) -> Constraint:
        """``eos``: tokens that end the text where the grammar lets it end. Raises RequestError with what is
        wrong with the grammar."""
        if tokenizer is None:
            raise RequestError("structured outputs need a tokenizer, and the checkpoint has none")
        try:
            import llguidance
        except ImportError:
            raise ConfigError(
                'structured outputs need llguidance: pip install "pyengine[constraints]"'
            ) from None
        # Without a token that ends texts, one that the model does not have stands for it.
        ends = tuple(sorted({token for token in eos if token < self._vocab_size})) or (self._vocab_size,)
        kind, text = params.source
        key = (ends, kind, text, params.disable_any_whitespace)
        known = self._compiled.pop(key, None)
        if known is None:
            known = Constraint(
                self._matcher(llguidance, params, self._vocabulary(llguidance, tokenizer, ends))
            )
        self._compiled[key] = known
        if len(self._compiled) > 64:
            del self._compiled[next(iter(self._compiled))]
        return known.copy()

    def _matcher(self, llguidance: Any, params: StructuredOutputsParams, vocabulary: Any) -> Any:
        kind, text = params.source
        name = "json" if kind == "json_schema" else "grammar" if kind in ("gbnf", "lark") else kind
        try:
            if kind == "json_schema":
                options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE}
                if params.disable_any_whitespace:
                    options = {"whitespace_flexible": False}
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
            else:
                grammar = llguidance.grammar_from(kind, text)
        except ValueError as error:
            raise RequestError(f"{name}={text!r}: {_line(error)}") from None
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"{name}={text!r}: {_line(matcher.get_error())}")
        return matcher

    def _vocabulary(self, llguidance: Any, tokenizer: Tokenizer, ends: tuple[int, ...]) -> Any:
        found = self._vocabularies.get(ends)
        if found is None:
            try:
                self._token_bytes = self._token_bytes or tokenizer.token_bytes()
            except TokenizerError as error:
                raise RequestError(f"structured outputs: {error}") from error
            size = max(self._vocab_size, *(end + 1 for end in ends))
            listed = self._token_bytes[:size]
            listed += [b""] * (size - len(listed))
            special = [
                token for token in range(self._vocab_size) if listed[token] and tokenizer.is_special(token)
            ]
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(listed, sorted({*special, *ends}), ends[0]))
            found = llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=list(ends))
            self._vocabularies[ends] = found
        return found


def _line(message: object) -> str:
    """What llguidance says, on one line, without the marks that point to a place in the line above."""
    return " ".join(word for word in str(message).split() if word.strip("^"))


class _Vocabulary:
    """What llguidance reads of a tokenizer; it asks for the tokens of a text only where it could jump ahead,
    which is not used."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id
        self._single = {data: token for token, data in enumerate(tokens) if len(data) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._single[byte] for byte in (bytes((b,)) for b in text) if byte in self._single]
