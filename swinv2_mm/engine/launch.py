"""From the flags of a command line to a config that is known to work: what training and testing share.

A user's mistake costs one line. Checks run before the `Runner` is built and leave nothing behind. Two checks need the
whole model and come later: of the weights to test, and of the parameter groups.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import mmengine.config.utils
import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import is_cuda_available
from mmengine.dist import init_dist
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import is_installed
from torch import nn

from ..backbone import SwinTransformerV2
from ..checkpoints.files import read_checkpoint
from ..checkpoints.loading import fit_pretrained
from ..checks.data import HOSTS, has_remote_images, innermost_datasets, is_remote
from ..checks.options import ConfigOptions, merge_options
from ..checks.registered import builds, class_name
from ..messages import first_line
from .model_weights import load_model, unwrapped

PREFIX_HELP = 'which backbone to take if the file holds several: the start of its names, such as teacher'
LAUNCHERS = {  # the variable that tells a process its rank, and what sets it
    'pytorch': ('RANK', 'torchrun'),
    'slurm': ('SLURM_PROCID', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that training and testing share."""
    parser.add_argument('--data-root', help='folder of the data, with the same layout as the one in the config')
    parser.add_argument('--launcher', choices=('none', *LAUNCHERS), default='none')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='override values of the config, for example train_dataloader.batch_size=4',
    )
    parser.add_argument(
        '--skip-data-checks', action='store_true', help='do not check annotations, images and label maps before the run'
    )
    parser.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # given by older launchers


def bad_input(error: Exception) -> int:
    """Print a user's mistake in one line. Returns the exit code for it, 2."""
    print(f'error: {error}', file=sys.stderr)
    return 2


def load_config(path: str | os.PathLike, overrides: Mapping | None = None) -> Config:
    """Read the config of a detector or segmentor.

    Args:
        path (str): the config file; it may inherit ``mmdet::`` and ``mmseg::`` recipes.
        overrides (Mapping, optional): values by dotted name, as ``--cfg-options`` gives them.

    Raises:
        ValueError: there is no such file, it is for neither mmdet nor mmseg, its host does not import, or a name in
            ``overrides`` is unknown.
    """
    if not os.path.isfile(path):
        raise ValueError(f'config {path} does not exist')
    _allow_onedl_recipes()
    try:
        cfg = Config.fromfile(path)
        _import_classes(cfg.get('model'))
        scope = cfg.get('default_scope') or _host_of(cfg.get('model'))
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise ValueError(f'config {path} cannot be read: {first_line(error)}') from error
    if scope not in HOSTS or 'model' not in cfg:
        cure = 'inherit a recipe of mmdet:: or mmseg::'
        if scope not in (None, *HOSTS):
            cure = f"use the tools of {scope} for it, where the backbone is type='mmengine.SwinTransformerV2'"
        raise ValueError(
            f'config {path} is for neither mmdet nor mmseg: default_scope is {scope!r} and it has '
            f'{"a" if "model" in cfg else "no"} model; {cure}'
        )
    cfg.default_scope = scope
    try:
        importlib.import_module(f'{scope}.models')
    except Exception as error:  # an mmcv of another version or for another PyTorch, in many ways
        raise ValueError(f'config {path} is for {scope}, which does not import here: {first_line(error)}') from error
    merge_options(cfg, overrides or {})
    return cfg


