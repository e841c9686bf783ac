"""Inference on bare images: what is written is what the hosts predict, whatever the batch, the folder or the file."""

import errno
import functools
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from entries import run_tool
from mmcv.transforms import BaseTransform
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope
from mmengine.structures import InstanceData
from PIL.PngImagePlugin import PngImageFile
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swinv2_mm.engine import launch

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).parents[1]
DEMO = ROOT / 'configs/demo/mask-rcnn_swinv2_shapes.py'
SHAPES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring')
SEG = """_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swinv2_mm'])
norm = dict(type='BN')
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformerV2',
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4)),
        window_size=4,
    ),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, norm_cfg=norm),
    auxiliary_head=dict(in_channels=64, channels=16, norm_cfg=norm),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 96), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
DET = """_base_ = '{}'
model = dict(test_cfg=dict(rcnn=dict(max_per_img=8)))
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]))
"""
CHANNELS = """
model.setdefault('backbone', dict())['in_channels'] = {}
model['data_preprocessor'] = dict(mean=[100.0], std=[60.0], bgr_to_rgb=False)
"""
PANOPTIC = """_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'
"""


@pytest.fixture(scope='module')
def infer(load_tool):
    return load_tool('infer')


@pytest.fixture
def run(infer, monkeypatch, capsys):
    """Run the command line; returns its exit code and the lines of its standard error."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['infer', *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            infer.main()
        return ended.value.code, capsys.readouterr().err.strip().split('\n')

    return run


@pytest.fixture
def fails(run):
    """Run the command line, which must end with exit code 2 and one line; returns the line."""

    def fails(*args):
        code, lines = run(*args)
        assert (code, len(lines)) == (2, 1), lines
        return lines[0]

    return fails


def make_model(text, meta, randomize, folder):
    """Write a config, flat so that it is read fast, and a checkpoint of random weights as a Runner saves it."""
    config, checkpoint = folder / 'config.py', folder / 'iter_1.pth'
    config.write_text(text)
    cfg = launch.load_config(config)
    cfg.dump(config)
    launch.set_initial_weights(cfg, 'none')
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        randomize(model.backbone)
    torch.save({'meta': meta, 'state_dict': model.state_dict()}, checkpoint)
    return config, checkpoint


SHAPES_META = {'dataset_meta': {'classes': SHAPES, 'palette': [(i, 200 - i, 40 * i) for i in range(6)]}}
MODELS_OF = {'detector': (DET.format(DEMO), SHAPES_META), 'segmentor': (SEG, {})}


@pytest.fixture(scope='module')
def detector(randomize, tmp_path_factory):
    """Config and checkpoint of a small instance segmentor that gives 8 detections of low scores on any image."""
    return make_model(*MODELS_OF['detector'], randomize, tmp_path_factory.mktemp('detector'))


@pytest.fixture(scope='module')
def segmentor(randomize, tmp_path_factory):
    """Config and checkpoint of a small segmentor of the 150 classes of ADE20K; the checkpoint does not name them."""
    return make_model(*MODELS_OF['segmentor'], randomize, tmp_path_factory.mktemp('segmentor'))


@pytest.fixture(scope='module')
def model_of(randomize, tmp_path_factory):
    """Config and checkpoint of a detector or segmentor of images of some channels."""

    @functools.lru_cache(maxsize=None)
    def model_of(kind, channels):
        text, meta = MODELS_OF[kind]
        return make_model(text + CHANNELS.format(channels), meta, randomize, tmp_path_factory.mktemp(kind))

    return model_of


@pytest.fixture(scope='module')
def scene():
    """A picture of (96, 128, 3), 8 bits, more than a hundredth of it black and as much white, in each channel."""
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    image[:24, :24], image[:24, 104:] = 0, 255
    return image


@pytest.fixture(scope='module')
def photos(shapes, tmp_path_factory):
    """A folder of lossless images: two of one size, one of another, and one more of the first."""
    folder = tmp_path_factory.mktemp('photos')
    image = cv2.imread(str(shapes / 'val2017' / '000000000001.jpg'))
    parts = {'a': image[:96, :96], 'b': image[96:192, 96:192], 'c': image[:64, :128], 'd': image[160:, :96]}
    for name, part in parts.items():
        cv2.imwrite(str(folder / f'{name}.png'), part)
    return folder


def written(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob('*') if path.is_file())


def read_json(path):
    return json.loads(path.read_text())


