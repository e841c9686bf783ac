"""From flags to a checked config: what goes where, and one clear line for every mistake."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import entries
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS, MODELS, RUNNERS, DefaultScope
from mmengine.runner import Runner

from swinv2_mm import CheckpointError, SwinTransformerV2
from swinv2_mm.checks.data import check_contents
from swinv2_mm.engine import launch, run_folder
from swinv2_mm.engine.runner import SwinV2Runner, runner_class

DET = 'configs/mask_rcnn_swinv2.py'
DEMO = 'configs/demo/mask-rcnn_swinv2_shapes.py'
SEG = """_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swinv2_mm'])
model = dict(backbone=dict(_delete_=True, type='SwinTransformerV2'))
"""


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))


@pytest.fixture
def seg(tmp_path):
    path = tmp_path / 'upernet.py'
    path.write_text(SEG)
    return path


@pytest.fixture
def fails(load_tool, monkeypatch, capsys):
    """Run a command line that must end with exit code 2 and one line; returns the line."""

    def fails(tool, *args):
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            load_tool(tool).main()
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().split('\n')
        assert len(lines) == 1
        return lines[0]

    return fails


@pytest.mark.parametrize('tool', ['train', 'test', 'infer'])
@pytest.mark.parametrize('ending', ['yaml', 'yml'])
def test_a_yaml_config_runs_no_code(fails, tmp_path, tool, ending):
    path = tmp_path / f'config.{ending}'
    path.write_text(f'default_scope: mmdet\nmodel: !!python/object/apply:os.system ["touch {tmp_path}/ran"]\n')
    rest = {'train': [], 'test': ['x.pth'], 'infer': ['x.pth', 'x.jpg', '--out', tmp_path / 'out']}[tool]
    assert fails(tool, path, *rest).startswith(f'error: config {path} cannot be read: could not determine a construct')
    assert not (tmp_path / 'ran').exists()


def test_the_front_door_is_the_host_recipe_with_another_backbone(tmp_path):
    cfg = launch.load_config(DET)
    host = tmp_path / 'host.py'
    host.write_text("_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'\n")
    base = Config.fromfile(host)
    for key in ('train_dataloader', 'val_evaluator', 'train_cfg', 'param_scheduler'):
        assert cfg[key] == base[key]
    assert cfg.model.roi_head == base.model.roi_head
    assert cfg.model.type == 'MaskRCNN'
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.optim_wrapper.paramwise_cfg == {}  # the keys of Swin V1
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('/v2.0.0/swinv2_tiny_patch4_window16_256.pth')


def test_a_host_that_does_not_import_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet.models', None)
    with pytest.raises(ValueError) as error:
        launch.load_config(DET)
    message = f'config {DET} is for mmdet, which does not import here: import of mmdet.models halted'
    assert str(error.value).startswith(message) and '\n' not in str(error.value)


def test_data_root_moves_every_data_set_and_metric(seg):
    cfg = launch.load_config(DET)
    launch.set_data_root(cfg, '/elsewhere')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == '/elsewhere/'
    assert cfg.val_evaluator.ann_file == '/elsewhere/annotations/instances_val2017.json'
    assert cfg.test_evaluator.ann_file == '/elsewhere/annotations/instances_val2017.json'
    cfg = launch.load_config(seg)
    launch.set_data_root(cfg, 'ade')
    assert cfg.train_dataloader.dataset.data_root == 'ade/'
    assert cfg.test_dataloader.dataset.data_prefix.img_path == 'images/validation'


def test_data_root_reaches_data_sets_inside_wrappers():
    cfg = launch.load_config(DET)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[inner])
    )
    launch.set_data_root(cfg, '/elsewhere')
    assert cfg.train_dataloader.dataset.dataset.datasets[0].data_root == '/elsewhere/'
    with pytest.raises(ValueError, match=r'/elsewhere/annotations/instances_train2017\.json does not exist'):
        launch.check_data(cfg, ('train',))


def test_flags_of_training_reach_the_config(load_tool, shapes, tmp_path):
    train = load_tool('train')
    args = [DEMO, '--data-root', str(shapes), '--work-dir', str(tmp_path), '--seed', '7', '--amp', 'bf16']
    cfg = train.prepare(train.parse_args([*args, '--cfg-options', 'train_dataloader.batch_size=3']))
    assert cfg.work_dir == str(tmp_path)
    assert cfg.randomness.seed == 7
    assert cfg.optim_wrapper.type == 'BFloat16OptimWrapper'
    assert cfg.train_dataloader.batch_size == 3
    assert cfg.train_dataloader.dataset.data_root == f'{shapes}/'
    assert not list(tmp_path.iterdir())


def test_scaling_the_learning_rate_is_turned_on_by_the_flag(load_tool, shapes):
    train = load_tool('train')
    common = [DEMO, '--data-root', str(shapes)]
    assert train.prepare(train.parse_args(common)).auto_scale_lr == dict(enable=False, base_batch_size=4)
    cfg = train.prepare(train.parse_args([*common, '--auto-scale-lr']))
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['auto_scale_lr.base_batch_size=0'], 'auto_scale_lr.base_batch_size is 0: must be a whole number of at least'),
        (['auto_scale_lr=True'], 'auto_scale_lr is True: must be a dict, as dict(enable='),
        (['auto_scale_lr=None'], 'auto_scale_lr of the config has no base_batch_size: name the batch size that its'),
        (['train_dataloader.batch_size=None'], 'train_dataloader has no batch_size for auto_scale_lr: set optim_wrapp'),
        (
            ['optim_wrapper.accumulative_counts=3', 'train_dataloader.batch_size=2'],
            'auto_scale_lr ignores optim_wrapper.accumulative_counts=3: drop --auto-scale-lr and set '
            'optim_wrapper.optimizer.lr to 0.001 x 2 x 3 x processes / 4',
        ),
    ],
)
def test_a_learning_rate_that_cannot_be_scaled_is_one_line(fails, shapes, tmp_path, options, message):
    flags = '--data-root', shapes, '--work-dir', tmp_path / 'run', '--auto-scale-lr', '--cfg-options', *options
    assert fails('train', DEMO, *flags).startswith(f'error: {message}')
    assert not (tmp_path / 'run').exists()


def test_initial_weights_come_from_the_flag(load_tool, shapes, tmp_path):
    train = load_tool('train')
    backbone = MODELS.build(launch.load_config(DEMO).model.backbone)
    torch.save(backbone.state_dict(), tmp_path / 'weights.pth')
    cfg = train.prepare(
        train.parse_args([DEMO, '--data-root', str(shapes), '--checkpoint', str(tmp_path / 'weights.pth')])
    )
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    cfg = train.prepare(train.parse_args([DEMO, '--data-root', str(shapes), '--checkpoint', 'none']))
    assert cfg.model.backbone.init_cfg is None


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_a_config_that_is_none_is_one_line(fails, tmp_path, tool):
    checkpoint = ['x.pth'] if tool == 'test' else []
    assert 'config nowhere.py does not exist' in fails(tool, 'nowhere.py', *checkpoint)
    neither = tmp_path / 'neither.py'
    neither.write_text("default_scope = 'mmpose'\nmodel = dict(type='X')\n")
    line = fails(tool, neither, *checkpoint)
    assert "neither mmdet nor mmseg: default_scope is 'mmpose'" in line
    assert line.endswith("use the tools of mmpose for it, where the backbone is type='mmengine.SwinTransformerV2'")
    neither.write_text("default_scope = 'mmdet'\n")
    assert 'it has no model' in fails(tool, neither, *checkpoint)
    neither.write_text('model = dict(')
    assert f'config {neither} cannot be read' in fails(tool, neither, *checkpoint)
    neither.write_text("custom_imports = dict(imports=['no_such_module'])")
    assert f'config {neither} cannot be read' in fails(tool, neither, *checkpoint)


def test_missing_data_names_the_path_and_the_flag(fails, tmp_path):
    line = fails('train', DET, '--data-root', tmp_path, '--work-dir', tmp_path / 'run')
    assert f'{tmp_path}/annotations/instances_train2017.json does not exist' in line
    assert '--data-root' in line
    assert not (tmp_path / 'run').exists()
    line = fails('test', DET, 'x.pth', '--data-root', tmp_path)
    assert f'{tmp_path}/annotations/instances_val2017.json does not exist' in line


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('model.backbone.arch=huger', "arch must be one of tiny, small, base, large, huge, giant or a dict.*'huger'"),
        ('model.backbone.window_size=(8,8)', r'window_size must be an int or 4 ints, one per stage, got \(8, 8\)'),
        ('model.backbone.window_size=0', 'window_size must be ints of at least 1 token and at most 65535, got 0'),
        ('model.backbone.out_indices=(2,4)', r'out_indices must be increasing stages from 0 to 3, got \(2, 4\)'),
        ('model.backbone.windows=8', 'has other names for its arguments: windows is window_size'),
    ],
)
def test_a_wrong_backbone_argument_ends_before_anything_is_written(fails, shapes, tmp_path, option, message):
    line = fails(
        'train',
        DET,
        '--data-root',
        shapes,
        '--work-dir',
        tmp_path / 'run',
        '--checkpoint',
        'none',
        '--cfg-options',
        option,
    )
    assert re.search(message, line)
    assert not (tmp_path / 'run').exists()


def test_initial_weights_that_cannot_be_had_end_before_anything_is_written(fails, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    common = (DEMO, '--data-root', shapes, '--work-dir', tmp_path / 'run', '--checkpoint')
    assert 'does not exist or is not a file' in fails('train', *common, tmp_path / 'no.pth')
    line = fails('train', *common, 'http://127.0.0.1:9/swinv2.pth')
    assert 'cannot download http://127.0.0.1:9/swinv2.pth' in line
    assert '--checkpoint FILE' in line
    (tmp_path / 'text.pth').write_text('no weights')
    assert 'truncated or not a checkpoint' in fails('train', *common, tmp_path / 'text.pth')
    other = SwinTransformerV2(arch=dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)))
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    assert "it has arch={'embed_dims': 16, 'depths': (2, 2, 2, 2)" in fails('train', *common, tmp_path / 'other.pth')
    assert not (tmp_path / 'run').exists()


def test_a_custom_key_that_matches_nothing_is_one_line(load_tool, shapes, tmp_path, monkeypatch, capsys):
    option = 'optim_wrapper.paramwise_cfg.custom_keys.absolute_pos_embed.decay_mult=0'
    args = ['train', DEMO, '--data-root', shapes, '--work-dir', tmp_path, '--cfg-options', option]
    monkeypatch.setattr(sys, 'argv', [str(arg) for arg in args])
    with pytest.raises(SystemExit) as ended:
        load_tool('train').main()
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().split('\n')[-1]
    assert line.startswith('error: ')
    assert "custom_keys has 'absolute_pos_embed', which is in no parameter name" in line


def test_nothing_to_resume_is_one_line(fails, shapes, tmp_path):
    line = fails('train', DEMO, '--data-root', shapes, '--work-dir', tmp_path / 'run', '--resume')
    assert f'nothing to resume: {tmp_path}/run holds no whole checkpoint' in line
    assert not (tmp_path / 'run').exists()
    torch.save({'state_dict': {}}, tmp_path / 'weights.pth')
    line = fails('train', DEMO, '--data-root', shapes, '--resume', tmp_path / 'weights.pth')
    assert 'holds no training state to resume' in line


def write_state(path, iteration):
    torch.save({'meta': {'iter': iteration}, 'optimizer': {}, 'state_dict': {}}, path)


def test_resume_takes_the_checkpoint_with_the_most_iterations_that_is_whole(tmp_path, capsys):
    for i in (8, 9, 10):
        write_state(tmp_path / f'iter_{i}.pth', i)
        os.utime(tmp_path / f'iter_{i}.pth', (20 - i, 20 - i))  # the times say nothing, as after a copy
    highest = tmp_path / 'iter_10.pth'
    assert run_folder.find_resume(tmp_path, 'auto') == str(highest)
    highest.write_bytes(highest.read_bytes()[:-100])  # killed while writing
    assert run_folder.find_resume(tmp_path, 'auto') == str(tmp_path / 'iter_9.pth')
    assert f'Skipping {highest}' in capsys.readouterr().out
    with pytest.raises(CheckpointError, match='truncated'):
        run_folder.find_resume(tmp_path, str(highest))


def test_resume_compares_what_files_of_several_names_say(tmp_path, capsys, monkeypatch):
    for i in (1, 2, 3):
        write_state(tmp_path / f'epoch_{i}.pth', 100 * i)
        write_state(tmp_path / f'iter_{50 * i}.pth', 50 * i)
    write_state(tmp_path / 'latest.pth', 250)
    torch.save({'meta': {'iter': 900}, 'state_dict': {}}, tmp_path / 'best_coco_bbox_mAP_epoch_9.pth')
    read, read_checkpoint = [], launch.read_checkpoint
    monkeypatch.setattr(
        run_folder, 'read_checkpoint', lambda path: read.append(Path(path).name) or read_checkpoint(path)
    )
    assert run_folder.find_resume(tmp_path, 'auto') == str(tmp_path / 'epoch_3.pth')
    assert sorted(read) == ['epoch_3.pth', 'iter_150.pth', 'latest.pth']
    assert 'Skipping' not in capsys.readouterr().out
    torch.save({'meta': {'iter': 300}, 'state_dict': {}}, tmp_path / 'epoch_3.pth')  # no optimizer
    assert run_folder.find_resume(tmp_path, 'auto') == str(tmp_path / 'latest.pth')
    assert 'holds no training state to resume' in capsys.readouterr().out
    for meta in (None, {}, {'iter': 'x'}):
        torch.save({'meta': meta, 'optimizer': {}, 'state_dict': {}}, tmp_path / 'latest.pth')
        with pytest.raises(CheckpointError, match='holds no training state to resume'):
            run_folder.find_resume(tmp_path, str(tmp_path / 'latest.pth'))


@pytest.mark.parametrize('tool', ['train', 'test'])
@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        (
            "runner_type = 'NoRunner'",
            "runner_type 'NoRunner' of the config derives from neither {base} nor FlexibleRunner: use the tools of",
        ),
    ],
)
def test_a_runner_that_is_not_ours_is_refused_before_anything_is_written(fails, shapes, tmp_path, tool, lines, message):
    torch.save({}, tmp_path / 'x.pth')
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{Path(DEMO).resolve()}'\n{lines}\n")
    flags = '--data-root', shapes, '--work-dir', tmp_path / 'run'
    line = fails(tool, config, *([tmp_path / 'x.pth'] if tool == 'test' else ['--checkpoint', 'none']), *flags)
    assert line.startswith('error: ' + message.format(base='SwinV2Runner' if tool == 'train' else 'Runner'))
    assert 'tools/train.py and tools/test.py' in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('tool', 'base'), [('train', SwinV2Runner), ('test', SwinV2Runner), ('test', Runner)])
@pytest.mark.usefixtures('no_traces')
def test_a_runner_that_is_made_from_ours_is_used(load_tool, shapes, tmp_path, monkeypatch, tool, base):
    ran = []

    @RUNNERS.register_module(force=True)
    class OwnRunner(base):
        def train(self):
            ran.append(('train', type(self)))

        def test(self):
            ran.append(('test', type(self)))

    cfg = launch.load_config(DEMO)
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'x.pth')
    rest = [tmp_path / 'x.pth'] if tool == 'test' else ['--checkpoint', 'none']
    for named, right in (('OwnRunner', OwnRunner), ('Runner', SwinV2Runner if tool == 'train' else Runner)):
        flags = ['--data-root', shapes, '--work-dir', tmp_path / named, '--cfg-options', f'runner_type={named}']
        for kind in (SwinV2Runner, Runner):
            monkeypatch.setattr(kind, tool, lambda self: ran.append((tool, type(self))))
        monkeypatch.setattr(sys, 'argv', [tool, DEMO, *map(str, [*rest, *flags])])
        load_tool(tool).main()
        assert ran.pop() == (tool, right) and not ran


def test_images_that_a_backend_reads_need_no_folder(shapes, tmp_path):
    shutil.copytree(shapes / 'annotations', tmp_path / 'annotations')
    cfg = launch.load_config(DEMO)
    launch.set_data_root(cfg, str(tmp_path))
    with pytest.raises(ValueError, match='train2017/ does not exist'):
        launch.check_data(cfg, ('train',))
    cfg.train_dataloader.dataset.pipeline[0].backend_args = dict(backend='lmdb', db_path='photos.lmdb')
    launch.check_data(cfg, ('train',))
    check_contents(cfg, ('train',))
    shutil.rmtree(tmp_path / 'annotations')
    with pytest.raises(ValueError, match=r'instances_train2017\.json does not exist'):
        launch.check_data(cfg, ('train',))


@pytest.mark.skipif(torch.cuda.is_available(), reason='about machines without a GPU')
def test_what_needs_a_gpu_says_so(fails, shapes):
    assert '--amp fp16 needs a GPU' in fails('train', DEMO, '--data-root', shapes, '--amp', 'fp16')
    assert '--launcher slurm needs the environment that srun sets' in fails(
        'train', DEMO, '--data-root', shapes, '--launcher', 'slurm'
    )
    assert 'torchrun' in fails('train', DEMO, '--data-root', shapes, '--launcher', 'pytorch')


@pytest.mark.parametrize(('tool', 'checkpoint'), [('train', []), ('test', ['a b.pth'])])
def test_the_scripts_of_the_hosts_start_the_tools_in_several_processes(load_tool, tmp_path, tool, checkpoint):
    """They run torchrun, in whose place there is a program that prints its arguments."""
    (tmp_path / 'torchrun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'torchrun').chmod(0o755)
    variables = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='29501')
    env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}')
    script = [f'tools/dist_{tool}.sh', DET, *checkpoint]

    def run(*args, **more):
        return subprocess.run([*script, *args], env={**env, **more}, capture_output=True, text=True)

    flags = ['--work-dir', 'my runs', '--cfg-options', 'train_dataloader.batch_size=1']
    defaults = ['--nnodes=1', '--node_rank=0', '--nproc_per_node=8', '--master_addr=127.0.0.1', '--master_port=29500']
    asked = ['--nnodes=2', '--node_rank=1', '--nproc_per_node=8', '--master_addr=10.0.0.1', '--master_port=29501']
    for more, options in (({}, defaults), (variables, asked)):
        printed = run('8', *flags, **more).stdout.splitlines()
        assert printed == [*options, f'tools/{tool}.py', DET, *checkpoint, '--launcher', 'pytorch', *flags]
    args = load_tool(tool).parse_args(printed[6:])
    assert (args.config, args.launcher, args.work_dir) == (DET, 'pytorch', 'my runs')
    for mistake in ([], ['--amp'], ['0']):
        done = run(*mistake)
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.startswith(f'error: usage: tools/dist_{tool}.sh CONFIG ') and done.stderr.count('\n') == 1


def test_predictions_are_written_as_pickle_only(fails, shapes, tmp_path):
    torch.save({}, tmp_path / 'x.pth')
    line = fails('test', DEMO, tmp_path / 'x.pth', '--data-root', shapes, '--out', 'predictions.json')
    assert '--out predictions.json' in line
    assert '.pkl' in line


@pytest.mark.parametrize(('flag', 'windows'), [(['6'], (6,) * 4), (['12', '10', '6', '5'], (12, 10, 6, 5))])
def test_a_model_is_tested_with_other_windows_and_its_own_pretrained_windows(
    load_tool, shapes, tmp_path, monkeypatch, flag, windows
):
    cfg = launch.load_config(DEMO)
    with DefaultScope.overwrite_default_scope('mmdet'):
        trained = MODELS.build(cfg.model)
    for name, weight in trained.backbone.named_parameters():
        torch.nn.init.normal_(weight, std=0.1 if 'norm' not in name else 1.0)
    trained.backbone.set_pretrained_window_sizes((8, 8, 8, 4))
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'trained.pth')
    tested = []
    monkeypatch.setattr(Runner, 'test', lambda runner: tested.append(runner.model))
    args = ['test', DEMO, tmp_path / 'trained.pth', '--data-root', shapes, '--work-dir', tmp_path / 'run']
    monkeypatch.setattr(sys, 'argv', [*map(str, args), '--window-size', *flag])
    load_tool('test').main()
    backbone = tested[0].backbone.eval()
    assert backbone.window_size == windows
    assert backbone.pretrained_window_sizes == (8, 8, 8, 4)
    other = dict(cfg.model.backbone, window_size=windows, pretrained_window_sizes=(8, 8, 8, 4))
    expected = MODELS.build(other).eval()
    expected.load_state_dict(trained.backbone.state_dict())
    image = torch.randn(1, 3, 192, 160)
    with torch.no_grad():
        for actual, wanted, before in zip(backbone(image), expected(image), trained.backbone.eval()(image)):
            torch.testing.assert_close(actual, wanted)
            assert not torch.allclose(actual, before, rtol=0.01)


def test_windows_that_are_none_are_one_line(fails, shapes, tmp_path):
    torch.save({}, tmp_path / 'x.pth')
    common = (DEMO, tmp_path / 'x.pth', '--data-root', shapes, '--work-dir', tmp_path / 'run', '--window-size')
    assert 'window_size must be an int or 4 ints, one per stage, got [8, 8]' in fails('test', *common, 8, 8)
    assert 'window_size must be ints of at least 1 token and at most 65535, got [0]' in fails('test', *common, 0)
    resnet = tmp_path / 'resnet.py'
    resnet.write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'")
    assert '--window-size is for models with a SwinTransformerV2' in fails('test', resnet, *common[1:], 8)
    assert not (tmp_path / 'run').exists()


def test_the_configs_of_the_readme_build_and_give_maps(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', Path('README.md').read_text(), re.DOTALL)
    assert len(blocks) == 2
    for i, block in enumerate(blocks):
        path = tmp_path / f'readme_{i}.py'
        path.write_text(block)
        cfg = launch.load_config(path)
        launch.set_initial_weights(cfg, 'none')
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model).eval()
        with torch.no_grad():
            features = model.extract_feat(torch.rand(1, 3, 64, 96))
            assert features[0].shape[2:] == (16, 24)
            if cfg.default_scope == 'mmseg':
                assert model.decode_head(features).shape == (1, 150, 16, 24)


def test_the_model_inside_a_wrapper_is_loaded(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'weights.pth')
    wrapper = torch.nn.Module()
    wrapper.module = torch.nn.Linear(2, 2)
    MODEL_WRAPPERS.register_module(name='Wrapper', module=type('Wrapper', (torch.nn.Module,), {}), force=True)
    wrapper.__class__ = MODEL_WRAPPERS.get('Wrapper')
    launch.load_weights(wrapper, tmp_path / 'weights.pth')
    assert torch.equal(wrapper.module.weight, model.weight)


def test_bf16_replaces_other_mixed_precision():
    cfg = launch.load_config(DET, {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.loss_scale': 'dynamic'})
    launch.set_amp(cfg, 'bf16')
    assert cfg.optim_wrapper.type == 'BFloat16OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper


def test_a_flag_for_initial_weights_keeps_what_the_config_allows_to_be_missing(tmp_path):
    cfg = Config(dict(model=dict(backbone=dict(type='SwinTransformerV2', in_channels=4))))
    launch.set_initial_weights(cfg, 'a.pth')
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='a.pth')
    cfg.model.backbone.init_cfg.allow_missing = ['patch_embed.proj']
    launch.set_initial_weights(cfg, str(tmp_path / 'b.pth'))
    torch.save(SwinTransformerV2(window_size=8).state_dict(), tmp_path / 'b.pth')
    launch.check_backbone(cfg)
    cfg.model.backbone.init_cfg.pop('allow_missing')
    with pytest.raises(CheckpointError, match=r"or allow_missing=\['patch_embed\.proj'\]"):
        launch.check_backbone(cfg)
    launch.set_initial_weights(cfg, 'none')
    assert cfg.model.backbone.init_cfg is None


PURE_BASE = """
from mmcv.transforms import LoadImageFromFile, Resize
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import IterBasedTrainLoop, TestLoop
from mmseg.datasets import BaseSegDataset, LoadAnnotations, PackSegInputs
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor

