"""Reference PyTorch GPT-2 and its training. Needs torch; nothing on the inference path imports it."""
