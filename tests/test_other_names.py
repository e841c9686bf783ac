"""Arguments that other implementations have are told apart in one message."""

import inspect

import pytest

from swinv2_mm import SwinTransformerV2
from swinv2_mm.arch import ARCHS
from swinv2_mm.other_names import OUR_NAMES

OURS = set(inspect.signature(SwinTransformerV2).parameters)


def test_all_of_them_are_named_in_one_line():
    with pytest.raises(TypeError) as error:
        SwinTransformerV2('t', in_chans=3, img_size=256, use_checkpoint=True, pretrained='a.pth', colour='red')
    start, *told = str(error.value).replace(': ', '; ', 1).split('; ')
    assert start == 'SwinTransformerV2 has other names for its arguments'
    assert told == [
        'in_chans is in_channels',
        'img_size is not needed: images may have any size',
        'use_checkpoint is with_cp',
        "pretrained is init_cfg=dict(type='Pretrained', checkpoint=PATH_OR_URL)",
        'colour is unknown',
        "arch='t' is arch='tiny'",
    ]


@pytest.mark.parametrize(
    'arch, full',
    [
        *((name[0], name) for name in ARCHS),
        ('T', 'tiny'),
        ('swinv2_base', 'base'),
        ('swin_v2_s', 'small'),
        ('SwinV2-L', 'large'),
        ('swin-tiny', 'tiny'),
    ],
)
def test_the_short_name_of_an_arch_is_told(arch, full):
    with pytest.raises(ValueError, match=rf"has other names for its arguments: arch='{arch}' is arch='{full}'$"):
        SwinTransformerV2(arch)


def test_a_name_that_is_no_arch_is_still_an_error_of_its_own():
    with pytest.raises(ValueError, match=r"^arch must be one of tiny, .* got 'xxl'$"):
        SwinTransformerV2('xxl')


def test_no_argument_of_ours_is_said_to_have_another_name():
    assert not OURS & set(OUR_NAMES)
    for here in OUR_NAMES.values():
        named = here.partition('=')[0].partition(',')[0]
        assert named in OURS or here.startswith(('not needed: ', 'a field of the dict arch')), here


def test_arguments_of_other_libraries_are_known(libraries):
    transformers = pytest.importorskip('transformers')
    classes = libraries.mmpretrain.SwinTransformerV2, libraries.timm.models.swin_transformer_v2.SwinTransformerV2
    theirs = {name for cls in classes for name in inspect.signature(cls.__init__).parameters} - {'self', 'kwargs'}
    computed = {'hidden_size', 'encoder_stride', 'stage_names', 'device', 'dtype'}
    config = set(vars(transformers.Swinv2Config())) - set(vars(transformers.PreTrainedConfig())) - computed
    theirs |= {name for name in config if not name.startswith('_')}
    assert theirs - OURS <= set(OUR_NAMES), theirs - OURS - set(OUR_NAMES)
