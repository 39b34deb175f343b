"""The pictures of docs/decoding.md: they show what the sampler computes, and every step has one."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tools.plot_decoding import CONTROLS, PROBABILITIES, WORDS, description, distribution, draw

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs/figures/decoding"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", CONTROLS)
def test_the_picture_shows_what_the_sampler_says(name: str) -> None:
    after = distribution(CONTROLS[name][1])
    path = PICTURES / f"{name}.svg"
    root = ElementTree.parse(path).getroot()
    assert root.findtext(f"{SVG}desc") == description(after), "run tools/plot_decoding.py"
    assert path.stat().st_size < 20_000
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert set(WORDS) <= set(texts) and CONTROLS[name][0] in texts
    assert not np.allclose(after, PROBABILITIES)  # it has an effect


def test_what_the_steps_do() -> None:
    """By their formulas, in float64."""
    assert np.allclose(distribution({}), PROBABILITIES)

    def of(name: str) -> np.ndarray:
        return distribution(CONTROLS[name][1])

    for name, power in (("temperature_low", 2), ("temperature_high", 0.5)):
        assert np.allclose(of(name), PROBABILITIES**power / np.sum(PROBABILITIES**power))
    surprise = -np.log(PROBABILITIES)
    entropy = np.sum(PROBABILITIES * surprise)
    kept = {
        "top_k": np.arange(16) < 5,
        "top_p": np.cumsum(PROBABILITIES) - PROBABILITIES < 0.6,
        "min_p": PROBABILITIES >= 0.4 * PROBABILITIES.max(),
        "epsilon_cutoff": PROBABILITIES >= 0.05,
        "eta_cutoff": PROBABILITIES >= min(0.05, np.sqrt(0.05) * np.exp(-entropy)),
        "mirostat": surprise / np.log(2) <= 4,
    }
    for name, mask in kept.items():
        assert np.allclose(of(name), np.where(mask, PROBABILITIES, 0) / PROBABILITIES[mask].sum()), name
    assert set(np.flatnonzero(of("no_repeat_ngram_size") == 0)) == {0, 3}  # "the" was followed by these
    assert of("presence_penalty")[1] / of("frequency_penalty")[1] > 2  # "the" came twice
    assert of("typical_p")[0] == 0 and of("typical_p")[1] > 0  # the likeliest is not typical


def test_the_page_has_each_picture_once() -> None:
    shown = re.findall(r"!\[(\w+)\]\(figures/decoding/(\w+)\.svg\)", (ROOT / "docs/decoding.md").read_text())
    assert sorted(shown) == sorted((name, name) for name in CONTROLS)
    assert {path.stem for path in PICTURES.glob("*.svg")} == set(CONTROLS)


def test_drawing() -> None:
    pytest.importorskip("matplotlib")
    text = draw("top_k", "k = 5", distribution({"top_k": 5}))
    assert text == draw("top_k", "k = 5", distribution({"top_k": 5}))
    root = ElementTree.fromstring(text)
    assert root.findtext(f"{SVG}title") == "top_k" and len(text) < 20_000
