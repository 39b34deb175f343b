"""Several streams in one event loop; the slowest are cancelled.

python examples/async_streams.py [CHECKPOINT]      (default: the bundled model)
"""

import asyncio
import sys
from contextlib import aclosing

from pyengine import LLM, SamplingParams


async def tell(llm: LLM, prompt: str, max_tokens: int) -> str:
    text = prompt
    params = SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=1, ignore_eos=True)
    async with aclosing(llm.astream(prompt, params)) as deltas:  # leaving the block ends the request
        async for delta in deltas:
            text += delta.text
    return text


async def main() -> None:
    with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        tasks = [asyncio.create_task(tell(llm, "Once upon a time", 20 * count)) for count in (1, 2, 3, 25)]
        done, late = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()  # its part of the KV cache is free within a step
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            print(task.result())
        print(f"\n{len(done)} came to its end first, {len(late)} were cancelled")


asyncio.run(main())
