"""What mmengine reads by itself, read without running code: checkpoints, whatever names them, and YAML.

A config may name a checkpoint for the backbone, for any other part of a model (``init_cfg``), for all of it
(``load_from``, ``resume``). mmengine unpickles what it downloads, and before PyTorch 2.6 also local files. `register`
hands all of them to `read_checkpoint`, in every process that imports the package.
"""

from __future__ import annotations

import os

import yaml
from mmengine.fileio import get_local_path, register_handler
from mmengine.fileio.handlers import YamlHandler
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as host

from .files import CheckpointError, read_checkpoint

# Its private helpers are the same from mmengine 0.8.0 to 0.10.7.
CEPH = r'(\S+\:)?s3://', r'(\S+\:)?petrel://'
TABLES = {  # of the checkpoints that mmengine has names for
    'torchvision': host.get_torchvision_models,
    'modelzoo': host.get_torchvision_models,
    'open-mmlab': host.get_external_models,
    'openmmlab': host.get_external_models,
    'mmcls': host.get_mmcls_models,
}


def register() -> None:
    """Have mmengine load checkpoints and YAML by the functions below."""
    schemes = ['', 'http://', 'https://', 'pavi://', *(f'{scheme}://' for scheme in TABLES)]
    CheckpointLoader.register_scheme(prefixes=schemes, loader=load_from_source, force=True)
    CheckpointLoader.register_scheme(prefixes=list(CEPH), loader=load_from_ceph, force=True)
    register_handler(['yaml', 'yml'])(SafeYamlHandler)


def load_from_source(filename: str, map_location=None) -> dict:
    """What mmengine's loaders return, on the CPU, from where a model takes it.

    Args:
        filename (str): a path, a URL, or a name that mmengine has a URL for, as ``torchvision://resnet50``.

    Raises:
        CheckpointError: there is no such file or name, or it can't be read.
    """
    scheme, _, name = filename.partition('://')
    if scheme == 'pavi':
        raise CheckpointError(f'checkpoint {filename}: this scheme is not read: download the file, and name that')
    if scheme not in TABLES:
        return _read(filename)
    name = host.get_deprecated_model_names().get(name, name)
    table = TABLES[scheme]()
    if name not in table:
        raise CheckpointError(f'checkpoint {filename}: mmengine knows no such name: pass a path or URL')
    found = table[name]
    checkpoint = _read(found if '://' in found else os.path.join(host._get_mmengine_home(), found))
    return host._process_mmcls_checkpoint(checkpoint) if scheme == 'mmcls' else checkpoint


def load_from_ceph(filename: str, map_location=None) -> dict:
    """`load_from_source` from an object store, by the client that mmengine uses."""
    with get_local_path(filename, backend_args=dict(backend='petrel')) as path:
        return _read(path)


def _read(source):
    """The checkpoint without the config that old runs saved in it, which mmengine runs when it resumes from it."""
    checkpoint = read_checkpoint(source)
    if isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    return checkpoint


class SafeYamlHandler(YamlHandler):
    """Reads YAML of plain values. mmengine's makes whatever Python objects a file names."""

    def load_from_fileobj(self, file, **kwargs):
        return super().load_from_fileobj(file, **{**kwargs, 'Loader': _PlainLoader})


class _PlainLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
    """Of plain values and tuples, which configs that were written as YAML have."""


_PlainLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
