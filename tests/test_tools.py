"""The command lines end to end, on a few drawn scenes: train, resume, evaluate, draw, kill, several processes."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import test_infer
import torch
from entries import IN_PROCESS, run_tool
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import VISUALIZERS

from swinv2_mm.checkpoints.loading import read_checkpoint
from swinv2_mm.checkpoints.sharded import is_sharded_checkpoint

ROOT = Path(__file__).parents[1]
DEMO = 'configs/demo/mask-rcnn_swinv2_shapes.py'
QUICK = ('train_dataloader.batch_size=2', 'default_hooks.logger.interval=1')
LOADERS = {'train': 2, 'val': 1, 'test': 1}  # and the place of Resize in its pipeline
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}

detector = test_infer.detector


def tool(name, *args, command=(sys.executable,)):
    return [*command, str(next((ROOT / 'tools').rglob(f'{name}.py'))), *map(str, args)]


def run(*command):
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def run_here(load_tool, no_traces):
    """Run a tool in this process, without the seconds of importing a host. Returns what it logs in a work dir."""

    def run_here(name, work_dir, *args):
        before = set(work_dir.glob('*/*.log'))
        assert run_tool(load_tool, name, *args, '--work-dir', work_dir) == 0
        [log] = set(work_dir.glob('*/*.log')) - before
        return log.read_text()

    return run_here


def options(iters, *more):
    return ('--cfg-options', f'train_cfg.max_iters={iters}', f'train_cfg.val_interval={iters}', *QUICK, *more)


def losses(work_dir):
    """The loss by iteration, over all runs in a work dir."""
    lines = [line for path in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in path.open()]
    return {record['iter']: record['loss'] for record in map(json.loads, lines) if 'loss' in record}


@pytest.fixture(scope='module')
def trained(shapes, tmp_path_factory):
    """A work dir with two iterations of training and their checkpoint."""
    work_dir = tmp_path_factory.mktemp('trained')
    save = 'default_hooks.checkpoint.interval=2'
    run(*tool('train', DEMO, '--data-root', shapes, '--work-dir', work_dir, '--seed', 0, *options(2, save)))
    return work_dir


def test_training_resumes_where_it_stopped(run_here, trained, shapes):
    before = read_checkpoint(trained / 'iter_2.pth')
    save = ('default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=5')
    few = options(4, *save, *IN_PROCESS)
    out = run_here('train', trained, ROOT / DEMO, '--data-root', shapes, '--seed', 0, '--resume', *few)
    assert 'resumed epoch: 0, iter: 2' in out
    after = read_checkpoint(trained / 'iter_4.pth')
    assert (before['meta']['iter'], after['meta']['iter']) == (2, 4)
    steps = [
        {int(state['step']) for state in checkpoint['optimizer']['state'].values()} for checkpoint in (before, after)
    ]
    assert steps == [{2}, {4}]  # a fresh optimizer would have counted to 2 again
    assert after['param_schedulers'][0]['last_step'] == 4
    loss = losses(trained)
    assert sorted(loss) == [1, 2, 3, 4]
    assert max(loss[3], loss[4]) < 1.5 * max(loss[1], loss[2])
    assert 'eta' in out


def test_a_trained_model_is_evaluated_and_drawn(trained, shapes, tmp_path):
    out = run(
        *tool('test', DEMO, trained / 'iter_2.pth', '--data-root', shapes, '--work-dir', tmp_path / 'run'),
        *('--out', tmp_path / 'new/folder/predictions.pkl', '--show-dir', tmp_path / 'pictures'),
    )
    for metric in ('coco/bbox_mAP_50', 'coco/segm_mAP_50'):
        assert metric in out
    predictions = pickle.loads((tmp_path / 'new/folder/predictions.pkl').read_bytes())  # written just now
    assert [prediction['img_id'] for prediction in predictions] == [1, 2]
    assert {'scores', 'labels', 'bboxes', 'masks'} <= set(predictions[0]['pred_instances'])
    pictures = sorted((tmp_path / 'pictures').glob('*.jpg'))
    assert [picture.name for picture in pictures] == ['000000000001.jpg', '000000000002.jpg']
    assert cv2.imread(str(pictures[0])).shape == (256, 512, 3)  # ground truth and predictions side by side


@pytest.fixture
def evaluate(load_tool, detector, shapes, no_traces, monkeypatch, capsys, tmp_path):
    """Run tools/test.py in this process; returns its exit code, its standard error and the log."""
    tool = load_tool('test')

    def evaluate(*args):
        work = ('--data-root', shapes, '--work-dir', tmp_path / 'run')
        monkeypatch.setattr(sys, 'argv', ['test', *map(str, (*detector, *work, *args))])
        with pytest.raises(SystemExit) as ended:
            tool.main()
        logs = (tmp_path / 'run').glob('*/*.log')
        return ended.value.code, capsys.readouterr().err, ''.join(path.read_text() for path in logs)

    evaluate.tool = tool
    return evaluate


def test_what_cannot_be_written_shows_before_the_evaluation(evaluate, monkeypatch, tmp_path):
    (tmp_path / 'folder.pkl').mkdir()
    (tmp_path / 'file').write_text('a file')
    for args, problem in (
        (('--out', tmp_path / 'folder.pkl'), 'is a folder: name a file'),
        (('--out', tmp_path / 'file/x.pkl'), f'cannot be written: File exists ({tmp_path}/file)'),
        (('--show-dir', tmp_path / 'file'), f'cannot be written: File exists ({tmp_path}/file)'),
    ):
        assert evaluate(*args) == (2, f'error: {args[0]} {args[1]} {problem}\n', '')

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, 'touch', read_only)
    for args in (('--out', tmp_path / 'x.pkl'), ('--show-dir', tmp_path)):
        code, err, log = evaluate(*args)
        assert (code, log) == (2, '')
        assert err.startswith(f'error: {args[0]} {args[1]} cannot be written: Read-only file system')


@pytest.mark.parametrize('flag', ['--out', '--show-dir'])
def test_a_disk_that_fills_up_costs_a_line_and_no_metrics(evaluate, monkeypatch, tmp_path, flag):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    old, pictures = tmp_path / 'old.pkl', tmp_path / 'pictures'
    old.write_text('of an earlier run')
    visualizer = VISUALIZERS.get('mmdet.DetLocalVisualizer')
    draw, drawn = visualizer.add_datasample, []

    def draw_one(self, *args, **kwargs):
        drawn.append(draw(self, *args, **kwargs))
        if drawn[1:]:
            raise full

    def dump(predictions, file):
        file.write(b'half')
        raise full

    monkeypatch.setattr(visualizer, 'add_datasample', draw_one)
    monkeypatch.setattr(evaluate.tool.pickle, 'dump', dump)
    failing = old if flag == '--out' else pictures
    code, err, log = evaluate(flag, failing)
    failing = old if flag == '--out' else pictures / '000000000002.jpg'
    assert code == 2
    assert err.splitlines()[-1] == f'error: {failing} cannot be written: No space left on device'
    assert err.count('error') == 1
    assert 'coco/bbox_mAP_50: ' in log and 'coco/segm_mAP_50: ' in log
    assert old.read_text() == 'of an earlier run'
    files = {'old.pkl', '000000000001.jpg'} if flag == '--show-dir' else {'old.pkl'}
    assert {path.name for path in tmp_path.rglob('*') if path.is_file() and 'run' not in path.parts} == files


class Listed(list):
    def get_data_info(self, i):
        return dict(img_path=self[i])


@pytest.mark.parametrize(
    ('kind', 'scope', 'names'),
    [
        (Listed, 'mmdet', {'a/scan.png', 'b/scan.png', 'b/photo.JPG'}),
        (list, 'mmdet', {'scan.png', 'photo.JPG'}),  # a data set that does not list its images
        (list, 'mmseg', {'scan.png', 'photo.png'}),
    ],
)
def test_pictures_are_named_as_images_in_formats_that_opencv_writes(load_tool, tmp_path, kind, scope, names):
    paths = kind(['a/scan.pgm', 'b/scan', 'b/photo.JPG'])
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=paths))
    runner = SimpleNamespace(visualizer=DetLocalVisualizer(), cfg=Config(dict(default_scope=scope)), test_loop=loop)
    assert load_tool('test').write_pictures(runner, tmp_path) == []
    for path in paths:
        sample = DetDataSample(metainfo=dict(img_path=path))
        runner.visualizer.add_datasample('x', np.zeros((32, 32, 3), np.uint8), sample, draw_gt=False)
    written = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob('*') if path.is_file()}
    assert written.keys() == names
    assert all(cv2.imread(str(path)).shape == (32, 32, 3) for path in written.values())


def test_curves_are_those_of_the_log(trained, load_tool, tmp_path, capsys):
    plot_curves = load_tool('plot_curves')
    scalars = plot_curves.read_scalars(trained)
    assert scalars['loss'] == losses(trained)
    evaluated = [i for i in losses(trained) if i % 2 == 0]  # every run of two iterations ends with one
    assert list(scalars['coco/bbox_mAP_50']) == evaluated
    assert run_tool(load_tool, 'plot_curves', trained, '--out', tmp_path / 'curves.png') == 0
    picture = cv2.imread(str(tmp_path / 'curves.png'))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20  # axes, lines and legend, no blank page
    assert run_tool(load_tool, 'plot_curves', tmp_path) == 2
    assert 'holds no training log' in capsys.readouterr().err


LAYERS = ('', *(f'd{i}.' for i in range(5)))
RUNS = {  # what mmdet and mmseg log of some models, and of each metric the factor that makes it percent
    'dino': (
        [f'{layer}{dn}loss_{i}' for i in ('cls', 'bbox', 'iou') for dn in ('', 'dn_') for layer in LAYERS]
        + ['enc_loss_cls', 'enc_loss_bbox', 'enc_loss_iou'],
        {'coco/bbox_mAP': 100, 'coco/bbox_mAP_s': 100, 'lvis/bbox_APr': 100, 'cityscapes/AP@50': 100},
    ),
    'htc': (
        [
            'loss_rpn_cls',
            'loss_semantic_seg',
            *(f's{i}.{j}' for i in range(3) for j in ('loss_cls', 'acc', 'loss_mask')),
        ],
        {'pascal_voc/mAP': 100, 'coco/cat_precision': 100, 'coco/a dog_precision': 100, 'coco_panoptic/PQ_th': 1},
    ),
    'upernet': (['decode.loss_ce', 'decode.acc_seg', 'aux.loss_ce'], {'aAcc': 1, 'mIoU': 1, 'rmse': None}),
}


@pytest.fixture
def drawn(load_tool, monkeypatch, tmp_path):
    """Write a log as mmengine does, and plot it; returns the axes."""
    plot_curves, figures = load_tool('plot_curves'), []
    monkeypatch.setattr(plot_curves.plt, 'close', figures.append)

    def drawn(records):
        log = tmp_path / 'my_run/20260101_000000/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(''.join(json.dumps(record) + '\n' for record in records))
        monkeypatch.setattr(sys, 'argv', ['plot_curves', str(tmp_path / 'my_run')])
        assert plot_curves.main() == 0
        figures[-1].draw_without_rendering()
        assert figures[-1].get_suptitle() == 'my_run'
        return figures[-1].axes

    return drawn


def record_of(names, value, step):
    parts = {name: value * (i + 1) for i, name in enumerate(names)}
    total = sum(part for name, part in parts.items() if 'loss' in name)
    return dict(lr=0.1, loss=total, **parts, time=0.1, epoch=(step + 9) // 10, iter=step, step=step)


@pytest.mark.parametrize('name', RUNS)
def test_curves_show_all_losses_and_metrics_of_any_model(drawn, name):
    names, metrics = RUNS[name]
    records = []
    for epoch in (1, 2, 3):
        records += [record_of(names, 1 / (10 * epoch + i), 10 * epoch + i) for i in (-7, -3, 0)]
        values = {metric: 0.1 * epoch * 100 / (factor or 10) for metric, factor in metrics.items()}
        records.append({**values, 'data_time': 0.1, 'time': 0.1, 'step': epoch})
    losses, *panels = drawn(records)

    lines = {tuple(line.get_ydata()) for line in losses.lines}
    parts = [name for name in names if 'loss' in name]
    trained = [record for record in records if 'loss' in record]
    assert lines == {tuple(record[name] for record in trained) for name in ('loss', *parts)}
    assert all(list(line.get_xdata()) == [3, 7, 10, 13, 17, 20, 23, 27, 30] for line in losses.lines)
    bold = max(losses.lines, key=lambda line: line.get_linewidth())
    assert list(bold.get_ydata()) == [record['loss'] for record in trained]
    said = [text.get_text() for text in losses.get_legend().get_texts()]
    kinds = {line.get_color() for line in losses.lines}  # the total has one too
    assert said[0] == 'loss' and len(said) == len(kinds) == {'dino': 10, 'htc': 5, 'upernet': 3}[name]
    if name == 'dino':
        assert 'dn_loss_bbox: d0 (pale) to the last' in said and losses.get_yscale() == 'log'
    if name == 'htc':
        assert said == [
            'loss',
            'loss_rpn_cls',
            'loss_semantic_seg',
            'loss_cls: s0 (pale) to s2',
            'loss_mask: s0 (pale) to s2',
        ]

    shown = {line.get_label(): line.get_ydata() for axes in panels for line in axes.lines}
    assert len(panels) == (2 if name == 'upernet' else 1) and panels[0].get_ylabel() == 'percent'
    assert sum(len(axes.lines) for axes in panels) == len(metrics)
    for axes in panels:
        assert axes.get_xlabel() == 'epoch'
        for line in axes.lines:
            assert list(line.get_xdata()) == [1, 2, 3]
            assert list(line.get_ydata()) == pytest.approx([1, 2, 3] if axes.get_ylabel() == 'value' else [10, 20, 30])
    if name == 'htc':
        assert set(shown) >= {'pascal_voc/mAP', 'coco_panoptic/PQ_th', 'AP of each class'}
    for axes in (losses, *panels):
        ticks = axes.get_xticks()
        assert len(ticks) > 2 and (ticks == np.round(ticks)).all()


def test_a_run_of_one_point_shows_it(drawn):
    records = [
        dict(loss=1.5, loss_cls=1.5, lr=0.1, iter=50, step=50),
        {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_s': -1, 'step': 50},
    ]
    losses, metrics = drawn(records)
    assert all(line.get_marker() == 'o' and list(line.get_xdata()) == [50] for line in (*losses.lines, *metrics.lines))
    assert metrics.get_xlabel() == 'iteration' and list(metrics.get_xticks()) == list(losses.get_xticks()) == [50]
    all_sizes, small = (line.get_ydata()[0] for line in metrics.lines)
    assert all_sizes == pytest.approx(20) and np.isnan(small)  # there are no small objects


def test_losses_of_validations_are_metrics_and_what_is_no_record_is_skipped(drawn, capsys):
    records = [dict(loss=1.0, loss_cls=1.0, epoch=i, step=10 * i) for i in (1, 2, 3)]
    records[1:1] = [[1], 'text', dict(loss=9.0), dict(mIoU=30.0, val_loss=0.5, step=1)]
    losses, *panels = drawn(records)
    assert [line.get_label() for line in losses.lines] == ['loss', 'loss_cls']
    assert [list(line.get_ydata()) for line in losses.lines] == [[1, 1, 1]] * 2
    assert {axes.get_ylabel(): [line.get_label() for line in axes.lines] for axes in panels} == {
        'percent': ['mIoU'],
        'value': ['val_loss'],
    }
    assert capsys.readouterr().err.count('skipping a torn line') == 3


@pytest.mark.parametrize(('steps', 'own'), [((1, 2, 16000), False), ((4000, 8000, 16000), True)])
def test_ticks_are_the_steps_unless_these_lie_close(drawn, steps, own):
    [losses] = drawn([dict(loss=1.0, epoch=1, step=step) for step in steps])
    ticks = list(losses.get_xticks())
    assert (ticks == list(steps)) == own
    assert own or min(np.diff(ticks)) >= 1000


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(shapes, tmp_path):
    common = ('--data-root', shapes, '--work-dir', tmp_path, '--seed', 0)
    save = ('default_hooks.checkpoint.interval=2', 'default_hooks.checkpoint.max_keep_ckpts=5')
    running = subprocess.Popen(
        tool('train', DEMO, *common, *options(1000, *save)),
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / 'iter_4.pth').exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    whole = max(int(path.stem.removeprefix('iter_')) for path in tmp_path.glob('iter_*.pth'))
    newest = tmp_path / f'iter_{whole}.pth'
    newest.write_bytes(newest.read_bytes()[:1000])  # as if killed while writing this one
    out = run(*tool('train', DEMO, *common, '--resume', *options(whole, *save)))
    assert f'Skipping {newest}' in out
    assert f'iter: {whole - 2}' in out
    assert read_checkpoint(newest)['meta']['iter'] == whole


def test_two_processes_train_a_sharded_detector_and_test_it_over_gloo(shapes, tmp_path):
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29511')
    train = tool(
        'train', DEMO, '--data-root', shapes, '--work-dir', tmp_path, '--launcher', 'pytorch', command=launcher
    )
    sharded = ('runner_type=SwinV2FlexibleRunner', 'strategy.type=SwinV2FSDPStrategy', 'model.backbone.with_cp=True')
    out = run(*train, *options(2, *sharded, 'default_hooks.checkpoint.interval=2'))
    assert 'GPU number: 2' in out  # mmengine counts processes so
    assert is_sharded_checkpoint(tmp_path / 'iter_2.pth')
    assert read_checkpoint(tmp_path / 'iter_2.pth')['meta']['iter'] == 2
    test = ('test', DEMO, tmp_path / 'iter_2.pth', '--data-root', shapes, '--work-dir', tmp_path / 'test')
    assert 'coco/bbox_mAP_50' in run(*tool(*test, '--launcher', 'pytorch', command=launcher))


def test_bfloat16_trains_a_whole_detector_on_cpu(run_here, shapes, tmp_path):
    few = options(1, 'default_hooks.checkpoint.interval=1', *IN_PROCESS)
    run_here('train', tmp_path, ROOT / DEMO, '--data-root', shapes, '--seed', 0, '--amp', 'bf16', *few)
    assert np.isfinite(losses(tmp_path)[1])
    weights = read_checkpoint(tmp_path / 'iter_1.pth')['state_dict']
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values() if w.is_floating_point())


def test_a_segmentor_trains_and_is_evaluated_by_the_same_commands(run_here, shapes, tmp_path):
    config = tmp_path / 'upernet.py'
    config.write_text(
        """_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swinv2_mm'])