def score(annotations, results, kind):
    """mAP, mAP_50, ... of results, as mmdet computes and rounds them."""
    truth = COCO(str(annotations))
    if kind == 'segm':  # areas are then those of the masks
        results = [{key: value for key, value in result.items() if key != 'bbox'} for result in results]
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.params.maxDets = [100, 300, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [round(value, 3) for value in evaluation.stats[:6]]


def make_truth(shapes, results, folder):
    """A data set that an untrained model does well on, not perfectly: the drawn scenes, and some of its own results."""
    folder.mkdir()
    (folder / 'val2017').symlink_to(shapes / 'val2017')
    (folder / 'annotations').mkdir()
    coco = read_json(shapes / 'annotations' / 'instances_val2017.json')
    coco['annotations'] = []
    for i, result in enumerate(results[::2], 1):
        mask = np.roll(rle_codec.decode(result['segmentation']), (0, 0, 20)[i % 3], axis=1)
        rle = rle_codec.encode(np.asfortranarray(mask))
        x, y, width, height = result['bbox']
        coco['annotations'].append(
            {
                'id': i,
                'image_id': result['image_id'],
                'category_id': result['category_id'],
                'bbox': [x + (0, 3, 20)[i % 3], y, width, height],
                'area': int(rle_codec.area(rle)),
                'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
                'iscrowd': 0,
            }
        )
    (folder / 'annotations' / 'instances_val2017.json').write_text(json.dumps(coco))
    return folder


@pytest.mark.usefixtures('no_traces')
def test_results_score_as_tools_test_scores_the_model(run, detector, load_tool, shapes, tmp_path):
    assert run(*detector, shapes / 'val2017', '--out', tmp_path / 'out', '--score-thr', 0)[0] == 0
    results = read_json(tmp_path / 'out' / 'predictions.json')
    data = make_truth(shapes, results, tmp_path / 'data')

    assert not run_tool(load_tool, 'test', *detector, '--data-root', data, '--work-dir', tmp_path / 'run')
    [log] = (tmp_path / 'run').glob('*/*.log')
    host = {name: float(value) for name, value in re.findall(r'coco/(\w+): (\S+)', log.read_text())}
    for kind in ('bbox', 'segm'):
        ours = score(data / 'annotations' / 'instances_val2017.json', results, kind)
        names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        assert ours == [host[f'{kind}_{name}'] for name in names]
        assert 0.1 < ours[0] < 0.9


def test_results_describe_themselves(run, detector, photos, tmp_path):
    assert run(*detector, photos, '--out', tmp_path, '--score-thr', 0)[0] == 0
    assert written(tmp_path) == ['image_info.json', *(f'overlays/{i}.png' for i in 'abcd'), 'predictions.json']
    info = COCO(str(tmp_path / 'image_info.json'))
    assert [info.imgs[i]['file_name'] for i in (1, 2, 3, 4)] == ['a.png', 'b.png', 'c.png', 'd.png']
    assert (info.imgs[3]['width'], info.imgs[3]['height']) == (128, 64)
    assert [info.cats[i]['name'] for i in range(1, 7)] == list(SHAPES)
    results = info.loadRes(str(tmp_path / 'predictions.json'))
    assert set(results.getImgIds()) == {1, 2, 3, 4}
    for result in results.anns.values():
        assert result['segmentation']['size'] == ([64, 128] if result['image_id'] == 3 else [96, 96])
        assert isinstance(result['segmentation']['counts'], str)
        assert all(type(value) is float for value in (*result['bbox'], result['score']))


def test_the_score_threshold_rules_pictures_and_results_alike(run, detector, photos, tmp_path):
    outputs = {}
    for threshold in (0, 1):
        assert run(*detector, photos / 'a.png', '--out', tmp_path / str(threshold), '--score-thr', threshold)[0] == 0
        outputs[threshold] = read_json(tmp_path / str(threshold) / 'predictions.json')
    assert len(outputs[0]) == 8
    assert outputs[1] == []
    image, plain, drawn = (
        cv2.imread(str(path)) for path in (photos / 'a.png', *(tmp_path / f'{i}/overlays/a.png' for i in (1, 0)))
    )
    assert np.array_equal(plain, image)
    assert (drawn != image).mean() > 0.05
    best = max(result['score'] for result in outputs[0])
    assert run(*detector, photos / 'a.png', '--out', tmp_path / 'best', '--score-thr', best)[0] == 0
    kept = read_json(tmp_path / 'best' / 'predictions.json')
    assert kept == [result for result in outputs[0] if result['score'] == best]  # one at the threshold is kept
    assert (cv2.imread(str(tmp_path / 'best/overlays/a.png')) != image).any()


def test_labels_are_those_of_the_hosts_own_inference(run, segmentor, photos, tmp_path):
    from mmseg.apis import inference_model, init_model

    assert run(*segmentor, photos, '--out', tmp_path)[0] == 0
    names = [f'{folder}/{i}.png' for folder in ('labels', 'overlays') for i in 'abcd']
    assert written(tmp_path) == names
    model = init_model(launch.load_config(segmentor[0]), None, 'cpu')
    launch.load_weights(model, segmentor[1])
    for i in 'abcd':
        labels = cv2.imread(str(tmp_path / 'labels' / f'{i}.png'), cv2.IMREAD_UNCHANGED)
        assert labels.dtype == np.uint8
        expected = inference_model(model, str(photos / f'{i}.png')).pred_sem_seg.data[0].numpy()
        assert np.array_equal(labels, expected)
        assert len(np.unique(labels)) > 3


def deep(image):
    """The same picture in 16 bits of which it takes a small part."""
    if not hasattr(torch, 'uint16'):
        pytest.skip('the hosts cannot put images of 16 bits into tensors of this PyTorch')
    return 1000 + 13 * image.astype(np.uint16)


def with_alpha(image):
    return np.dstack([image, image[:, ::-1, 0]])


IMAGES = {  # what loads the file, what is in it, and whether the picture is that of the first channel alone
    'grey.png': ('grayscale', lambda scene: scene[..., 0], True),
    'grey16.png': ('unchanged', lambda scene: deep(scene[..., 0]), True),
    'float.tif': ('unchanged', lambda scene: scene[..., 0] / np.float32(255), True),
    'alpha.png': ('unchanged', with_alpha, False),
    'colour16.png': ('unchanged', deep, False),
    'alpha16.png': ('unchanged', lambda scene: deep(with_alpha(scene)), False),
}


TRANSPARENT = {'visualizer.alpha': 0.0, 'visualizer.name': 'transparent'}  # classes; mmengine keeps one of each name


def host_inference(kind, model, path, options):
    """What the host's own function for one image gives."""
    import mmdet.apis
    import mmseg.apis

    cfg = launch.load_config(model[0], options)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # where mmseg looks
    weights = torch.load(model[1], weights_only=False)['state_dict']
    if kind == 'detector':
        built = mmdet.apis.init_detector(cfg, None, palette='random', device='cpu')
        built.load_state_dict(weights)
        return mmdet.apis.inference_detector(built, str(path)).pred_instances
    built = mmseg.apis.init_model(cfg, None, device='cpu')
    built.load_state_dict(weights)
    return mmseg.apis.inference_model(built, str(path)).pred_sem_seg.data[0].numpy()


def as_arguments(options):
    return ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]


