"""What tests need to run on every Python and PyTorch that the package supports."""

import pytest
import torch

half_dtypes = pytest.mark.parametrize(
    'dtype',
    [
        torch.bfloat16,
        pytest.param(
            torch.float16,
            marks=pytest.mark.skipif(torch.__version__ < (2, 4), reason='CPUs autocast to bfloat16 alone'),
        ),
    ],
)
ASSIGN = dict(assign=True) if torch.__version__ >= (2, 1) else {}  # for `load_state_dict`


def strict_zip(*iterables):
    """``zip(..., strict=True)``, which Python before 3.10 does not have."""
    columns = [list(iterable) for iterable in iterables]
    assert len({len(column) for column in columns}) == 1, [len(column) for column in columns]
    return zip(*columns)
