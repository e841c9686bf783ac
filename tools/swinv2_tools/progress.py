"""Progress of long work: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from mmengine.utils import track_iter_progress

INTERVAL = 10  # seconds between two lines


def track(items: Sequence) -> Iterator:
    """Iterate over items and show on the standard output how many are done."""
    if sys.stdout.isatty():
        yield from track_iter_progress(items, file=sys.stdout)
        return
    shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown >= INTERVAL:
            print(f'{done} of {len(items)}', flush=True)
            shown = time.monotonic()


class TimeLeft:
    """Says how much of long work is done, and when the rest will be, by the work done since this was made.

    Args:
        total (float): all the work, in any unit.
        done (float): what was done before.
    """

    def __init__(self, total: float, done: float):
        self.total, self.before, self.start = total, done, time.monotonic()

    def line(self, done: float) -> str:
        minutes = (time.monotonic() - self.start) / 60
        left = 'time left not known yet'
        if done > self.before:
            left = f'about {minutes * (self.total - done) / (done - self.before):.0f} minutes left'
        return f'{100 * done / self.total:.0f} percent done after {minutes:.0f} minutes, {left}'
