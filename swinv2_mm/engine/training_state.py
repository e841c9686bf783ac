"""Whether training can continue from what a checkpoint holds beside the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor

from ..checkpoints.files import CheckpointError
from ..checkpoints.fitting import all_finite
from ..messages import first_line

MAX_COUNT = 2**32 - 1  # of iterations, and the largest seed that NumPy takes
OF_PARAMETER_SHAPE = 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'momentum_buffer'


def check_progress(checkpoint: Mapping, source: str) -> Mapping:
    """Check that a checkpoint says how far its run got.

    Args:
        checkpoint (Mapping): what the file holds.
        source (str): its name, for the message.

    Returns:
        Mapping: its ``meta``, with ``epoch`` and ``iter``.

    Raises:
        CheckpointError: epoch, iteration or seed is missing or out of range.
    """
    meta = checkpoint.get('meta')
    with _checking(source):
        _require(isinstance(meta, Mapping), f'its meta is {_short(meta)}, not a dict')
        for name in ('epoch', 'iter'):
            _require(_is_count(meta.get(name)), f'its {name} is {_short(meta.get(name))}, not 0 to {MAX_COUNT}')
        length = meta.get('epoch_length', 1)
        _require(_is_count(length) and length > 0, f'its epoch_length is {_short(length)}, not 1 to {MAX_COUNT}')
        seed = meta.get('seed')
        _require(seed is None or _is_count(seed), f'its seed is {_short(seed)}, not 0 to {MAX_COUNT}')
    return meta


def check_training_state(
    checkpoint: Mapping,
    source: str,
    optim_wrapper: OptimWrapper | OptimWrapperDict | None,
    param_schedulers: Sequence | Mapping[str, Sequence] | bool | None,
) -> None:
    """Check that training can continue from what a checkpoint holds beside the weights.

    Args:
        checkpoint (Mapping): what the file holds.
        source (str): its name, for the message.
        optim_wrapper (OptimWrapper): of this run; None if the optimizer is not resumed.
        param_schedulers (list): of this run, or lists by the name of the optimizer; False if they are not resumed.

    Raises:
        CheckpointError: some of it is missing, damaged or of another config.
    """
    meta = check_progress(checkpoint, source)
    with _checking(source):
        _check_message_hub(checkpoint.get('message_hub'))
        if 'ema_state_dict' in checkpoint:
            _check_averaged(checkpoint['ema_state_dict'], checkpoint.get('state_dict'))
        if optim_wrapper is not None:
            wrappers, states = _by_name(optim_wrapper, checkpoint.get('optimizer'), 'optimizer')
            for name, wrapper in wrappers.items():
                _check_optimizer(states[name], wrapper.optimizer, started=meta['iter'] > 0)
            held, saved = sum(len(state['state']) for state in states.values()), meta.get('num_optimizer_states')
            _require(saved in (None, held), f'its optimizer has {held} states, and was saved with {_short(saved)}')
        if param_schedulers is not False:
            ours, theirs = _by_name(param_schedulers, checkpoint.get('param_schedulers'), 'param_schedulers')
            for name, schedulers in ours.items():
                _check_schedulers(theirs[name], schedulers)


def count_states(optim_wrapper: OptimWrapper | OptimWrapperDict) -> int:
    """Count the parameters for which an optimizer has state. A checkpoint stores it, to show that none was lost."""
    wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
    return sum(len(wrapper.optimizer.state) for wrapper in wrappers)


@contextlib.contextmanager
def _checking(source):
    try:
        yield
    except ValueError as error:
        raise unresumable(source, error) from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # values may be anything
        raise unresumable(source, f'{type(error).__name__}: {first_line(error)}') from error


def unresumable(source: str, reason: object) -> CheckpointError:
    """The error of a checkpoint from which a run of this config cannot continue."""
    cure = 'resume another one, or start from its weights with load_from'
    return CheckpointError(f'checkpoint {source} cannot be resumed with this config: {reason}: {cure}')


def _require(condition, reason):
    if not condition:
        raise ValueError(reason)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_finite(value):
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _short(value):
    """A value from a file, short enough for a message of one line."""
    return repr(value)[:40] if isinstance(value, (int, float, str, type(None))) else f'a {type(value).__name__}'


def _by_name(ours, theirs, key):
    """Two dicts with the same keys, of ours and of the file's; what is not a dict becomes one with the key None."""
    if not isinstance(ours, (dict, OptimWrapperDict)):
        return {None: ours}, {None: theirs}
    ours = dict(ours.items())
    _require(isinstance(theirs, Mapping) and set(theirs) == set(ours), f'its {key} is not of {", ".join(ours)}')
    return ours, theirs


