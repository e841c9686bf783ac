"""Bad input is one line before anything is written; what the hosts train on rightly passes."""

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from draws import DRAWS
from entries import run_tool
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmseg.models import FCNHead
from mmseg.models.decode_heads import STDCHead
from PIL import Image
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from spoilt import (
    COCO_CHANGES,
    FILES,
    GOOD,
    GOOD_MAPS,
    GOOD_OPTIONS,
    MAP,
    MAPS,
    OPTIONS,
    SEGMENTATION,
    TRAIN,
    VAL,
    category,
    drop,
    drop_category,
    drop_shape,
    each,
    put,
    rewrite,
    spoil_one,
    write,
    write_map,
)

from swinv2_mm.checks.coco import Needs, check_annotations
from swinv2_mm.checks.data import check_contents, innermost_datasets, open_dataset
from swinv2_mm.checks.heads import check_heads
from swinv2_mm.checks.label_maps import host_labels
from swinv2_mm.checks.masks import decode_counts
from swinv2_mm.checks.options import accepted_names
from swinv2_mm.checks.settings import check_settings
from swinv2_mm.engine import launch

ROOT = Path(__file__).parents[1]
DET = 'configs/demo/mask-rcnn_swinv2_shapes.py'
SEG = 'configs/demo/upernet_swinv2_shapes.py'
REAL = os.environ.get('SWINV2_MM_REAL_COCO')  # a folder laid out as COCO, whose annotations are spoilt too


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope='module', autouse=True)
def parsed_once():
    """Configs are parsed once; parsing is most of the time of a refusal."""
    fromfile, parsed = Config.fromfile, {}

    def cached(path, *args, **kwargs):
        key = Path(path).read_bytes()
        if key not in parsed:
            parsed[key] = fromfile(path, *args, **kwargs)
        return copy.deepcopy(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'fromfile', cached)
        yield


@pytest.fixture(scope='module')
def tools(load_tool):
    return dict(train=load_tool('train'), test=load_tool('test'))


@pytest.fixture
def data(shapes, tmp_path):
    """A copy of the drawn data set."""
    return Path(shutil.copytree(shapes, tmp_path / 'data'))


@pytest.fixture
def refused(tools, tmp_path, monkeypatch, capsys):
    """Run a command line that must end with exit code 2 and one line, and write nothing; returns the line."""

    def refused(tool, *args):
        if tool == 'test':
            torch.save({}, tmp_path / 'x.pth')
            args = (args[0], tmp_path / 'x.pth', *args[1:])
        before = sorted(tmp_path.rglob('*'))
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args), '--work-dir', str(tmp_path / 'run')])
        with pytest.raises(SystemExit) as ended:
            tools[tool].main()
        err = capsys.readouterr().err
        assert ended.value.code == 2, err
        assert err.startswith('error: ') and err.count('\n') == 1 and err.endswith('\n'), err
        assert sorted(tmp_path.rglob('*')) == before
        return err

    return refused


@pytest.fixture
def prepared(tools, tmp_path):
    """The config of a command line that must pass all checks."""

    def prepared(tool, *args):
        if tool == 'test':
            torch.save({}, tmp_path / 'x.pth')
            args = (args[0], tmp_path / 'x.pth', *args[1:])
        return tools[tool].prepare(tools[tool].parse_args([*map(str, args), '--work-dir', str(tmp_path / 'run')]))

    return prepared


@pytest.mark.parametrize('name', FILES)
def test_a_file_that_is_no_coco_json(name, data, refused):
    content, says = FILES[name]
    (data / TRAIN).write_bytes(content)
    line = refused('train', DET, '--data-root', data)
    assert f'{data / TRAIN} ' in line and says in line


@pytest.mark.parametrize('name', COCO_CHANGES)
def test_annotations_that_are_wrong(name, data, refused):
    change, says = COCO_CHANGES[name]
    rewrite(data / TRAIN, change)
    line = refused('train', DET, '--data-root', data)
    assert str(data / TRAIN) in line and says in line


@pytest.mark.parametrize('name', list(COCO_CHANGES)[::9])
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_annotations_to_evaluate_on_are_checked_too(name, data, refused, tool):
    change, says = COCO_CHANGES[name]
    rewrite(data / VAL, change)
    line = refused(tool, DET, '--data-root', data)
    assert str(data / VAL) in line and says in line


