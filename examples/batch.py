"""Many prompts at once: one output per prompt, in order, as soon as each is complete.

python examples/batch.py [CHECKPOINT]      (default: the bundled model)
"""

import sys

from pyengine import LLM, RequestOutput, SamplingParams

prompts = [f"Chapter {number}. The Captain" for number in range(1, 9)]
params = SamplingParams(max_tokens=30, temperature=0.8, seed=1, n=2)


def show(index: int, output: RequestOutput) -> None:
    for completion in output.outputs:
        print(f"{prompts[index]}{completion.text!r}")


with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
    # The last prompt is in a hurry: the lower the number, the earlier its turn.
    llm.generate(prompts, params, priority=[0] * 7 + [-1], on_output=show)

    stats = llm.stats()
    print(f"\n{stats.new_tokens} new tokens in {stats.steps} steps, {stats.busy_time:.2f} s; ", end="")
    print(f"{stats.prefix_hit_tokens} prompt tokens came from the prefix cache")
