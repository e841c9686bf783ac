"""Test-time augmentation against doing it by hand: a plain model on each scaled or flipped image, undone and merged."""

import copy
import json
import pickle
import socket
import uuid

import cv2
import mmcv
import mmdet.models
import numpy as np
import pytest
import torch
from entries import IN_PROCESS, run_tool
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from mmseg.structures import SegDataSample
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from test_infer import DEMO, DET, SEG, SHAPES_META, make_model

from swinv2_mm import InstanceTTAModel
from swinv2_mm.engine import launch
from swinv2_mm.engine.tta import augment_test, check_views, count_views

pytestmark = pytest.mark.usefixtures('one_thread')
HEIGHT, WIDTH = 160, 240  # of the images
SIZES = (60, 90), (120, 80)  # width and height of the views; the second is distorted less
FLIPS = {'none': (), 'horizontal': (-1,), 'vertical': (-2,)}  # axes
IOU = 0.3
VIEWS = f"""
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=size, keep_ratio=False) for size in {SIZES}],
            [
                dict(type='RandomFlip', prob=0.0),
                *(dict(type='RandomFlip', prob=1.0, direction=flip) for flip in ('horizontal', 'vertical')),
            ],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [dict(type='PackDetInputs')],
        ],
    ),
]
tta_model = dict(type='InstanceTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold={IOU}), max_per_img=10))
"""
# The data_preprocessor of mmseg's recipes stands at the top level too, where it keeps the old mean.
SEG_VIEWS = VIEWS.split('tta_model')[0].replace('Det', 'Seg').replace(', with_bbox=True', '') + (
    "model['data_preprocessor'] = dict(mean=[90.0, 110.0, 100.0])\n"
)


@pytest.fixture(scope='module')
def scenes(shapes, tmp_path_factory):
    """Two of the drawn scenes, cropped to another width than height, in the layouts of COCO and ADE20K."""
    root = tmp_path_factory.mktemp('scenes')
    for folder in ('val2017', 'annotations', 'images/validation', 'annotations/validation'):
        (root / folder).mkdir(parents=True)
    truth = COCO(str(shapes / 'annotations/instances_val2017.json'))
    coco = dict(categories=truth.dataset['categories'], images=[], annotations=[])
    for i in (1, 2):
        image = cv2.imread(str(shapes / f'val2017/{i:012d}.jpg'))[:HEIGHT, :WIDTH]
        for folder in ('val2017', 'images/validation'):
            cv2.imwrite(str(root / f'{folder}/{i}.jpg'), image)
        cv2.imwrite(str(root / f'annotations/validation/{i}.png'), np.full((HEIGHT, WIDTH), i, np.uint8))
        coco['images'].append(dict(id=i, file_name=f'{i}.jpg', width=WIDTH, height=HEIGHT))
        box = dict(bbox=[8, 8, 60, 40], area=2400, segmentation=[[8, 8, 68, 8, 68, 48, 8, 48]])
        coco['annotations'].append(dict(id=i, image_id=i, category_id=1, iscrowd=0, **box))
    (root / 'annotations/instances_val2017.json').write_text(json.dumps(coco))
    return root


@pytest.fixture(scope='module')
def detector(randomize, tmp_path_factory):
    text = DET.format(DEMO).replace('max_per_img=8', 'max_per_img=6, score_thr=0.0')
    return make_model(text + VIEWS, SHAPES_META, randomize, tmp_path_factory.mktemp('detector'))


@pytest.fixture(scope='module')
def segmentor(randomize, tmp_path_factory):
    return make_model(SEG + SEG_VIEWS, {}, randomize, tmp_path_factory.mktemp('segmentor'))