default_scope = None
classes = ('background', 'disc', 'square', 'triangle', 'star', 'cross', 'ring')
head = dict(type=FCNHead, in_index=0, channels=8, num_convs=1, num_classes=7, norm_cfg=dict(type='BN'))
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(32, 32), mean=[99.0] * 3, std=[60.0] * 3),
    decode_head=head,
    test_cfg=dict(mode='whole'),
)
load = [dict(type=LoadImageFromFile), dict(type=Resize, scale=(32, 32)), dict(type=LoadAnnotations)]
dataset = dict(
    type=BaseSegDataset,
    metainfo=dict(classes=classes, palette=[(i, i, i) for i in range(7)]),
    data_root='data',
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[*load, dict(type=PackSegInputs)],
)
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type=InfiniteSampler), dataset=dataset)
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False), dataset=dataset)
test_evaluator = dict(type=IoUMetric)
test_cfg = dict(type=TestLoop)
train_cfg = dict(type=IterBasedTrainLoop, max_iters=1)
"""
PURE = """
from mmengine.config import read_base
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from torch.optim import AdamW

from swinv2_mm import SwinTransformerV2, SwinV2OptimWrapperConstructor

with read_base():
    from .pure_base import *

arch = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))
model.update(backbone=dict(type=SwinTransformerV2, arch=arch, window_size=4, out_indices=(0, 1)))
model['decode_head'].update(in_channels=8)
optim_wrapper = dict(
    type=OptimWrapper, constructor=SwinV2OptimWrapperConstructor, optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.0)
)
default_hooks = dict(checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=1))
"""


@pytest.mark.usefixtures('no_traces')
def test_a_pure_python_config_trains_and_what_it_saves_is_used(load_tool, shapes, tmp_path):
    """It has classes where others have names, and no scope. The config that training saves has dotted names."""
    for name, content in (('pure_base', PURE_BASE), ('pure', PURE)):
        (tmp_path / f'{name}.py').write_text(content)
    start = SwinTransformerV2(dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)), window_size=4, out_indices=(0, 1))
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    flags = '--data-root', shapes / 'ade', '--work-dir', tmp_path / 'run'
    more = '--checkpoint', tmp_path / 'start.pth', '--cfg-options', 'optim_wrapper.optimizer.lr=0'
    assert entries.run_tool(load_tool, 'train', tmp_path / 'pure.py', *flags, *more) == 0
    saved = launch.load_config(tmp_path / 'run/pure.py')
    assert saved.model.backbone.type == 'swinv2_mm.SwinTransformerV2' and saved.default_scope == 'mmseg'
    trained = torch.load(tmp_path / 'run/iter_1.pth', weights_only=False)['state_dict']  # written just now
    for name, value in start.state_dict().items():
        torch.testing.assert_close(trained[f'backbone.{name}'], value)
    image, out = next((shapes / 'val2017').iterdir()), tmp_path / 'out'
    inference = tmp_path / 'run/pure.py', tmp_path / 'run/iter_1.pth', image, '--out', out
    assert entries.run_tool(load_tool, 'infer', *inference) == 0
    assert [path.name for path in (out / 'labels').iterdir()] == [f'{image.stem}.png']
    assert load_tool('analyze_model').build(str(tmp_path / 'pure.py')).arch == start.arch
    exporter, checkpoint = load_tool('export_onnx'), str(tmp_path / 'run/iter_1.pth')
    exported = '--out', 'x.onnx', '--size', '8', '8', '--part', 'model'
    for config in (tmp_path / 'pure.py', tmp_path / 'run/pure.py'):
        args = exporter.parse_args([str(config), checkpoint, *exported])
        assert exporter.build(exporter.read_config(args), args).model.backbone.arch == start.arch
    tested = tmp_path / 'pure.py', tmp_path / 'run/iter_1.pth', '--data-root', shapes / 'ade'
    more = '--work-dir', tmp_path / 'tested', '--show-dir', tmp_path / 'pictures'
    more = *more, '--cfg-options', f'experiment_name={tmp_path.name}'  # in one second, training has the same
    assert entries.run_tool(load_tool, 'test', *tested, *more) == 0
    photos = {path.stem for path in (shapes / 'ade/images/training').iterdir()}
    assert {path.stem for path in (tmp_path / 'pictures').glob('*.png')} == photos


@pytest.mark.parametrize(
    ('right', 'wrong', 'named'),
    [
        ('EncoderDecoder', 'EncoderDecodr', 'EncoderDecodr from mmseg.models'),
        ('FCNHead', 'FCNHed', 'FCNHed from mmseg.models'),
        ('mmseg.models', 'no_such_host.models', 'no_such_host'),
    ],
)
def test_a_class_that_a_pure_python_config_cannot_import_is_one_line(tmp_path, right, wrong, named):
    (tmp_path / 'pure_base.py').write_text(PURE_BASE.replace(right, wrong))
    (tmp_path / 'pure.py').write_text(PURE)
    with pytest.raises(ValueError, match=rf'^config {tmp_path}/pure\.py cannot be read: .*{named}') as error:
        launch.load_config(tmp_path / 'pure.py')
    assert '\n' not in str(error.value)


def test_a_runner_may_be_named_by_its_class():
    for named, right in ((SwinV2Runner, SwinV2Runner), (Runner, SwinV2Runner), (None, SwinV2Runner)):
        assert runner_class(Config(dict(runner_type=named))) is right
    assert runner_class(Config({}), Runner) is Runner
    with pytest.raises(
        ValueError, match=r'runner_type <class .*Linear.> .* derives from neither SwinV2Runner nor Flex'
    ):
        runner_class(Config(dict(runner_type=torch.nn.Linear)))


@pytest.mark.usefixtures('no_traces')
def test_a_run_without_validation_needs_no_data_for_it(load_tool, shapes, tmp_path):
    """In the config, checkpoints are chosen by metrics, and validations become more frequent."""
    ade = tmp_path / 'ade'
    shutil.copytree(shapes / 'ade', ade, ignore=shutil.ignore_patterns('validation'))
    best = ['default_hooks.checkpoint.save_best=mIoU', 'default_hooks.checkpoint.rule=greater']
    more = [*best, 'train_cfg.dynamic_intervals=[(1,1)]', 'val_evaluator.type=IoUMetric']
    assert entries.train(load_tool, tmp_path, tmp_path / 'run', more=more) == 2  # validation data is missing
    assert entries.train(load_tool, tmp_path, tmp_path / 'run', '--no-validate', iters=2, more=more) == 0
    assert {path.name for path in (tmp_path / 'run').glob('*.pth')} == {'iter_1.pth', 'iter_2.pth'}


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        (
            "custom_hooks = [dict(type='EarlyStoppingHook', monitor='mIoU')]",
            'custom_hooks.0 of the config is EarlyStoppingHook',
        ),
        (
            "param_scheduler = [dict(_delete_=True, type='mmengine.ReduceOnPlateauLR', monitor='mIoU')]",
            'param_scheduler.0 of the config is ReduceOnPlateauLR',
        ),
    ],
)
def test_what_needs_validation_does_not_go_without(fails, shapes, tmp_path, lines, message):
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{Path(DEMO).resolve()}'\n{lines}\n")
    line = fails('train', config, '--data-root', shapes, '--no-validate', '--work-dir', tmp_path / 'run')
    assert line == f'error: {message}, which needs validation: leave --no-validate out'
    assert not (tmp_path / 'run').exists()


def test_only_the_hook_that_chooses_checkpoints_changes_without_validation():
    own = dict(type='OwnHook', rule='mine')
    saving = dict(type='CheckpointHook', save_best='mIoU', rule='greater')
    cfg = Config(dict(default_hooks=dict(checkpoint=saving), custom_hooks=[own]))
    launch.drop_validation(cfg)
    assert (cfg.custom_hooks, cfg.default_hooks.checkpoint) == ([own], dict(type='CheckpointHook'))


def test_mixed_precision_needs_something_to_train():
    with pytest.raises(ValueError, match='--amp bf16 needs an optim_wrapper in the config, which has none'):
        launch.set_amp(Config(dict(model=dict(type='X'))), 'bf16')


def test_a_model_without_features_is_one_line_before_it_trains(shapes, tmp_path, load_tool, monkeypatch, capsys):
    config = tmp_path / 'bare.py'
    config.write_text(
        f"_base_ = '{Path(DEMO).resolve()}'\ncustom_imports = dict(imports=['swinv2_mm'])\n"
        "model = dict(_delete_=True, type='SwinTransformerV2', window_size=8, "
        'arch=dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1))\n'
        'optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))\n'
    )
    args = ['train', config, '--data-root', shapes, '--work-dir', tmp_path / 'run', '--amp', 'bf16']
    monkeypatch.setattr(sys, 'argv', [*map(str, args)])
    with pytest.raises(SystemExit) as ended:
        load_tool('train').main()
    line = capsys.readouterr().err.strip().split('\n')[-1]
    assert ended.value.code == 2
    assert line.startswith('error: SwinTransformerV2 has no extract_feat, and only that runs in bfloat16: ')


def test_a_file_is_for_every_backbone_of_ours_and_none_for_all_of_any_kind():
    ours = dict(type='SwinTransformerV2', init_cfg=dict(type='Pretrained', checkpoint='old.pth'))
    other = dict(type='ResNet', init_cfg=dict(type='Pretrained', checkpoint='old.pth'))
    model = dict(backbone=other, parts=[dict(detector=dict(backbone=ours)), dict(teacher_backbone=ours)])
    cfg = Config(dict(model=model))
    assert list(launch.find_backbones(cfg)) == [
        'model.backbone',
        'model.parts.1.teacher_backbone',
        'model.parts.0.detector.backbone',
    ]
    launch.set_initial_weights(cfg, 'new.pth', prefix='student')
    named = [backbone.init_cfg.checkpoint for backbone in launch.find_backbones(cfg).values()]
    assert named == ['old.pth', 'new.pth', 'new.pth']
    assert cfg.model.parts[1].teacher_backbone.init_cfg.prefix == 'student'
    launch.drop_initial_weights(cfg)
    assert [backbone.init_cfg for backbone in launch.find_backbones(cfg).values()] == [None] * 3
    with pytest.raises(ValueError, match='model X has no backbone to give initial weights to'):
        launch.set_initial_weights(Config(dict(model=dict(type='X'))), 'none')
