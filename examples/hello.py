"""The example every newcomer knows, beside its transformers original.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    model = AutoModelForCausalLM.from_pretrained("gpt2")
    inputs = tokenizer.encode("Hello, my dog is cute", return_tensors="pt")
    outputs = model.generate(inputs, max_length=100, temperature=0.7)
    print(tokenizer.decode(outputs[0]))

The original decodes greedily: without do_sample=True, transformers ignores the temperature. So its twin
here says temperature=0 and returns the same tokens; with temperature=0.7 the text is sampled.

    python examples/hello.py [CHECKPOINT]      (default: the bundled model)
"""

import sys

from pyengine import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
prompt = "Hello, my dog is cute"

greedy = llm.generate(prompt, SamplingParams(max_length=100, temperature=0))[0]
print(prompt + greedy.outputs[0].text)

print("\n--- sampled ---\n")

sampled = llm.generate(prompt, SamplingParams(max_length=100, temperature=0.7, seed=1))[0]
print(prompt + sampled.outputs[0].text)
