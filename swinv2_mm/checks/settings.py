"""Checks of settings on which the Runner would fail late, or with a traceback."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from mmengine.config import Config

from .registered import class_name

PARTS = {  # what each part of a run needs; the Runner wants all of it or none
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}
METRICS = {  # the argument of the hosts' metrics that says what they compute
    'CocoMetric': ('metric', ('bbox', 'segm', 'proposal', 'proposal_fast')),
    'IoUMetric': ('iou_metrics', ('mIoU', 'mDice', 'mFscore')),
}
MAX_SEED = 2**32 - 1  # of NumPy
TAKE_FLOATS = ('train_cfg', 'default_hooks.logger')  # such as 57300.0, where a recipe divides


def check_settings(cfg: Config, splits: Iterable[str]) -> None:
    """Check numbers, and what the Runner needs besides data.

    Args:
        cfg (Config): the config.
        splits (tuple[str]): any of train, val and test.

    Raises:
        ValueError: one is missing or out of its range; the message names it.
    """
    _check_whole(cfg, 'randomness', 'seed', 0, MAX_SEED)
    for split, names in PARTS.items():
        missing = [name for name in names if cfg.get(name) is None]
        if missing and (split in splits or len(missing) < len(names)):
            raise ValueError(f'the config has no {missing[0]}, must have {", ".join(names)}: add it')
    for split in splits:
        _check_dataloader(cfg, f'{split}_dataloader')
        _check_metrics(cfg, f'{split}_evaluator')
    if 'train' in splits:
        for key in ('max_epochs', 'max_iters', 'val_interval'):
            _check_whole(cfg, 'train_cfg', key, 1)
        _check_whole(cfg, 'optim_wrapper', 'accumulative_counts', 1)
        for key in ('lr', 'weight_decay'):
            value = _value(cfg, 'optim_wrapper.optimizer', key)
            if value is not None and not (_is_number(value) and value >= 0):
                raise ValueError(f'optim_wrapper.optimizer.{key} is {value!r}: must be a number of at least 0')
        _check_schedulers(cfg)
        _check_scaling(cfg)
    _check_whole(cfg, 'default_hooks.logger', 'interval', 1)
    if _value(cfg, 'default_hooks.checkpoint', 'interval') == 0:  # a negative one means never
        raise ValueError(
            'default_hooks.checkpoint.interval is 0: must be a whole number of at least 1, or -1 for never'
        )


def _check_dataloader(cfg, name):
    if 'batch_size' not in (_value(cfg, name, 'batch_sampler') or ()):  # which would override that of the loader
        _check_whole(cfg, name, 'batch_size', 1)
    _check_whole(cfg, name, 'num_workers', 0)
    _check_whole(cfg, name, 'prefetch_factor', 1)
    if (_value(cfg, name, 'num_workers') or 0) > 0:
        return
    for key, off in (('persistent_workers', False), ('prefetch_factor', None)):
        if _value(cfg, name, key):
            raise ValueError(f'{name}.num_workers is 0, and {key} is for workers: add --cfg-options {name}.{key}={off}')


def _check_schedulers(cfg):
    schedulers = cfg.get('param_scheduler') or []
    for i, one in enumerate(schedulers if isinstance(schedulers, list) else [schedulers]):
        begin, end = (one.get(key, default) for key, default in (('begin', 0), ('end', math.inf)))
        if not (_is_number(begin) and isinstance(end, Real) and 0 <= begin < end):
            raise ValueError(f'param_scheduler.{i} has begin={begin!r} and end={end!r}: must be 0 <= begin < end')


def _check_scaling(cfg):
    """Check that the learning rate can be scaled by the batch size, if the config asks for that."""
    scaling = cfg.get('auto_scale_lr')
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ValueError(f'auto_scale_lr is {scaling!r}: must be a dict, as dict(enable=True, base_batch_size=16)')
    _check_whole(cfg, 'auto_scale_lr', 'base_batch_size', 1)
    if not _value(cfg, 'auto_scale_lr', 'enable'):
        return
    base, batch = _value(cfg, 'auto_scale_lr', 'base_batch_size'), _value(cfg, 'train_dataloader', 'batch_size')
    if base is None:
        raise ValueError(
            'auto_scale_lr of the config has no base_batch_size: name the batch size that its learning rate is for, '
            'as --cfg-options auto_scale_lr.base_batch_size=16'
        )
    if batch is None:
        raise ValueError('train_dataloader has no batch_size for auto_scale_lr: set optim_wrapper.optimizer.lr instead')
    passes = _value(cfg, 'optim_wrapper', 'accumulative_counts') or 1
    if passes > 1:
        lr = _value(cfg, 'optim_wrapper.optimizer', 'lr')
        raise ValueError(
            f'auto_scale_lr ignores optim_wrapper.accumulative_counts={passes}: drop --auto-scale-lr and set '
            f'optim_wrapper.optimizer.lr to {lr} x {batch} x {passes} x processes / {base}'
        )


def _check_metrics(cfg, name):
    metrics = cfg.get(name) or []
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        key, known = METRICS.get(class_name(metric.get('type')), ('', ()))
        asked = metric.get(key) or []
        for one in [asked] if isinstance(asked, str) else asked:
            if one not in known:
                raise ValueError(f'{name}.{key} is {one!r}: must be one of {", ".join(known)}')


def _value(cfg, place, key):
    """A value of the config; None if there is none."""
    node = cfg
    for part in place.split('.'):
        node = node.get(part) or {}
        if not isinstance(node, Mapping):
            return None
    return node.get(key)


def _check_whole(cfg, place, key, lowest, highest=math.inf):
    value = _value(cfg, place, key)
    whole = isinstance(value, Integral) or (place in TAKE_FLOATS and _is_number(value) and int(value) == value)
    if value is None or (whole and _is_number(value) and lowest <= value <= highest):
        return
    range_ = f'of at least {lowest}' if highest == math.inf else f'from {lowest} to {highest}'
    raise ValueError(f'{place}.{key} is {value!r}: must be a whole number {range_}')


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
