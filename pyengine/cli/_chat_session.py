"""The loop of ``pyengine-cli chat``: messages and commands in, replies out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyengine.cli import _text
from pyengine.decoding.params import ALIASES, SamplingParams
from pyengine.decoding.resolve import DEFAULT_MAX_TOKENS
from pyengine.errors import ClosedError, InternalError, PyEngineError, RequestError

if TYPE_CHECKING:
    from pyengine.chat.conversation import Conversation
    from pyengine.chat.formats import ChatFormat
    from pyengine.cli._chat_input import Pipe, Terminal

# What is not a setting of one reply that is shown as it grows.
_NOT_SETTINGS = {
    *("n", "best_of", "num_beams", "length_penalty", "early_stopping", "num_return_sequences", "echo"),
    *("logprobs", "prompt_logprobs", "structured_outputs", "guided_decoding", "logits_processors"),
    *("max_length", "min_length", "truncate_prompt_tokens"),
}
SETTINGS = sorted({*SamplingParams.__dataclass_fields__, *ALIASES, "do_sample"} - _NOT_SETTINGS)


class Session:
    """One conversation. Errors are notices to a person, and end the program where there is none."""

    def __init__(
        self,
        llm: Any,
        conversation: Conversation,
        form: ChatFormat,
        fields: dict[str, Any],
        lines: Pipe | Terminal,
        quiet: bool,
    ) -> None:
        self._llm, self._conversation, self._format = llm, conversation, form
        self._fields, self._lines, self._quiet = fields, lines, quiet
        self._over = False

    def run(self) -> None:
        while not self._over:
            try:
                line = self._lines.read()
                if line is None:
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._exchange(line)
            except KeyboardInterrupt:
                if not self._lines.is_terminal:
                    raise
                click.echo()
                self._note("Ctrl-D ends the conversation")
            except (ClosedError, InternalError):
                raise
            except (PyEngineError, OSError) as error:
                if not self._lines.is_terminal or isinstance(error, BrokenPipeError):
                    raise
                _text.note(f"{error}")

    def _note(self, message: str) -> None:
        if not self._quiet:
            _text.note(message)

    def _exchange(self, message: str) -> None:
        """A message and the reply to it; a message that cannot be served leaves no trace."""
        params = SamplingParams(**{**self._fields, "stop": self._stop()})
        conversation = self._conversation
        dropped = conversation.num_dropped
        ids = conversation.ask(message, params.max_tokens or DEFAULT_MAX_TOKENS)
        if conversation.num_dropped > dropped:
            count = conversation.num_dropped - dropped
            self._note(f"the context is full: the model does not see the {count} oldest turns any more")
        answered = False
        try:
            self._reply(ids, params)
            answered = True
        finally:
            if not answered:
                conversation.undo()

    def _stop(self) -> list[str]:
        own = self._fields.get("stop") or ()
        return [*([own] if isinstance(own, str) else own), *self._format.stop]

    def _reply(self, ids: Sequence[int], params: SamplingParams) -> None:
        text, reason = "", None
        said: list[int] = []
        if self._lines.is_terminal:
            click.echo(click.style("model> ", bold=True), nl=False)
        deltas = self._llm.stream(list(ids), params)
        try:
            for delta in deltas:
                said += delta.token_ids
                piece = delta.text if text or not self._format.strips else delta.text.lstrip()
                text += piece
                if piece:
                    click.echo(piece, nl=False)
                reason = delta.finish_reason or reason
        except KeyboardInterrupt:
            if not self._lines.is_terminal:
                raise
            reason = "abort"
        finally:
            deltas.close()
            click.echo()
        # A text that was cut, by a stop string or here, is not what the model's tokens say.
        whole = not self._format.strips and not (params.stop_texts and reason == "stop")
        text = text.rstrip() if self._format.strips else text
        self._conversation.answer(text, said if whole else None)
        if reason == "abort":
            self._note("stopped; what was said stays in the conversation (/undo takes it back)")
        elif reason == "length":
            self._note("the reply is cut: max_tokens or the context allow no more (/set max_tokens N)")

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        run = COMMANDS.get(name.lower())
        if run is None:
            raise RequestError(
                f"/{name} is no command: /help lists them; a space before it makes it a message"
            )
        run(self, argument.strip())

    def help(self, _argument: str) -> None:
        """this list"""
        width = max(len(usage) for usage in USAGES)
        for usage, run in zip(USAGES, COMMANDS.values(), strict=True):
            click.echo(f"{usage:<{width}}  {run.__doc__}")

    def set(self, argument: str) -> None:
        """change a control of decoding, e.g. /set temperature 0.8; none: as if never set"""
        if not argument:
            shown = {name: value for name, value in self._fields.items() if value is not None}
            for name, value in sorted(shown.items()):
                click.echo(f"{name} = {json.dumps(value, ensure_ascii=False, default=str)}")
            if not shown:
                click.echo("nothing is set: the checkpoint's defaults")
            return
        name, _, text = argument.replace("=", " ", 1).partition(" ")
        name = name.replace("-", "_")
        if name not in SETTINGS:
            raise RequestError(f"{name}: no such setting here; there are {', '.join(SETTINGS)}")
        if not text.strip():
            raise RequestError(f"/set {name} VALUE: the value is missing")
        name = ALIASES.get(name, name)
        changed = {**self._fields, name: _value(text.strip())}
        if changed[name] is None:
            del changed[name]
        if name == "do_sample":  # one setting with the temperature
            changed.pop("temperature", None)
        elif name == "temperature":
            changed.pop("do_sample", None)
        SamplingParams(**changed)
        self._fields = changed

    def system(self, argument: str) -> None:
        """what comes before the conversation; without TEXT: show it"""
        if argument:
            self._conversation.set_system(argument)
        else:
            click.echo(self._conversation.system or "no system message")

    def history(self, _argument: str) -> None:
        """show the conversation"""
        for number, turn in enumerate(self._conversation.turns):
            mark = " (dropped)" if number < self._conversation.num_dropped else ""
            click.echo(f"{turn.role}{mark}: {turn.text}")

    def undo(self, _argument: str) -> None:
        """take the last message and its reply back"""
        question = self._conversation.undo()
        taken = "nothing to take back" if question is None else f"taken back: {_text.quote(question.text)}"
        self._note(taken)

    def retry(self, _argument: str) -> None:
        """another reply to the last message (the same one where a seed is set, or the temperature is 0)"""
        question = self._conversation.undo()
        if question is None:
            raise RequestError("there is no message yet that another reply could be given to")
        self._exchange(question.text)

    def reset(self, _argument: str) -> None:
        """begin again; settings and the system message stay"""
        self._conversation.reset()
        self._note("a new conversation")

    def save(self, argument: str) -> None:
        """write the conversation as JSON"""
        path = _path("save", argument)
        self._conversation.save(path)
        self._note(f"{len(self._conversation.turns)} turns in {path}")

    def load(self, argument: str) -> None:
        """go on with a conversation that /save wrote"""
        path = _path("load", argument)
        self._conversation.load(path)
        self._note(f"{len(self._conversation.turns)} turns from {path}")

    def quit(self, _argument: str) -> None:
        """end, like Ctrl-D"""
        self._over = True


def _value(text: str) -> Any:
    """The value of ``/set``: JSON where it is that, else a text; None for none and default."""
    if text.lower() in ("none", "default", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise RequestError(f"/{command} FILE: the name of the file is missing")
    return Path(argument).expanduser()


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "help": Session.help,
    "set": Session.set,
    "system": Session.system,
    "history": Session.history,
    "undo": Session.undo,
    "retry": Session.retry,
    "reset": Session.reset,
    "save": Session.save,
    "load": Session.load,
    "quit": Session.quit,
}
_ARGUMENTS = {"set": " [NAME VALUE]", "system": " [TEXT]", "save": " FILE", "load": " FILE"}
USAGES = [f"/{name}{_ARGUMENTS.get(name, '')}" for name in COMMANDS]


def completions(line: str) -> list[str]:
    """What a line that begins so may go on to: commands, and what /set changes."""
    found = [f"/{name} " if name in _ARGUMENTS else f"/{name}" for name in COMMANDS]
    found += [f"/set {name} " for name in SETTINGS]
    return [each for each in found if line.startswith("/") and each.startswith(line)]