def _import_classes(node):
    """Import the classes that a part of a pure-Python config names, which mmengine does as values are read."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        _import_classes(value)


def _host_of(model):
    """The host whose class a model is of or derived from, where no scope says it, as in pure-Python configs."""
    kind = (model or {}).get('type')
    names = [base.__module__ for base in kind.__mro__] if isinstance(kind, type) else [str(kind)]
    return next((name.split('.')[0] for name in names if name.split('.')[0] in HOSTS), None)


def _allow_onedl_recipes():
    """Add OneDL's distribution of mmseg to mmengine's list of packages with recipes, which lacks it."""
    packages = mmengine.config.utils.MODULE2PACKAGE
    if not is_installed(packages['mmseg']) and is_installed('onedl-mmsegmentation'):
        packages['mmseg'] = 'onedl-mmsegmentation'


def set_data_root(cfg: Config, data_root: str) -> None:
    """Point all data sets and metrics of a config at another folder with the same layout."""
    old_roots = {dataset['data_root'] for dataset in innermost_datasets(cfg) if dataset.get('data_root')}
    new_root = os.path.join(data_root, '')

    def moved(value):
        for old in old_roots:
            if value == old or value.startswith(os.path.join(old, '')):
                return os.path.join(new_root, os.path.relpath(value, old)) if value != old else new_root
        return value

    def move(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, str):
                node[key] = moved(value)
            elif isinstance(value, (dict, list)):
                move(value)

    for name in list(cfg):
        if name.endswith(('_dataloader', '_evaluator')) and cfg[name]:
            move(cfg[name])


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the files and folders that the data sets of some splits name are there, unless they are not on a disk.

    Args:
        cfg (Config): the config.
        splits (tuple[str]): any of train, val and test.

    Raises:
        ValueError: one is missing; the message names the path and the flag.
    """
    for dataset in innermost_datasets(cfg, splits):
        root = dataset.get('data_root') or ''
        needed = [] if is_remote(dataset) else [dataset.get('ann_file')]
        if not has_remote_images(dataset):
            needed += dict(dataset.get('data_prefix') or {}).values()
        for path in (os.path.join(root, name) for name in needed if name):
            if not os.path.exists(path):
                raise ValueError(f'{path} does not exist: put the data there or name its folder with --data-root')


def set_amp(cfg: Config, dtype: str) -> None:
    """Train in mixed precision.

    Args:
        cfg (Config): the config.
        dtype (str): bf16 or fp16. fp16 scales the loss and needs a GPU.

    Raises:
        ValueError: fp16 without a GPU, or a config that trains nothing.
    """
    if not cfg.get('optim_wrapper'):
        raise ValueError(f'--amp {dtype} needs an optim_wrapper in the config, which has none')
    if dtype == 'fp16':
        if not is_cuda_available():
            raise ValueError('--amp fp16 needs a GPU, and PyTorch finds none: use --amp bf16')
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
    else:
        for key in ('dtype', 'loss_scale', 'use_fsdp'):  # of an AmpOptimWrapper
            cfg.optim_wrapper.pop(key, None)
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'


def drop_validation(cfg: Config) -> None:
    """Train without validation: nothing reads its data, and no checkpoint is saved as the best.

    Raises:
        ValueError: training itself depends on its metrics.
    """
    default = cfg.get('default_hooks') or {}
    hooks = {f'default_hooks.{key}': hook for key, hook in default.items() if hook}
    hooks.update((f'custom_hooks.{i}', hook) for i, hook in enumerate(cfg.get('custom_hooks') or []))
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    needing = {**hooks, **{f'param_scheduler.{i}': one for i, one in enumerate(schedulers)}}
    for place, node in needing.items():
        kind = class_name(node.get('type'))
        if kind.startswith(('EarlyStopping', 'ReduceOnPlateau')):
            raise ValueError(f'{place} of the config is {kind}, which needs validation: leave --no-validate out')
    for hook in hooks.values():
        if 'save_best' in hook:
            del hook['save_best']
            hook.pop('rule', None)
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[key] = None


def find_backbones(cfg: Config) -> dict[str, ConfigDict]:
    """The configs of a model's backbones by dotted name, also in a detector inside it: model.detector.backbone."""
    found, nodes = {}, [('model', cfg.model)]
    while nodes:
        place, node = nodes.pop(0)
        if isinstance(node, dict):
            if 'type' in node and (place.endswith('.backbone') or is_ours(node, cfg)):
                found[place] = node
            nodes += [(f'{place}.{key}', value) for key, value in node.items()]
        elif isinstance(node, (list, tuple)):
            nodes += [(f'{place}.{i}', value) for i, value in enumerate(node)]
    return found


def is_ours(backbone: ConfigDict, cfg: Config) -> bool:
    """Whether a part of a model's config is a `SwinTransformerV2` or derived from it, however its type is named."""
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        return builds(backbone, SwinTransformerV2)


