"""Work that one process of a run does for all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

from mmengine.dist import broadcast_object_list, get_rank, get_world_size

from .messages import first_line

T = TypeVar('T')


def in_main_process(function: Callable[[], T]) -> T:
    """Call a function in the first process of a run. All processes call this, and get its result or raise its error.

    So no process waits for one that has stopped at a mistake, and what is large is in one memory.

    Args:
        function (Callable): its result and its errors are pickled; it takes no part in what processes do together.

    Raises:
        Exception: what the function raises; where that is neither a ValueError nor an OSError, or can't be pickled,
            other processes than the first raise a RuntimeError.
    """
    outcome, failure = [None], None
    if get_rank() == 0:
        try:
            outcome = [(function(), None)]
            if get_world_size() > 1:
                pickle.dumps(outcome)  # what can't be sent is an error of all, too
        except Exception as error:
            failure, told = error, error
            if not (isinstance(error, (OSError, ValueError)) and _can_be_sent(error)):
                told = RuntimeError(f'the first process failed: {first_line(error)}')
            outcome = [(None, told)]
    broadcast_object_list(outcome)
    result, error = outcome[0]
    if failure or error:
        raise failure or error
    return result


def _can_be_sent(error):
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
