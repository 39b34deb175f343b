#!/usr/bin/env python3
"""Pictures for docs/decoding.md: what each control does to a distribution over sixteen words.

    tools/plot_decoding.py [--out docs/figures/decoding]

The sampler of the engine computes the distributions. Outlines are the model's, filled bars what the next
token is drawn from. Each picture's <desc> holds the numbers; a test compares them with the sampler's.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyengine import _C  # noqa: E402

WORDS = "cat the dog mat red and home </s> a sat on . ran far slept away".split()
PROBABILITIES = np.array(
    [0.24, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.045, 0.035, 0.03, 0.02, 0.017, 0.013, 0.01, 0.006, 0.004]
)
LOGITS = (np.log(PROBABILITIES) + 4).astype(np.float32)  # the likelier half is positive
PROMPT, TEXT = "the cat sat on".split(), "the mat and the".split()
GREY, BLUE = "#767676", "#3b82f6"  # at least 4:1 (text) and 3:1 against white and against #0d1117


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


# File name -> (what the picture says, arguments of _C.Sampler.set; "mask" is for set_mask).
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "logit_bias": ("home: +2, cat: −2", {"logit_bias": [(ids("home"), 2.0), (ids("cat"), -2.0)]}),
    "allowed_token_ids": ("cat, dog, home", {"allowed_token_ids": ids("cat", "dog", "home")}),
    "repetition_penalty": ("r = 1.5", {"repetition_penalty": 1.5}),
    "presence_penalty": ("p = 1", {"presence_penalty": 1.0}),
    "frequency_penalty": ("f = 1", {"frequency_penalty": 1.0}),
    "no_repeat_ngram_size": ("n = 2", {"no_repeat_ngram_size": 2}),
    "bad_words": ("red", {"bad_words": [ids("red")]}),
    "min_tokens": ("5", {"min_tokens": 5, "stop_ids": ids("</s>")}),
    "structured_outputs": ('regex "dog|(red )?mat"', {"mask": ids("dog", "red", "mat")}),
    "temperature_low": ("T = 0.5", {"temperature": 0.5}),
    "temperature_high": ("T = 2", {"temperature": 2.0}),
    "top_k": ("k = 5", {"top_k": 5}),
    "top_p": ("p = 0.6", {"top_p": 0.6}),
    "min_p": ("m = 0.4", {"min_p": 0.4}),
    "typical_p": ("p = 0.6", {"typical_p": 0.6}),
    "epsilon_cutoff": ("ε = 0.05", {"epsilon_cutoff": 0.05}),
    "eta_cutoff": ("ε = 0.05", {"eta_cutoff": 0.05}),
    "mirostat": ("τ = 2, first token", {"mirostat_tau": 2.0}),
}


def distribution(arguments: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What the next token is drawn from, (16,), after ``PROMPT`` and ``TEXT``."""
    settings = dict(arguments)
    mask = settings.pop("mask", None)
    sampler = _C.Sampler(1)
    so_far = np.array(ids(*PROMPT, *TEXT), np.int32)
    sampler.set(0, token_ids=so_far, num_prompt=len(PROMPT), **settings)
    if mask is not None:
        sampler.set_mask(0, np.array([sum(1 << token for token in mask)], np.int32))
    position = np.array([len(so_far)], np.int32)
    scores = sampler.process(_C.ExecContext(1), LOGITS[None], np.zeros(1, np.int32), position)[0]
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def description(after: npt.NDArray[np.float64]) -> str:
    return ", ".join(f"{word} {100 * value:.1f} %" for word, value in zip(WORDS, after, strict=True))


def draw(name: str, says: str, after: npt.NDArray[np.float64]) -> str:
    """The picture as SVG, whose text is text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 7}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(2.9, 1.35))
        x = np.arange(len(WORDS))
        axes.bar(x, after, width=0.76, color=BLUE)
        axes.bar(x, PROBABILITIES, width=0.76, fill=False, edgecolor=GREY, linewidth=0.7)
        axes.set_xticks(x, WORDS, rotation=90, color=GREY)
        axes.set_yticks([0.2, 0.4], ["20 %", "40 %"], color=GREY)
        axes.set_ylim(0, 0.66)
        axes.set_xlim(-0.7, len(WORDS) - 0.3)
        axes.tick_params(length=0, pad=2)
        axes.text(len(WORDS) - 0.5, 0.65, says, ha="right", va="top", color=GREY, fontsize=8)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GREY)
        figure.subplots_adjust(left=0.1, right=0.995, top=0.99, bottom=0.27)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = picture.getvalue()
    start = text.index(">", text.index("<svg")) + 1
    heading = f"\n <title>{name}</title>\n <desc>{escape(description(after))}</desc>"
    return text[:start] + heading + text[start:]


def pictures() -> Iterator[tuple[str, str]]:
    """File names and their contents."""
    for name, (says, arguments) in CONTROLS.items():
        yield f"{name}.svg", draw(name, says, distribution(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/decoding"), help="a directory")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in pictures():
        (args.out / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
