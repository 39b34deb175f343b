from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pyengine._C import TextStream


class Pieces:
    """A detokenizer whose tokens index a list of pieces, with a rest that only ``finish`` gives."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def append(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def finish(self) -> str:
        return self.rest

    def copy(self) -> Pieces:
        return self


def play(pieces: list[str], stop: tuple[str, ...], rest: str = "") -> tuple[list[str], str, str | None]:
    """What was shown after each piece, the text, and the stop string that ended it."""
    stream = TextStream(Pieces(pieces, rest), stop)
    shown, hit = [], None
    for number in range(len(pieces)):
        hit = stream.append((number,))
        if hit is not None:
            break
        shown.append(stream.take())
    if hit is None:
        hit = stream.finish()
    shown.append(stream.take())
    assert "".join(shown) == stream.text
    return shown, stream.text, hit


def test_stop_string_inside_one_piece_cuts_the_text() -> None:
    assert play(["one END two"], ("END",)) == (["one "], "one ", "END")


def test_stop_string_across_pieces_is_never_shown() -> None:
    assert play(["a E", "N", "D b"], ("END",)) == (["a ", "", ""], "a ", "END")


def test_false_beginning_is_shown_later() -> None:
    assert play(["E", "N", "x"], ("END",)) == (["", "", "ENx", ""], "ENx", None)


def test_beginning_at_the_end_is_shown_when_finished() -> None:
    assert play(["abc E"], ("END",)) == (["abc ", "E"], "abc E", None)


def test_of_several_the_one_complete_first_wins() -> None:
    assert play(["ab12cd"], ("cd", "b1", "12")) == (["a"], "a", "b1")
    assert play(["ab12cd"], ("b12c", "2")) == (["ab1"], "ab1", "2")
    assert play(["ab12cd"], ("2", "b12")) == (["a"], "a", "b12")


def test_overlapping_beginnings_hold_back_the_longest() -> None:
    assert play(["xaab", "aaa"], ("aabaac", "bb")) == (["x", "aaba", "aa"], "xaabaaa", None)
    assert play(["xaa", "ab"], ("aab",))[1:] == ("xa", "aab")


def test_rest_of_the_detokenizer_can_complete_a_stop_string() -> None:
    assert play(["abc"], ("cd",), rest="d!") == (["ab", ""], "ab", "cd")


@given(
    text=st.text("ab\n", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_any_split_gives_the_text_before_the_first_stop(text: str, cuts: list[int], stop: list[str]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    _, result, hit = play(pieces, tuple(stop))
    if hit is None:
        assert result == text and not any(s in text for s in stop)
    else:
        assert text.startswith(result + hit)
        assert all(s not in (result + hit)[:-1] for s in stop), (
            "the stop string that is complete first ends it"
        )
