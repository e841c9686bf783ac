"""Progress of long work: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

INTERVAL = 10  # seconds between two lines in a file, at least
REFRESH = 0.1  # seconds between two states of a bar
BAR = 20  # characters


class Progress:
    """Shows how much of long work is done, and how long the rest will take by the work done since this was made.

    Args:
        total (float): all the work, in any unit.
        done (float): what was done before.
        file (TextIO, optional): where to show it (default: the standard output).
    """

    def __init__(self, total: float, done: float = 0, file: TextIO | None = None):
        self.total, self.before, self.file = total, done, file or sys.stdout
        self.start = self.shown = time.monotonic()
        self.is_drawn = False

    def show(self, done: float, doing: str = '', at_once: bool = False) -> None:
        """Show it, if that is due.

        Args:
            done (float): how much is done, with what was done before.
            doing (str): what to say of it beside.
            at_once (bool): whether it is due in any case: what it announces may take long.
        """
        now, is_terminal = time.monotonic(), self.file.isatty()
        interval = REFRESH if is_terminal else max(INTERVAL, (now - self.start) / 100)  # few lines of long work
        is_due = now - self.shown >= interval
        if not (is_due or at_once or (is_terminal and done >= self.total)):
            return
        self.shown, line = now, self.line(done, now - self.start, doing)
        if is_terminal:
            filled = int(BAR * done / self.total)
            columns = shutil.get_terminal_size().columns - 1  # a full line would wrap
            line = f'\r[{"#" * filled:<{BAR}}] {line}'[: columns + 1].ljust(columns + 1)
            self.is_drawn = True
        print(line, end='' if is_terminal else '\n', file=self.file, flush=True)

    def line(self, done: float, seconds: float, doing: str = '') -> str:
        left = ''
        if self.before < done < self.total:
            left = f', about {duration(seconds * (self.total - done) / (done - self.before))} left'
        return f'{done / self.total:.0%} done after {duration(seconds)}{left}{f" ({doing})" if doing else ""}'

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        """Leave the line of the bar."""
        if self.is_drawn:
            print(file=self.file, flush=True)


def duration(seconds: float) -> str:
    """Seconds, or minutes from two minutes on, or hours from two hours on."""
    for length, name in ((3600, 'h'), (60, 'min')):
        if seconds >= 2 * length:
            return f'{seconds / length:.0f} {name}'
    return f'{seconds:.0f} s'


def track(items: Sequence) -> Iterator:
    """Iterate over items, and show on the standard output how many are done."""
    with Progress(len(items)) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.show(done, f'{done} of {len(items)}')
