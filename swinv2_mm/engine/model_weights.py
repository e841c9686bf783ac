"""Loading a checkpoint into a whole detector or segmentor, whole or not at all, with a report."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from ..backbone import SwinTransformerV2
from ..checkpoints.files import CheckpointError
from ..checkpoints.fitting import NOT_BUILT, Fitted, all_finite, fit_weights, is_within
from ..checkpoints.formats import COMPUTED, unwrap
from ..checkpoints.loading import convert_with_windows, named_in_errors
from ..checkpoints.report import describe_tensors, first_of
from ..messages import printable

MISSING = 'not in the file, or in another shape'


class ModelReport(NamedTuple):
    """What `load_model` did with a checkpoint. As a string, a small table."""

    source: str  # the path or URL
    model: str  # its class
    loaded: tuple[str, ...]  # names in the model whose values are those of one tensor of the file
    converted: dict[str, str]  # names in the model whose values were rearranged: how
    left_out: dict[str, str]  # names in the file that the model does not get: why
    initial: dict[str, str]  # names in the model that stay at their initial value: why

    def __str__(self):
        lines = [f'Loaded {self.source} into {self.model}', *(f'  {line}' for line in describe_tensors(self, 9))]
        return '\n'.join(map(printable, lines))


def load_model(
    model: nn.Module,
    checkpoint: Mapping,
    source: str | os.PathLike,
    *,
    transfer: bool = False,
    allow_missing: Sequence[str] = (),
) -> ModelReport:
    """Load all weights of a model, and log a report. Its backbones may have any format that `load_pretrained` takes.

    Args:
        model (nn.Module): a detector or segmentor, or the wrapper that distributes one.
        checkpoint (Mapping): what `read_checkpoint` returns.
        source (str): the path or URL, for messages; its name may say the windows of a backbone.
        transfer (bool): whether heads may be left out, as where a detector is fine-tuned on other classes; backbones
            must be whole in any case.
        allow_missing (Sequence[str]): names of parameters or modules in a backbone that may stay at their initial
            value in a transfer, e.g. ``backbone.patch_embed.proj``; or a whole ``backbone``.

    Returns:
        ModelReport: what was loaded, converted, left out or left at its initial value.

    Raises:
        CheckpointError: a weight is missing, unknown, of another shape or not finite; the model stays as it was.
    """
    model = unwrapped(model)
    with named_in_errors(source):
        before = {name: value.detach().to('cpu', copy=True) for name, value in model.state_dict().items()}
        for name in allow_missing:
            if not any(is_within(other, (name,)) for other in before):
                raise CheckpointError(f'allow_missing names {name!r}, and the model has no such parameter or module')
        weights, report = _fit_model(model, checkpoint, source, transfer, tuple(allow_missing) if transfer else ())
        try:
            # The hosts' modules may rename what their older versions wrote, so only loading shows what fits.
            missing, unexpected = model.load_state_dict(weights, strict=False)
            report = _completed(report, before, missing, unexpected)
            _check_whole(report, _backbones(model) or ['backbone'], transfer, allow_missing)
        except BaseException as error:
            model.load_state_dict(before)
            if not isinstance(error, (RuntimeError, CheckpointError)):
                raise
            raise CheckpointError(str(error).strip().split('\n')[-1].strip()) from None
    print_log(str(report), logger='current')
    return report


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that distribute it, or augment its images at test time."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _backbones(model):
    """The Swin V2 backbones of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwinTransformerV2)}


