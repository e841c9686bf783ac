"""Names and fields of architectures, and window sizes for one or all stages."""

import subprocess
import sys

import numpy as np
import pytest

from swinv2_mm.arch import ARCHS, MAX_WINDOW, arch_argument, parse_arch, per_stage

SMALL = dict(embed_dims=8, depths=(3, 1, 4), num_heads=(1, 2, 4))


@pytest.mark.parametrize(
    'arch, message',
    [
        ('nano', r"arch .*tiny, small, base, large, huge, giant.*'nano'"),
        ({**SMALL, 'depths': (3, 0, 4)}, r'depths of arch .*at least 1.*got \(3, 0, 4\)'),
        ({**SMALL, 'num_heads': (1, 0, 4)}, r'arch .*num_heads|stage 1 of arch'),
        ({**SMALL, 'num_heads': (1, 3, 4)}, r'stage 1 of arch has 16 channels.* 3 heads'),
    ],
)
def test_an_arch_that_is_invalid_is_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        parse_arch(arch)


@pytest.mark.parametrize('arch', [*ARCHS, SMALL, {**SMALL, 'extra_norm_every_n_blocks': 2}], ids=str)
def test_an_arch_goes_back_to_the_argument_it_came_from(arch):
    assert arch_argument(parse_arch(arch)) == arch


@pytest.mark.parametrize('sizes', [7, [7], (7,), (7, 7, 7), [7, 7, 7], np.array([7, 7, 7]), np.int64(7)], ids=repr)
def test_sizes_are_one_for_all_stages_or_one_for_each(sizes):
    assert per_stage('window_size', sizes, 3) == (7, 7, 7)


@pytest.mark.parametrize(
    'sizes', [[], (7, 7), (7,) * 4, '777', None, 7.0, 0, -1, [0], (7, 7, MAX_WINDOW + 1)], ids=repr
)
def test_other_sizes_are_refused_by_name(sizes):
    with pytest.raises(ValueError, match=r'^--window-size must be ') as error:
        per_stage('--window-size', sizes, 3)
    assert str(error.value).endswith(f'got {sizes!r}')


def test_the_module_needs_no_torch():
    code = 'import sys; sys.modules["torch"] = None; import runpy; runpy.run_path(sys.argv[1])'
    subprocess.run([sys.executable, '-c', code, sys.modules[parse_arch.__module__].__file__], check=True)
