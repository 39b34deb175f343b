"""Kneser-Ney against a direct implementation with dictionaries; probabilities sum to one."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from pyengine.errors import ConfigError
from pyengine.evaluation.kneser_ney import KneserNey


class Direct:
    """The formulas of the module, written down as they stand."""

    def __init__(self, documents: list[list[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.counts: list[dict[tuple[int, ...], int]] = []
        self.discounts = []
        for k in range(1, order + 1):
            before: dict[tuple[int, ...], list[object]] = defaultdict(list)
            for document in documents:
                for end in range(k, len(document) + 1):
                    gram = tuple(document[end - k : end])
                    before[gram].append(document[end - k - 1] if end > k else "start")
            if k == order:
                counts = {gram: len(b) for gram, b in before.items()}
            else:
                counts = {gram: len(set(b)) for gram, b in before.items()}
            once = sum(c == 1 for c in counts.values())
            twice = sum(c == 2 for c in counts.values())
            self.counts.append(counts)
            self.discounts.append(once / (once + 2 * twice) if once else 0.0)

    def probability(self, history: tuple[int, ...], token: int) -> float:
        history = history[len(history) - min(len(history), self.order - 1) :]
        return self._p(history, token)

    def _p(self, history: tuple[int, ...], token: int) -> float:
        k = len(history) + 1
        lower = self._p(history[1:], token) if history else 1 / self.vocab_size
        counts, discount = self.counts[k - 1], self.discounts[k - 1]
        behind = [c for gram, c in counts.items() if gram[:-1] == history]
        if not behind:
            return lower
        count, total = counts.get((*history, token), 0), sum(behind)
        return max(count - discount, 0) / total + discount * len(behind) / total * lower


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_direct_one(order: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 5, n).tolist() for n in (60, 1, 2, 40)]
    model, direct = KneserNey(documents, order, 7), Direct(documents, order, 7)
    text = rng.integers(0, 7, 80).tolist()
    expected = [direct.probability(tuple(text[:i]), text[i]) for i in range(len(text))]
    np.testing.assert_allclose(model.probabilities(text), expected, rtol=1e-12)


@pytest.mark.parametrize("order", range(1, 6))
def test_sums_to_one(order: int) -> None:
    rng = np.random.default_rng(order)
    model = KneserNey([rng.integers(0, 4, 50), rng.integers(0, 6, 30)], order, 8)
    for length in range(8):
        history = rng.integers(0, 8, length).tolist()
        total = sum(model.probabilities([*history, token])[-1] for token in range(8))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_longer_histories_help_where_they_matter() -> None:
    text = [0, 1, 2, 0, 2, 1] * 50
    perplexities = [-np.log(KneserNey([text], n, 3).probabilities(text[:60])).mean() for n in (1, 2, 3)]
    assert perplexities[0] > perplexities[1] > perplexities[2]


def test_refused() -> None:
    with pytest.raises(ConfigError, match="order 0"):
        KneserNey([[0]], 0, 2)
    with pytest.raises(ConfigError, match="needs text"):
        KneserNey([[]], 2, 2)
    with pytest.raises(ConfigError, match="outside the vocabulary of 2"):
        KneserNey([[2]], 2, 2)
    with pytest.raises(ConfigError, match="outside the vocabulary of 2"):
        KneserNey([[1, 0]], 2, 2).probabilities([5])
