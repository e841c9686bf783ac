"""The demo's own parts: the classifier that stands in for a published checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from swinv2_mm import SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoints.loading import read_checkpoint

ROOT = Path(__file__).parents[1]
DETECTOR = 'configs/demo/mask-rcnn_swinv2_shapes.py'


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('train_classifier')


@pytest.fixture(scope='module')
def written(tool, shapes, tmp_path_factory):
    """The checkpoint of one iteration, by the command line."""
    out = tmp_path_factory.mktemp('classifier') / 'classifier.pth'
    with pytest.MonkeyPatch.context() as patch:
        args = ['train_classifier', DETECTOR, str(out), '--data-root', str(shapes), '--epochs', '1']
        patch.setattr(sys, 'argv', args)
        assert tool.main() == 0
    return out


@pytest.mark.parametrize('margin, x_shift, y_shift', [(1.1, 0, 0), (2, 0.25, 0), (1.5, -0.1, 0.15)])
def test_a_crop_is_a_square_around_the_object(tool, margin, x_shift, y_shift):
    image = np.zeros((256, 256, 3), np.uint8)
    cv2.rectangle(image, (100, 60), (149, 89), (255, 255, 255), -1)  # 50 x 30 pixels at x 100, y 60
    pixels = tool.crop(image, [100, 60, 50, 30], margin, x_shift, y_shift)
    assert pixels.shape == (64, 64, 3)
    rows, columns = np.nonzero(pixels[:, :, 0] > 127)
    for found, length, shift in ((columns, 50, x_shift), (rows, 30, y_shift)):
        assert abs(np.ptp(found) + 1 - 64 / margin * length / 50) <= 2
        assert abs(found.mean() - (31.5 - 64 * shift)) <= 1


def test_a_crop_of_part_of_an_object_has_its_resolution(tool):
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    assert np.array_equal(tool.crop(image, [68, 70, 128, 100], 0.5), image[88:152, 100:164])


def test_training_crops_are_turned_and_mirrored_at_random(tool, shapes, monkeypatch):
    monkeypatch.setattr(tool, 'MARGINS', (tool.MARGIN, tool.MARGIN))
    monkeypatch.setattr(tool, 'SHIFT', 0)
    crops = tool.Crops(shapes, 'train')
    pixels = tool.crop(*crops.objects[0], tool.MARGIN)
    turned = [np.rot90(pixels, turns) for turns in range(4)]
    possible = {image.transpose(2, 0, 1).tobytes() for image in (*turned, *(image[:, ::-1] for image in turned))}
    assert {crops[0]['inputs'].numpy().tobytes() for _ in range(100)} == possible


def test_training_crops_differ_in_scale_and_place(tool, shapes, monkeypatch):
    seen = []
    monkeypatch.setattr(tool, 'crop', lambda *args: seen.append(args[2:]) or np.zeros((64, 64, 3), np.uint8))
    crops = tool.Crops(shapes, 'train')
    for _ in range(300):
        crops[0]
    margins, *shifts = np.array(seen).T
    assert (margins >= 0.7).all() and (margins <= 1.5).all() and margins.min() < 0.75 and margins.max() > 1.4
    for shift in shifts:
        assert (abs(shift) <= 0.15).all() and shift.min() < -0.1 and shift.max() > 0.1


def test_crops_have_the_categories_of_their_objects(tool, shapes):
    crops = tool.Crops(shapes, 'val')
    annotations = json.loads((shapes / 'annotations/instances_val2017.json').read_text())['annotations']
    assert [label + 1 for label in crops.labels] == [annotation['category_id'] for annotation in annotations]
    assert crops[0]['inputs'].shape == (3, 64, 64)
    assert crops[0]['inputs'].dtype == torch.uint8


def test_the_classifier_is_written_as_the_official_repository_would(tool, written):
    checkpoint = read_checkpoint(written)['model']
    assert checkpoint['head.weight'].shape == (6, 256)
    windows = [checkpoint[f'layers.{i}.blocks.0.attn.relative_coords_table'].shape for i in range(4)]
    assert windows == [(1, 7, 7, 2)] * 3 + [(1, 3, 3, 2)]  # the last map has 2 x 2 tokens
    arch = dict(embed_dims=32, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8))
    backbone = SwinTransformerV2(arch, window_size=8, out_indices=(0, 1, 2, 3))
    report = load_pretrained(backbone, written)
    assert report.format == 'official'
    assert report.checkpoint_window_size == (4, 4, 4, 2)
    assert report.window_size == (8, 8, 8, 8)
    assert backbone.pretrained_window_sizes == (4, 4, 4, 2)


def test_the_last_of_four_stages_has_a_window_no_larger_than_its_map(tool):
    backbone = tool.build_classifier('configs/mask_rcnn_swinv2.py', 6).backbone
    assert backbone.window_size == (4, 4, 4, 2)


def test_what_is_written_is_what_was_trained(tool):
    classifier = tool.build_classifier(DETECTOR, 6).eval()
    for weight in classifier.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    copy = tool.build_classifier(DETECTOR, 6).eval()
    load_pretrained(copy.backbone, tool.official(classifier))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy.backbone(image)[0], classifier.backbone(image)[0])


def test_a_classifier_learns_crops_by_heart(tool, shapes):
    crops = tool.Crops(shapes, 'val')
    batch = torch.utils.data.default_collate([crops[i] for i in range(len(crops))])
    classifier = tool.build_classifier(DETECTOR, 6)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        classifier(**classifier.data_preprocessor(batch, True), mode='loss')['loss'].backward()
        optimizer.step()
    right = classifier.eval().val_step(batch)
    accuracy = tool.Accuracy()
    accuracy.process(batch, right)
    assert accuracy.evaluate(len(right))['accuracy'] > 90


def test_the_demo_ends_with_what_is_worse_than_it_should_be(load_tool):
    demo = load_tool('demo')
    good = {'bbox AP': 50.0, 'bbox AP50': 75.0, 'segm AP': 45.0, 'segm AP50': 70.0, 'mIoU': 55.0}
    worse = dict.fromkeys(good, 20.0)
    assert demo.shortfall(good) is None
    for label, expected in (('bbox AP50', 65), ('mIoU', 50)):
        error = f'error: {label} is {expected - 1:.1f}, and {expected} or more is expected'
        assert demo.shortfall({**good, label: expected - 1}) == error
    lines = demo.table({'transferred': good, 'from scratch': worse}).split('\n')
    assert lines[0].split() == ['percent', 'transferred', 'from', 'scratch']
    assert lines[-1].split() == ['mIoU', '55.0', '20.0']


@pytest.mark.parametrize('seed', [0, 1])
def test_the_demo_trains_from_each_start(load_tool, tmp_path, monkeypatch, capsys, seed):
    demo = load_tool('demo')
    calls, logs = [], []

    def run_side_by_side(commands):
        for (tool, *args), log in commands.items():
            calls.append((tool, *map(str, args)))
            logs.append(log)
            if tool == 'train.py':
                work_dir = Path(args[args.index('--work-dir') + 1])
                work_dir.mkdir(parents=True)
                (work_dir / 'last_checkpoint').write_text(f'{work_dir}/iter_1.pth')

    monkeypatch.setattr(demo, 'run_side_by_side', run_side_by_side)
    monkeypatch.setattr(
        demo,
        'read_metrics',
        lambda config, work_dir: dict.fromkeys(demo.METRICS[config], 70 if 'transferred' in str(work_dir) else 60),
    )
    monkeypatch.setattr(demo, 'ensure_environment', lambda: None)
    imported = []
    monkeypatch.setattr(demo, 'has_gpu', lambda: False)
    monkeypatch.setattr(demo.importlib, 'import_module', imported.append)
    data_root = tmp_path / '[data]'
    for name in ('05', '07', '10'):
        (data_root / 'val2017').mkdir(parents=True, exist_ok=True)
        (data_root / f'val2017/{name}.jpg').touch()
    flags = ['--compare', '--work-dir', str(tmp_path), '--data-root', str(data_root), '--seed', str(seed)]
    monkeypatch.setattr(sys, 'argv', ['demo', *flags])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code is None
    assert imported == ['mmdet.apis', 'mmseg.apis']
    out = capsys.readouterr().out
    assert out.count('70.0') == out.count('60.0') / 2 == 5
    trained = [call for call in calls if call[0] == 'train.py']
    assert [call[1] for call in trained] == [demo.DETECTOR, demo.SEGMENTOR] * 3
    assert all(call[call.index('--seed') + 1] == str(seed) for call in trained)
    assert all(f'seed_{seed}' in call[call.index('--work-dir') + 1] for call in trained)
    folders = [tmp_path / f'seed_{seed}' / start for start in ('transferred', 'from_scratch', 'wrong_window')]
    assert list(filter(None, logs)) == [folder / 'upernet.log' for folder in folders]
    checkpoints = [Path(call[call.index('--checkpoint') + 1]).name for call in trained]
    written = 'swinv2_shapes_patch4_window4_64.pth'
    assert checkpoints == [written, written, 'none', 'none', written, written]
    wrong = ['model.backbone.pretrained_window_sizes=8' in call for call in trained]
    assert wrong == [False] * 4 + [True] * 2
    inferred = [call for call in calls if call[0] == 'infer.py']
    assert [call[1] for call in inferred] == [call[1] for call in trained]
    for call, train in zip(inferred, trained, strict=True):
        work_dir = train[train.index('--work-dir') + 1]
        assert call[2] == f'{work_dir}/iter_1.pth'
        assert call[4:6] == ('--out', f'{work_dir}/predictions')
        assert ('model.test_cfg.rcnn.nms.class_agnostic=True' in call) == (call[1] == demo.DETECTOR)
        found = load_tool('image_files').find_images([call[3]])
        assert list(found.values()) == [data_root / f'val2017/{name}.jpg' for name in ('05', '10')]


def test_metrics_are_those_of_the_validation_at_the_end_in_percent(load_tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    demo = load_tool('demo')
    names = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50', 'mIoU')

    def log(run, *records):
        path = tmp_path / run / 'vis_data/scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, records)))

    log('20260101_000000', dict(loss=1.0, step=10), dict.fromkeys(names, 0.7) | dict(step=10), dict(loss=1.0, step=20))
    with pytest.raises(SystemExit, match=r'stopped in its last validation: delete it and start again'):
        demo.read_metrics(demo.DETECTOR, tmp_path)
    log('20260102_000000', dict.fromkeys(names, 0.5) | dict(step=20))
    detector = {'bbox AP': 50, 'bbox AP50': 50, 'segm AP': 50, 'segm AP50': 50}
    assert demo.read_metrics(demo.DETECTOR, tmp_path) == detector
    assert demo.read_metrics(demo.SEGMENTOR, tmp_path) == dict(mIoU=0.5)


@pytest.mark.parametrize('gpu', [False, True])
def test_the_demo_runs_a_tool_in_a_process_of_its_own_and_ends_where_it_fails(tmp_path, gpu):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / 'tools')!r})
import cv2, demo
encode = cv2.imencode
cv2.imencode = lambda *args: print('imported before') or encode(*args)
demo.has_gpu = lambda: {gpu}
demo.run('misc/draw_dataset.py', {str(tmp_path / 'shapes')!r}, '--train', 1, '--val', 1)
assert os.getcwd() == {str(tmp_path)!r} and sys.argv == ['-c']
demo.run('misc/draw_dataset.py', {str(tmp_path / 'shapes')!r}, '--train', 2)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert f'$ python tools/misc/draw_dataset.py {tmp_path}/shapes --train 1 --val 1\n' in done.stdout
    assert (tmp_path / 'shapes/train2017/000000000001.jpg').exists()
    assert ('imported before' in done.stdout) == (not gpu)  # CUDA does not survive a fork
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith('draw_dataset.py: error:')
    assert 'shapes exists and is not the data set asked for' in done.stderr


def test_tools_run_side_by_side_with_shares_of_the_cores(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / 'tools')!r})
import cv2, torch
from pathlib import Path
import demo
encode, shown = cv2.imencode, set()
def imencode(*args):
    if not shown:
        shown.add(print('threads', torch.get_num_threads()))
    return encode(*args)
cv2.imencode = imencode
demo.has_gpu = lambda: False
os.sched_getaffinity = lambda process: range(6)
out = Path({str(tmp_path)!r})
draw = lambda name, *flags: ('misc/draw_dataset.py', out / name, '--train', 1, '--val', 1, *flags)
demo.run_side_by_side({{draw('a'): None, draw('b'): out / 'logs/b.log'}})
print('both done', flush=True)
long = ('misc/draw_dataset.py', out / 'c', '--train', 100000)
demo.run_side_by_side({{long: None, draw('a', '--seed', 1): out / 'd.log'}})
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
    shown, log = done.stdout, (tmp_path / 'logs/b.log').read_text()
    assert f'wrote {tmp_path}/a' in shown and f'wrote {tmp_path}/b' in log and f'wrote {tmp_path}/b' not in shown
    assert 'threads 3' in shown and 'threads 3' in log
    assert 'both done' in shown
    assert done.returncode == 2  # of the second, which stops the first
    assert done.stderr.strip().splitlines()[-1] == f'error: it failed, see the end of {tmp_path}/d.log'
    assert 'exists and is not the data set asked for' in (tmp_path / 'd.log').read_text()
