"""How likely is a text, and which of several answers is the likeliest?

python examples/scoring.py [CHECKPOINT]      (default: the bundled model)
"""

import sys

from pyengine import LLM

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)

score = llm.score("The Captain came upon the deck, and looked at the sea.")
for token, logprob in zip(score.tokens, score.logprobs, strict=True):
    print(f"{'first token' if logprob is None else f'{logprob:11.3f}'}  {token}")
print(f"perplexity {score.perplexity:.2f}, bits per character {score.bits_per_character:.3f}\n")

score = llm.score("The Captain came upon the", continuation=" deck")
print(f"' deck' after 'The Captain came upon the': log-probability {score.total_logprob:.3f}\n")

for choice in llm.choose("He took off his", [" hat", " boots", " hat and coat", " Wednesday"]):
    print(f"{choice.probability:7.2%}  {choice.text!r}")
