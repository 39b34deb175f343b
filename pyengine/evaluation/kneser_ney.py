"""Interpolated Kneser–Ney n-gram model (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7).

For the highest order, counts are how often an n-gram occurs; for the lower ones, after how many different
tokens it occurs (its continuation count). With d the discount of an order, c the counts and h a history of
n - 1 tokens (h' without its first):

    p_n(w | h) = max(c(h w) - d, 0) / c(h ·)  +  d N(h ·) / c(h ·)  p_{n-1}(w | h')
    p_0(w)     = 1 / V

N(h ·) is the number of different tokens seen behind h; where h was never seen, p_n = p_{n-1}. The discount
is Ney's estimate n_1 / (n_1 + 2 n_2), from the numbers of n-grams counted once and twice.

The n-grams of an order are sorted rows, without a hash: each n-gram is the number of its history among the
histories (one less order) and its last token, packed into 64 bits. All steps are numpy's sorting and
searching, so that millions of tokens take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.errors import ConfigError

Ids = npt.NDArray[np.int64]
MAX_ORDER = 12


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order. ``keys`` are sorted; history number * V + token."""

    keys: Ids
    discounted: npt.NDArray[np.float64]  # max(count - d, 0) of each key
    totals: npt.NDArray[np.float64]  # count of all n-grams with a history, by its number
    weights: npt.NDArray[np.float64]  # d N(h ·) / c(h ·) by number of the history


class KneserNey:
    """A model of order n over token ids below ``vocab_size``, trained on token sequences."""

    def __init__(self, documents: Sequence[Sequence[int] | Ids], order: int, vocab_size: int) -> None:
        """``documents``: n-grams do not reach from one into another. ConfigError for what cannot work."""
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError(f"n-gram order {order}: must be from 1 to {MAX_ORDER}")
        arrays = [np.asarray(d, np.int64) for d in documents if len(d)]
        if not arrays:
            raise ConfigError("an n-gram model needs text to count")
        if max(int(a.max()) for a in arrays) >= vocab_size:
            raise ConfigError(f"a token of the text is outside the vocabulary of {vocab_size}")
        self.order, self.vocab_size = order, vocab_size
        tokens = np.concatenate(arrays)
        # Tokens of its document before each position: an n-gram of order k ends only where there are k - 1.
        before = np.concatenate([np.arange(len(a)) for a in arrays])
        self._vocabulary: list[Ids] = []  # per order k: sorted keys of the k-grams
        ranks: list[Ids] = []  # per order k: at each position the number of the k-gram ending there, or -1
        history = np.zeros(len(tokens), np.int64)  # the empty history has number 0
        for k in range(1, order + 1):
            valid = before >= k - 1
            keys = np.where(valid, history * vocab_size + tokens, -1)
            known = np.unique(keys[valid])
            rank = np.where(valid, np.searchsorted(known, keys), -1)
            self._vocabulary.append(known)
            ranks.append(rank)
            history = np.concatenate(([-1], rank[:-1]))  # the k-gram that ends one token before
        self._orders = [self._count(k, ranks, tokens, before) for k in range(1, order + 1)]

    def _count(self, k: int, ranks: list[Ids], tokens: Ids, before: Ids) -> _Order:
        keys = self._vocabulary[k - 1]
        if k == self.order:
            valid = ranks[k - 1] >= 0
            counts = np.bincount(ranks[k - 1][valid], minlength=len(keys))
        else:
            # Each distinct (k + 1)-gram is one token before its last k. An n-gram at the start of a document
            # may have nothing before it: that is a context of its own, counted once.
            longer = ranks[k]
            last = np.full(len(self._vocabulary[k]), -1)
            valid = longer >= 0
            last[longer[valid]] = ranks[k - 1][valid]
            counts = np.bincount(last[last >= 0], minlength=len(keys))
            first = before == k - 1
            counts[np.unique(ranks[k - 1][first])] += 1
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else 0.0
        histories = keys // self.vocab_size
        size = 1 if k == 1 else len(self._vocabulary[k - 2])
        totals = np.bincount(histories, weights=counts, minlength=size).astype(np.float64)
        # As much as the discount took: nothing more where counts are smaller than it.
        discounted = np.maximum(counts - discount, 0.0)
        taken = np.bincount(histories, weights=counts - discounted, minlength=size)
        weights = np.divide(taken, totals, out=np.ones(size), where=totals > 0)
        return _Order(keys, discounted, totals, weights)

    def probabilities(self, tokens: Sequence[int] | Ids) -> npt.NDArray[np.float64]:
        """p(token | the order - 1 tokens before it) for each of ``tokens``, from the first one on."""
        ids = np.asarray(tokens, np.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ConfigError(f"a token of the text is outside the vocabulary of {self.vocab_size}")
        result = np.full(len(ids), 1.0 / self.vocab_size)
        history = np.zeros(len(ids), np.int64)
        for k in range(1, self.order + 1):
            one = self._orders[k - 1]
            seen = history >= 0
            keys = history * self.vocab_size + ids
            at = np.minimum(np.searchsorted(one.keys, keys), len(one.keys) - 1)
            found = seen & (one.keys[at] == keys)
            number = np.where(seen, history, 0)
            total = one.totals[number]
            usable = seen & (total > 0)
            direct = np.where(found, one.discounted[at], 0.0)
            mixed = direct / np.where(usable, total, 1.0) + one.weights[number] * result
            result = np.where(usable, mixed, result)
            rank = np.where(found, at, -1)
            history = np.concatenate(([-1], rank[:-1])) if len(rank) else rank
        return result
