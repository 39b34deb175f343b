"""The progress bar for many prompts. It imports rich, so it is imported only where it is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Finished prompts or texts, and tokens per second, on standard error while it is entered."""

    def __init__(self, count: int, what: str = "prompts") -> None:
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(what + "  {task.fields[rate]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # results must reach standard output as they are
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=count, rate="")

    def __enter__(self) -> ProgressBar:
        self._start = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, finished: int, _total: int, new_tokens: int) -> None:
        rate = f"{new_tokens / (time.perf_counter() - self._start):.0f} tokens/s"
        self._bar.update(self._task, completed=finished, rate=rate)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Makes room for results where they are printed to the same terminal."""
        if not sys.stdout.isatty():
            yield
            return
        self._bar.stop()
        yield
        self._bar.start()