def test_what_the_evaluation_alone_reads(data, shapes, refused, prepared):
    rewrite(data / TRAIN, drop_shape(0, 'iscrowd'))
    prepared('train', DET, '--data-root', data)  # mmdet does not miss it
    rewrite(data / VAL, drop_shape(0, 'iscrowd'))
    for tool in ('train', 'test'):
        line = refused(tool, DET, '--data-root', data)
        assert f"{data / VAL}: annotations[0]: iscrowd is None, and COCO's evaluation reads it" in line
    for change, says in (
        (put('annotations', 0, 'id', 'a'), "id is 'a', and COCO's evaluation takes only numbers"),
        (
            put('annotations', 0, 'segmentation', [[5, 5, 9, 9]]),
            'segmentation has [5, 5, 9, 9], must have three points',
        ),
    ):
        shutil.copytree(shapes / 'annotations', data / 'annotations', dirs_exist_ok=True)
        rewrite(data / TRAIN, change)
        prepared('train', DET, '--data-root', data)
        rewrite(data / VAL, change)
        assert says in refused('train', DET, '--data-root', data)


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_a_metric_reads_annotations_of_the_same_images(data, refused, tool):
    flags = (DET, '--data-root', data, '--cfg-options')
    split = 'val' if tool == 'train' else 'test'
    line = refused(tool, *flags, f'{split}_evaluator.ann_file={data}/none.json')
    assert f'{data}/none.json, the ann_file of {split}_evaluator, does not exist' in line

    def number_anew(coco):
        for image in coco['images']:
            image['id'] += 100
        for shape in coco['annotations']:
            shape['image_id'] += 100

    rewrite(data / TRAIN, number_anew)
    line = refused(tool, *flags, f'{split}_evaluator.ann_file={data / TRAIN}')
    assert f'{data / TRAIN}, which the metric reads, has no image with id 1 of {data / VAL}' in line


def test_classes_are_checked_as_their_names(data):
    cfg = launch.load_config(DET)
    launch.set_data_root(cfg, str(data))
    cfg.val_evaluator = dict(type=CocoMetric, ann_file='none.json')
    with pytest.raises(ValueError, match=r'^none\.json, the ann_file of val_evaluator, does not exist'):
        check_contents(cfg, ('val',))
    dataset = SimpleNamespace(metainfo=dict(classes=('dog', 'cat', 'cow')))
    check_heads(dict(auxiliary_head=dict(type=STDCHead, num_classes=1)), dataset, 'the data')
    with pytest.raises(ValueError, match=r'auxiliary_head\.num_classes is 1, and the data has 3 classes'):
        check_heads(dict(auxiliary_head=dict(type=FCNHead, num_classes=1)), dataset, 'the data')


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda path: path.unlink(), 'does not exist'),
        (lambda path: path.write_bytes(b''), 'is not a readable image'),
        (lambda path: path.write_text('<html>404</html>'), 'is not a readable image'),
        (lambda path: path.write_bytes(path.read_bytes()[:3]), 'is not a readable image'),
        (lambda path: (path.unlink(), path.mkdir()), 'does not exist'),
        (lambda path: (path.unlink(), path.symlink_to('nowhere.jpg')), 'does not exist'),
        (lambda path: cv2.imwrite(str(path), np.zeros((9, 7, 3), np.uint8)), 'has 7 x 9 pixels, and 256 x 256 in'),
    ],
)  # fmt: skip
@pytest.mark.parametrize('listed', [False, True])
def test_a_photo_that_is_missing_or_none(data, refused, monkeypatch, spoil, says, listed):
    monkeypatch.setattr('swinv2_mm.checks.images.LIST_FROM', 1 if listed else 1000)
    photo = data / 'train2017/000000000003.jpg'
    spoil(photo)
    line = refused('train', DET, '--data-root', data)
    assert str(photo) in line and says in line


