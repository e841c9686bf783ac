import importlib.util
from pathlib import Path

import hypothesis
import pytest
import torch
from mmengine.logging import MMLogger

from swinv2_mm import SwinTransformerV2

TOOLS = Path(__file__).parents[1] / 'tools'

hypothesis.settings.register_profile('repeatable', deadline=None, derandomize=True, max_examples=150)
hypothesis.settings.load_profile('repeatable')

# The logger keeps the stream it is created with: not one that a test captures, which is closed after it.
MMLogger.get_current_instance()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    return load_tool('peers').import_libraries()


@pytest.fixture(scope='session')
def load_tool():
    """Import one of the command lines of ``tools/`` as a module."""

    def load_tool(name):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(TOOLS)  # they import each other
            spec.loader.exec_module(module)
        return module

    return load_tool


@pytest.fixture(scope='session')
def shapes(load_tool, tmp_path_factory):
    """The folder of a small drawn data set."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    load_tool('draw_dataset').write_dataset(folder, train=8, val=2, seed=0)
    return folder
