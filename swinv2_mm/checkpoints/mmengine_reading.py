"""Makes mmengine read checkpoints and YAML without running code from them.

A config may name a checkpoint for the backbone, for any other part of a model (``init_cfg``), or for all of it
(``load_from``, ``resume``). mmengine unpickles what it downloads, and before PyTorch 2.6 also local files. `register`
passes all of them to `read_checkpoint`, in every process that imports the package.
"""

from __future__ import annotations

import yaml
from mmengine.fileio import get_local_path, register_handler
from mmengine.fileio.handlers import YamlHandler
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from .downloads import TABLES
from .files import CheckpointError, read_checkpoint

CEPH = r'(\S+\:)?s3://', r'(\S+\:)?petrel://'


def register() -> None:
    """Make mmengine load checkpoints and YAML through the functions below."""
    schemes = ['', 'http://', 'https://', 'pavi://', *(f'{scheme}://' for scheme in TABLES)]
    CheckpointLoader.register_scheme(prefixes=schemes, loader=load_from_source, force=True)
    CheckpointLoader.register_scheme(prefixes=list(CEPH), loader=load_from_ceph, force=True)
    register_handler(['yaml', 'yml'])(SafeYamlHandler)


def load_from_source(filename: str, map_location=None) -> dict:
    """Load what mmengine's loaders return, on the CPU.

    Args:
        filename (str): a path, a URL, or a name that mmengine has a URL for, such as ``torchvision://resnet50``.
        map_location: ignored; loading moves values to the model's device.

    Raises:
        CheckpointError: there is no such file or name, or it can't be read.
    """
    if filename.startswith('pavi://'):
        raise CheckpointError(
            f'checkpoint {filename}: this scheme is not supported: download the file, and pass its path'
        )
    checkpoint = _read(filename)
    return mmengine_checkpoint._process_mmcls_checkpoint(checkpoint) if filename.startswith('mmcls://') else checkpoint


def load_from_ceph(filename: str, map_location=None) -> dict:
    """`load_from_source` from an object store, through the client that mmengine uses."""
    with get_local_path(filename, backend_args=dict(backend='petrel')) as path:
        return _read(path)


def _read(source):
    """The checkpoint without the config that old runs saved in it, which mmengine would run on resuming."""
    checkpoint = read_checkpoint(source)
    if isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    return checkpoint


class SafeYamlHandler(YamlHandler):
    """Reads YAML of plain values. mmengine's handler makes any Python objects that a file names."""

    def load_from_fileobj(self, file, **kwargs):
        return super().load_from_fileobj(file, **{**kwargs, 'Loader': _PlainLoader})


class _PlainLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
    """Loads plain values, and tuples, which configs that were dumped as YAML have."""


_PlainLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