@pytest.mark.parametrize('name', SEGMENTATION)
def test_segmentation_data_that_are_wrong(name, data, refused):
    spoil, options, says = SEGMENTATION[name]
    if spoil:
        spoil(data)
    more = ['--cfg-options', *options] if options else []
    assert says in refused('train', SEG, '--data-root', data / 'ade', *more)


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda folder: write_map(folder / '000000000001.png', 9), '000000000001.png has the value 9'),
        (lambda folder: (folder / '000000000002.png').unlink(), '000000000002.png does not exist'),
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_label_maps_to_evaluate_on_are_checked_too(data, refused, tool, spoil, says):
    spoil(data / 'ade/annotations/validation')
    assert says in refused(tool, SEG, '--data-root', data / 'ade')


@pytest.mark.parametrize('option', OPTIONS)
def test_options_that_are_wrong(option, shapes, refused):
    line = refused('train', DET, '--data-root', shapes, '--cfg-options', option)
    assert OPTIONS[option] in line
    assert option.partition('=')[0].split('.')[-1] in line


@pytest.mark.parametrize(
    'option', ['optim_wraper.x=1', 'test_dataloader.batch_size=0', 'test_dataloader.bath_size=1', 'foo']
)
def test_options_of_testing_that_are_wrong(option, shapes, refused):
    refused('test', DET, '--data-root', shapes, '--cfg-options', option)


@pytest.mark.parametrize('seed', ['-1', str(2**32)])
def test_a_seed_that_is_none(shapes, refused, seed):
    assert f'seed is {seed}: must be a whole number from 0 to 4294967295' in refused(
        'train', DET, '--data-root', shapes, '--seed', seed
    )


@pytest.mark.parametrize(
    ('config', 'option', 'value'),
    [
        ('cascade_mask_rcnn_swinv2', 'model.roi_head.bbox_head.1.num_classes', 3),
        ('htc_swinv2', 'model.roi_head.mask_head.2.num_classes', 3),
        ('mask2former_swinv2', 'model.panoptic_head.num_stuff_classes', 53),
        ('mask2former_swinv2', 'model.panoptic_fusion_head.num_stuff_classes', 53),
        ('coco/retinanet_swinv2-t-w16_fpn_1x_coco', 'model.bbox_head.num_classes', 81),
        ('coco/dino-4scale_swinv2-t-w16_8xb2-12e_coco', 'model.bbox_head.num_classes', 3),
    ],
)
def test_heads_of_other_detectors(coco, refused, config, option, value):
    flags = (f'configs/{config}.py', '--data-root', coco, '--checkpoint', 'none', '--cfg-options')
    total = value + 80 if 'stuff' in option else value
    line = refused('train', *flags, f'{option}={value}')
    assert f'{option} is {total}, and train_dataloader.dataset has 80 classes' in line


RECIPES = {
    'mmdet': (
        'boxinst/boxinst_r50_fpn_ms-90k_coco',
        'detr/detr_r50_8xb2-150e_coco',
        'glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco',
        'ms_rcnn/ms-rcnn_r50_fpn_1x_coco',
        'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco',
        'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco',
        'rtmdet/rtmdet-ins_s_8xb32-300e_coco',
        'solo/solo_r50_fpn_1x_coco',
        'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco',
        'yolact/yolact_r50_1xb8-55e_coco',
    ),
    'mmseg': (
        'beit/beit-base_upernet_8xb2-160k_ade20k-640x640',
        'mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024',
        'maskformer/maskformer_swin-t_upernet_8xb2-160k_ade20k-512x512',
        'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024',
        'segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512',
        'stdc/stdc1_4xb12-80k_cityscapes-512x1024',
    ),
}


def typed(node, *place):
    """The dicts of a config that name a class, each with its place."""
    if isinstance(node, dict):
        yield place, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from typed(value, *place, str(key))


@pytest.mark.parametrize(('host', 'recipe'), [(host, recipe) for host in RECIPES for recipe in RECIPES[host]])
def test_nothing_in_the_hosts_recipes_is_refused(tmp_path, host, recipe):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{host}::{recipe}.py'")
    cfg = launch.load_config(path)
    check_settings(cfg, ('train', 'val', 'test'))
    opened = 0
    with DefaultScope.overwrite_default_scope(host):
        for node in innermost_datasets(cfg):
            dataset = open_dataset(node, 'the data set')
            check_heads(cfg.model, dataset, 'the data set')
            opened += 1
        for name in ('model', 'train_dataloader', 'test_dataloader', 'optim_wrapper', 'default_hooks', 'val_evaluator'):
            for place, node in typed(cfg.to_dict()[name], name):
                accepted = accepted_names(list(place), node)
                assert accepted is None or set(node) <= accepted, place
    assert opened == 3


