import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import hypothesis
import map_kernels  # noqa: F401, sets how Triton runs before anything imports it
import mmengine.config.config
import mmengine.config.utils
import mmengine.dataset.base_dataset
import mmengine.runner.runner
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin
from pycocotools.coco import COCO

from swinv2_mm import SwinTransformerV2

TOOLS = Path(__file__).parents[1] / 'tools'

hypothesis.settings.register_profile('repeatable', deadline=None, derandomize=True, max_examples=150)
hypothesis.settings.load_profile('repeatable')

# The logger keeps the stream it is created with: not one that a test captures, which is closed after it.
MMLogger.get_current_instance()

# What mmengine does anew for every run, and takes seconds: format the config four times, collect the versions of
# compilers, parse the hosts' indices of recipes, and look for garbage after each data set, among all that tests have
# imported. Runs in processes of their own (test_tools.py) do it as it is.
mmengine.config.config.FormatCode = lambda text, **_: (text, True)
mmengine.runner.runner.collect_env = functools.lru_cache(None)(mmengine.runner.runner.collect_env)
mmengine.config.utils.load = functools.lru_cache(None)(mmengine.config.utils.load)
mmengine.dataset.base_dataset.gc = SimpleNamespace(collect=lambda: 0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def one_thread():
    """For models too small to gain from more threads, which would wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def randomize():
    """Give every parameter a random value: nothing stays 0 or 1, and some logit scales exceed their limit, 4.6."""

    def randomize(module, std=0.1):
        for name, parameter in module.named_parameters():
            if name.endswith('logit_scale'):
                torch.nn.init.uniform_(parameter, 0, 5)
            elif name.endswith('weight') and parameter.ndim == 1:  # of a LayerNorm
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=std)
        return module

    return randomize


@pytest.fixture(scope='session')
def build_small(randomize):
    """Build a small backbone with random weights, in training mode and without drop path unless the test asks."""
    small = {'embed_dims': 16, 'depths': (2, 2, 2, 2), 'num_heads': (1, 2, 4, 8)}

    def build_small(**kwargs):
        return randomize(SwinTransformerV2(**{'arch': small, 'window_size': 4, 'drop_path_rate': 0.0, **kwargs}))

    return build_small


@pytest.fixture(scope='session')
def libraries(load_tool):
    """The libraries that tests compare with: timm, torchvision and mmpretrain's backbones."""
    peers = load_tool('peers')
    if not peers.FOLDER.exists():
        pytest.skip('the libraries to compare with are not installed')
    return peers.import_libraries()


@pytest.fixture(scope='session')
def load_tool():
    """Import one of the command lines of ``tools/`` as a module."""

    def load_tool(name):
        [path] = TOOLS.rglob(f'{name}.py')
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(path.parent)
            patch.syspath_prepend(TOOLS)
            spec.loader.exec_module(module)
        return module

    return load_tool


@pytest.fixture(scope='session')
def shapes(load_tool, tmp_path_factory):
    """The folder of a small drawn data set."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    load_tool('draw_dataset').write_dataset(folder, train=8, val=2, seed=0)
    return folder


@pytest.fixture
def no_traces(monkeypatch):
    """A test with a Runner finds nothing that an earlier one registered by name, as its scope, and leaves nothing."""
    managers = [ManagerMixin]
    for manager in managers:  # grows
        managers += manager.__subclasses__()
        instances = manager._instance_dict if manager is MMLogger else {}  # else runs in one second share a log file
        monkeypatch.setattr(manager, '_instance_dict', type(manager._instance_dict)(instances))


@pytest.fixture(scope='session')
def coco(shapes, tmp_path_factory):
    """The drawn scenes as if they were COCO: its categories, of which six are drawn, and panoptic annotations too."""
    from mmdet.datasets import CocoPanopticDataset  # tests of the package alone need no host

    root = tmp_path_factory.mktemp('coco')
    classes = CocoPanopticDataset.METAINFO['classes']  # 80 things, then stuff
    for split in ('train', 'val'):
        (root / f'{split}2017').symlink_to(shapes / f'{split}2017')
        segments = root / f'annotations/panoptic_{split}2017'
        segments.mkdir(parents=True)
        drawn = COCO(shapes / f'annotations/instances_{split}2017.json')
        common = dict(info={}, images=list(drawn.imgs.values()))
        things = [dict(id=i, name=name, isthing=1) for i, name in enumerate(classes[:80], 1)]
        stuff = [dict(id=i, name=name, isthing=0) for i, name in enumerate(classes[80:], 81)]
        instances = dict(**common, categories=things, annotations=list(drawn.anns.values()))
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(instances))
        annotations = []
        for image_id in drawn.imgs:
            ids = np.full((256, 256), 200)  # of segments; that of the background is 200
            infos = [dict(id=200, category_id=81, area=1, bbox=[0, 0, 256, 256], iscrowd=0)]
            for i, shape in enumerate(drawn.imgToAnns[image_id], 1):
                ids[drawn.annToMask(shape) == 1] = i
                infos.append({key: shape[key] for key in ('category_id', 'area', 'bbox', 'iscrowd')})
                infos[-1]['id'] = i
            name = f'{image_id:012d}.png'
            cv2.imwrite(str(segments / name), np.stack((ids * 0, ids * 0, ids), 2))  # BGR: the id is in red
            annotations.append(dict(image_id=image_id, file_name=name, segments_info=infos))
        panoptic = dict(**common, categories=things + stuff, annotations=annotations)
        (root / f'annotations/panoptic_{split}2017.json').write_text(json.dumps(panoptic))
    return root


@pytest.fixture(scope='session')
def trained_segmentor(tmp_path_factory, shapes, load_tool):
    """What a run of the demo's segmentor saves after one step."""
    from entries import train  # tests of the package alone need no host

    work_dir = tmp_path_factory.mktemp('trained')
    assert train(load_tool, shapes, work_dir) == 0
    return torch.load(work_dir / 'iter_1.pth', weights_only=False)  # written just now