def _check_message_hub(hub):
    for name in ('log_scalars', 'runtime_info', 'resumed_keys'):
        _require(isinstance(hub, Mapping) and isinstance(hub.get(name), Mapping), f'its message_hub has no {name}')
    for name, scalar in hub['log_scalars'].items():
        whole = isinstance(scalar, HistoryBuffer) and {'_log_history', '_count_history'} <= set(vars(scalar))
        _require(whole, f'log_scalars of its message_hub has no history of {_short(name)}')
    for name in (*hub['log_scalars'], *hub['runtime_info']):  # what is saved is what is resumed
        _require(hub['resumed_keys'].get(name) is True, f'resumed_keys of its message_hub do not have {_short(name)}')


def _check_averaged(averaged, weights):
    """Check that averaged weights have the names, shapes and dtypes of the plain ones, and are finite.

    mmengine's EMA hook saves its step count too, and the names have the prefix of a wrapped model.
    """
    whole = isinstance(averaged, Mapping) and isinstance(weights, Mapping)
    theirs = {name[len('module.') :]: value for name, value in averaged.items() if name != 'steps'} if whole else {}
    _require(whole and set(theirs) == set(weights), 'its averaged weights have other names than the plain ones')
    for name, value in theirs.items():
        fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (weights[name].shape, weights[name].dtype)
        _require(fits, f'{name} of its averaged weights has another shape or dtype than the plain one')
        _require(all_finite(value), f'{name} of its averaged weights is not finite')


def _check_optimizer(saved, optimizer, started):
    """Check the state dict of an optimizer; ``started`` says whether it has made a step."""
    state, groups = (saved.get('state'), saved.get('param_groups')) if isinstance(saved, Mapping) else (None, None)
    _require(isinstance(state, Mapping) and isinstance(groups, list), 'its optimizer has no state and param_groups')
    ours = optimizer.param_groups
    _require(len(groups) == len(ours), f'its optimizer has {len(groups)} parameter groups, this run {len(ours)}')
    parameters = {}
    for i, (group, own) in enumerate(zip(groups, ours)):
        indices = group.get('params') if isinstance(group, Mapping) else None
        _require(isinstance(indices, list) and all(map(_is_count, indices)), f'group {i} of its optimizer is damaged')
        sizes = len(indices), len(own['params'])
        _require(sizes[0] == sizes[1], f'group {i} of its optimizer has {sizes[0]} parameters, this run {sizes[1]}')
        for name, value in own.items():
            if isinstance(value, float):
                _require(
                    _is_finite(group.get(name)),
                    f'{name} of group {i} is {_short(group.get(name))}, not a finite number',
                )
        parameters.update(zip(indices, own['params']))
    is_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    expected = {'step', 'exp_avg', 'exp_avg_sq'} if is_adam else set()
    _require(state or not is_adam or not started, 'the state of its optimizer is empty')
    for index, entry in state.items():
        _require(index in parameters, f'its optimizer has a state of parameter {_short(index)}, which is in no group')
        _require(isinstance(entry, Mapping) and expected <= set(entry), f'the state of parameter {index} is incomplete')
        for name in expected:
            _require(isinstance(entry[name], (Tensor, int, float)), f'{name} of parameter {index} is not a number')
        for name, value in entry.items():
            _check_state(value, name, parameters[index].shape, f'{name} of parameter {index} in its optimizer')


def _check_state(value, name, shape, what):
    if isinstance(value, Tensor):
        fits = name not in OF_PARAMETER_SHAPE or value.shape == shape
        _require(fits, f'{what} has shape {tuple(value.shape)}, in this run {tuple(shape)}')
        _require(all_finite(value), f'{what} is not finite')
    else:
        missing = name in OF_PARAMETER_SHAPE and value is not None
        _require(not missing, f'{what} is {_short(value)}, not a tensor')
        _require(not isinstance(value, float) or math.isfinite(value), f'{what} is not finite')


def _check_schedulers(saved, schedulers):
    saved, schedulers = saved or [], schedulers or []
    _require(isinstance(saved, list), f'its param_schedulers is a {type(saved).__name__}')
    counts = len(saved), len(schedulers)
    _require(counts[0] == counts[1], f'it has {counts[0]} parameter schedulers, and this config makes {counts[1]}')
    for i, state in enumerate(saved):
        for name, least in (('last_step', -1), ('_global_step', 0)):  # -1: a scheduler that has not begun
            value = state.get(name) if isinstance(state, Mapping) else None
            whole = isinstance(value, int) and value >= least
            _require(whole, f'{name} of its parameter scheduler {i} is {_short(value)}, not {least} or more')
        for name, own in schedulers[i].state_dict().items():
            value = state.get(name, own)
            if name == 'param_name':
                fits = value == own
            else:
                fits = _is_like(value, own) or (name == 'best' and value in (math.inf, -math.inf))  # of a metric
            _require(fits, f'{name} of its parameter scheduler {i} is {_short(value)}, here {_short(own)}')


def _is_like(value, own):
    """Whether a value from a file has the type of our own, and is a finite number if ours is a number."""
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return _is_finite(value)
    return own is None or type(value) is type(own)
