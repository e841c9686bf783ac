"""Loading a checkpoint of any published format into the backbone, whole or not at all, with a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mmengine.logging import print_log
from torch import Tensor, nn

from ..messages import printable
from ..position_bias import POSITION_BIASES
from .arguments import infer_arguments
from .files import CheckpointError, local_path, read_checkpoint
from .fitting import fit_weights
from .formats import COMPUTED, Converted, convert, identify
from .report import LoadReport
from .windows import TrainedWindows, infer_windows, windows_from_buffer, windows_from_tables, windows_from_weights


def load_pretrained(
    backbone: nn.Module,
    source: str | os.PathLike | Mapping,
    allow_missing: str | Sequence[str] = (),
    prefix: str = '',
) -> LoadReport:
    """Load weights of any published format into the backbone, and log a report.

    Takes what the official repository (also of SimMIM), timm, transformers, torchvision, mmpretrain, OpenMMLab
    detectors and segmentors with this backbone, and `tools/model_converters/convert_checkpoint.py` save. Everything
    but output norms must be there, in the right shape; else nothing is loaded. The windows that the position MLPs were
    trained with become ``pretrained_window_sizes``, unless the backbone was given that argument. The backbone keeps its
    window size.

    Args:
        backbone (SwinTransformerV2): the backbone to load into.
        source (str | Mapping): a path, a URL or a state dict.
        allow_missing (str | Sequence[str]): names of parameters or modules of the backbone that may stay at their
            initial value if the file lacks them or has them in another shape. ``patch_embed.proj`` is for images with
            another number of channels: the filters of the channels that both have are kept, or summed for one channel.
            The file must hold a patch embedding of some shape, because it identifies the format.
        prefix (str): which backbone to take if the file holds several, such as ``teacher``: the start of its names, or
            the keys of the dicts around them.

    Returns:
        LoadReport: what was loaded, converted, left out or left at its initial value, and the windows.

    Raises:
        CheckpointError: the file can't be read (`read_checkpoint`), holds no Swin V2 or one that does not fit the
            backbone, or nothing says its pretrained windows.
        TypeError: the backbone is not a `SwinTransformerV2`.
        ValueError: the backbone is on the meta device.
    """
    weights, report = fit_pretrained(backbone, source, allow_missing, prefix)
    if any(parameter.is_meta for parameter in backbone.parameters()):
        raise ValueError(
            "the backbone is on the meta device, where there are no values: call backbone.to_empty(device='cpu') before"
        )
    backbone.load_state_dict(weights, strict=False)
    print_log(str(report), logger='current')
    return report


def fit_pretrained(
    backbone: nn.Module,
    source: str | os.PathLike | Mapping,
    allow_missing: str | Sequence[str] = (),
    prefix: str = '',
) -> tuple[dict[str, Tensor], LoadReport]:
    """Read the weights that `load_pretrained` loads, and check that they fit; changes nothing.

    Args and errors as `load_pretrained`; the backbone may be on the meta device.

    Returns:
        tuple: the weights by name in the backbone, and the report of loading them.
    """
    if not hasattr(backbone, 'pretrained_windows_given'):
        raise TypeError(
            f'load_pretrained loads into a SwinTransformerV2, got {type(backbone).__name__}: pass model.backbone'
        )
    allowed = (allow_missing,) if isinstance(allow_missing, str) else tuple(allow_missing)
    converted, windows = read_weights(source, prefix)
    with named_in_errors(source):
        fitted = fit_weights(backbone, converted, windows, allowed)
    weights = fitted.weights
    has_setting = POSITION_BIASES[backbone.position_bias].has_pretrained_window
    keeps_own = backbone.pretrained_windows_given or not has_setting
    return weights, LoadReport(
        source=_label(source),
        format=converted.format,
        place=converted.place,
        loaded=tuple(name for name in weights if name not in fitted.rearranged and name != 'pretrained_windows'),
        converted=fitted.rearranged,
        left_out=fitted.left_out,
        initial=fitted.initial,
        checkpoint_window_size=windows.window_size,
        window_size=backbone.window_size,
        checkpoint_pretrained_window_sizes=windows.pretrained_window_sizes,
        pretrained_window_sizes=(
            backbone.pretrained_window_sizes if keeps_own else tuple(weights['pretrained_windows'].tolist())
        ),
        origin='the argument pretrained_window_sizes' if backbone.pretrained_windows_given else windows.origin or '',
    )


def read_weights(source: str | os.PathLike | Mapping, prefix: str = '') -> tuple[Converted, TrainedWindows]:
    """Read the weights of a checkpoint, by our names, and its windows as far as something says them.

    Args:
        source (str | Mapping): a path, a URL or a state dict.
        prefix (str): as in `load_pretrained`.

    Raises:
        CheckpointError: it can't be read, or holds no Swin V2.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    with named_in_errors(source):
        return convert_with_windows(checkpoint, None if isinstance(source, Mapping) else local_path(source), prefix)


