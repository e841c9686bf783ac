"""Checks of ``--cfg-options``: what mmengine silently accepts, or fails on with a traceback.

mmengine adds an unknown name to the config, where nothing reads it. Here a name must be in the config already, or be
one that its place accepts: an argument of the class that the place's ``type`` names, or of the `Runner`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping

from mmengine.config import Config, DictAction
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, LogProcessor, Runner, TestLoop, ValLoop
from torch.utils.data import DataLoader

from ..messages import first_line
from .registered import did_you_mean, find, names, nearest, registries_of

# What mmengine, mmdet, mmseg and these tools read at the top level of a config, besides arguments of the Runner.
TOP_LEVEL = {
    *('activation_checkpointing', 'allow_missing', 'compile', 'custom_imports', 'efficient_conv_bn_eval'),
    *('find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'test_pipeline'),
    *('tta_model', 'tta_pipeline'),
}
OF_DATALOADER = {'type', 'num_batch_per_epoch', 'disable_subprocess_warning'}
OF_HOOKS = {'priority'}
OF_OPTIM_WRAPPER = {'type', 'constructor', 'optimizer', 'paramwise_cfg'}
OF_SCHEDULER = {'convert_to_iter_based'}
OF_LOSSES = {'bg_cls_weight'}  # removed by the heads
BY_EPOCH = {'type', 'by_epoch'}
FREE = ('custom_keys', 'metainfo', 'data_prefix')  # dicts whose keys are the user's own


class ConfigOptions(DictAction):
    """The action of ``--cfg-options``. A word that is not KEY=VALUE ends the tool with one line."""

    def __call__(self, parser, namespace, values, option_string=None):
        for word in values or ():
            key, equals, _ = word.partition('=')
            try:
                if not equals or not all(key.split('.')):
                    raise ValueError
                super().__call__(parser, namespace, [word], option_string)
            except (AssertionError, ValueError):  # an AssertionError if brackets don't match
                parser.exit(2, f'error: {option_string} {word}: must be KEY=VALUE, as train_dataloader.batch_size=4\n')


def merge_options(cfg: Config, options: Mapping[str, object]) -> None:
    """Override values of a config, in place.

    Args:
        cfg (Config): the config of a detector or segmentor, whose host imports.
        options (dict): values by dotted name, as ``--cfg-options`` gives them.

    Raises:
        ValueError: a name is unknown, or a ``type`` is not registered; the message names the nearest one that is.
    """
    before, merged = cfg.to_dict(), Config(cfg.to_dict())
    for name in options:
        _check_indices(before, name)
    try:
        merged.merge_from_dict(dict(options))
    except Exception as error:
        raise ValueError(f'--cfg-options {" ".join(options)}: do not fit the config: {first_line(error)}') from error
    after = merged.to_dict()
    with DefaultScope.overwrite_default_scope(after.get('default_scope')):
        for name, value in options.items():
            _check_name(before, after, name)
            _check_type(before, name, value)
    cfg.merge_from_dict(dict(options))


def _check_indices(node, name):
    """Check that items of lists are named by number, and that only dicts and lists have parts."""
    keys = name.split('.')
    for depth, key in enumerate(keys):
        above = '.'.join(keys[:depth])
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                have = f'a list of {len(node)}, whose items are numbered from 0' if node else 'an empty list'
                raise ValueError(f'--cfg-options {name}: {above} is {have}, and {key!r} is not one of them')
            node = node[int(key)]
        elif isinstance(node, Mapping):
            if key not in node:
                return
            node = node[key]
        else:
            raise ValueError(
                f'--cfg-options {name}: {above} is {node!r}, which has no {key!r}: set {above} as a whole, in a config'
            )


def _check_name(before, after, name):
    """Refuse a name that nothing reads: every key must be in the config already, or be accepted by its place."""
    keys, place = name.split('.'), []
    for key in keys:
        if isinstance(after, Mapping) and key not in (before or ()):
            _check_new(place, key, before or {}, after, name)
        key = int(key) if isinstance(after, list) else key
        before = before[key] if before and (isinstance(before, list) or key in before) else None
        after = after[key]
        place.append(str(key))
    if isinstance(before, Mapping) and 'type' in before and after is not None and not isinstance(after, Mapping):
        raise ValueError(f'--cfg-options {name}={after}: it is a dict: set one of its parts, as {name}.type')


def _check_new(place, key, before, after, name):
    """Refuse a key that is new in a dict of the config, unless its place accepts it."""
    if place and place[-1] in FREE:
        return
    accepted = accepted_names(place, after)
    here = '.'.join(place) or 'the config'
    if accepted is None:
        other = nearest(key, before, cutoff=0.85)
        if other:
            raise ValueError(f'--cfg-options {name}: {here} has no {key!r}: did you mean {other!r}?')
    elif key not in accepted:
        raise ValueError(
            f'--cfg-options {name}: {here} neither has nor accepts {key!r}{did_you_mean(key, {*accepted, *before})}'
        )


def accepted_names(place: list[str], node: Mapping) -> set[str] | None:
    """The keys that a dict of a config may have; None if that can't be known.

    Args:
        place (list[str]): the keys that lead to it.
        node (Mapping): the dict itself.
    """
    if not place:
        return _arguments(Runner) | TOP_LEVEL
    top, *rest = place
    if not rest:
        loops = {
            'train_cfg': (EpochBasedTrainLoop, IterBasedTrainLoop),
            'val_cfg': (ValLoop,),
            'test_cfg': (TestLoop,),
        }
        if top.endswith('_dataloader'):
            return _arguments(DataLoader) | OF_DATALOADER
        if top in loops and 'type' not in node:
            return BY_EPOCH.union(*map(_arguments, loops[top]))
        if top == 'randomness':
            return _arguments(Runner.set_randomness)
        if top == 'auto_scale_lr':
            return {'enable', 'base_batch_size'}
        if top == 'env_cfg':
            return {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'}
        if top in ('log_processor', 'optim_wrapper') and 'type' not in node:
            default = LogProcessor if top == 'log_processor' else OptimWrapper
            return _arguments(default) | OF_OPTIM_WRAPPER
    if place[-1].endswith(('cfg', 'dcn')) and top != 'train_cfg':
        return None  # its builder first removes keys, such as requires_grad of a norm_cfg
    kind = node.get('type')
    found = [kind] if isinstance(kind, type) else [find(registry, kind) for registry in registries_of(kind)]
    arguments = [_arguments(one) for one in found]
    if not arguments or None in arguments:
        return None
    extra = {
        'optim_wrapper': OF_OPTIM_WRAPPER,
        'param_scheduler': OF_SCHEDULER,
        'default_hooks': OF_HOOKS,
        'custom_hooks': OF_HOOKS,
    }
    if place[-1].startswith('loss'):
        extra[top] = OF_LOSSES
    return {'type', '_scope_', *extra.get(top, ())}.union(*arguments)


def _arguments(function: Callable) -> set[str] | None:
    """The names that a function or class takes; None if any is.

    If a class passes unknown arguments on, those of its base classes count too.
    """
    taken, passes_on = set(), False
    for owner in inspect.getmro(function) if isinstance(function, type) else [function]:
        function = vars(owner).get('__init__') if isinstance(owner, type) else owner
        if function is None or owner is object:
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
            source = inspect.getsource(function)
        except (OSError, TypeError, ValueError):  # not written in Python
            return None
        taken |= {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        rest = next((one.name for one in parameters if one.kind is one.VAR_KEYWORD), None)
        if rest and not _is_passed_on(rest, source):
            return None
        passes_on = passes_on or rest is not None
        if not passes_on:
            break
    return taken - {'self'}


def _is_passed_on(name, source):
    """Whether a method only passes its ``**name`` on to other classes' ``__init__``."""
    nodes = list(ast.walk(ast.parse(textwrap.dedent(source))))
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, 'attr', None) == '__init__']
    given = [keyword.value for call in calls for keyword in call.keywords if keyword.arg is None]
    return all(node in given for node in nodes if isinstance(node, ast.Name) and node.id == name)