def predictions_of(load_tool, monkeypatch, model, scenes, tmp_path, *args):
    """The predictions of tools/test.py by file name, as plain values."""
    flags = '--data-root', scenes, '--work-dir', tmp_path / 'run', '--out', tmp_path / 'predictions.pkl', *args
    monkeypatch.setattr(Config, 'pretty_text', 'unformatted')  # for the log; yapf takes long
    options = *IN_PROCESS, f'experiment_name={uuid.uuid4()}'
    assert run_tool(load_tool, 'test', *model, *flags, '--cfg-options', *options) == 0
    samples = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    return {sample['img_path'].rsplit('/', 1)[-1]: sample for sample in samples}


def plain_model(model, window_size=None):
    cfg = launch.load_config(model[0])
    launch.set_initial_weights(cfg, 'none')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        built = MODELS.build(cfg.model).eval()
    launch.load_weights(built, model[1])
    if window_size:
        launch.set_window_size(built, [window_size])
    return built


@torch.no_grad()
def by_hand(model, path, kind):
    """For each view, the axes it is flipped along and what a plain model finds in it; the model knows of no flip."""
    image = cv2.imread(str(path))
    for width, height in SIZES:
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        for axes in FLIPS.values():
            flipped = torch.from_numpy(resized).permute(2, 0, 1).flip(axes)
            sample = kind(
                metainfo=dict(
                    ori_shape=(HEIGHT, WIDTH), img_shape=(height, width), scale_factor=(width / WIDTH, height / HEIGHT)
                )
            )
            yield axes, model.test_step(dict(inputs=[flipped], data_samples=[sample]))[0]


def suppressed(boxes, scores, labels):
    """Indices of what non-maximum suppression in each class keeps, best first."""
    kept = []
    for i in np.argsort(-scores):
        left, top = np.maximum(boxes[i, :2], boxes[kept, :2]).T
        right, bottom = np.minimum(boxes[i, 2:], boxes[kept, 2:]).T
        both = np.clip(right - left, 0, None) * np.clip(bottom - top, 0, None)
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        if not ((both / (area[i] + area[kept] - both) > IOU) & (labels[kept] == labels[i])).any():
            kept.append(i)
    return kept


def merged_by_hand(model, path):
    """Boxes, scores, labels and masks of an image."""
    parts = []
    for axes, sample in by_hand(model, path, DetDataSample):
        found = sample.pred_instances.numpy()
        boxes = found.bboxes.copy()
        if -1 in axes:
            boxes[:, [0, 2]] = WIDTH - found.bboxes[:, [2, 0]]
        if -2 in axes:
            boxes[:, [1, 3]] = HEIGHT - found.bboxes[:, [3, 1]]
        parts.append((boxes, found.scores, found.labels, np.flip(found.masks, axes)))
    boxes, scores, labels, masks = map(np.concatenate, zip(*parts))
    kept = suppressed(boxes, scores, labels)
    assert 10 < len(kept) < len(boxes) == 36  # some are suppressed, and too many are left
    return [values[kept[:10]] for values in (boxes, scores, labels, masks)]


