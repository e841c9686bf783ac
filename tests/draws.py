"""How much is drawn by tests of what has no end: `SWINV2_MM_DRAWS=20` draws twenty times as much."""

import os

DRAWS = int(os.environ.get('SWINV2_MM_DRAWS', 1))