def set_initial_weights(cfg: Config, checkpoint: str, prefix: str = '') -> None:
    """Start the backbones from a file or URL, or from scratch if ``checkpoint`` is ``none``.

    Args:
        cfg (Config): the config. The file is for every `SwinTransformerV2` in its model, or for its other backbones
            where there is none.
        checkpoint (str): a path, a URL or ``none``.
        prefix (str): which backbone to take, as in `load_pretrained`.

    Raises:
        ValueError: the model has no backbone.
    """
    backbones = list(find_backbones(cfg).values())
    if not backbones:
        raise ValueError(f'model {cfg.model.get("type")} has no backbone to give initial weights to')
    if checkpoint.lower() == 'none':
        drop_initial_weights(cfg)
        return
    for backbone in [one for one in backbones if is_ours(one, cfg)] or backbones:
        old = backbone.get('init_cfg') or {}
        backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint, **(dict(prefix=prefix) if prefix else {}))
        if 'allow_missing' in old:  # it is about the backbone of the config, not about the file
            backbone.init_cfg.allow_missing = old.allow_missing


def drop_initial_weights(cfg: Config) -> None:
    """Start all backbones from scratch, because a checkpoint of the whole model is loaded later."""
    for backbone in find_backbones(cfg).values():
        backbone.init_cfg = None


def check_backbone(cfg: Config) -> nn.ModuleList:
    """Check the arguments of every `SwinTransformerV2` in the model, and that its initial weights exist and fit.

    Returns:
        nn.ModuleList: these backbones on the meta device; empty if the model has others.

    Raises:
        ValueError: an argument is wrong.
        CheckpointError: the initial weights can't be read or are of another architecture.
    """
    backbones = nn.ModuleList()
    for place, backbone in find_backbones(cfg).items():
        if not is_ours(backbone, cfg):
            continue
        with torch.device('meta'), DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            try:
                built = MODELS.build(dict(backbone))
            except TypeError as error:
                raise ValueError(f'{place} of the config: {error}') from error
        if built.init_cfg is not None:
            fit_pretrained(built, *built.pretrained_source())
        backbones.append(built)
    return backbones


def set_window_size(model: nn.Module, window_size: Sequence[int]) -> None:
    """Make all backbones attend in other windows, as ``--window-size`` asks. Their pretrained windows stay the same.

    Args:
        model (nn.Module): the backbones, or a model that contains them.
        window_size (Sequence[int]): window size in tokens, one for all stages or one per stage.

    Raises:
        ValueError: there is no `SwinTransformerV2`, or the sizes are invalid.
    """
    backbones = [module for module in model.modules() if isinstance(module, SwinTransformerV2)]
    if not backbones:
        raise ValueError('--window-size is for models with a SwinTransformerV2: leave it out')
    for backbone in backbones:
        backbone.set_window_size(window_size)


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load the weights of a whole detector or segmentor: all of them, from a checkpoint that a Runner wrote.

    Returns:
        nn.Module: the model itself, without the wrapper that distributes it.

    Raises:
        CheckpointError: the file can't be read, or does not hold exactly the weights of this model.
    """
    load_model(model, read_checkpoint(path), path)
    return unwrapped(model)


def init_distributed(cfg: Config, launcher: str) -> None:
    """Join the processes of a launcher, over NCCL with GPUs and over gloo without.

    Args:
        cfg (Config): the config; without GPUs its model wrapper is set, because mmengine's defaults name a GPU.
        launcher (str): none, pytorch, slurm or mpi.

    Raises:
        ValueError: the launcher's environment is missing.
    """
    cfg.launcher = launcher
    if launcher == 'none':
        return
    variable, command = LAUNCHERS[launcher]
    if variable not in os.environ:
        raise ValueError(f'--launcher {launcher} needs the environment that {command} sets: run the tool through it')
    if is_cuda_available():
        init_dist(launcher, **(cfg.get('env_cfg') or {}).get('dist_cfg', {}))
    elif launcher == 'pytorch':
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        if class_name(cfg.get('runner_type')) == 'FlexibleRunner':
            strategy = cfg.get('strategy') or dict(type='DDPStrategy')  # which is its default
            if class_name(strategy.get('type')) == 'DDPStrategy':
                cfg.strategy = dict(dict(model_wrapper=cfg.model_wrapper_cfg), **strategy)
    else:
        raise ValueError(f'--launcher {launcher} needs GPUs, and PyTorch finds none: use torchrun and pytorch')
