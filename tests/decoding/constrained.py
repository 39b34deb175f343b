"""What constrained texts have to be in the tests, each with a check that owes nothing to llguidance."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pyengine import StructuredOutputsParams

Check = Callable[[str], bool]

REGEXES = [
    r"\d{4}-\d{2}-\d{2}",
    r"[A-Z][a-z]{2,8} [A-Z][a-z]{2,8}",
    r"(yes|no|maybe)( (yes|no|maybe)){0,3}",
    r"\(\d{3}\) \d{3}-\d{4}",
    r"[a-z0-9]{1,12}@[a-z0-9]{1,8}\.(com|org|net)",
    r"#[0-9a-f]{6}",
    r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}",
    r"[^\n]{1,30}\.",
    r"(a|b){0,20}abb",
    r"-?(0|[1-9]\d{0,5})(\.\d{1,4})?",
    r"[äöüß]{3,6}",
    r"日本[ぁ-ん]{2,5}",
    r"(?:ACGT){2,4}[ACGT]{0,9}",
    r"\s{0,3}x = \d{1,40};",
    r'"[^"\\]{0,20}"',
    *(rf"[a-{last}]{{{count}}}" for last in "cgkpz" for count in (1, 4, 9, 16)),
    *(rf"([a-{last}]{{2}} ){{30}}" for last in "defghijk"),  # long enough to be preempted
    *(rf"(foo|bar{number}|\d{{{number}}}){{2}}" for number in range(1, 11)),
]
CHOICES = [
    ["positive", "negative", "neutral"],
    ["a", "ab", "abc"],
    ["The answer is 42.", "The answer is unknown."],
    [" leading", "trailing ", 'with "quotes"', "\n"],
    ["日本", "中国", "한국"],
    *([str(number * step) for number in range(7)] for step in range(1, 16)),
]
GRAMMARS: list[tuple[str, Check]] = [
    (
        'start: sum\nsum: term ("+" term){0,3}\nterm: NUMBER | "(" sum ")"\nNUMBER: /[1-9][0-9]{0,2}/',
        lambda text: isinstance(eval(compile(ast.parse(text, mode="eval"), "", "eval")), int),
    ),
    (
        'root ::= pair{1,3}\npair ::= key "=" value "\\n"\nkey ::= [a-z]{1,9}\nvalue ::= [0-9]{1,5}',
        lambda text: re.fullmatch(r"([a-z]{1,9}=[0-9]{1,5}\n){1,3}", text) is not None,
    ),
    (
        'start: "<" NAME ">" /[a-z ]{0,20}/ "</p>"\nNAME: "p"',
        lambda text: re.fullmatch(r"<p>[a-z ]{0,20}</p>", text) is not None,
    ),
    (
        'root ::= "SELECT " col (", " col){0,2} " FROM " [a-z]{1,8} ";"\ncol ::= "id" | "name" | "age"',
        lambda text: (
            re.fullmatch(r"SELECT (id|name|age)(, (id|name|age)){0,2} FROM [a-z]{1,8};", text) is not None
        ),
    ),
    ('start: "[" (start | /[01]{1,3}/) "]"', lambda text: is_nested(text)),
    ('root ::= "[" (root | [01]{1,3}) "]"', lambda text: is_nested(text)),
]


def is_nested(text: str) -> bool:
    found = re.fullmatch(r"(\[+)[01]{1,3}(\]+)", text)
    return found is not None and len(found[1]) == len(found[2])


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema all of whose values are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (2 if depth else 0))
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 12)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 9)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2, None, True], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, False])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[A-Z]{3}$", "^\\d{2}:\\d{2}$", "^(ja|nein)$"])}
    if kind == "array":
        low = rng.randint(0, 2)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["name", "age", "tags", "ok", "città"], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    return {"type": kind}


def follows(schema: dict[str, Any], value: Any) -> bool:
    """JSON Schema's own rules, for the keywords that occur here."""
    if "anyOf" in schema:
        return any(follows(each, value) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    if "const" in schema:
        return value == schema["const"] and type(value) is type(schema["const"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        whole = kind == "number" or value == int(value)
        return whole and schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(follows(schema["items"], item) for item in value)
    if kind == "object":
        fits = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"])
        return fits and all(follows(schema["properties"][name], item) for name, item in value.items())
    return value is None if kind == "null" else isinstance(value, bool)


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def is_json_of(schema: dict[str, Any], text: str) -> bool:
    return follows(schema, json.loads(text))


# Schemas with keywords that ``follows`` does not know: the jsonschema package judges these.
RICH_SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"oneOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "string", "pattern": "^[a-f]{2}$"}]},
    {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]},
    {"type": ["boolean", "null"]},
    {
        "type": "array",
        "prefixItems": [{"enum": ["x", "y"]}, {"type": "boolean"}],
        "items": {"type": "null"},
        "minItems": 2,
        "maxItems": 4,
    },
    {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["id"],
        "maxProperties": 3,
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 99},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "size": {
                "type": "object",
                "properties": {"w": {"$ref": "#/definitions/side"}, "h": {"$ref": "#/definitions/side"}},
                "required": ["w", "h"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "size"],
        "additionalProperties": False,
        "definitions": {"side": {"type": "integer", "minimum": 1, "maximum": 1000}},
    },
    {"const": {"a": [1, None, "ß"]}},
]


def literal(rng: random.Random) -> str:
    return "".join(rng.choices("abcxyz01 ,:", k=rng.randint(1, 4)))


def random_grammar(rng: random.Random) -> Iterator[tuple[str, str]]:
    """The same language as a Lark grammar and as one for llama.cpp, each with a regular expression that says
    the same to Python: rules refer to later ones only, so putting them into each other gives one."""
    number = rng.randint(2, 5)
    lark, gbnf, meaning = [""] * number, [""] * number, [""] * number
    for index in reversed(range(number)):
        choices: tuple[list[str], list[str], list[str]] = ([], [], [])
        for _ in range(rng.randint(1, 3)):
            parts: tuple[list[str], list[str], list[str]] = ([], [], [])
            for _ in range(rng.randint(1, 3)):
                kind = rng.choice(["literal", "class", "rule"][: 3 if index < number - 1 else 2])
                low = rng.choice([0, 1, 1, 2])
                high = low + rng.choice([0, 0, 1, 2]) or 1
                times = f"{{{low},{high}}}"
                if kind == "rule":
                    inner = rng.randrange(index + 1, number)
                    each = (f"r{inner}{times}", f"r{inner}{times}", f"(?:{meaning[inner]}){times}")
                elif kind == "class":
                    chars = rng.choice(["[a-f]", "[0-9]", "[A-Z]", "[äöü]", "[^a-z]"])
                    if chars == "[^a-z]":
                        chars = "[^a-z\\n]"
                    each = (f"/{chars}{times}/", f"{chars}{times}", f"{chars}{times}")
                else:
                    text = literal(rng)
                    each = (f'"{text}"{times}', f'"{text}"{times}', f"(?:{re.escape(text)}){times}")
                for found, part in zip(parts, each, strict=True):
                    found.append(part)
            for chosen, found, joint in zip(choices, parts, (" ", " ", ""), strict=True):
                chosen.append(joint.join(found))
        name = "start" if index == 0 else f"r{index}"
        lark[index] = f"{name}: " + " | ".join(choices[0])
        gbnf[index] = f"{'root' if index == 0 else name} ::= " + " | ".join(choices[1])
        meaning[index] = "|".join(choices[2])
    yield "\n".join(lark), meaning[0]
    yield "\n".join(gbnf), meaning[0]


def cases() -> list[tuple[StructuredOutputsParams, Check]]:
    result: list[tuple[StructuredOutputsParams, Check]] = []
    result += [(StructuredOutputsParams(regex=pattern), partial(matches, pattern)) for pattern in REGEXES]
    result += [(StructuredOutputsParams(choice=choice), choice.__contains__) for choice in CHOICES]
    result += [(StructuredOutputsParams(grammar=grammar), check) for grammar, check in GRAMMARS]
    rng = random.Random(1)
    for number in range(140):
        schema = random_schema(rng)
        params = StructuredOutputsParams(json=schema, disable_any_whitespace=number < 120)
        result.append((params, partial(is_json_of, schema)))
    for _ in range(15):
        for grammar, pattern in random_grammar(rng):
            result.append((StructuredOutputsParams(grammar=grammar), partial(matches, pattern)))
    return result


CASES = cases()