@pytest.mark.parametrize('name', IMAGES)
@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_images_of_any_channels_and_depth(run, model_of, scene, tmp_path, kind, name):
    color_type, content, is_grey = IMAGES[name]
    array = content(scene)
    cv2.imwrite(str(tmp_path / name), array)
    model = model_of(kind, array.shape[2] if array.ndim == 3 else 1)
    options = {'test_dataloader.dataset.pipeline.0.color_type': color_type}
    expected = host_inference(kind, model, tmp_path / name, options)
    if kind == 'detector':
        assert run(*model, tmp_path / name, '--out', tmp_path / '0', '--score-thr', 0, *as_arguments(options))[0] == 0
        found = read_json(tmp_path / '0/predictions.json')
        assert [result['category_id'] - 1 for result in found] == expected.labels.tolist()
        assert [result['score'] for result in found] == pytest.approx(expected.scores.tolist(), abs=1e-6)
        boxes = np.array([result['bbox'] for result in found])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, expected.bboxes, atol=1e-3)
    else:
        options.update(TRANSPARENT)
    # an overlay without anything in it
    assert run(*model, tmp_path / name, '--out', tmp_path, '--score-thr', 1, *as_arguments(options))[0] == 0
    if kind == 'segmentor':
        labels = cv2.imread(str(tmp_path / 'labels' / f'{Path(name).stem}.png'), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(labels, expected)
        assert len(np.unique(labels)) > 3
    overlay = cv2.imread(str(tmp_path / 'overlays' / f'{Path(name).stem}.png'), cv2.IMREAD_UNCHANGED)
    assert (overlay.dtype, overlay.shape) == (np.uint8, (96, 128, 3))
    picture = scene[..., :1].repeat(3, axis=2) if is_grey else scene
    assert np.abs(overlay.astype(int) - picture).max() <= (array.dtype != np.uint8)  # rounding


@pytest.mark.parametrize('loader', ['gdal', 'tifffile'])
@pytest.mark.parametrize('channels', [2, 5])
def test_images_of_many_bands(run, model_of, scene, monkeypatch, tmp_path, loader, channels):
    bands = deep(np.dstack([scene[..., ::-1], scene[:, ::-1, :2]])[..., 5 - channels :])
    if loader == 'tifffile':
        path = tmp_path / 'x.tif'
        pytest.importorskip('tifffile').imwrite(path, bands, photometric='minisblack', planarconfig='contig')
        options = {'test_dataloader.dataset.pipeline.0.imdecode_backend': 'tifffile'}
    else:
        import mmseg.datasets.transforms.loading as loading

        path = tmp_path / 'x.npy'
        np.save(path, bands.transpose(2, 0, 1))
        stub = SimpleNamespace(Open=lambda path: SimpleNamespace(ReadAsArray=lambda: np.load(path)))
        monkeypatch.setattr(loading, 'gdal', stub)
        options = {'test_dataloader.dataset.pipeline.0.type': 'LoadSingleRSImageFromFile'}
    model = model_of('segmentor', channels)
    expected = host_inference('segmentor', model, path, options)
    arguments = as_arguments({**options, **TRANSPARENT})
    assert run(*model, path, '--out', tmp_path, *arguments)[0] == 0
    assert np.array_equal(cv2.imread(str(tmp_path / 'labels/x.png'), cv2.IMREAD_UNCHANGED), expected)
    overlay = cv2.imread(str(tmp_path / 'overlays/x.png'), cv2.IMREAD_UNCHANGED)
    picture = scene if channels == 5 else scene[:, ::-1, :1].repeat(3, axis=2)  # the bands were red, green, blue, ...
    assert np.abs(overlay.astype(int) - picture).max() <= 1
    code, lines = run(*model, path, '--out', tmp_path, '--max-pixels', 96 * 128 - 1, *arguments)
    assert (code, lines[-1]) == (1, f'skipped {path}: its 128 x 96 pixels are more than --max-pixels 12287')


@pytest.mark.filterwarnings('error')  # such as of NaN that becomes an integer
def test_pictures_of_odd_values_can_be_seen(load_tool):
    to_picture = load_tool('pictures').to_picture
    image = np.zeros((50, 60), np.uint16)
    image[20, 30] = 40000  # less than a hundredth
    assert np.array_equal(to_picture(image, is_rgb=False)[..., 0], image // 40000 * 255)
    assert not to_picture(np.full((1, 1), 7000, np.uint16), is_rgb=False).any()
    image = np.linspace(-1, 1, 3000, dtype=np.float32).reshape(50, 60)
    image[:5], image[45:], image[5, 0] = np.nan, np.inf, -1e6
    picture = to_picture(image, is_rgb=True)
    assert not picture[:5].any() and picture[45:].min() == 255
    assert picture[24, 59, 0] == picture[25, 0, 0] == 127  # the middle of what is left, less an outlier
    assert not to_picture(image * np.nan, is_rgb=True).any()


def test_an_overlay_is_of_the_image_as_loaded(run, infer, detector, photos, monkeypatch, tmp_path):
    class Erase(BaseTransform):
        def transform(self, results):
            results['img'][:] = 0
            return results

    monkeypatch.setitem(TRANSFORMS._module_dict, 'Erase', Erase)
    cfg = launch.load_config(detector[0])
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='Erase'))
    cfg.dump(tmp_path / 'config.py')
    assert run(tmp_path / 'config.py', detector[1], photos / 'a.png', '--out', tmp_path, '--score-thr', 1)[0] == 0
    assert np.array_equal(cv2.imread(str(tmp_path / 'overlays/a.png')), cv2.imread(str(photos / 'a.png')))


@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_an_image_of_one_pixel(request, run, tmp_path, kind):
    model = request.getfixturevalue(kind)
    cv2.imwrite(str(tmp_path / 'x.png'), np.full((1, 1, 3), 200, np.uint8))
    assert run(*model, tmp_path / 'x.png', '--out', tmp_path, '--score-thr', 0)[0] == 0
    assert cv2.imread(str(tmp_path / 'overlays/x.png')).shape == (1, 1, 3)
    if kind == 'segmentor':
        labels = cv2.imread(str(tmp_path / 'labels/x.png'), cv2.IMREAD_UNCHANGED)
        assert labels == host_inference(kind, model, tmp_path / 'x.png', {})


