"""Perplexity and bits per character of texts, by the engine and by an n-gram model on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyengine.errors import ConfigError, RequestError
from pyengine.evaluation.kneser_ney import KneserNey
from pyengine.llm import LLM
from pyengine.train.corpus import Source
from pyengine.train.data import Dataset
from pyengine.train.tokenizers import TextEncoder, fingerprint

_GROUP_CHARS = 1 << 20  # short documents that are scored together


@dataclass
class Likelihood:
    """Sums over the scored tokens of a text; ``nats`` is the negative log-likelihood."""

    name: str
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    num_bytes: int = 0
    nats: float = 0.0
    ngram_nats: float | None = None  # of the n-gram model, where there is one

    def add(self, other: Likelihood) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.characters += other.characters
        self.num_bytes += other.num_bytes
        self.nats += other.nats
        if other.ngram_nats is not None:
            self.ngram_nats = (self.ngram_nats or 0.0) + other.ngram_nats

    def metrics(self, nats: float) -> dict[str, float]:
        """loss (nats per token), perplexity, bits per character and per byte."""
        loss, bits = nats / max(1, self.tokens), nats / math.log(2)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_character": bits / max(1, self.characters),
            "bits_per_byte": bits / max(1, self.num_bytes),
        }


def evaluate(
    llm: LLM,
    sources: Iterable[Source],
    *,
    stride: int | None = None,
    add_bos: bool | None = None,
    ngram: KneserNey | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Likelihood]:
    """The likelihood of each file, in order.

    Every token but the first of a document is scored; the first, too, with ``add_bos`` [where there is a
    BOS]. Long documents are scored in windows ``stride`` tokens apart, see ``LLM.score``. ``progress`` is
    called with the characters done since its last call.
    """
    if llm.tokenizer is None:
        raise ConfigError(f"{llm.path}: has no tokenizer, so texts cannot be evaluated; add its files")
    bos = llm.config.bos_token_id
    if bos is None:
        bos = llm.tokenizer.bos_token_id
    if add_bos is None:
        add_bos = bos is not None
    for source in sources:
        total = Likelihood(source.name)
        for group in _groups(source):
            scores = llm.score(group, add_bos=add_bos, stride=stride)
            for text, score in zip(group, scores, strict=True):
                unscored = score.token_ids[: len(score.token_ids) - score.num_scored]
                first = (llm.tokenizer.decode(unscored) if unscored else "").encode("utf-8")
                one = Likelihood(
                    source.name,
                    documents=1,
                    tokens=score.num_scored,
                    characters=score.num_characters or 0,
                    num_bytes=len(text.encode("utf-8")) - len(first),
                    nats=-score.total_logprob,
                )
                if ngram is not None:
                    ids = ([bos] if add_bos and bos is not None else []) + score.token_ids
                    probabilities = ngram.probabilities(ids)[len(ids) - score.num_scored :]
                    one.ngram_nats = -float(np.log(probabilities).sum())
                total.add(one)
            if progress is not None:
                progress(sum(map(len, group)))
        if not total.documents:
            raise RequestError(f"{source.name}: there is nothing to evaluate: the text is empty")
        yield total


def _groups(source: Source) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for document in source.documents():
        text = "".join(document)
        if not text:
            continue
        group.append(text)
        size += len(text)
        if size >= _GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def ngram_of_run(model: Path, order: int, vocab_size: int) -> KneserNey | None:
    """An n-gram model of the tokens that ``pyengine-cli train`` had for a checkpoint; None without them."""
    for data in (model / "data", model.parent / "data"):
        manifest = data / "manifest.json"
        if not manifest.is_file():
            continue
        from pyengine.model.json_file import read_json_object

        dataset = Dataset(data, read_json_object(manifest, ConfigError))
        if fingerprint(model) != dataset.manifest.get("fingerprint"):
            continue
        store = dataset.store("train")
        tokens = store.slice(0, len(store))
        start = dataset.manifest["document_start"]
        borders = np.flatnonzero(tokens == start[0])[1:].tolist() if start else []
        return KneserNey(np.split(tokens, borders), order, vocab_size)
    return None


def ngram_of_texts(model: Path, sources: Iterable[Source], order: int, vocab_size: int) -> KneserNey:
    """An n-gram model of texts in the tokens of a checkpoint."""
    encoder = TextEncoder(model)
    documents = []
    for source in sources:
        for document in source.documents():
            ids = [i for piece in encoder.encode(document) for i in piece]
            documents.append(np.array([*encoder.document_start, *ids], np.int64))
    return KneserNey(documents, order, vocab_size)