def config_of(tmp_path, text, base=DET):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{ROOT / base}'\n{text}")
    return path


def test_a_head_without_a_number_of_classes_has_that_of_its_class(shapes, tmp_path, refused):
    config = config_of(
        tmp_path, "model = dict(roi_head=dict(bbox_head=dict(_delete_=True, type='Shared2FCBBoxHead', in_channels=64)))"
    )
    assert 'bbox_head.num_classes is 80' in refused('train', config, '--data-root', shapes)


def trains(cfg, split='train'):
    """Whether a data set of the host, with all its samples, is loaded through its pipeline; returns the data set."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    for i in range(len(dataset)):
        assert dataset[i] is not None
    return dataset


@pytest.mark.parametrize('name', GOOD)
def test_good_annotations_pass(name, data, prepared):
    rewrite(data / TRAIN, GOOD[name])
    cfg = prepared('train', DET, '--data-root', data)
    assert len(trains(cfg)) == (7 if name == 'images without objects' else 8)


WRAPPERS = {
    'RepeatDataset': 'times=2, dataset=inner',
    'ClassBalancedDataset': 'oversample_thr=0.1, dataset=inner',
    'ConcatDataset': 'datasets=[inner, inner]',
    'MultiImageMixDataset': "dataset=dict(inner, pipeline=inner['pipeline'][:2]), pipeline=inner['pipeline'][2:]",
}
INNER = f"""inner = dict(
    type='CocoDataset', data_root='data/shapes/', ann_file='{TRAIN}', data_prefix=dict(img='train2017/'),
    metainfo=_base_.metainfo, pipeline=_base_.train_pipeline)
"""


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_data_sets_in_wrappers_are_checked(wrapper, data, tmp_path, prepared, refused):
    outer = f"train_dataloader = dict(dataset=dict(_delete_=True, type='{wrapper}', {WRAPPERS[wrapper]}))"
    config = config_of(tmp_path, INNER + outer)
    assert len(trains(prepared('train', config, '--data-root', data))) >= 8
    rewrite(data / TRAIN, category(1, 'name', 'sqare'))
    assert "no category 'square'" in refused('train', config, '--data-root', data)


def test_a_part_of_the_classes(data, tmp_path, prepared):
    config = config_of(
        tmp_path,
        """part = dict(metainfo=dict(classes=('square', 'ring'), palette=[(1, 2, 3), (4, 5, 6)]))
train_dataloader = dict(dataset=part)
val_dataloader = dict(dataset=part)
model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))
""",
    )
    trains(prepared('train', config, '--data-root', data))


def test_a_file_without_annotations_is_for_predictions(data, tmp_path, prepared, refused):
    rewrite(data / VAL, drop('annotations'))
    assert "has no 'annotations'" in refused('test', DET, '--data-root', data)
    options = ('--cfg-options', 'test_evaluator.format_only=True', f'test_evaluator.outfile_prefix={tmp_path}/out')
    trains(prepared('test', DET, '--data-root', data, *options), 'test')


def test_negatives_beside_other_data(data, tmp_path, prepared, refused):
    shutil.copy(data / TRAIN, data / 'annotations/none.json')
    rewrite(data / 'annotations/none.json', put('annotations', []))
    outer = "train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[{}]))"
    negatives = "dict(inner, ann_file='annotations/none.json')"
    config = config_of(tmp_path, INNER + outer.format(f'{negatives}, inner'))
    assert len(trains(prepared('train', config, '--data-root', data))) == 16
    config = config_of(tmp_path, INNER + outer.format(f'{negatives}, {negatives}'))
    assert 'none.json has no object to learn' in refused('train', config, '--data-root', data)


def test_masks_that_nobody_reads_may_be_wrong(data, tmp_path, prepared):
    rewrite(data / TRAIN, each('annotations', segmentation='none'))
    steps = 'train_dataloader.dataset.pipeline.1.with_mask=False'
    cfg = prepared('train', DET, '--data-root', data, '--cfg-options', steps)
    trains(cfg)


def test_images_that_the_host_may_miss(data, prepared, refused):
    (data / 'train2017/000000000003.jpg').unlink()
    flags = (DET, '--data-root', data)
    assert '000000000003.jpg' in refused('train', *flags)
    prepared('train', *flags, '--cfg-options', 'train_dataloader.dataset.pipeline.0.ignore_empty=True')
    prepared('train', *flags, '--cfg-options', 'train_dataloader.dataset.indices=2')
    prepared('train', *flags, '--cfg-options', 'train_dataloader.dataset.indices=[0,1,7,-1]')


@pytest.mark.parametrize('size', [(100, 200), (200, 100)])
def test_a_photo_turned_by_its_exif(data, prepared, size):
    path = data / 'train2017/000000000003.jpg'
    photo = Image.open(path).crop((0, 0, 200, 100))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(path, exif=exif)

    def shrink(coco):
        coco['images'][2].update(width=size[0], height=size[1])
        coco['annotations'] = [shape for shape in coco['annotations'] if shape['image_id'] != 3]

    rewrite(data / TRAIN, shrink)
    prepared('train', DET, '--data-root', data, '--cfg-options', 'train_dataloader.dataset.filter_cfg=None')


def test_data_sets_of_other_kinds_are_left_to_the_host(data, tmp_path, prepared):
    (data / 'annotations/instances_train2017.json').write_text('[]')
    config = config_of(
        tmp_path,
        """from mmengine.dataset import BaseDataset
