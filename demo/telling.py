"""What the demo says: sentences, and the progress of both directions. On a terminal with bars, else in plain lines."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from demo.tally import Tally

_PLAIN_SECONDS = 1.0
"Between two plain lines of progress."
_WIDTH = 100
"Sentences are not set wider, however wide the terminal is."


class Teller:
    """Writes to standard output. A context manager: leaving it puts the terminal back in order."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._is_fancy = self._console.is_terminal and not self._console.is_dumb_terminal
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._next_line = 0.0

    def __enter__(self) -> Teller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()

    def say(self, text: str, *, style: str = "") -> None:
        """A paragraph of its own."""
        width = min(_WIDTH, self._console.width if self._is_fancy else _WIDTH)
        for line in textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False):
            self._print(line, style)

    def step(self, text: str, *, style: str = "") -> None:
        """A paragraph with the seconds since the start in front of it."""
        stamp = f"{time.monotonic() - self._started:5.1f} s  "
        width = min(_WIDTH, self._console.width if self._is_fancy else _WIDTH)
        lines = textwrap.wrap(
            " ".join(text.split()), max(30, width - len(stamp)), break_on_hyphens=False, break_long_words=False
        )
        for line in lines:
            self._print(stamp + line, style)
            stamp = " " * len(stamp)

    def line(self, text: str = "") -> None:
        """As it stands, for commands that one may copy."""
        self._print(text, "")

    def _print(self, text: str, style: str) -> None:
        if self._is_fancy:
            self._console.print(Text(text, style=style), soft_wrap=True)
        else:
            print(text, flush=True)  # noqa: T201

    def progress(self, tally: Tally, uploads: int, commands: int) -> None:
        """Show how far both directions are; call it often."""
        if self._is_fancy:
            self._show_bars(tally, uploads, commands)
            return
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _PLAIN_SECONDS
            self.step(
                f"uploads: {tally.uploads.sent} sent, {tally.uploads.arrived} of {uploads} in the cloud; "
                f"commands: {tally.commands.sent} sent, {tally.commands.arrived} of {commands} answered"
            )

    def _show_bars(self, tally: Tally, uploads: int, commands: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("         {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._bars = {
                "uploads": self._progress.add_task("device → cloud", total=uploads, note=""),
                "commands": self._progress.add_task("cloud → device", total=commands, note=""),
            }
            self._progress.start()
        waiting = [f"{t.lost} on the way" if t.lost else "" for t in (tally.uploads, tally.commands)]
        self._progress.update(self._bars["uploads"], completed=tally.uploads.arrived, note=waiting[0])
        self._progress.update(self._bars["commands"], completed=tally.commands.arrived, note=waiting[1])

    def end_progress(self) -> None:
        """Take the bars away; the next call of `progress` shows them again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def last_line(self, text: str) -> None:
        """Plain, unbroken and last."""
        self.end_progress()
        sys.stdout.write(text + "\n")
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
