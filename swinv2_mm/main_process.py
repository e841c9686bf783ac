"""Work that one process of a run does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmengine.dist import broadcast_object_list, get_rank

from .messages import first_line

T = TypeVar('T')


def in_main_process(function: Callable[[], T]) -> T:
    """Call a function in the first process of a run. All processes call this, and get its result or raise its error.

    So no process waits for one that has stopped at a mistake, and what is large is in one memory.

    Args:
        function (Callable): its result and its errors are pickled; it takes no part in what processes do together.

    Raises:
        Exception: what the function raises; where that is neither a ValueError nor an OSError, other processes than the
            first raise a RuntimeError.
    """
    outcome, failure = None, None
    if get_rank() == 0:
        try:
            outcome = function(), None
        except Exception as error:
            failure = error
            told = isinstance(error, (OSError, ValueError))
            outcome = None, error if told else RuntimeError(f'the first process failed: {first_line(error)}')
    shared = [outcome]
    broadcast_object_list(shared)
    result, error = shared[0]
    if failure or error:
        raise failure or error
    return result
