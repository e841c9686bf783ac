"""The backbone is found by every host, and needs none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.registry import MODELS, DefaultScope, Registry

import swinv2_mm
from swinv2_mm.checks.registered import builds, class_name

NOT_NEEDED = ['mmdet', 'mmseg', 'mmcv', 'mmpretrain', 'timm', 'transformers', 'torchvision', 'yacs']
BUILD_AND_RUN = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}))  # importing any of them raises ModuleNotFoundError
import torch
from swinv2_mm import SwinTransformerV2
arch = dict(embed_dims=8, depths=(2, 2), num_heads=(1, 2))
backbone = SwinTransformerV2(arch, window_size=4, out_indices=(0, 1))
backbone.init_weights()
maps = backbone(torch.randn(1, 3, 33, 47))
sum(x.sum() for x in maps).backward()
print([tuple(x.shape) for x in maps])
"""


@pytest.mark.parametrize('host', ['mmengine', 'mmdet', 'mmseg'])
def test_backbone_is_built_from_the_registry_of(host):
    models = pytest.importorskip(f'{host}.registry').MODELS
    backbone = models.build({'type': 'SwinTransformerV2', 'arch': 'tiny', 'window_size': [8, 8, 8, 4]})
    assert type(backbone) is swinv2_mm.SwinTransformerV2
    assert backbone.window_size == (8, 8, 8, 4)


def test_backbone_is_built_in_the_scope_of_any_other_toolbox():
    """In a scope that has a backbone of that name, mmengine's name is ours."""
    theirs, other = (Registry('model', parent=MODELS, scope=scope) for scope in ('with_theirs', 'with_none'))
    theirs.register_module(name='SwinTransformerV2', module=dict)
    try:
        for registry, name in ((other, 'SwinTransformerV2'), (theirs, 'mmengine.SwinTransformerV2')):
            with DefaultScope.overwrite_default_scope(registry.scope):
                assert type(MODELS.build(dict(type=name, arch='tiny'))) is swinv2_mm.SwinTransformerV2
    finally:
        for registry in (theirs, other):
            del MODELS.children[registry.scope]


NAMES = [
    'SwinTransformerV2',
    'mmengine.SwinTransformerV2',
    'swinv2_mm.SwinTransformerV2',
    'swinv2_mm.backbone.SwinTransformerV2',
    swinv2_mm.SwinTransformerV2,
    type('Own', (swinv2_mm.SwinTransformerV2,), {}),
]


def test_a_backbone_is_known_however_its_type_is_named():
    assert [class_name(name) for name in NAMES] == ['SwinTransformerV2'] * 5 + ['Own']
    pytest.importorskip('mmdet.models')
    for scope in (None, 'mmdet'):
        with DefaultScope.overwrite_default_scope(scope):
            assert [builds(dict(type=name), swinv2_mm.SwinTransformerV2) for name in NAMES] == [True] * len(NAMES)
            for other in ('ResNet', 'mmdet.ResNet', 'mmpretrain.SwinTransformerV2', 'NoSuch', dict, None):
                assert not builds(dict(type=other), swinv2_mm.SwinTransformerV2)


def test_package_imports_builds_and_runs_without_any_host():
    root = Path(swinv2_mm.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, '-c', BUILD_AND_RUN],
        env={**os.environ, 'PYTHONPATH': str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == '[(1, 8, 9, 12), (1, 16, 5, 6)]'
