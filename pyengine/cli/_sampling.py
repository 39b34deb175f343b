"""The controls of decoding as options: every field of ``SamplingParams`` that a command line can say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _text
from pyengine.cli._options import Function, in_section

if TYPE_CHECKING:
    from pyengine.decoding.constraints import StructuredOutputsParams
    from pyengine.decoding.params import SamplingParams

Option = Callable[[Function], Function]

_length = in_section("Length and end")
_choice = in_section("Choice of the next token (docs/decoding.md has formulas and their order)")
_repetition = in_section("Repetition")
_tokens = in_section("Words and tokens")
_structure = in_section("Constrained text (one of these)")
_several = in_section("Several continuations")
_output = in_section("Output")

_LENGTH: tuple[Option[Any], ...] = (
    _length("--max-tokens", "--max-new-tokens", "max_tokens", type=int, metavar="N",
            help="New tokens at most.  [default: the checkpoint's, else 128]"),
    _length("--min-tokens", "--min-new-tokens", "min_tokens", type=int, metavar="N",
            help="New tokens before anything may end the text."),
    _length("--stop", "--stop-strings", "stop", multiple=True, metavar="TEXT",
            help="End before this text; may be given several times."),
    _length("--include-stop-str-in-output", is_flag=True, help="End after the --stop text instead."),
    _length("--stop-token-ids", metavar="IDS", help="Token ids that end the text, e.g. 198,628."),
    _length("--eos-token-id", metavar="IDS", help="The end-of-text token, or several."),
    _length("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
)  # fmt: skip
_WITH_PROMPT: tuple[Option[Any], ...] = (
    _length("--max-length", type=int, metavar="N", help="Tokens at most, those of the prompt included."),
    _length("--min-length", type=int, metavar="N",
            help="Tokens before anything may end the text, those of the prompt included."),
    _length("--truncate-prompt-tokens", type=int, metavar="N",
            help="Keep only the last N tokens of each prompt."),
)  # fmt: skip
_DRAW: tuple[Option[Any], ...] = (
    _choice("--temperature", type=float, metavar="T",
            help="0: always the likeliest token; higher: more surprising.  "
                 "[default: the checkpoint's, else 1]"),
    _choice("--do-sample/--no-do-sample", default=None,
            help="transformers' switch: --no-do-sample is --temperature 0."),
    _choice("--top-k", type=int, metavar="K", help="Among the K likeliest tokens; 0: all."),
    _choice("--top-p", type=float, metavar="P",
            help="Among the likeliest tokens that reach probability P together."),
    _choice("--min-p", type=float, metavar="P",
            help="Among tokens of at least P times the likeliest one's probability."),
    _choice("--typical-p", type=float, metavar="P",
            help="Among the tokens of most average surprise that reach P together."),
    _choice("--epsilon-cutoff", type=float, metavar="E",
            help="Among tokens of at least this probability."),
    _choice("--eta-cutoff", type=float, metavar="E",
            help="The same, with a bound that sinks as entropy rises."),
    _choice("--mirostat", type=int, metavar="2", help="2: steer the surprise of the text, in place of cuts."),
    _choice("--mirostat-tau", type=float, metavar="BITS", help="The surprise to aim at.  [default: 5]"),
    _choice("--mirostat-eta", type=float, metavar="RATE", help="How fast to adapt.  [default: 0.1]"),
    _choice("--seed", type=int, metavar="N",
            help="The same seed, the same text.  [default: a fresh one, in --json]"),
)  # fmt: skip
_REPETITION: tuple[Option[Any], ...] = (
    _repetition("--repetition-penalty", type=float, metavar="R",
                help="Above 1: tokens of the prompt and the text are less likely."),
    _repetition("--presence-penalty", type=float, metavar="X",
                help="-2 to 2, off the logits of tokens of the text."),
    _repetition("--frequency-penalty", type=float, metavar="X",
                help="-2 to 2, the same for each time that a token has come."),
    _repetition("--no-repeat-ngram-size", type=int, metavar="N",
                help="No N tokens come twice in the same order; 0: off."),
)  # fmt: skip
_TOKENS: tuple[Option[Any], ...] = (
    _tokens("--bad-words", multiple=True, metavar="TEXT",
            help="A text that must not come; may be given several times."),
    _tokens("--bad-words-ids", multiple=True, metavar="IDS",
            help="The same as token ids, e.g. 198,628; may be given several times."),
    _tokens("--suppress-tokens", metavar="IDS", help="Token ids that must not come."),
    _tokens("--allowed-token-ids", metavar="IDS", help="No other tokens may come."),
    _tokens("--logit-bias", "--sequence-bias", "logit_bias", multiple=True, metavar="IDS=BIAS",
            help="Added to the logit of a token, or of the last of several after the others, e.g. "
                 "198=-2.5; may be given several times."),
)  # fmt: skip
_STRUCTURE: tuple[Option[Any], ...] = (
    _structure("--regex", metavar="REGEX", help="All of the text matches this."),
    _structure("--choice", multiple=True, metavar="TEXT", help="It is one of these; give each."),
    _structure("--json-schema", metavar="FILE|JSON", help="It is JSON that follows this JSON schema."),
    _structure("--json-object", is_flag=True, help="It is a JSON object."),
    _structure("--grammar", metavar="FILE", help="It follows a grammar: Lark's, or llama.cpp's with ::=."),
    _structure("--disable-any-whitespace", is_flag=True, help="JSON on one line."),
)  # fmt: skip
_SEVERAL: tuple[Option[Any], ...] = (
    _several("--n", "--num-return-sequences", "n", type=int, metavar="N",
             help="Continuations of each prompt.  [default: 1]"),
    _several("--best-of", type=int, metavar="N", help="Make N of them; --n of the likeliest are printed."),
    _several("--num-beams", type=int, metavar="N",
             help="Beam search: N continuations compete, none is drawn; --n of the best are printed."),
    _several("--length-penalty", type=float, metavar="X",
             help="Beams are ranked by log-probability / length^X.  [default: 1]"),
    _several("--early-stopping", type=click.Choice(["true", "false", "never"]),
             help="End when there are enough beams, when better ones are unlikely, or impossible.  "
                  "[default: false]"),
)  # fmt: skip
_OUTPUT: tuple[Option[Any], ...] = (
    _output("--logprobs", type=int, metavar="N",
            help="With --json: log-probabilities of each token and the N best, 0 to 64."),
    _output("--prompt-logprobs", type=int, metavar="N",
            help="With --json: the same for the prompt's tokens."),
    _output("--skip-special-tokens/--no-skip-special-tokens", default=None,
            help="Leave special tokens out of the text.  [default: skip]"),
)  # fmt: skip

# Options that belong together and are one field of SamplingParams.
_CONSTRAINT = ("regex", "choice", "json_schema", "json_object", "grammar", "disable_any_whitespace")


def _add(groups: Iterable[tuple[Option[Any], ...]]) -> Callable[[Function], Function]:
    listed = [option for group in groups for option in group]

    def decorate(function: Function) -> Function:
        for option in reversed(listed):
            function = option(function)
        return function

    return decorate


# How one text is chosen, whatever its prompt: a conversation takes these, too.
one_text = _add((_LENGTH, _DRAW, _REPETITION, _TOKENS, _STRUCTURE))
every_control = _add((_LENGTH, _WITH_PROMPT, _DRAW, _REPETITION, _TOKENS, _STRUCTURE, _SEVERAL, _OUTPUT))


def take_params(options: dict[str, Any]) -> SamplingParams:
    """The parameters that ``options`` ask for; they are taken out of it. UsageError with the field, the value
    and what is allowed."""
    return checked(take_fields(options))


def checked(fields: dict[str, Any]) -> SamplingParams:
    """Parameters of these fields, or a UsageError."""
    from pyengine.decoding.params import SamplingParams
    from pyengine.errors import RequestError

    try:
        return SamplingParams(**fields)
    except RequestError as error:
        raise click.UsageError(str(error)) from None


def take_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that were given, with their values; they are taken out of ``options``."""
    from pyengine.decoding.params import SamplingParams

    fields = SamplingParams.__dataclass_fields__
    given = {name: options.pop(name) for name in sorted(set(fields) & set(options))}
    given = {
        name: value
        for name, value in given.items()
        if value not in (None, ()) and value != fields[name].default
    }
    constraint = {name: options.pop(name) for name in _CONSTRAINT if name in options}
    for name in ("stop_token_ids", "eos_token_id", "suppress_tokens", "allowed_token_ids"):
        if name in given:
            given[name] = _ids(name, given[name])
    if "bad_words_ids" in given:
        given["bad_words_ids"] = [_ids("bad_words_ids", text) for text in given["bad_words_ids"]]
    if "logit_bias" in given:
        given["logit_bias"] = [_bias(text) for text in given["logit_bias"]]
    if "early_stopping" in given:
        given["early_stopping"] = {"true": True, "false": False}.get(given["early_stopping"], "never")
    for name in ("stop", "bad_words"):
        if name in given:
            given[name] = [_text.argument(text, _flag(name)) for text in given[name]]
    if any(constraint.values()):
        given["structured_outputs"] = _constraint(**constraint)
    return given


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _ids(field: str, text: str) -> list[int]:
    try:
        return _text.parse_ids(text)
    except click.UsageError as error:
        raise click.UsageError(f"{_flag(field)}: {error.message}") from None