def convert_with_windows(checkpoint: Mapping, path: str | None, prefix: str = '') -> tuple[Converted, TrainedWindows]:
    """`read_weights` from the contents of a file; its path may say the windows."""
    converted = convert(checkpoint, prefix)
    buffer = converted.weights.pop('pretrained_windows', None)
    arguments = infer_arguments(converted.weights)
    if arguments is None:  # incomplete weights show no windows, and fit no backbone
        return converted, TrainedWindows()
    if POSITION_BIASES[arguments['position_bias']].has_pretrained_window:
        return converted, infer_windows(buffer, converted.tables, path, arguments)
    return converted, windows_from_weights(converted.weights, arguments)


def convert_in_place(backbone: nn.Module, state_dict: dict, prefix: str) -> tuple[int, ...] | None:
    """Convert the weights of a backbone in a state dict, such as that of a detector with another implementation.

    Anything but a whole backbone of another format stays as it is, and whoever loads it reports what is missing.

    Args:
        backbone (SwinTransformerV2): the backbone to load into; stays as it is.
        state_dict (dict): tensors by name, changed in place.
        prefix (str): the start of the backbone's names in it.

    Returns:
        tuple[int]: the pretrained window of each stage, as far as the state dict says it; else None.
    """
    tables = _convert_in_place(backbone, state_dict, prefix)
    if not POSITION_BIASES[backbone.position_bias].has_pretrained_window:
        return backbone.pretrained_window_sizes  # loading resizes the weights
    buffer = state_dict.get(f'{prefix}pretrained_windows')
    if buffer is not None:
        return backbone.of_built_stages(windows_from_buffer(buffer).pretrained_window_sizes)
    found = (windows_from_tables(tables, number) for number in (len(backbone.arch.depths), len(backbone.layers)))
    return backbone.of_built_stages(next((w.pretrained_window_sizes for w in found if w.origin), ()))


def _convert_in_place(backbone, state_dict, prefix):
    """The tables of coordinates in a state dict of another format, by our names; its weights are converted."""
    theirs = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    theirs = {name: value for name, value in theirs.items() if isinstance(value, Tensor)}
    if all(name in theirs for name, _ in backbone.named_parameters()) and 'pretrained_windows' in theirs:
        return {}
    try:
        _, inner = identify(theirs)
        if inner:
            return {}
        converted = convert(theirs)
    except CheckpointError:
        return {}
    left = [name for name, why in converted.left_out.items() if why != COMPUTED]
    for name in set(theirs) - set(left):
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in converted.weights.items()})
    return converted.tables


@contextmanager
def named_in_errors(source: str | os.PathLike | Mapping) -> Iterator[None]:
    """Put the name of a checkpoint before a `CheckpointError` about what it holds, and make it one line."""
    try:
        yield
    except ValueError as error:  # a CheckpointError, or a number in a name that is too long for an int
        raise CheckpointError(f'checkpoint {_label(source)}: {printable(" ".join(str(error).splitlines()))}') from None


def _label(source):
    return 'state dict' if isinstance(source, Mapping) else os.fspath(source)