def test_labels_beyond_8_bits_are_written_in_16(infer):
    labels = torch.tensor([[0, 255], [256, 299]])
    png = np.frombuffer(infer.encode_labels(labels, 300), np.uint8)
    assert np.array_equal(cv2.imdecode(png, cv2.IMREAD_UNCHANGED), labels.numpy())
    png = np.frombuffer(infer.encode_labels(labels % 256, 256), np.uint8)
    assert cv2.imdecode(png, cv2.IMREAD_UNCHANGED).dtype == np.uint8


@pytest.mark.parametrize('model', ['detector', 'segmentor'])
def test_results_do_not_depend_on_the_batch_size(request, run, infer, monkeypatch, photos, tmp_path, model):
    sizes, collate = [], infer.pseudo_collate
    monkeypatch.setattr(infer, 'pseudo_collate', lambda items: sizes.append(len(items)) or collate(items))
    files = request.getfixturevalue(model)
    for size in (1, 3):
        args = ('--out', tmp_path / str(size), '--batch-size', size, '--score-thr', 0)
        assert run(*files, photos, *args)[0] == 0
    assert sizes == [1, 1, 1, 1, 2, 1, 1]  # a and b are of one size, c of another
    alone, together = tmp_path / '1', tmp_path / '3'
    assert written(alone) == written(together)
    for path in alone.glob('labels/*'):
        one, three = (cv2.imread(str(folder / 'labels' / path.name), -1) for folder in (alone, together))
        assert (one != three).mean() < 1e-3  # rounding may decide between two classes
    if model == 'detector':
        pairs = zip(*(read_json(folder / 'predictions.json') for folder in (alone, together)), strict=True)
        for one, three in pairs:
            assert (one['image_id'], one['category_id']) == (three['image_id'], three['category_id'])
            assert one['bbox'] == pytest.approx(three['bbox'], abs=1e-2)
            assert one['score'] == pytest.approx(three['score'], abs=1e-5)