def _bias(text: str) -> tuple[list[int], float]:
    ids, equals, bias = text.partition("=")
    try:
        if equals:
            return _ids("logit_bias", ids), float(bias)
    except ValueError:
        pass
    raise click.UsageError(
        f"--logit-bias: token ids and a number are expected, like 198=-2.5 or 198,628=1; not {text!r}."
    )


def _constraint(
    regex: str | None,
    choice: tuple[str, ...],
    json_schema: str | None,
    json_object: bool,
    grammar: str | None,
    disable_any_whitespace: bool,
) -> StructuredOutputsParams:
    from pyengine.decoding.constraints import StructuredOutputsParams
    from pyengine.errors import RequestError

    named = {"--regex": regex, "--choice": choice, "--json-schema": json_schema,
             "--json-object": json_object, "--grammar": grammar}  # fmt: skip
    given = [name for name, value in named.items() if value not in (None, (), False)]
    if len(given) != 1:
        raise click.UsageError(
            "Constrained text follows one of --regex, --choice, --json-schema, --json-object and --grammar, "
            f"not {' and '.join(given) or '--disable-any-whitespace alone'}."
        )
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = _read("--json-schema", json_schema)
    regex = None if regex is None else _text.argument(regex, "--regex")
    choices = [_text.argument(text, "--choice") for text in choice] or None
    grammar = None if grammar is None else _read("--grammar", grammar)
    try:
        return StructuredOutputsParams(
            json=json_schema,
            regex=regex,
            choice=choices,
            grammar=grammar,
            json_object=json_object or None,
            disable_any_whitespace=disable_any_whitespace,
        )
    except RequestError as error:
        raise click.UsageError(str(error)) from None


def _read(option: str, path: str) -> str:
    if path in ("", _text.STANDARD_INPUT):
        raise click.UsageError(f"{option}: the name of a file is expected; standard input is for prompts.")
    return _text.read_text(path)
