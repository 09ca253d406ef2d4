"""What rank 0 says while it trains: one line that moves on a terminal, a plain line now and then elsewhere."""

import time
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Terminal:
    """The progress of one stage."""

    def __init__(self, name: str, stream: TextIO) -> None:
        """`stream` is the user's; what this process prints otherwise goes to the log of its rank."""
        self._name = name
        self._console = Console(file=stream, highlight=False)
        self._live: Live | None = None
        self._began: tuple[float, float] | None = None

    def say(self, text: str) -> None:
        """A line that stays, and stands in the log too."""
        self._console.print(text, markup=False, soft_wrap=True)
        print(text, flush=True)

    def show(self, step: int, progress: float, loss: float, tokens_per_s: float, skipped: int, dropped: int) -> None:
        """The state of the run now; the time left is judged by this life's own pace."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, progress
        began, first = self._began
        left = (now - began) / (progress - first) * (1 - progress) if progress > first else None
        parts = [f"{self._name} {progress:6.1%}", f"step {step}", f"loss {loss:.3f}", f"{tokens_per_s:,.0f} tokens/s", f"skipped {skipped}"]
        parts += [f"bad samples {dropped}"] if dropped else []
        parts += [f"left {_duration(left)}"] if left is not None else []
        line = "  ".join(parts)
        if not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(line), refresh=True)

    def close(self) -> None:
        """Gives the line back."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
