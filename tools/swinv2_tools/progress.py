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
