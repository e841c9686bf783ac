"""Reading checkpoints without running code from them, and loading them into the backbone whole or not at all."""

import os
import pickle
import re
from collections.abc import Mapping
from http.client import HTTPException

import numpy as np
import torch
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor, nn

# Of the official file and ours: derived tables and masks, the classifier, and the norm before it.
LEFT_OUT = re.compile(r'relative_coords_table$|relative_position_index$|attn_mask$|^head\.|^norm\.')
INITIAL = re.compile(r'^norm\d+\.')  # output norms, which a classification checkpoint cannot have


class CheckpointError(ValueError):
    """A checkpoint that can't be read, is none, or does not fit the backbone; the message says what to do."""


def _history_buffer_method(cls, name):
    """The one use of `getattr` in what mmengine writes: the methods of `HistoryBuffer` by name."""
    if cls is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL builtins.getattr of {cls!r}, {name!r}')
    return getattr(HistoryBuffer, name)


# What mmengine's Runner writes beside tensors and plain containers: its log history, numbers in NumPy arrays.
# Registered on import, because PyTorch reads with `weights_only=True` and the Runner's resume would fail.
MMENGINE_GLOBALS = [
    HistoryBuffer,
    (_history_buffer_method, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32')),
    *(
        (function, f'numpy.{core}.multiarray.{function.__name__}')  # NumPy 1 and 2 name the same module differently
        for function in (np.zeros(1).__reduce__()[0], np.float64().__reduce__()[0])
        for core in ('core', '_core')
    ),
]
torch.serialization.add_safe_globals(MMENGINE_GLOBALS)


def read_checkpoint(source: str | os.PathLike) -> dict:
    """Read a checkpoint file onto the CPU without running any code from it.

    Args:
        source (str): a path, or a URL, which is downloaded to the cache of `torch.hub` once.

    Returns:
        dict: what the file holds.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, holds anything but tensors, plain containers
            and what mmengine writes, or can't be downloaded.
    """
    path = os.fspath(source)
    if path.startswith(('http://', 'https://')):
        path = _download(path)
    if not os.path.isfile(path):
        raise CheckpointError(f'checkpoint {path} does not exist or is no file')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise CheckpointError(f'checkpoint {path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        refused = re.search(r'GLOBAL (\S+)', str(error))
        if refused:
            raise CheckpointError(
                f'checkpoint {path} holds {refused[1]}, which could run code, and is refused: '
                'save the tensors alone, as a state dict'
            ) from None
        reason = (str(error) or type(error).__name__).split('\n')[0]
        raise CheckpointError(
            f'checkpoint {path} is truncated or no PyTorch checkpoint ({reason}): download or save it again'
        ) from None
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


def load_pretrained(backbone: nn.Module, source: str | os.PathLike) -> None:
    """Load the backbone's weights from a file of the official repository or of our own, and log what was loaded.

    A detector or segmentor trained with the backbone will do as well. Everything but the output norms must be there,
    in the right shape; else nothing is loaded.

    Args:
        backbone (SwinTransformerV2): the backbone to load into.
        source (str): a path or URL.

    Raises:
        CheckpointError: see `read_checkpoint`; or the file does not fit the backbone.
    """
    weights, left_out, initial = fit_pretrained(backbone, source)
    backbone.load_state_dict(weights, strict=False)
    print_log(
        f'Loaded {len(weights)} tensors of {source}. Left out: {_summary(left_out)}. At their initial value: '
        f'{_summary(initial)}. Position MLPs trained with windows {backbone.pretrained_window_sizes}, '
        f'used with windows {backbone.window_size}.',
        logger='current',
    )


def fit_pretrained(backbone: nn.Module, source: str | os.PathLike) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Read the weights that `load_pretrained` loads and check that they fit; changes nothing.

    Args and errors as `load_pretrained`; the backbone may be on the meta device.

    Returns:
        tuple: the weights by name in the backbone, the names in the file that are left out, and the names in the
        backbone that stay at their initial value.
    """
    state_dict = backbone_state_dict(read_checkpoint(source))
    own = backbone.state_dict()
    left_out = [name for name in state_dict if LEFT_OUT.search(name) or (INITIAL.match(name) and name not in own)]
    weights = {name: value for name, value in state_dict.items() if name not in left_out}
    initial = _check_fit(backbone, weights, source)
    windows = pretrained_windows_from_tables(state_dict)
    if windows:
        weights.setdefault('pretrained_windows', torch.tensor(windows))
    if 'pretrained_windows' not in weights and not backbone.pretrained_windows_given:
        raise CheckpointError(
            f'checkpoint {source} does not say the windows it was trained with: pass pretrained_window_sizes, '
            'for example (16, 16, 16, 8) for window 16 at 256 pixels'
        )
    return weights, left_out, initial


def backbone_state_dict(checkpoint: Mapping) -> dict[str, Tensor]:
    """The tensors of the backbone in a checkpoint, without the wrappers ``model`` (official) and ``state_dict``
    (mmengine) and the prefix ``backbone.``."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    prefix = 'backbone.'
    of_backbone = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    return of_backbone or tensors


def pretrained_windows_from_tables(state_dict: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The window size per stage that the position MLPs of an official checkpoint were trained with.

    The corner of ``relative_coords_table``, the offset of a whole window W, is ``log2(1 + 8 (W-1) / (P-1)) / 3``
    where P is the window that normalised it.

    Returns:
        tuple[int] | None: P per stage; None if a stage has no table.
    """
    stages = {int(match[1]) for name in state_dict if (match := re.match(r'layers\.(\d+)\.', name))}
    windows = []
    for stage in sorted(stages):
        table = state_dict.get(f'layers.{stage}.blocks.0.attn.relative_coords_table')
        if table is None:
            return None
        window = (table.shape[-2] + 1) // 2
        corner = table.flatten()[-1].item()
        windows.append(1 + round(8 * (window - 1) / (2 ** (3 * corner) - 1)) if window > 1 else 1)
    return tuple(windows) or None


def _check_fit(backbone, weights, source):
    """Names that stay at their initial value; a `CheckpointError` if any other is missing, unknown or misshapen."""
    own = backbone.state_dict()
    missing = [name for name in own if name not in weights and name != 'pretrained_windows']
    initial = [name for name in missing if INITIAL.match(name)]
    required = [name for name in missing if name not in initial]
    unknown = [name for name in weights if name not in own]
    misshapen = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if misshapen:
        name = misshapen[0]
        raise CheckpointError(
            f'checkpoint {source} does not fit the backbone: {name} is {tuple(weights[name].shape)} in the file and '
            f'{tuple(own[name].shape)} in the backbone ({len(misshapen)} differ): check arch'
        )
    if required or unknown:
        raise CheckpointError(
            f'checkpoint {source} does not fit the backbone: it lacks {_summary(required)}; '
            f'the backbone does not know {_summary(unknown)}: check that it is a Swin V2 of this arch'
        )
    return initial


def _summary(names):
    """At most three of the names, and how many there are."""
    if not names:
        return 'nothing'
    listed = ', '.join(names[:3])
    return listed if len(names) <= 3 else f'{listed} and {len(names) - 3} more'


def _download(url):
    """Path of the downloaded file in the cache of `torch.hub`; one process of a node downloads, the others wait."""
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(url))
    try:
        if os.environ.get('LOCAL_RANK', '0') == '0' and not os.path.exists(path):
            print_log(f'Downloading {url} to {path}', logger='current')
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=True)
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f'cannot download {url} ({error}): download it on a machine with network, for example with '
            f'"wget {url}", and pass the file (tools/train.py: --checkpoint FILE, or none to start from scratch)'
        ) from error
    barrier()
    return path
