"""The faults that tools/cuda_mutants.py plants fit the sources as they are. (Running them takes minutes.)"""

from __future__ import annotations

import pytest

from tools.cuda_mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_changes_one_place(mutant: Mutant) -> None:
    source = (ROOT / "csrc" / mutant.file).read_text()
    assert mutated(source, mutant) != source


def test_there_are_enough() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15
    with pytest.raises(ValueError, match="2 times"):
        mutated("a a", Mutant("x", "y", "a", "b"))