@pytest.mark.usefixtures('no_traces')
def test_instances_are_those_that_a_plain_model_finds_in_each_view(load_tool, detector, scenes, tmp_path, monkeypatch):
    window = '--window-size', 4, '--show-dir', tmp_path / 'pictures'
    tested = predictions_of(load_tool, monkeypatch, detector, scenes, tmp_path, '--tta', *window)
    assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == ['1.jpg', '2.jpg']
    flags = '--tta', '--score-thr', 0, '--batch-size', 2, '--cfg-options', 'model.backbone.window_size=4'
    flags = *flags, 'visualizer.name=infer'  # that of the test writes into its own folder
    assert run_tool(load_tool, 'infer', *detector, scenes / 'val2017', '--out', tmp_path / 'out', *flags) == 0
    inferred = json.loads((tmp_path / 'out/predictions.json').read_text())
    model = plain_model(detector, window_size=4)
    for i, name in enumerate(('1.jpg', '2.jpg'), 1):
        boxes, scores, labels, masks = merged_by_hand(model, scenes / 'val2017' / name)
        found = tested[name]['pred_instances']
        np.testing.assert_allclose(found['scores'], scores, rtol=1e-5)
        np.testing.assert_allclose(found['bboxes'], boxes, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(found['labels'], labels)
        assert np.array_equal(rle_codec.decode(found['masks']).transpose(2, 0, 1), masks)
        written = [result for result in inferred if result['image_id'] == i]
        np.testing.assert_allclose([result['score'] for result in written], found['scores'], rtol=1e-5)
        codes = [result['segmentation'] for result in written]
        assert np.array_equal(rle_codec.decode(codes).transpose(2, 0, 1), masks)


@pytest.mark.usefixtures('no_traces')
def test_labels_have_the_highest_mean_probability_in_the_views(load_tool, segmentor, scenes, tmp_path, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    try:
        tested = predictions_of(load_tool, monkeypatch, segmentor, scenes, tmp_path, '--tta', '--launcher', 'pytorch')
    finally:
        torch.distributed.destroy_process_group()
    photos = scenes / 'images/validation'
    flags = '--out', tmp_path / 'out', '--batch-size', 2
    assert run_tool(load_tool, 'infer', *segmentor, photos, *flags, '--tta') == 0
    model = plain_model(segmentor)
    for i in (1, 2):
        views = list(by_hand(model, photos / f'{i}.jpg', SegDataSample))
        mean = sum(sample.seg_logits.data.flip(axes).softmax(0) for axes, sample in views) / len(views)
        best = mean.topk(2, 0)
        clear = (best.values[0] - best.values[1] > 1e-6).numpy()  # flipping back before or after resizing is the same
        assert clear.mean() > 0.999
        labels = best.indices[0].numpy()
        assert (labels != views[0][1].pred_sem_seg.data[0].numpy()).mean() > 0.05
        assert np.array_equal(tested[f'{i}.jpg']['pred_sem_seg']['data'][0].numpy()[clear], labels[clear])
        written = cv2.imread(str(tmp_path / f'out/labels/{i}.png'), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(written, tested[f'{i}.jpg']['pred_sem_seg']['data'][0].numpy())


@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_one_view_gives_what_no_augmentation_gives(kind, request, scenes):
    model = request.getfixturevalue(kind)
    cfg, plain = launch.load_config(model[0]), plain_model(model)
    load, resize, _, pack = cfg.test_dataloader.dataset.pipeline
    pack.pop('meta_keys', None)
    views = dict(type='TestTimeAug', transforms=[[resize], [dict(type='RandomFlip', prob=0.0)], [pack]])
    cfg.tta_pipeline = [load, views]
    if kind == 'detector':
        cfg.tta_model.tta_cfg.nms.iou_threshold = 0.5  # as the detector's own
    augment_test(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        augmented = MODELS.build(dict(cfg.model, module=plain))
        one, view = Compose([load, resize, pack]), Compose(cfg.test_dataloader.dataset.pipeline)
    paths = [dict(img_path=str(scenes / f'val2017/{i}.jpg'), img_id=i, reduce_zero_label=True) for i in (1, 2)]
    with torch.no_grad():
        wanted = plain.test_step(pseudo_collate([one(dict(path)) for path in paths]))
        wanted = [sample.clone() for sample in wanted]
        found = augmented.test_step(pseudo_collate([view(dict(path)) for path in paths]))
    for a, w in zip(found, wanted):
        if kind == 'segmentor':
            assert torch.equal(a.pred_sem_seg.data, w.pred_sem_seg.data)
            continue
        assert len(a.pred_instances) == 6
        for key in ('bboxes', 'scores', 'labels', 'masks'):
            assert torch.equal(a.pred_instances[key], w.pred_instances[key]), key


class Host(torch.nn.Module):
    """A detector that finds what it is given."""

    def test_step(self, data):
        return data['data_samples']


class Found(Host):
    """A detector that finds what it is given, and is told of no flip: mmdet's cascades would undo it in their masks."""

    def test_step(self, data):
        assert not any(sample.flip for sample in data['data_samples'])
        return super().test_step(data)


def view(boxes, scores, labels, flip=None, shape=(4, 6), **fields):
    """What is found in a view of an image of a height and width."""
    sample = DetDataSample(metainfo=dict(ori_shape=shape, flip=flip is not None, flip_direction=flip))
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sample.pred_instances = InstanceData(
        bboxes=boxes, scores=torch.tensor(scores), labels=torch.tensor(labels, dtype=torch.long), **fields
    )
    return sample


def merge(*views, kind=InstanceTTAModel, module=Found, **nms):
    model = kind(module=module(), tta_cfg=ConfigDict(nms=dict(type='nms', iou_threshold=0.5) | nms, max_per_img=3))
    [merged] = model.test_step(dict(data_samples=[[sample] for sample in views]))
    return merged.pred_instances


@pytest.mark.parametrize(
    'flip,box,pixel',
    [
        (None, [1, 0, 3, 1], (0, 1)),
        ('horizontal', [3, 0, 5, 1], (0, 4)),
        ('vertical', [1, 3, 3, 4], (3, 1)),
        ('diagonal', [3, 3, 5, 4], (3, 4)),
    ],
)
def test_boxes_and_masks_are_flipped_back(flip, box, pixel):
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 0, 1] = True
    found = merge(view([[1, 0, 3, 1]], [0.9], [2], flip, masks=mask))
    assert found.bboxes.tolist() == [box]
    assert found.masks.nonzero().tolist() == [[0, *pixel]]
    assert (found.scores.tolist(), found.labels.tolist()) == (pytest.approx([0.9]), [2])
    assert mask.nonzero().tolist() == [[0, 0, 1]]  # the view's own are left as they are


def test_an_instance_keeps_the_mask_of_the_view_that_it_was_found_in_best():
    masks = torch.arange(1, 5, dtype=torch.uint8)[:, None, None].expand(4, 4, 6)
    first = view([[0, 0, 4, 4], [0, 0, 1, 1]], [0.5, 0.4], [0, 0], masks=masks[:2])
    second = view([[2, 0, 6, 4], [2, 0, 6, 4]], [0.7, 0.6], [0, 1], 'horizontal', masks=masks[2:])
    found = merge(first, second)
    assert found.scores.tolist() == pytest.approx([0.7, 0.6, 0.4])  # another class is not suppressed
    assert found.labels.tolist() == [0, 1, 0]
    assert found.bboxes.tolist() == [[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 1, 1]]
    assert found.masks[:, 0, 0].tolist() == [3, 4, 2]


def test_views_need_no_flip_and_masks_need_boxes():
    views = [view([[0, 0, 2, 2]], [score], [0], masks=torch.full((1, 4, 6), i)) for i, score in enumerate((0.5, 0.6))]
    for sample in views:  # of a pipeline without a step that flips
        sample.set_metainfo(dict(flip=None))
        del sample.flip, sample.flip_direction
    assert merge(*views).masks.unique().tolist() == [1]
    masks = torch.ones(2, 4, 6, dtype=torch.bool)
    for flip in (None, 'horizontal'):
        with pytest.raises(ValueError, match=r'^--tta merges instances by their boxes, and Found gives masks alone'):
            merge(view([[0] * 4] * 2, [0.5, 0.4], [0, 1], flip, masks=masks))


def test_nothing_found_in_any_view_is_nothing():
    empty = [view([], [], [], flip, masks=torch.zeros(0, 4, 6, dtype=torch.bool)) for flip in (None, 'horizontal')]
    found = merge(*empty)
    assert (len(found), found.masks.shape) == (0, (0, 4, 6))
    some = merge(empty[0], view([[0, 0, 1, 1]], [0.5], [0], masks=torch.ones(1, 4, 6, dtype=torch.bool)))
    assert some.bboxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize('nms', [{}, dict(type='soft_nms', min_score=0.1)], ids=['nms', 'soft_nms'])
def test_boxes_are_merged_as_by_the_host(nms):
    def views():
        torch.manual_seed(0)
        for flip in (None, 'horizontal', 'vertical'):
            corners = torch.rand(30, 2) * 60
            boxes = torch.cat((corners, corners + 10 + 20 * torch.rand(30, 2)), 1).tolist()
            yield view(boxes, torch.rand(30).tolist(), torch.randint(0, 2, (30,)).tolist(), flip, shape=(90, 100))

    ours, host = merge(*views(), **nms), merge(*views(), kind=mmdet.models.DetTTAModel, module=Host, **nms)
    assert len(ours) == 3
    for key in ('bboxes', 'scores', 'labels'):
        assert torch.equal(ours[key], host[key]), key


def test_the_default_views_are_the_image_and_its_mirror_image(detector, segmentor, scenes):
    for model, folder in ((detector, 'val2017'), (segmentor, 'images/validation')):
        cfg = launch.load_config(model[0])
        plain = cfg.test_dataloader.dataset.pipeline
        plain.insert(2, ConfigDict(type='Pad', size=(144, 128)))  # of the image, which has 96 x 64 pixels or 128 x 85
        cfg.tta_pipeline = cfg.tta_model = None
        augment_test(cfg)
        assert cfg.model.type == {'mmdet': 'InstanceTTAModel', 'mmseg': 'SegTTAModel'}[cfg.default_scope]
        views = cfg.test_dataloader.dataset.pipeline
        assert count_views(views) == 2
        loaded = dict(img_path=str(scenes / folder / '1.jpg'), img_id=1, height=HEIGHT, width=WIDTH)
        box = dict(bbox=[8, 8, 68, 48], bbox_label=0, ignore_flag=0, mask=[[8, 8, 68, 8, 68, 48, 8, 48]])
        labels = dict(seg_map_path=str(scenes / 'annotations/validation/1.png'), seg_fields=[], reduce_zero_label=True)
        loaded.update(instances=[box], **labels)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            one, two = Compose(plain)(dict(loaded)), Compose(views)(dict(loaded))
        assert torch.equal(two['inputs'][0], one['inputs'])
        height, width = (64, 96) if folder == 'val2017' else (85, 128)
        mirrored = one['inputs'].int()
        mirrored[:, :height, :width] = mirrored[:, :height, :width].flip(-1)
        assert (two['inputs'][1] - mirrored).abs().max() <= 1  # pixels are rounded after they are resized
        assert (one['inputs'] - mirrored).abs().max() > 50
        flips = [(sample.flip, sample.flip_direction) for sample in two['data_samples']]
        assert flips == [(False, None), (True, 'horizontal')]
        wanted = one['data_samples']  # its annotations are drawn beside predictions
        for sample in two['data_samples']:
            if folder == 'val2017':
                assert torch.equal(sample.gt_instances.bboxes.tensor, wanted.gt_instances.bboxes.tensor)
                assert np.array_equal(sample.gt_instances.masks.masks, wanted.gt_instances.masks.masks)
            else:
                assert torch.equal(sample.gt_sem_seg.data, wanted.gt_sem_seg.data)


def test_every_data_set_gives_the_views(detector):
    cfg = launch.load_config(detector[0])
    inner = cfg.test_dataloader.dataset
    repeated = dict(type='RepeatDataset', times=2, dataset=inner)
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, repeated])
    for kind in ('mmdet.DetTTAModel', mmdet.models.DetTTAModel, 'DetTTAModel', None):  # it fails on masks
        augmented = copy.deepcopy(cfg)
        augmented.tta_model.pop('type') if kind is None else augmented.tta_model.update(type=kind)
        augment_test(augmented)
        assert augmented.model.type == 'InstanceTTAModel'
    cfg = augmented
    first, second = cfg.test_dataloader.dataset.datasets
    assert first.pipeline == second.dataset.pipeline == cfg.tta_pipeline
    assert count_views(first.pipeline) == 6
    assert count_views(cfg.val_dataloader.dataset.pipeline) == 1


def test_the_memory_for_the_scores_of_all_views_is_counted(load_tool, segmentor, monkeypatch):
    infer, cfg = load_tool('infer'), launch.load_config(segmentor[0])
    augment_test(cfg)
    monkeypatch.setattr(infer.os, 'sysconf', {'SC_PHYS_PAGES': 2**20, 'SC_PAGE_SIZE': 2**12}.get)  # 4 GiB
    assert infer.pixels_that_fit(cfg, 128, 'cpu') == 2**32 // 9 // 512


def test_what_can_not_be_augmented_is_one_line(load_tool, detector, scenes, tmp_path, capsys):
    def fails(config, *options):
        flags = '--tta', '--data-root', scenes, '--work-dir', tmp_path / 'run', '--cfg-options'
        assert run_tool(load_tool, 'test', config, detector[1], *flags, *IN_PROCESS, *options) == 2
        assert not (tmp_path / 'run').exists()
        return capsys.readouterr().err

    plain = tmp_path / 'config.py'
    plain.write_text(f"{detector[0].read_text()}\ntta_pipeline[1] = dict(type='PackDetInputs')\n")
    line = fails(plain)
    assert line == 'error: tta_pipeline ends with PackDetInputs: must end with TestTimeAug, which makes the views\n'
    line = fails(detector[0], 'tta_pipeline.1.transforms.3.0.meta_keys=[img_path,ori_shape]')
    assert line == (
        'error: meta_keys of PackDetInputs in tta_pipeline lack flip and flip_direction, without which no view is '
        'flipped back: add both\n'
    )
    line = fails(detector[0], 'test_dataloader.dataset.pipeline.1.scale=(60,60)')
    assert line == (
        'error: --cfg-options test_dataloader.dataset.pipeline.1.scale has no effect with --tta, which takes the '
        'views of tta_pipeline: set tta_pipeline in its place\n'
    )
    cfg = Config(dict(model=dict(panoptic_fusion_head=dict(), test_cfg=None), default_scope='mmdet'))
    with pytest.raises(ValueError, match=r'^--tta merges .* is panoptic'):
        augment_test(cfg)


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        (dict(tta_model=dict(tta_cfg=dict(max_per_img=9))), 'tta_cfg of tta_model has no nms: add it'),
        (dict(tta_model=dict(type='DetTTAModel', tta_cfg=dict(nms={}))), 'tta_cfg of tta_model has no max_per_img'),
        (dict(tta_pipeline=[dict(type='TestTimeAug')]), 'transforms of TestTimeAug in tta_pipeline must be a list'),
        (
            dict(tta_pipeline=[dict(type='TestTimeAug', transforms=[dict(type='Resize'), dict(type='PackDetInputs')])]),
            'transforms of TestTimeAug in tta_pipeline must be a list of lists: for each step, what views choose',
        ),
        (dict(plain=[]), 'the test pipeline has 0 steps: --tta needs one that loads and packs an image'),
        (
            dict(plain=[dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[])]),
            'the test pipeline ends with TestTimeAug: for --tta, name it tta_pipeline in the config',
        ),
    ],
)
def test_what_gives_no_views_is_one_line(lines, message):
    plain = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]
    loader = dict(dataset=dict(pipeline=lines.pop('plain', plain)))
    cfg = Config(dict(model=dict(type='X'), default_scope='mmdet', test_dataloader=loader, **lines))
    with pytest.raises(ValueError, match=f'^{message}'):
        augment_test(cfg)


def test_only_views_that_are_flipped_must_say_so():
    pack = dict(type='PackDetInputs', meta_keys=('ori_shape',))
    views = dict(type='TestTimeAug', transforms=[[dict(type='Resize', scale=size) for size in SIZES], [pack]])
    check_views([views])
    views['transforms'].insert(1, [dict(type=mmcv.transforms.RandomFlip, prob=1.0)])
    with pytest.raises(ValueError, match=r'^meta_keys of PackDetInputs in tta_pipeline lack flip and flip_direction'):
        check_views([views])
