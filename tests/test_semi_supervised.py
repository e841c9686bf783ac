"""A detector that wraps another, mmdet's SoftTeacher: its backbones get what a flag says, and train as it says."""

import sys

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from test_configs import SMALL, shrink

from swinv2_mm import BFloat16OptimWrapper, CheckpointError, SwinTransformerV2
from swinv2_mm.engine import launch

CONFIG = f"""
_base_ = 'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
custom_imports = dict(imports=['swinv2_mm'])
backbone = dict(_delete_=True, type='SwinTransformerV2', arch={SMALL}, window_size=4, drop_path_rate=0.0)
model = dict(detector=dict(backbone=backbone, neck=dict(in_channels=[16, 32, 64, 128])))
"""
LABELED = 'semi_anns/instances_train2017.1@10.json'
pytestmark = pytest.mark.usefixtures('no_traces')


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'soft_teacher.py'
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def data(coco, tmp_path):
    """COCO with a tenth of it labeled, where the config looks for it."""
    root = tmp_path / 'data'
    (root / 'semi_anns').mkdir(parents=True)
    for name in ('annotations', 'train2017', 'val2017'):
        (root / name).symlink_to(coco / name)
    for name in (LABELED, LABELED.replace('.json', '-unlabeled.json')):
        (root / name).symlink_to(coco / 'annotations/instances_train2017.json')
    return str(root)


@pytest.fixture
def backbones(randomize, tmp_path):
    """A teacher and a student, and the path of a file that holds both."""
    nets = {who: randomize(SwinTransformerV2(SMALL, window_size=4)) for who in ('teacher', 'student')}
    state = {f'{who}.backbone.{name}': value for who, net in nets.items() for name, value in net.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'both.pth')
    return nets, str(tmp_path / 'both.pth')


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg.model)


def sample():
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (64, 96))
    meta.update(scale_factor=(1.0, 1.0), homography_matrix=np.eye(3, dtype=np.float32))
    boxes = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([3]))
    return DetDataSample(metainfo=meta, gt_instances=boxes)


def test_bf16_is_for_the_maps_of_student_and_teacher(config):
    cfg = launch.load_config(config)
    launch.set_initial_weights(cfg, 'none')
    model = build(cfg)
    maps, inner = {}, {}
    for who in ('student', 'teacher'):
        detector = getattr(model, who)
        maps[who], inner[who] = [], set()
        detector.rpn_head.register_forward_hook(lambda _, args, out, seen=maps[who]: seen.append(args[0]))
        fc1 = detector.backbone.layers[2].blocks[0].mlp.fc1
        fc1.register_forward_hook(lambda _, args, out, seen=inner[who]: seen.add(out.dtype))
    branches = 'sup', 'unsup_teacher', 'unsup_student'
    images = {branch: torch.rand(1, 3, 64, 96) for branch in branches}
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    with wrapper.optim_context(model):
        losses = model(images, {branch: [sample()] for branch in branches}, mode='loss')
    assert inner == {'student': {torch.bfloat16}, 'teacher': {torch.bfloat16}}
    for who, image in (('student', images['sup']), ('teacher', images['unsup_teacher'])):
        with torch.autocast('cpu', torch.bfloat16):
            expected = getattr(model, who).extract_feat(image)
        pairs = list(zip(maps[who][0], expected))
        assert len(pairs) == 5 and all(x.dtype == torch.float32 and torch.equal(x, right) for x, right in pairs)
    losses = [value for value in losses.values() for value in (value if isinstance(value, list) else [value])]
    assert all(loss.dtype == torch.float32 for loss in losses)
    sum(losses).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.student.backbone.parameters())
    inner['student'].clear()
    model.student.extract_feat(images['sup'])
    assert inner['student'] == {torch.float32}


