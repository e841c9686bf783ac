"""Helpers for tests that run on every Python and PyTorch that the package supports."""

import pytest
import torch

half_dtypes = pytest.mark.parametrize(
    'dtype',
    [
        torch.bfloat16,
        pytest.param(
            torch.float16,
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 4), reason='before PyTorch 2.4, CPUs autocast only to bfloat16'
            ),
        ),
    ],
)
ASSIGN = dict(assign=True) if torch.__version__ >= (2, 1) else {}  # for `load_state_dict`


def strict_zip(*iterables):
    """``zip(..., strict=True)``, which Python lacks before 3.10."""
    columns = [list(iterable) for iterable in iterables]
    assert len({len(column) for column in columns}) == 1, [len(column) for column in columns]
    return zip(*columns)
