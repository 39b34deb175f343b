"""What the context holds of a conversation, and the files that keep one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.chat.conversation import Conversation, read_messages
from pyengine.chat.formats import ChatFormat, Turn
from pyengine.errors import RequestError


class Letters(ChatFormat):
    """A token per letter, and one after each turn."""

    name = "letters"

    def __init__(self, takes_system: bool = True) -> None:
        self.takes_system = takes_system

    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]:
        return [ord(letter) for letter in system + "".join(turn.text + "\0" for turn in turns)]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=30),
    context=st.integers(8, 100),
    reply_tokens=st.integers(1, 120),
    system=st.integers(0, 10),
)
def test_what_is_asked_fits_and_holds_the_newest_turns(
    lengths: list[tuple[int, int]], context: int, reply_tokens: int, system: int
) -> None:
    form = Letters()
    talk = Conversation(form, context, "s" * system)
    for asked, said in lengths:
        before, dropped = list(talk.turns), talk.num_dropped
        alone = form.prompt_ids(talk.system, [Turn("user", "q" * asked)])
        if len(alone) >= context:
            with pytest.raises(RequestError, match=f"take {len(alone)} tokens, .* holds {context},"):
                talk.ask("q" * asked, reply_tokens)
            assert (talk.turns, talk.num_dropped) == (before, dropped)
            continue
        ids = talk.ask("q" * asked, reply_tokens)
        assert ids == form.prompt_ids(talk.system, talk.turns[talk.num_dropped :])
        assert len(ids) < context and talk.num_dropped % 2 == 0
        room = min(reply_tokens, context // 2)
        if talk.num_dropped == dropped:  # nothing had to go, or nothing was left that could
            assert len(ids) + room <= context or len(ids) == len(alone)
        else:  # no more went than had to
            more = form.prompt_ids(talk.system, talk.turns[talk.num_dropped - 2 :])
            assert len(more) + room > context * 3 // 4
        talk.answer("a" * said, None)
    assert len(talk.turns) % 2 == 0


def test_undo_and_reset() -> None:
    talk = Conversation(Letters(), 100)
    assert talk.undo() is None
    for text in ("one", "two"):
        talk.ask(text, 1)
        talk.answer(text.upper(), None)
    assert talk.undo() == Turn("user", "two")
    assert [turn.text for turn in talk.turns] == ["one", "ONE"]
    talk.ask("three", 1)  # without a reply
    assert talk.undo() == Turn("user", "three")
    talk.reset()
    assert talk.turns == [] and talk.undo() is None


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk = Conversation(Letters(), 20, "sys")
    for text in ("é\n犬", "long enough", "and on"):
        talk.ask(text, 4)
        talk.answer(text.upper(), [1, 2])
    assert talk.num_dropped
    talk.save(path)
    talk.save(path)  # over itself
    other = Conversation(Letters(), 20)
    other.load(path)
    assert (other.system, other.num_dropped) == ("sys", 0)
    assert [(turn.role, turn.text) for turn in other.turns] == [(turn.role, turn.text) for turn in talk.turns]
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "sys"}
    with pytest.raises(RequestError, match="no place for a system message"):
        Conversation(Letters(takes_system=False), 20).load(path)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(RequestError, match="exists and is no conversation"):
        Conversation(Letters(), 20).save(path)
    assert path.read_text() == "years of work"


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("{", "is not JSON"),
        ({"turns": []}, "expected {"),
        ([USER, USER], "message 2 has the role 'user', and 'assistant' is expected"),
        ([ASSISTANT], "message 1 has the role 'assistant'"),
        ([USER], "the last message is the user's"),
        ([USER, {"role": "assistant"}], "message 2 is"),
        ([USER, ASSISTANT, {"role": "system", "content": "x"}], "message 3 has the role 'system'"),
        (["hello"], "message 1 is 'hello'"),
    ],
)
def test_files_that_are_no_conversation(tmp_path: Path, data: Any, hint: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(RequestError, match=hint) as caught:
        read_messages(path)
    assert str(path) in str(caught.value)


def test_a_bare_list_of_messages(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([USER, ASSISTANT]))
    assert read_messages(path) == ("", [Turn("user", "a"), Turn("assistant", "b")])