def test_training_starts_from_the_backbone_that_prefix_chooses(
    config, data, backbones, load_tool, tmp_path, monkeypatch
):
    nets, both = backbones
    original = launch.load_config

    def load_small(path, overrides=None):
        cfg = original(path)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            shrink(loader.dataset)
            loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        cfg.train_dataloader.sampler.update(batch_size=2, source_ratio=[1, 1])
        cfg.train_cfg.update(max_iters=1, val_interval=5)
        cfg.default_hooks.checkpoint.interval = 1
        cfg.optim_wrapper.optimizer.update(lr=0.0, weight_decay=0.0)  # so that a step shows what it started from
        return cfg

    monkeypatch.setattr(launch, 'load_config', load_small)
    monkeypatch.setattr(Config, 'pretty_text', '')  # for the log; yapf takes long
    flags = ['--data-root', data, '--work-dir', str(tmp_path / 'run'), '--checkpoint', both, '--prefix', 'teacher']
    monkeypatch.setattr(sys, 'argv', ['train', config, *flags])
    load_tool('train').main()
    saved = torch.load(tmp_path / 'run/iter_1.pth', weights_only=False)['state_dict']  # written just now
    for name, value in nets['teacher'].state_dict().items():
        assert torch.equal(saved[f'student.backbone.{name}'], value), name
        torch.testing.assert_close(saved[f'teacher.backbone.{name}'], value, msg=name)  # an average of both


@pytest.mark.parametrize('who', ['teacher', 'student'])
def test_initial_weights_reach_the_wrapped_detector(config, data, backbones, load_tool, who):
    nets, both = backbones
    train = load_tool('train')
    cfg = train.prepare(train.parse_args([config, '--data-root', data, '--checkpoint', both, '--prefix', who]))
    model = build(cfg)
    for detector in (model.student, model.teacher):
        detector.backbone.init_weights()
        for name, value in nets[who].state_dict().items():
            assert torch.equal(detector.backbone.state_dict()[name], value), name


def test_which_backbone_is_not_clear_is_one_line(config, data, backbones, load_tool):
    train = load_tool('train')
    _, both = backbones
    with pytest.raises(CheckpointError, match=r"the prefixes 'student\.backbone\.', 'teacher\.backbone\.': choose one"):
        train.prepare(train.parse_args([config, '--data-root', data, '--checkpoint', both]))
    for flags in (['--prefix', 'teacher'], ['--prefix', 'teacher', '--checkpoint', 'none']):
        with pytest.raises(ValueError, match='--prefix teacher chooses a backbone in the file of --checkpoint: pass'):
            train.prepare(train.parse_args([config, '--data-root', data, *flags]))


def test_wrong_arguments_of_a_wrapped_backbone_are_told_by_their_place(config, data, load_tool):
    train = load_tool('train')
    for option, message in {
        'model.detector.backbone.window_size=0': 'window_size must be ints of at least 1 token and at most 65535',
        'model.detector.backbone.pretrained=x.pth': r'model\.detector\.backbone of the config: ',
    }.items():
        with pytest.raises(ValueError, match=message):
            train.prepare(train.parse_args([config, '--data-root', data, '--cfg-options', option]))


def test_a_whole_checkpoint_brings_the_weights_of_all_backbones(config, data, backbones, load_tool, tmp_path):
    weights = dict(type='Pretrained', checkpoint='https://127.0.0.1:9/never_downloaded.pth')
    with open(config, 'a') as file:
        file.write(f'model["detector"]["backbone"]["init_cfg"] = {weights}\n')
    torch.save({'meta': {'iter': 1}, 'optimizer': {}, 'state_dict': {}}, tmp_path / 'iter_1.pth')
    train, test = load_tool('train'), load_tool('test')
    resumed = train.prepare(train.parse_args([config, '--data-root', data, '--resume', str(tmp_path / 'iter_1.pth')]))
    tested = test.prepare(test.parse_args([config, backbones[1], '--data-root', data]))
    assert [cfg.model.detector.backbone.init_cfg for cfg in (resumed, tested)] == [None, None]


def test_other_windows_are_for_student_and_teacher(config, data, load_tool, tmp_path, monkeypatch):
    torch.save(dict(state_dict=build(launch.load_config(config)).state_dict()), tmp_path / 'trained.pth')
    tested = []
    monkeypatch.setattr(Runner, 'test', lambda runner: tested.append(runner.model))
    flags = ['--data-root', data, '--work-dir', str(tmp_path / 'run'), '--window-size', '6']
    monkeypatch.setattr(sys, 'argv', ['test', config, str(tmp_path / 'trained.pth'), *flags])
    load_tool('test').main()
    assert tested[0].student.backbone.window_size == tested[0].teacher.backbone.window_size == (6,) * 4