def _fit_model(model, checkpoint, source, transfer, allow_missing):
    """The weights to load, those of backbones by our names, and what the report can say before they are loaded."""
    held, own = checkpoint.get('state_dict'), model.state_dict()
    tensors = unwrap({'state_dict': held} if isinstance(held, Mapping) else checkpoint)[0]
    tensors = _without_prefix(tensors, own)
    weights, converted, left_out, initial = OrderedDict(), {}, {}, {}
    backbones = _backbones(model)
    if not any(is_within(name, backbones) for name in tensors) and '' not in backbones:
        backbones = {}  # a module may know its weights by other names, as mmdet's semi-supervised detectors do
    for path, backbone in backbones.items():
        prefix = f'{path}.' if path else ''
        inside = {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        fitted = _fit_backbone(backbone, path, inside, source, transfer, allow_missing)
        for ours, part in zip((weights, converted, left_out, initial), fitted):
            ours.update({prefix + name: value for name, value in part.items()})
    for name, value in tensors.items():
        if name in own and own[name].shape != value.shape:
            if not transfer or (is_within(name, ('backbone',)) and not is_within(name, allow_missing)):
                raise CheckpointError(
                    f'{name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}: it is not of this config'
                )
            left_out[name] = f'of another shape than in the {type(model).__name__}'
            continue
        if name in own or not transfer:
            _check_kind(name, value, own.get(name, value))  # also of a name that a module knows from older versions
        weights[name] = value
    weights._metadata = getattr(held, '_metadata', None)
    report = ModelReport(os.fspath(source), type(model).__name__, (), converted, left_out, initial)
    return weights, report


def _fit_backbone(backbone, path, tensors, source, transfer, allow_missing):
    """Fit the tensors of a backbone at some path in the model, by their names in it."""
    prefix = f'{path}.' if path else ''
    allowed = [name[len(prefix) :] for name in allow_missing if name.startswith(prefix)]
    try:
        fitted = fit_weights(backbone, *convert_with_windows(tensors, os.fspath(source)), allowed)
        if fitted.initial and not transfer:
            raise CheckpointError(f'it lacks {first_of(list(fitted.initial))}')
        return fitted
    except CheckpointError as error:
        if not is_within(path, allow_missing):
            raise CheckpointError(f'{path or "the model"}: {error}') from None
    initial = dict.fromkeys(backbone.state_dict(), 'allowed by allow_missing')
    return Fitted({}, {}, dict.fromkeys(tensors, 'of a backbone that does not fit'), initial)


def _without_prefix(tensors, own):
    """Tensors by their names in the model, without prefixes of wrappers and training code."""
    for prefix in ('module.', 'model.', 'model.module.', '_orig_mod.'):
        stripped = {name[len(prefix) :] if name.startswith(prefix) else name: value for name, value in tensors.items()}
        if not any(name in own for name in tensors) and any(name in own for name in stripped):
            return stripped
    return tensors


def _completed(report, before, missing, unexpected):
    """The report, completed by what loading showed."""
    initial, left_out = dict(report.initial), dict(report.left_out)
    for name in missing:
        initial.setdefault(name, MISSING)
    left_out.update(dict.fromkeys(unexpected, 'not in the model'))
    loaded = [name for name in before if name not in initial and name not in report.converted]
    return report._replace(loaded=tuple(loaded), left_out=left_out, initial=initial)


def _check_whole(report, backbones, transfer, allow_missing):
    """Check that every weight that must be in the file was loaded, and that a whole model's file holds nothing else.

    In a transfer, a backbone of the file was checked before: it may lack output norms.
    """
    lacking = [name for name in report.initial if not name.endswith('num_batches_tracked')]
    if transfer:
        lacking = [name for name in lacking if report.initial[name] == MISSING and is_within(name, list(backbones))]
        lacking = [name for name in lacking if not is_within(name, allow_missing)]
    if lacking:
        cure = 'it is damaged, or not of this config'
        loaded = [name for name in report.loaded if not name.endswith('pretrained_windows')]  # it is never missing
        if not any(is_within(name, list(backbones)) for name in loaded):
            cure += '; --checkpoint loads the weights of a backbone alone'
        raise CheckpointError(f'it lacks {first_of(lacking)}: {cure}')
    unknown = [name for name, why in report.left_out.items() if why not in (COMPUTED, NOT_BUILT)]
    if unknown and not transfer:
        raise CheckpointError(f'it has {first_of(unknown)}, which the model does not have: it is not of this config')


def _check_kind(name, value: Tensor, own: Tensor):
    """Check that a tensor has values of the kind that the model has, and that they are finite."""
    kinds = [(held.is_floating_point(), held.is_complex(), held.dtype == torch.bool) for held in (value, own)]
    if value.is_meta or value.layout != own.layout or kinds[0] != kinds[1]:
        raise CheckpointError(f'{name} is {value.dtype} ({value.layout}), not {own.dtype}: it is damaged')
    cast = value.to(own.dtype)
    if not own.is_floating_point():
        if not torch.equal(cast.to(value.dtype), value):
            raise CheckpointError(f'{name} holds numbers that do not fit {own.dtype}: it is damaged')
    elif not all_finite(cast) and (own is value or all_finite(own)):
        raise CheckpointError(f'{name} holds NaN or infinity: the training that wrote it diverged, take another one')