from mmdet.datasets import CocoDataset
class Other(BaseDataset):
    pass
class Own(CocoDataset):
    def load_data_list(self):
        return []
train_dataloader = dict(dataset=dict(type=KIND))
del BaseDataset, CocoDataset
""".replace('KIND', 'Other'),
    )
    prepared('train', config, '--data-root', data)
    config.write_text(config.read_text().replace('type=Other', 'type=Own'))
    prepared('train', config, '--data-root', data)


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_the_checks_can_be_skipped(data, prepared, tool):
    for path in (TRAIN, VAL):
        rewrite(data / path, category(1, 'name', 'sqare'))
    prepared(tool, DET, '--data-root', data, '--skip-data-checks')


@pytest.mark.parametrize(
    'config',
    [
        'mask_rcnn',
        'cascade_mask_rcnn',
        'htc',
        'mask2former',
        'coco/mask2former_swinv2-t-w16_8xb2-lsj-50e_coco-panoptic',
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_recipes_for_coco_pass(coco, prepared, config, tool):
    path = f'configs/{config}_swinv2.py' if '/' not in config else f'configs/{config}.py'
    prepared(tool, path, '--data-root', coco, *(['--checkpoint', 'none'] if tool == 'train' else []))


def test_panoptic_annotations(coco, tmp_path, prepared, refused):
    data = Path(shutil.copytree(coco, tmp_path / 'coco', symlinks=True))
    config = 'configs/coco/mask2former_swinv2-t-w16_8xb2-lsj-50e_coco-panoptic.py'
    flags = (config, '--data-root', data, '--checkpoint', 'none')
    path = data / 'annotations/panoptic_train2017.json'
    prepared('train', *flags)
    whole = path.read_text()
    first = ('annotations', 0, 'segments_info', 0)
    for change, says in (
        (put(*first, 'category_id', 999), 'annotations[0].segments_info[0]: category_id 999 is not the id'),
        (put(*first, 'bbox', [1, 2]), 'segments_info[0]: bbox is [1, 2]'),
        (drop_shape(0, 'segments_info'), 'segments_info is None, must be a list of dicts'),
        (drop_category(0, 'isthing'), 'has no isthing'),
        (category(100, 'name', 'flor'), 'of the config'),
        (put('annotations', 0, 'image_id', 999), 'image_id 999 is not the id'),
    ):
        rewrite(path, change)
        line = refused('train', *flags)
        assert str(path) in line and says in line
        path.write_text(whole)
    (data / 'annotations/panoptic_train2017/000000000004.png').unlink()
    assert 'panoptic_train2017/000000000004.png does not exist' in refused('train', *flags)
    options = ('--cfg-options', 'model.panoptic_head.num_things_classes=133', 'model.panoptic_head.num_stuff_classes=0')
    assert 'model.panoptic_head.num_things_classes is 133' in refused('train', *flags, *options)


@pytest.mark.parametrize('name', GOOD_MAPS)
def test_good_label_maps_pass(name, data, prepared):
    spoil, options = GOOD_MAPS[name]
    if spoil:
        spoil(data)
    cfg = prepared('train', SEG, '--data-root', data / 'ade', *(['--cfg-options', *options] if options else []))
    assert len(trains(cfg)) in (2, 8)


def test_ade20k_with_150_classes_from_1(data, prepared, refused):
    flags = ('configs/upernet_swinv2.py', '--data-root', data / 'ade', '--checkpoint', 'none')
    write_map(data / MAP, 150)
    trains(prepared('train', *flags))
    write_map(data / MAP, 151)
    assert (
        f'{MAP} has the value 151, and with 150 classes and reduce_zero_label=True values go from 1 to 150, 0 and 255'
        in (refused('train', *flags))
    )


def test_cityscapes_names_and_suffixes(data, tmp_path, prepared, refused):
    for split in ('training', 'validation'):
        for folder, suffix in (
            (f'ade/images/{split}', '_leftImg8bit.png'),
            (f'ade/annotations/{split}', '_gtFine_labelTrainIds.png'),
        ):
            for path in (data / folder).iterdir():
                path.rename(path.with_name(path.stem + suffix))
    config = config_of(
        tmp_path,
        """train_dataloader = dict(dataset=dict(type='CityscapesDataset', metainfo=None))
