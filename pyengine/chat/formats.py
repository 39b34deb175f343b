"""How a model wants to see a conversation: by a template, with EOS after each turn, as a transcript."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pyengine.errors import ConfigError, RequestError, TokenizerError
from pyengine.model.json_file import read_json_object, show
from pyengine.model.tokenization.config import read_tokenizer_config

if TYPE_CHECKING:
    from pyengine.model.tokenizer import Tokenizer

FORMATS = ("auto", "template", "eos", "transcript")
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


@dataclass(frozen=True)
class Turn:
    role: str  # USER or ASSISTANT
    text: str
    ids: tuple[int, ...] | None = None  # as the model said it; None: loaded from a file, or typed


class ChatFormat(ABC):
    """Turns to token ids. The last turn is the user's, and the ids end where the model's reply begins."""

    name: str
    stop: tuple[str, ...] = ()  # texts that end a reply, beside EOS
    takes_system = True
    strips = False  # white space around a reply belongs to the format, not to the reply

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]: ...

    def _inside(self, text: str) -> list[int]:
        """Ids of a text without what the tokenizer puts in front of every text."""
        return self._tokenizer.encode(text)[len(self._tokenizer.encode("")) :]


class TranscriptFormat(ChatFormat):
    """``User: ...`` and ``Bot: ...``, a line for each turn, which a base model continues."""

    name = "transcript"
    strips = True

    def __init__(self, tokenizer: Tokenizer, user: str, bot: str) -> None:
        super().__init__(tokenizer)
        self._names = {USER: user, ASSISTANT: bot}
        self.stop = (f"\n{user}:", f"\n{bot}:")

    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]:
        lines = [f"{system}\n\n"] if system else []
        lines += [f"{self._names[turn.role]}: {turn.text}\n" for turn in turns]
        return self._tokenizer.encode("".join(lines) + f"{self._names[ASSISTANT]}:")


class EosFormat(ChatFormat):
    """Turns with EOS after each, as DialoGPT was trained."""

    name = "eos"
    takes_system = False

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        super().__init__(tokenizer)
        if not eos:
            raise ConfigError('the format "eos" needs an EOS token, and the checkpoint names none')
        self._eos = tuple(eos)

    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]:
        ids = self._tokenizer.encode("")
        for turn in turns:
            ids += self._inside(turn.text) if turn.ids is None else turn.ids
            if not turn.ids or turn.ids[-1] not in self._eos:  # a reply that was cut has none of its own
                ids.append(self._eos[0])
        return ids


class TemplateFormat(ChatFormat):
    """The checkpoint's chat template, a Jinja program, run in a sandbox with what transformers gives it."""

    name = "template"

    def __init__(self, tokenizer: Tokenizer, template: str, special: dict[str, str], source: str) -> None:
        super().__init__(tokenizer)
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ConfigError(
                f'{source} holds a chat template, which needs jinja2: pip install "pyengine[chat]"; '
                'or choose the format "transcript" or "eos"'
            ) from None
        self._errors = TemplateError
        self._special, self._source = special, source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise TokenizerError(f"{source}: chat_template is no Jinja template: {error}") from None

    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": SYSTEM, "content": system}] if system else []
        messages += [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except RequestError:
            raise
        except Exception as error:  # the template is a program of somebody else: anything may happen in it
            raise RequestError(f"{self._source}: chat_template failed: {show(error)}") from None
        return self._inside(text)

    def _refuse(self, message: object) -> NoReturn:
        raise RequestError(f"{self._source}: chat_template refuses this conversation: {message}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Without the escapes for HTML of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def chat_format(
    directory: Path,
    tokenizer: Tokenizer | None,
    eos: Sequence[int],
    wanted: str = "auto",
    *,
    user: str = "User",
    bot: str = "Bot",
) -> ChatFormat:
    """The format of a checkpoint. "auto": its chat template if it has one; "eos" where config.json has
    ``task_specific_params.conversational``, as DialoGPT's has; else "transcript". ``eos``: the ids of EOS;
    ``user`` and ``bot``: names in a transcript. ConfigError, TokenizerError."""
    if tokenizer is None:
        raise ConfigError(f"{directory} has no tokenizer files: a conversation needs texts")
    if wanted not in FORMATS:
        raise ConfigError(f"format={wanted!r}: must be one of {', '.join(FORMATS)}")
    for field, name in (("user", user), ("bot", bot)):
        if not name.strip() or "\n" in name:
            raise ConfigError(f"{field}={name!r}: must be a name on one line")
    template, source = _template(directory) if wanted in ("auto", "template") else (None, "")
    if wanted == "template" and template is None:
        raise ConfigError(f'{directory} has no chat template: choose the format "transcript" or "eos"')
    if template is not None:
        special = {
            name: token.content for name, token in read_tokenizer_config(directory).special.items()
        }
        return TemplateFormat(tokenizer, template, special, source)
    if wanted == "eos" or (wanted == "auto" and _is_conversational(directory)):
        return EosFormat(tokenizer, eos)
    return TranscriptFormat(tokenizer, user, bot)


def _template(directory: Path) -> tuple[str | None, str]:
    """The chat template and the file that holds it; chat_template.jinja goes before tokenizer_config.json."""
    own = directory / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8"), str(own)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{own} is not UTF-8: {error.reason} at byte {error.start}") from None
    path = directory / "tokenizer_config.json"
    template = read_json_object(path, TokenizerError).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default", "")
    if template is not None and (not isinstance(template, str) or not template):
        raise TokenizerError(
            f'{path}: chat_template must be a text, or a list of {{"name", "template"}} with a "default", '
            f"not {show(template)}"
        )
    return template, str(path)


def _is_conversational(directory: Path) -> bool:
    tasks = read_json_object(directory / "config.json", ConfigError).get("task_specific_params")
    return isinstance(tasks, dict) and "conversational" in tasks