def test_unreadable_images_are_skipped_and_listed(run, detector, photos, shapes, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    (folder / '1.png').write_bytes((photos / 'a.png').read_bytes())
    whole = (shapes / 'val2017' / '000000000002.jpg').read_bytes()
    (folder / '2.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / '3.jpg').write_text('no image')
    (folder / '4.jpg').touch()
    (folder / '5.png').write_bytes((photos / 'c.png').read_bytes())
    (folder / '6.png').write_bytes((photos / 'a.png').read_bytes()[:1000])
    code, lines = run(*detector, folder, '--out', tmp_path / 'out', '--score-thr', 0)
    assert code == 1
    lines = [line for line in lines if line.startswith('skipped ')]
    reasons = ('image file is truncated', 'failed to load image', 'the file is empty', 'image file is truncated')
    for name, reason, line in zip(('2.jpg', '3.jpg', '4.jpg', '6.png'), reasons, lines, strict=True):
        assert line.startswith(f'skipped {folder / name}: {reason}')
    assert written(tmp_path / 'out') == ['image_info.json', 'overlays/1.png', 'overlays/5.png', 'predictions.json']
    assert {result['image_id'] for result in read_json(tmp_path / 'out' / 'predictions.json')} == {1, 5}
    assert [image['id'] for image in read_json(tmp_path / 'out' / 'image_info.json')['images']] == [1, 5]


@pytest.fixture
def fail_on(infer, monkeypatch):
    """Have models raise an error for each batch that holds an image of a name."""

    def fail_on(name, error):
        build = infer.build_model

        def build_failing(*args):
            model = build(*args)
            step = model.test_step

            def failing(data):
                if any(Path(sample.img_path).name == name for sample in data['data_samples']):
                    raise error
                return step(data)

            model.test_step = failing
            return model

        monkeypatch.setattr(infer, 'build_model', build_failing)

    return fail_on


def test_an_image_that_cannot_be_drawn_leaves_nothing(run, infer, segmentor, photos, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ValueError('too large to draw')

    monkeypatch.setattr(infer.VISUALIZERS.get('mmseg.SegLocalVisualizer'), 'add_datasample', fail)
    code, lines = run(*segmentor, photos / 'a.png', '--out', tmp_path)
    assert (code, lines[-1]) == (1, f'skipped {photos}/a.png: too large to draw')
    assert written(tmp_path) == []


def test_empty_results_are_evaluated_as_the_tool_says(infer, detector, photos, monkeypatch, capfd, tmp_path):
    def output(threshold):
        arguments = (*detector, photos, '--out', tmp_path, '--score-thr', threshold)
        monkeypatch.setattr(sys, 'argv', ['infer', *map(str, arguments)])
        with pytest.raises(SystemExit, match='0'):
            infer.main()
        return capfd.readouterr().out

    assert 'pycocotools' not in output(0)
    results = read_json(tmp_path / 'predictions.json')
    info = read_json(tmp_path / 'image_info.json')
    truth = tmp_path / 'truth.json'
    area = {'area': 100, 'iscrowd': 0}
    truth.write_text(json.dumps({**info, 'annotations': [{**result, **area, 'id': 1} for result in results[:1]]}))

    assert "predictions.json is an empty list, which pycocotools does not load; evaluate COCO('image_info.json')" in (
        output(1)
    )
    assert read_json(tmp_path / 'predictions.json') == []
    with pytest.raises(IndexError):
        COCO(str(truth)).loadRes(str(tmp_path / 'predictions.json'))
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(COCO(str(truth)), COCO(str(tmp_path / 'image_info.json')), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == 0


@pytest.mark.parametrize('size', [1, 4])
def test_an_image_that_the_model_fails_on_is_skipped_alone(run, detector, photos, fail_on, tmp_path, size):
    folder = tmp_path / 'photos'
    folder.mkdir()
    for name in 'abcd':
        (folder / f'{name}.png').write_bytes((photos / 'a.png').read_bytes())
    fail_on('b.png', torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB.\nSee the manual'))
    out = tmp_path / 'out'
    code, lines = run(*detector, folder, '--out', out, '--score-thr', 0, '--batch-size', size)
    assert code == 1
    assert lines[-1] == f'skipped {folder}/b.png: the model fails: CUDA out of memory. Tried to allocate 9 GiB.'
    assert written(out) == ['image_info.json', *(f'overlays/{i}.png' for i in 'acd'), 'predictions.json']
    assert [image['id'] for image in read_json(out / 'image_info.json')['images']] == [1, 3, 4]
    assert [result['image_id'] for result in read_json(out / 'predictions.json')] == [1] * 8 + [3] * 8 + [4] * 8


def test_results_up_to_an_end_are_kept(infer, detector, photos, monkeypatch, fail_on, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['infer', *map(str, (*detector, photos, '--out', tmp_path, '--score-thr', 0))])
    fail_on('c.png', KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        infer.main()
    assert written(tmp_path) == ['image_info.json', 'overlays/a.png', 'overlays/b.png', 'predictions.json']
    assert [image['id'] for image in read_json(tmp_path / 'image_info.json')['images']] == [1, 2]
    assert [result['image_id'] for result in read_json(tmp_path / 'predictions.json')] == [1] * 8 + [2] * 8


def test_results_of_an_earlier_run_outlast_one_that_has_none(infer, detector, photos, monkeypatch, fail_on, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['infer', *map(str, (*detector, photos, '--out', tmp_path))])
    (tmp_path / 'predictions.json').write_text('[1]')
    fail_on('a.png', KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        infer.main()
    assert written(tmp_path) == ['predictions.json']
    assert read_json(tmp_path / 'predictions.json') == [1]


def test_results_are_written_from_time_to_time(run, infer, detector, photos, monkeypatch, tmp_path):
    clock, times, write, predict = [0], [], infer.write_results, infer.predict

    def write_for_two_seconds(out, done, categories):
        times.append((clock[0], len(done)))
        clock[0] += 2
        write(out, done, categories)

    def predict_for_four_seconds(model, batch, skipped):
        if times:
            assert len(read_json(tmp_path / 'image_info.json')['images']) == times[-1][1]
        clock[0] += 4
        return predict(model, batch, skipped)

    monkeypatch.setattr(infer, 'write_results', write_for_two_seconds)
    monkeypatch.setattr(infer, 'predict', predict_for_four_seconds)
    monkeypatch.setattr(infer.time, 'monotonic', lambda: clock[0])
    copies = tmp_path / 'photos'
    copies.mkdir()
    for i in range(10):
        (copies / f'{i}.png').write_bytes((photos / 'a.png').read_bytes())
    assert run(*detector, copies, '--out', tmp_path)[0] == 0
    assert times == [(12, 3), (34, 8), (44, 10)]  # after 10 seconds, then 20 after the end, so that it takes a tenth


def test_a_full_disk_is_one_line_and_what_was_written_is_whole(fails, infer, detector, photos, monkeypatch, tmp_path):
    visualizer = infer.VISUALIZERS.get('mmdet.DetLocalVisualizer')
    draw = visualizer.add_datasample

    def full(self, name, *args, out_file, **kwargs):
        if name == 'c.png':
            Path(out_file).write_bytes((photos / 'c.png').read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return draw(self, name, *args, out_file=out_file, **kwargs)

    monkeypatch.setattr(visualizer, 'add_datasample', full)
    line = fails(*detector, photos, '--out', tmp_path, '--score-thr', 0)
    assert line == f'error: {tmp_path}/overlays/c.png cannot be written: No space left on device'
    assert written(tmp_path) == ['image_info.json', 'overlays/a.png', 'overlays/b.png', 'predictions.json']
    assert [image['id'] for image in read_json(tmp_path / 'image_info.json')['images']] == [1, 2]
    assert {result['image_id'] for result in read_json(tmp_path / 'predictions.json')} == {1, 2}


def test_predictions_and_their_images_are_replaced_together(infer, monkeypatch, tmp_path):
    infer.write_results(tmp_path, [({'id': 1}, [{'image_id': 1}])], [])
    before = {name: (tmp_path / name).read_text() for name in written(tmp_path)}
    write_text, names = Path.write_text, []

    def full(self, text):
        names.append(self)
        write_text(self, text[: len(text) // len(names)])
        if names[1:]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, 'write_text', full)
    done = [({'id': 1}, [{'image_id': 1}]), ({'id': 2}, [{'image_id': 2}])]
    with pytest.raises(OSError, match='No space left on device') as caught:
        infer.write_results(tmp_path, done, [])
    assert caught.value.filename == str(tmp_path / 'predictions.json')
    assert {name: (tmp_path / name).read_text() for name in written(tmp_path)} == before


def test_images_that_the_pipeline_fails_on_or_that_are_too_large_are_skipped(run, detector, photos, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    (folder / '1.png').write_bytes((photos / 'a.png').read_bytes())
    cv2.imwrite(str(folder / '2.png'), np.zeros((3000, 3, 3), np.uint8))  # of width 0 once it is resized
    (folder / '3.png').write_bytes(bomb(60000, 50000))
    cv2.imwrite(str(folder / '4.png'), np.zeros((96, 97, 3), np.uint8))
    code, lines = run(*detector, folder, '--out', tmp_path / 'out', '--max-pixels', 96 * 96)
    assert code == 1
    assert lines[-2:] == [
        f'skipped {folder}/3.png: its 60000 x 50000 pixels are more than --max-pixels 9216',
        f'skipped {folder}/4.png: its 97 x 96 pixels are more than --max-pixels 9216',
    ]
    assert lines[-3].startswith(f'skipped {folder}/2.png: the test pipeline fails on 3 x 3000 pixels: OpenCV')
    assert written(tmp_path / 'out') == ['image_info.json', 'overlays/1.png', 'predictions.json']


def bomb(width, height):
    """A valid PNG of few bytes that would be an image of gigabytes: one bit per pixel."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    compress = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    data = b''.join(compress.compress(row * 1000) for _ in range(height // 1000)) + compress.flush()
    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def tiff_header(width, height, *, order='<', big=False):
    """A TIFF of 5 channels of 16 bits, of which there is no more than the header."""
    letters, word, kind = {'<': b'II', '>': b'MM'}[order], 'Q' if big else 'L', 16 if big else 4
    start = letters + (struct.pack('<HHHQ', 43, 8, 0, 16) if big else struct.pack(f'{order}HL', 42, 8))
    values = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 5}
    entries = [struct.pack(f'{order}HH{word}{word}', tag, kind, 1, value) for tag, value in values.items()]
    return start + struct.pack(f'{order}{"Q" if big else "H"}', len(entries)) + b''.join(entries) + bytes(8)


@pytest.mark.parametrize('variant', [{}, {'order': '>'}, {'big': True}])
def test_a_tiff_that_pillow_does_not_know_is_skipped_before_it_is_decoded(infer, tmp_path, variant):
    path = tmp_path / 'x.tif'
    path.write_bytes(tiff_header(60000, 50000, **variant))
    with pytest.raises(ValueError, match=r'its 60000 x 50000 pixels are more than --max-pixels 50000000'):
        infer.check_whole(path, infer.MAX_PIXELS)
    infer.check_whole(path, 60000 * 50000)
    for length in range(1, path.stat().st_size, 7):  # too short to tell
        (tmp_path / 'y.tif').write_bytes(path.read_bytes()[:length])
        infer.check_whole(tmp_path / 'y.tif', 60000 * 50000)


def test_a_bomb_is_skipped_before_it_is_decoded(infer, monkeypatch, tmp_path):
    path = tmp_path / 'bomb.png'
    path.write_bytes(bomb(60000, 50000))
    assert path.stat().st_size < 1e6
    monkeypatch.setattr(PngImageFile, 'load', None)
    with pytest.raises(ValueError, match=r'its 60000 x 50000 pixels are more than --max-pixels 50000000'):
        infer.check_whole(path, infer.MAX_PIXELS)


def test_a_segmentor_takes_as_many_pixels_as_fit_into_the_memory(infer, segmentor, monkeypatch):
    cfg = infer.launch.load_config(segmentor[0])
    monkeypatch.setattr(infer.os, 'sysconf', {'SC_PHYS_PAGES': 2**20, 'SC_PAGE_SIZE': 2**12}.get)  # 4 GiB
    assert infer.pixels_that_fit(cfg, 128, 'cpu') == 2**30 // 512
    assert infer.pixels_that_fit(cfg, 1, 'cpu') == infer.MAX_PIXELS


@pytest.mark.parametrize('meta', [7, 'x', {'dataset_meta': 7}, {'dataset_meta': {'classes': None, 'palette': []}}])
def test_a_checkpoint_whose_classes_are_damaged_is_one_line(fails, detector, photos, tmp_path, meta):
    torch.save({**torch.load(detector[1], weights_only=False), 'meta': meta}, tmp_path / 'x.pth')
    assert 'lists no classes' in fails(detector[0], tmp_path / 'x.pth', photos, '--out', tmp_path / 'out')


def test_images_are_found_by_file_folder_and_pattern(infer, tmp_path):
    paths = (
        '1.jpg',
        'x/2.PNG',
        'x/y/3.tif',
        'x/notes.txt',
        'odd[1]/4.jpg',
        'x/odd.dat',
        'overlays/1.jpg',
        'labels/1.png',
    )
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()

    def find(*inputs):
        found = infer.find_images(
            [str(tmp_path / given) for given in inputs], [tmp_path / 'overlays', tmp_path / 'labels']
        )
        assert all(path == tmp_path / path and path.is_file() for path in found.values())
        return list(found)

    assert find('') == ['1.jpg', 'odd[1]/4.jpg', 'x/2.PNG', 'x/y/3.tif']
    assert find('overlays/1.jpg') == ['1.jpg']
    assert find('x') == ['2.PNG', 'y/3.tif']
    assert find('odd[1]') == ['4.jpg']
    assert find('odd[1]/4.jpg') == ['4.jpg']
    assert find('x/*') == ['2.PNG']
    assert find('x/**/*') == ['2.PNG', 'y/3.tif']
    assert find('*/*.*') == ['odd[1]/4.jpg', 'x/2.PNG']
    assert find('x/odd.dat') == ['odd.dat']  # named, so it is tried
    assert find('1.jpg', 'x', '1.jpg') == ['1.jpg', 'x/2.PNG', 'x/y/3.tif']
    for nothing in ('none.jpg', 'x/*.bmp', 'x/odd*'):
        with pytest.raises(ValueError, match=r'no image at .*: no such file, and no file there that ends in \.bmp, '):
            find(nothing)


def test_outputs_of_images_that_differ_in_their_extension_alone_do_not_meet(run, infer, segmentor, photos, tmp_path):
    names = ['a.jpg', 'a.png', 'b.bmp', 'x/a.jpg']
    assert infer.output_stems(names) == {'a.jpg': 'a.jpg', 'a.png': 'a.png', 'b.bmp': 'b', 'x/a.jpg': 'x/a'}
    folder = tmp_path / 'photos'
    (folder / 'x').mkdir(parents=True)
    image = cv2.imread(str(photos / 'a.png'))
    for name in names:
        cv2.imwrite(str(folder / name), image)
    assert run(*segmentor, folder, '--out', tmp_path / 'out')[0] == 0
    assert written(tmp_path / 'out') == [
        *('labels/a.jpg.png', 'labels/a.png.png', 'labels/b.png', 'labels/x/a.png'),
        *('overlays/a.jpg.jpg', 'overlays/a.png.png', 'overlays/b.png', 'overlays/x/a.jpg'),
    ]


@pytest.mark.parametrize('name', ['x' * 246 + '.png', 'x' * 251 + '.jpg', '\N{GREEK SMALL LETTER PI}' * 127])
def test_long_names_give_results(run, segmentor, photos, tmp_path, name):
    folder, out = tmp_path / 'photos', tmp_path / 'out'
    folder.mkdir()
    (folder / name).write_bytes((photos / 'a.png').read_bytes())
    assert run(*segmentor, folder / name, '--out', out)[0] == 0
    label, overlay = (Path(path).name for path in written(out))
    if len(name) == 250:
        assert (label, overlay) == (name, name)
    else:
        stem, _, digest = Path(label).stem.partition('-')
        assert Path(overlay).stem == Path(label).stem
        assert name.startswith(stem) and len(os.fsencode(stem)) >= 232
        assert re.fullmatch('[0-9a-f]{16}', digest)


def test_long_names_that_begin_alike_give_outputs_of_their_own(infer):
    names = ['x' * 250 + end for end in ('a.bmp', 'b.bmp', 'b.png')]
    stems = infer.output_stems(names)
    assert len(set(stems.values())) == 3
    assert max(len(f'{stem}.jpeg') for stem in stems.values()) <= 255
    assert infer.output_stems(['a/' + 'x' * 250 + '.jpeg']) == {'a/' + 'x' * 250 + '.jpeg': 'a/' + 'x' * 250}


def test_folders_are_read_once_though_links_lead_to_them_again(infer, tmp_path):
    for path in ('a/1.jpg', 'b/c/2.jpg', 'b/.hidden/3.jpg', '../elsewhere/4.jpg'):
        path = tmp_path / 'photos' / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    photos = tmp_path / 'photos'
    for link, target in {'loop': '.', 'a/up': '..', 'a/other': '../b', 'b/away': tmp_path / 'elsewhere'}.items():
        (photos / link).symlink_to(target)
    for given in (photos, photos / '**', f'{photos}/**/*.jpg', f'{tmp_path}/ph*/**/*.jpg', f'{tmp_path}/**/photos/**'):
        found = list(infer.find_images([str(given)]))
        assert [Path(name).name for name in found] == ['1.jpg', '4.jpg', '2.jpg'], given
    assert list(infer.find_images([str(photos)])) == ['a/1.jpg', 'b/away/4.jpg', 'b/c/2.jpg']
    assert list(infer.find_images([str(photos / 'loop/b')])) == ['away/4.jpg', 'c/2.jpg']


def test_category_ids_are_those_of_coco(infer):
    meta = DATASETS.get('mmdet.CocoDataset').METAINFO
    ids = {category['name']: category['id'] for category in infer.list_categories(meta, {})}
    assert len(ids) == 80
    around_gaps = {
        **{'person': 1, 'fire hydrant': 11, 'stop sign': 13, 'giraffe': 25, 'backpack': 27, 'umbrella': 28},
        **{'handbag': 31, 'bottle': 44, 'wine glass': 46, 'bed': 65, 'dining table': 67, 'toilet': 70, 'tv': 72},
        **{'refrigerator': 82, 'book': 84, 'toothbrush': 90},
    }
    assert {name: ids[name] for name in around_gaps} == around_gaps


def test_ids_are_those_of_the_annotations_where_they_know_them(infer, tmp_path):
    annotations = {
        'categories': [{'id': 7, 'name': 'b'}, {'id': 9, 'name': 'other'}, {'id': 3, 'name': 'a', 'x': 0}],
        'images': [{'id': 70, 'file_name': 'p.jpg'}, {'id': 30, 'file_name': 'x/000000000012.jpg'}],
    }
    known = [{'id': 7, 'name': 'b'}, {'id': 3, 'name': 'a'}]  # mmdet counts labels in this order
    assert infer.list_categories({'classes': ('a', 'b')}, annotations) == known
    assert infer.list_categories({'classes': ('a', 'c')}, annotations) == [
        {'id': 1, 'name': 'a'},
        {'id': 2, 'name': 'c'},
    ]
    both = ['p.jpg', 'x/000000000012.jpg']
    assert infer.list_image_ids(both, annotations) == dict(zip(both, (70, 30)))
    assert infer.list_image_ids(both, {}) == dict(zip(both, (1, 2)))
    numbers = ['000000008193.jpg', 'x/000000000012.jpg']
    assert infer.list_image_ids(numbers, annotations) == dict(zip(numbers, (8193, 12)))
    assert list(infer.list_image_ids(['x/1.jpg', 'y/1.jpg'], {}).values()) == [1, 2]

    cfg = launch.load_config(DEMO, {'test_dataloader.dataset.data_root': str(tmp_path)})
    assert infer.read_annotations(infer.test_dataset(cfg)) == {}
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_val2017.json').write_text(json.dumps(annotations))
    assert infer.read_annotations(infer.test_dataset(cfg)) == annotations


def test_boxes_alone_are_results_without_segmentation(infer):
    instances = InstanceData(
        bboxes=torch.tensor([[1.5, 2, 11.5, 22]]), scores=torch.tensor([0.5]), labels=torch.tensor([1])
    )
    assert infer.coco_results(instances, 4, [{'id': 8}, {'id': 9}]) == [
        {'image_id': 4, 'category_id': 9, 'bbox': [1.5, 2, 10, 20], 'score': 0.5}
    ]


def test_classes_are_those_of_the_checkpoint_or_else_of_the_config(infer):
    cfg = launch.load_config(DEMO)
    with DefaultScope.overwrite_default_scope('mmdet'):
        saved = {'classes': ('x',), 'palette': [(1, 2, 3)]}
        assert infer.class_meta(cfg, {'meta': {'dataset_meta': saved}}) == saved
        for checkpoint in ({}, {'meta': None}, {'meta': {'dataset_meta': None}}):
            meta = infer.class_meta(cfg, checkpoint)
            assert meta['classes'] == SHAPES
            assert meta['palette'][1] == (60, 120, 240)
        assert infer.class_meta(cfg, {'meta': {'dataset_meta': {'classes': ('x',)}}})['classes'] == ('x',)


def test_a_mistake_is_one_line_and_leaves_nothing_behind(fails, detector, photos, tmp_path):
    config, checkpoint = detector
    out = tmp_path / 'out'
    assert '--batch-size must be 1 or more, got 0' in fails(*detector, photos, '--out', out, '--batch-size', 0)
    assert '--max-pixels must be 1 or more, got 0' in fails(*detector, photos, '--out', out, '--max-pixels', 0)
    assert '--score-thr must be from 0 to 1, got 30' in fails(*detector, photos, '--out', out, '--score-thr', 30)
    assert 'config nowhere.py does not exist' in fails('nowhere.py', checkpoint, photos, '--out', out)
    assert 'nowhere.pth does not exist' in fails(config, 'nowhere.pth', photos, '--out', out)
    assert f'no image at {tmp_path}/*.jpg' in fails(*detector, f'{tmp_path}/*.jpg', '--out', out)
    torch.save({'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'other.pth')
    assert '--checkpoint loads the weights' in fails(config, tmp_path / 'other.pth', photos, '--out', out)
    options = ('--cfg-options', 'model.backbone.window_size=0')
    assert 'window_size must be ints of at least 1 token' in fails(*detector, photos, '--out', out, *options)
    for device in ('gpu', 'cuda:99'):
        assert f'--device {device} is not available: ' in fails(*detector, photos, '--out', out, '--device', device)
    (tmp_path / 'file').touch()
    for path in ('file', 'file/out'):
        line = fails(*detector, photos / 'a.png', '--out', tmp_path / path)
        assert line.startswith(f'error: --out {tmp_path / path} cannot be written: ')
    assert sorted(os.listdir(tmp_path)) == ['file', 'other.pth']


def test_what_is_not_supported_says_so(fails, infer, tmp_path):
    config = tmp_path / 'panoptic.py'
    config.write_text(PANOPTIC)
    line = fails(config, 'x.pth', 'x.jpg', '--out', tmp_path / 'out')
    assert 'is panoptic, which is not supported' in line
    instances = dict(item.split('=') for item in line.split('--cfg-options ')[1].split())
    assert instances == {'model.test_cfg.panoptic_on': 'False', 'model.test_cfg.instance_on': 'True'}
    cfg = launch.load_config(config, {'model.test_cfg.panoptic_on': False})
    infer.check_supported(cfg, config)
    config.write_text("default_scope = 'mmdet'\nmodel = dict(type='X')\n")
    line = fails(config, 'x.pth', 'x.jpg', '--out', tmp_path / 'out')
    assert f'the test pipeline of {config} does not start with loading an image' in line


def test_a_pipeline_that_cannot_be_built_or_used_says_so(run, fails, infer, detector, photos, monkeypatch, tmp_path):
    step, out = 'test_dataloader.dataset.pipeline', ('--out', tmp_path / 'out')
    cfg = launch.load_config(detector[0])
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='NoSuch')
    cfg.dump(tmp_path / 'config.py')
    line = fails(tmp_path / 'config.py', detector[1], photos, *out)
    assert re.search(f'the test pipeline of {tmp_path}/config.py cannot be built: .*NoSuch is not in', line)

    monkeypatch.setattr(infer.importlib.util, 'find_spec', lambda name: None)
    line = fails(*detector, photos, *out, '--cfg-options', f'{step}.0.imdecode_backend=tifffile')
    assert line == "error: imdecode_backend='tifffile' needs a package: pip install tifffile"

    several = [[dict(type='Resize', scale=(96, 96))], [dict(type='PackDetInputs')]]
    cfg.test_dataloader.dataset.pipeline[1:] = [dict(type='TestTimeAug', transforms=several)]
    cfg.dump(tmp_path / 'config.py')
    line = fails(tmp_path / 'config.py', detector[1], photos, *out)
    assert line.endswith('config.py ends with TestTimeAug: name it tta_pipeline, and pass --tta')

    cfg.test_dataloader.dataset.pipeline[1:] = [dict(type='Resize', scale=(96, 96)), dict(type='Resize', scale='wrong')]
    cfg.dump(tmp_path / 'config.py')
    code, lines = run(tmp_path / 'config.py', detector[1], photos / 'a.png', photos / 'b.png', *out)
    assert code == 1
    assert [line.split(' the test pipeline fails on ')[0] for line in lines if line.startswith('skipped')] == [
        f'skipped {photos}/{name}.png:' for name in 'ab'
    ]


def test_panoptic_models_give_instances_of_things(infer):
    meta = DATASETS.get('mmdet.CocoPanopticDataset').METAINFO
    assert len(meta['classes']) == 133
    categories = infer.list_categories(meta, {})
    assert (len(categories), categories[-1]) == (80, {'id': 90, 'name': 'toothbrush'})


def test_a_config_without_a_backbone_at_its_usual_place_is_taken_too(infer, detector, photos, tmp_path):
    cfg = launch.load_config(detector[0])
    cfg.model = dict(type='Wrapper', detector=cfg.model)
    cfg.dump(tmp_path / 'wrapped.py')
    args = [tmp_path / 'wrapped.py', detector[1], photos, '--out', tmp_path / 'out']
    assert infer.prepare(infer.parse_args([*map(str, args)]))[0].model == cfg.model


PHOTOS = Path(__file__).parents[2] / 'shared' / 'data' / 'coco_tiny'


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f'needs COCO photos in {PHOTOS}')
def test_ids_of_coco_photos_are_those_of_their_annotations(infer):
    coco = read_json(PHOTOS / 'annotations' / 'instances_val2017.json')
    images = infer.find_images([str(PHOTOS / 'val2017')])
    ids = infer.list_image_ids(list(images), {})
    assert ids == {image['file_name']: image['id'] for image in coco['images']}
    categories = infer.list_categories(DATASETS.get('mmdet.CocoDataset').METAINFO, {})
    assert categories == [{key: category[key] for key in ('id', 'name')} for category in coco['categories']]