val_dataloader = dict(dataset=dict(type='CityscapesDataset', metainfo=None))
model = dict(decode_head=dict(num_classes=19), auxiliary_head=dict(num_classes=19))
""",
        SEG,
    )
    trains(prepared('train', config, '--data-root', data / 'ade'))
    for path in (data / MAPS).iterdir():
        path.rename(path.with_name(path.name.replace('TrainIds', 'Ids')))
    assert 'there is 000000000001_gtFine_labelIds.png, set seg_map_suffix' in refused(
        'train', config, '--data-root', data / 'ade'
    )


@pytest.mark.parametrize('options', GOOD_OPTIONS)
def test_options_that_are_right(options, shapes, prepared):
    cfg = prepared('train', DET, '--data-root', shapes, '--cfg-options', *options.split())
    expected = launch.Config(launch.load_config(DET).to_dict())
    key = options.split()[0].partition('=')[0].split('.')
    node = cfg
    for part in key:
        node = node[int(part)] if isinstance(node, list) else node[part]
    assert node is not expected


def test_mmdet_shifts_labels_after_a_name_that_the_file_lacks(data, prepared):
    """Why a misspelt category is refused."""
    cfg = prepared('train', DET, '--data-root', data)
    cfg.train_dataloader.dataset.filter_cfg = None

    def labels():
        dataset = trains(cfg)
        return [instance['bbox_label'] for i in range(8) for instance in dataset.get_data_info(i)['instances']]

    right = labels()
    rewrite(data / TRAIN, category(1, 'name', 'sqare'))
    wrong = labels()
    assert 1 in right
    assert wrong == [label - (label > 1) for label in right if label != 1]


@pytest.mark.parametrize('density', [0, 0.01, 0.5, 1])
def test_run_length_codes_are_those_of_pycocotools(density):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 90, 2)
        mask = np.asfortranarray(rng.random((height, width)) < density, np.uint8)
        flat = mask.ravel(order='F')
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff(np.concatenate(([0], edges, [len(flat)]))).tolist()
        runs = [0, *runs] if flat[0] else runs
        assert decode_counts(rle_codec.encode(mask)['counts'].decode()) == runs


@pytest.mark.parametrize('reduce', [False, True])
@pytest.mark.parametrize('label_map', [None, {0: 255, 1: 0, 2: 1, 3: 255, 254: 3}])
def test_labels_are_those_of_mmseg(tmp_path, reduce, label_map):
    from mmseg.datasets.transforms import LoadAnnotations

    values = np.arange(256)
    Image.fromarray(values.astype(np.uint8).reshape(16, 16)).save(tmp_path / 'map.png')
    results = dict(seg_map_path=str(tmp_path / 'map.png'), reduce_zero_label=reduce, label_map=label_map, seg_fields=[])
    expected = LoadAnnotations()(results)['gt_seg_map'].ravel()
    assert np.array_equal(host_labels(values, reduce, label_map), expected)


def evaluates(path, classes):
    """COCO's evaluation of the annotations against themselves, as mmdet's metric does it."""
    truth = COCO(path)
    ids = truth.getCatIds(catNms=classes)
    found = [shape for shape in truth.dataset['annotations'] if shape['category_id'] in ids]
    results = [dict(image_id=shape['image_id'], category_id=shape['category_id'], score=0.5) for shape in found]
    boxes = [dict(result, bbox=shape['bbox']) for result, shape in zip(results, found)]
    masks = [dict(result, segmentation=truth.annToRLE(shape)) for result, shape in zip(results, found)]
    for kind, detections in (('bbox', boxes), ('segm', masks)):
        run = COCOeval(truth, truth.loadRes(detections), kind)
        run.params.catIds = ids
        run.evaluate()
        run.accumulate()


def few_images(folder, count):
    """The annotations of the first images."""
    coco = json.loads((folder / TRAIN).read_text())
    coco['images'] = coco['images'][:count]
    ids = {image['id'] for image in coco['images']}
    coco['annotations'] = [shape for shape in coco['annotations'] if shape['image_id'] in ids]
    return coco


def test_annotations_spoilt_at_random_are_refused_or_train(shapes, tmp_path):
    """What passes is loaded by mmdet with all its masks, and evaluated; what does not is one line."""
    folder, config = (Path(REAL), 'configs/mask_rcnn_swinv2.py') if REAL else (shapes, DET)
    whole, path = few_images(folder, 4), tmp_path / 'spoilt.json'
    cfg = launch.load_config(config)
    node = cfg.train_dataloader.dataset
    node.update(data_root='', ann_file=str(path), data_prefix=dict(img=f'{folder}/train2017/'))
    next(step for step in node.pipeline if step.type == 'Resize').scale = (64, 64)
    with DefaultScope.overwrite_default_scope('mmdet'):
        classes = open_dataset(node, 'train_dataloader.dataset').metainfo['classes']
    count = dict(refused=0, passed=0)
    for seed in range(60 * DRAWS):
        coco, rng = copy.deepcopy(whole), random.Random(seed)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            spoil_one(coco, rng)
        write(path, coco)
        needs = Needs(masks=True, metrics=('bbox', 'segm') if seed % 2 else ())
        try:
            found = check_annotations(str(path), json.loads(path.read_text()), classes, needs)
        except ValueError as error:
            assert str(error).startswith(f'{path}') and '\n' not in str(error), (seed, error)
            count['refused'] += 1
            continue
        count['passed'] += 1
        if other_photos(coco, folder / 'train2017') or not found.objects:
            continue  # these are found out by what follows in `check_contents`
        trains(cfg)
        if seed % 2:
            evaluates(path, classes)
    print(count)
    assert count['refused'] > 15 * DRAWS and count['passed'] > 10 * DRAWS


def other_photos(coco, folder):
    """Whether a photo is not there, or not of the size that the annotations have."""
    for image in coco['images']:
        path = folder / image['file_name']
        if not path.is_file() or Image.open(path).size != (image['width'], image['height']):
            return True
    return False


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_the_command_line_prints_one_line_and_writes_nothing(data, load_tool, tmp_path, capsys, tool):
    for path in (TRAIN, VAL):
        rewrite(data / path, category(1, 'name', 'sqare'))
    torch.save({}, tmp_path / 'x.pth')
    checkpoint = [str(tmp_path / 'x.pth')] if tool == 'test' else []
    flags = '--data-root', data, '--work-dir', tmp_path / 'run'
    assert run_tool(load_tool, tool, ROOT / DET, *checkpoint, *flags) == 2
    err = capsys.readouterr().err
    path = data / (TRAIN if tool == 'train' else VAL)
    cure = "correct the name, the nearest in the file is 'sqare'"
    assert f"error: {path} has no category 'square' of the config: {cure}" in err.splitlines()[-1]
    assert 'Traceback' not in err
    assert not (tmp_path / 'run').exists()
