"""A conversation with one model: its turns, and which of them the context still holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyengine.chat.formats import ASSISTANT, SYSTEM, USER, ChatFormat, Turn
from pyengine.errors import RequestError
from pyengine.model.json_file import show


class Conversation:
    """Turns of user and model, in turn, the user's first.

    ``turns`` are all; ``num_dropped`` of them, the oldest, are not shown to the model any more.
    """

    def __init__(self, form: ChatFormat, max_model_len: int, system: str = "") -> None:
        self._format = form
        self._max_model_len = max_model_len
        self.turns: list[Turn] = []
        self.num_dropped = 0
        self.system = ""
        self.set_system(system)

    def set_system(self, text: str) -> None:
        if text and not self._format.takes_system:
            raise RequestError(f'the format "{self._format.name}" has no place for a system message')
        self.system = text

    def ask(self, text: str, reply_tokens: int) -> list[int]:
        """Token ids that a reply to ``text`` continues.

        Where the context does not hold them with ``reply_tokens`` new ones (but at most half of itself), the
        oldest exchanges are dropped until a quarter of it is free for the turns to come. RequestError if
        ``text`` alone is too long; the conversation is then as it was.
        """
        turns = [*self.turns, Turn(USER, text)]
        dropped = self.num_dropped
        room = min(reply_tokens, self._max_model_len // 2)
        ids = self._format.prompt_ids(self.system, turns[dropped:])
        if len(ids) + room > self._max_model_len:
            while len(ids) + room > self._max_model_len * 3 // 4 and dropped + 2 < len(turns):
                dropped += 2
                ids = self._format.prompt_ids(self.system, turns[dropped:])
        if len(ids) >= self._max_model_len:
            raise RequestError(
                f"this message{' and the system message' if self.system else ''} take {len(ids)} tokens, and "
                f"the context holds {self._max_model_len}, the reply included: shorten it"
            )
        self.turns, self.num_dropped = turns, dropped
        return ids

    def answer(self, text: str, ids: Sequence[int] | None) -> None:
        """What the model said to the last question; ``ids`` None: its tokens are not those of ``text``."""
        self.turns.append(Turn(ASSISTANT, text, None if ids is None else tuple(ids)))

    def undo(self) -> Turn | None:
        """Take the last exchange back; its question, or None where there was none."""
        while self.turns:
            turn = self.turns.pop()
            if turn.role == USER:
                self.num_dropped = min(self.num_dropped, len(self.turns))
                return turn
        return None

    def reset(self) -> None:
        self.turns, self.num_dropped = [], 0

    def save(self, path: Path) -> None:
        """As JSON, ``{"messages": [{"role": ..., "content": ...}, ...]}``; a file that is something else is
        not overwritten. RequestError, OSError."""
        if path.exists():
            try:
                read_messages(path)
            except RequestError:
                raise RequestError(
                    f"{path} exists and is no conversation; choose another name, or remove it"
                ) from None
        messages = [{"role": SYSTEM, "content": self.system}] if self.system else []
        messages += [{"role": turn.role, "content": turn.text} for turn in self.turns]
        path.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n", "utf-8")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in place of this one. RequestError, OSError."""
        system, turns = read_messages(path)
        self.set_system(system)
        self.turns, self.num_dropped = turns, 0


def read_messages(path: Path) -> tuple[str, list[Turn]]:
    """System message and turns of a file as ``Conversation.save`` writes it, or of a list of messages."""
    try:
        data: Any = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list):
        raise RequestError(f'{path}: expected {{"messages": [...]}}')
    system = ""
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        role, text = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if not isinstance(text, str):
            raise RequestError(
                f'{path}: message {number + 1} is {show(message)}: expected {{"role": ..., "content": TEXT}}'
            )
        if role == SYSTEM and number == 0:
            system = text
            continue
        expected = ASSISTANT if len(turns) % 2 else USER
        if role != expected:
            raise RequestError(
                f"{path}: message {number + 1} has the role {show(role)}, and {expected!r} is expected: one "
                "system message at most, then user and assistant in turn"
            )
        turns.append(Turn(role, text))
    if len(turns) % 2:
        raise RequestError(f"{path}: the last message is the user's: expected an assistant's after it")
    return system, turns