def check_arguments(cfg: Config, options: Mapping[str, object] | None) -> None:
    """Check that a class that an option names accepts the arguments that the config has for it.

    Args:
        cfg (Config): the config, with the options.
        options (dict, optional): values by dotted name.

    Raises:
        ValueError: the class does not accept an argument.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for name in options or ():
            *place, key = name.split('.')
            if key != 'type':
                continue
            node = cfg.to_dict()
            for part in place:
                node = node and node[int(part) if isinstance(node, list) else part]
            if node is None:  # another flag has taken it out since
                continue
            accepted = accepted_names(place, node)
            unknown = [one for one in node if accepted is not None and one not in accepted]
            if unknown:
                here = '.'.join(place)
                raise ValueError(
                    f'--cfg-options {name}={node["type"]}: {node["type"]} takes no {unknown[0]!r}, which {here} has: '
                    f'write {here} in a config, with _delete_=True'
                )


def _check_type(node, name, kind):
    """Refuse a ``type`` that is not in a registry of the one that it replaces."""
    *place, key = name.split('.')
    if key != 'type' or not isinstance(kind, str):
        return
    for part in place:
        node = node[int(part)] if isinstance(node, list) else node.get(part)
        if node is None:
            return
    old = node.get('type')
    registries = registries_of(old)
    if registries and not any(registry in registries for registry in registries_of(kind)):
        known = {known for registry in registries for known in names(registry)}
        raise ValueError(
            f'--cfg-options {name}={kind}: there is no {registries[0].name} {kind!r}{did_you_mean(kind, known)}'
        )
