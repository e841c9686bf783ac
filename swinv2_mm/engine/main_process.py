"""Work that one process of a run does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine.dist import broadcast_object_list, get_rank

T = TypeVar('T')


def in_main_process(function: Callable[[], T]) -> T:
    """Call a function in the first process of a run. All processes call this, and get its result or raise its error.

    So no process waits for one that has stopped at a user's mistake, and large files are in one memory.

    Raises:
        ValueError, OSError: as the function raises.
    """
    outcome = [None]
    if get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except (OSError, ValueError) as error:
            outcome = [(None, error)]
    broadcast_object_list(outcome)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
