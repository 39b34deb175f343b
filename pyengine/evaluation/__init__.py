"""How well a model predicts a text, beside the classic n-gram model. Needs numpy, no torch."""
