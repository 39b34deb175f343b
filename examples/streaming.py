"""Text as it is generated, and what it took.

python examples/streaming.py [CHECKPOINT]      (default: the bundled model)
"""

import sys

from pyengine import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
params = SamplingParams(max_tokens=100, temperature=0.8, stop="\n\n")

prompt = "Once upon a time"
print(prompt, end="")
for delta in llm.stream(prompt, params):
    print(delta.text, end="", flush=True)
    if delta.output is not None:  # the last delta carries the whole request
        metrics = delta.output.metrics
        print(f"\n\n[{delta.finish_reason}; first token after {metrics.ttft:.3f} s; ", end="")
        print(
            f"{metrics.new_tokens} tokens in {metrics.total_time:.3f} s; seed {delta.output.outputs[0].seed}]"
        )

# Leaving the loop early ends the request and frees its part of the KV cache.
for delta in llm.stream("The Captain looked at the sea", params):
    print(delta.text, end="", flush=True)
    if "." in delta.text:
        break
print()
