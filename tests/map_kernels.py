"""What the tests of the CUDA path share: they run on a GPU if there is one, else in Triton's interpreter on small maps.

Import this before anything that imports Triton, which reads the variable when it is imported.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ['TRITON_INTERPRET'] = '1'

from swinv2_mm import backbone, ops  # noqa: E402
from swinv2_mm.ops import flash_cuda, reference  # noqa: E402
from swinv2_mm.windows import map_windows  # noqa: E402

DEVICE = 'cuda' if ON_GPU else 'cpu'
HALF = (torch.bfloat16, torch.float16)


on_gpu = pytest.mark.skipif(not ON_GPU, reason='needs a GPU')


@pytest.fixture(scope='session')
def needs_triton():
    """Skip where the kernels can't run."""
    if torch.__version__ < (2, 4):
        pytest.skip(f'the kernels need PyTorch 2.4, not {torch.__version__}')
    triton = pytest.importorskip('triton', '3', 'the kernels need Triton 3')
    if ON_GPU and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f'the kernels of Triton {triton.__version__} need a GPU from Ampere on')


@pytest.fixture
def kernels(monkeypatch, needs_triton):
    """Without a GPU, take the CPU for one, on which blocks run on whole maps."""
    torch.manual_seed(0)
    monkeypatch.setattr(flash_cuda, 'DEVICE', DEVICE)
    monkeypatch.setattr(backbone, 'runs_in_parts', lambda x: False)
    monkeypatch.setattr(ops, 'forced', None)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    if not ON_GPU:
        monkeypatch.setattr(flash_cuda, '_try_triton', lambda *args: None)  # which takes long in the interpreter
        monkeypatch.setattr(flash_cuda, 'PROGRAMS', 4)  # the interpreter runs them one by one


def error(actual, true, size=None):
    """Root of the mean square of the difference, over that of the true values or ``size``, or as it is if that is 0."""
    actual, true = actual.double(), true.double()
    size = true.square().mean().sqrt() if size is None else size
    return ((actual - true).square().mean().sqrt() / (size if size > 1e-12 else 1)).item()


def attend_map(path, qkv, scale, table, windows):
    """Attention of a path that takes tokens in window order, on a map."""
    return map_windows(lambda x, part: path.attention(x, scale, table, part.groups), qkv, [windows])


def terms_of_scale_gradient(leaves, windows, grad):
    """Root of the mean square, over heads, of the norm of what the gradient of the scale sums over pairs of tokens.

    Most of the sum cancels, so that its rounding is relative to this.
    """
    qkv, scale, table = leaves
    total = 0
    sizes = [group.num_tokens for group in windows.groups]
    tokens = (x.flatten(0, 2)[windows.order].split(sizes) for x in (qkv, grad))
    for group, x, g in zip(windows.groups, *tokens):
        q, k, v = reference._split_heads(x, group, len(table))
        cosines = reference._unit(q) @ reference._unit(k).mT
        weights = (cosines * scale + reference._bias(table, group.height, group.width)).softmax(-1)
        of_weights = g.view(group.count, -1, len(table), q.shape[-1]).transpose(1, 2) @ v.mT
        of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        total += (of_logits * cosines).square().sum()
    return (total / len(table)).sqrt()


class Launches:
    """A stand-in of a kernel, which records what it is launched with and computes nothing."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append((args, options))

        return launch

    @classmethod
    def of(cls, monkeypatch, module):
        """Stand-ins of all kernels of a module, by name."""
        stand_ins = {name: cls() for name in vars(module) if name.endswith('_kernel')}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(module, name, stand_in)
        return stand_ins

    def variants(self):
        """What the compiler would be asked for: options, dtypes of tensors, kinds of numbers."""
        return {
            (tuple(sorted(options.items())), tuple(getattr(x, 'dtype', type(x)) for x in args))
            for args, options in self.calls
        }
