"""The kinds of tokenizers, one file each; ``pyengine.model.tokenizer`` chooses among them.

Nothing is imported here: `tokenizers` and `sentencepiece` load only where a checkpoint needs them.
"""