norm = dict(type='BN')
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        _delete_=True,
        type='SwinTransformerV2',
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4)),
        window_size=8,
    ),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, norm_cfg=norm),
    auxiliary_head=dict(in_channels=64, channels=16, norm_cfg=norm),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
"""
    )
    work_dir = tmp_path / 'run'
    ade = Path(shutil.copytree(shapes / 'ade', tmp_path / 'ade'))
    for folder in (ade / 'images/validation', ade / 'annotations/validation'):  # two images of one name, as in videos
        for i, path in enumerate(sorted(folder.iterdir())):
            (folder / 'ab'[i]).mkdir()
            path.rename(folder / 'ab'[i] / f'1{path.suffix}')
    data = ('--data-root', ade)
    run_here('train', work_dir, config, *data, '--seed', 0)
    assert np.isfinite(list(losses(work_dir).values())).all()
    test = ('test', tmp_path / 'test', config, work_dir / 'iter_2.pth', *data, '--show-dir', tmp_path / 'pictures')
    assert 'mIoU' in run_here(*test)
    assert test_infer.written(tmp_path / 'pictures') == ['a/1.png', 'b/1.png']
    image = cv2.imread(str(ade / 'images/validation/a/1.jpg'))
    picture = cv2.imread(str(tmp_path / 'pictures/a/1.png'))
    assert picture.shape == (256, 512, 3)  # ground truth and predictions side by side, and coloured by class
    truth = cv2.imread(str(ade / 'annotations/validation/a/1.png'), 0)
    assert len(np.unique(truth)) > 1
    for label in np.unique(truth):
        left = picture[:, :256][truth == label] - 0.2 * image[truth == label]
        assert abs(left - np.median(left, axis=0)).mean() < 20  # one colour and a fifth of the image, but for labels


PHOTOS = ROOT.parent / 'shared' / 'data' / 'coco_tiny'


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f'needs COCO photos in {PHOTOS}')
def test_the_front_door_trains_and_is_evaluated_on_real_photos(run_here, tmp_path):
    config, data = ROOT / 'configs/mask_rcnn_swinv2.py', ('--data-root', PHOTOS)
    scales = [f'{loader}_dataloader.dataset.pipeline.{i}.scale=(192,128)' for loader, i in LOADERS.items()]
    few = [f'{loader}_dataloader.dataset.indices=2' for loader in LOADERS]
    quick = ('--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1', *scales, *few, *IN_PROCESS)
    run_here('train', tmp_path, config, *data, '--checkpoint', 'none', '--seed', 0, *quick)
    assert np.isfinite(losses(tmp_path)[1])
    checkpoint = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert (checkpoint['meta']['epoch'], checkpoint['meta']['iter']) == (1, 1)
    assert checkpoint['state_dict']['backbone.pretrained_windows'].tolist() == [16, 16, 16, 16]  # from scratch
    out = run_here('test', tmp_path / 'test', config, tmp_path / 'epoch_1.pth', *data, *quick)
    assert 'coco/bbox_mAP_50' in out
    assert 'coco/segm_mAP_50' in out


def test_a_config_imports_the_modules_of_its_user_not_those_of_the_tools(tmp_path):
    names = 'lib', 'utils', 'common', 'models', 'datasets'
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').touch()
        (tmp_path / name / 'mine.py').write_text(f'print("imported {name}")')
    config = tmp_path / 'config.py'
    modules = [f'{name}.mine' for name in names]
    config.write_text(f'custom_imports = dict(imports={modules})\nmodel = dict(type="Mine")\n')
    env = {**ENV, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run(tool('train', config), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f'imported {name}' for name in names], done.stderr
    assert done.returncode == 2 and 'default_scope is None' in done.stderr  # after the imports
