"""An exported file gives the maps of the eager model at any batch, with standard operators, or it isn't there."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from swinv2_mm.engine import launch

DET = """_base_ = '{root}/configs/mask_rcnn_swinv2.py'
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=8, depths=(2, 1), num_heads=(1, 2)), window_size=4, out_indices=(0, 1)
    ),
    neck=dict(in_channels=[8, 16], out_channels=8, num_outs=3),
)
"""
SEG = """_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swinv2_mm'])
arch = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))
model = dict(
    backbone=dict(_delete_=True, type='SwinTransformerV2', arch=arch, window_size=3, out_indices=(0, 1)),
    decode_head=dict(in_channels=[8, 16], in_index=[0, 1], pool_scales=(1,), channels=8),
    auxiliary_head=dict(in_channels=16, in_index=1),
)
"""


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """The files of a small detector, whose window divides no map, and of a small segmentor without a neck."""
    folder = tmp_path_factory.mktemp('configs')
    (folder / 'det.py').write_text(DET.format(root=Path(__file__).parents[1]))
    (folder / 'seg.py').write_text(SEG)
    return SimpleNamespace(det=folder / 'det.py', seg=folder / 'seg.py')


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('export_onnx')


@pytest.fixture(scope='module')
def run(tool):
    """Run the command line in this process."""

    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', ['export_onnx.py', *map(str, args)])
            tool.main()

    return run


@pytest.fixture
def fails(run, capsys):
    """Run a command line that must end with one line and an exit code, 2 for a user's mistake; returns the line."""

    def fails(*args, code=2):
        with pytest.raises(SystemExit) as ended:
            run(*args)
        assert ended.value.code == code
        (line,) = capsys.readouterr().err.strip().split('\n')
        return line

    return fails


@pytest.fixture(scope='module')
def trained(configs, randomize, tmp_path_factory):
    """Build the model of a config with random weights, and a checkpoint of it."""

    def trained(config, **backbone):
        cfg = launch.load_config(config)
        launch.set_initial_weights(cfg, 'none')
        cfg.model.backbone.update(backbone)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = randomize(MODELS.build(cfg.model), std=0.3).eval()
        path = tmp_path_factory.mktemp('weights') / 'epoch_1.pth'
        torch.save({'state_dict': model.state_dict()}, path)
        return model, path

    return trained


def assert_agrees(path, model, names, size, batches):
    """Assert that a file gives the maps of a model, for images that are not the ones it was exported with."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    assert [out.name for out in session.get_outputs()] == names
    for batch in batches:
        image = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected = model(image)
        outs = [torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})]
        for out, value in zip(outs, expected, strict=True):
            assert (value - value[:1]).abs().amax((1, 2, 3))[1:].gt(0.1 * value.abs().max()).all()
            torch.testing.assert_close(out, value, rtol=0, atol=1e-4 * value.abs().max().item())


def assert_standard(path):
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {'', 'ai.onnx'}
    assert not model.functions


@pytest.fixture(scope='module')
def dynamic(run, configs, trained, tmp_path_factory):
    """Backbone and neck for any batch, with ragged windows and other ones than the config's."""
    model, checkpoint = trained(configs.det)
    path = tmp_path_factory.mktemp('files') / 'new' / 'neck.onnx'
    flags = ('--size', 13, 51, '--window-size', 3, 8, '--part', 'neck', '--dynamic', 'batch')
    run(configs.det, checkpoint, '--out', path, *flags)
    model.backbone.set_window_size((3, 8))
    return model, path


def test_a_file_for_any_batch_agrees_at_batches_it_was_not_exported_at(dynamic):
    model, path = dynamic

    def pyramid(image):
        return model.neck(model.backbone(image))

    assert_agrees(path, pyramid, ['level0', 'level1', 'level2'], (13, 51), (1, 2, 3))
    assert_standard(path)
    (image,) = onnx.load(path).graph.input
    sides = image.type.tensor_type.shape.dim
    assert (sides[0].dim_param, [side.dim_value for side in sides[1:]]) == ('batch', [3, 13, 51])


def test_a_file_holds_no_traces_of_the_code_and_stands_alone(dynamic):
    _, path = dynamic
    assert not any(node.metadata_props for node in onnx.load(path).graph.node)
    assert list(path.parent.iterdir()) == [path]


def test_a_runtime_computes_the_position_mlps_once_when_it_loads_a_file(dynamic, tmp_path):
    _, path = dynamic
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / 'loaded.onnx')
    onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    written, loaded = (
        [node.op_type for node in onnx.load(file).graph.node] for file in (path, tmp_path / 'loaded.onnx')
    )
    assert 'Sigmoid' in written and 'Softmax' in loaded
    assert not {'Sigmoid', 'Relu'} & set(loaded)


@pytest.mark.parametrize(('kind', 'opset', 'batch'), [('linear_cpb', 18, 1), ('parameterized', 23, 2)])
def test_a_file_for_one_batch_agrees_with_other_position_biases(run, configs, trained, tmp_path, kind, opset, batch):
    model, checkpoint = trained(configs.seg, position_bias=kind)
    path = tmp_path / 'backbone.onnx'
    flags = ('--size', 12, 12, '--batch', batch, '--opset', opset)
    run(configs.seg, checkpoint, '--out', path, *flags, '--cfg-options', f'model.backbone.position_bias={kind}')
    assert_agrees(path, model.backbone, ['stride4', 'stride8'], (12, 12), (batch,))
    assert_standard(path)
    file = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [('', opset)]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        (('--part', 'model'), '--part model: a whole model is not exported'),
        (('--dynamic', 'size'), '--dynamic size: windows are cut for one image size; export a file for each --size'),
        (('--dynamic', 'batch', '--batch', 2), 'leave one out'),
        (('--batch', 0), '--batch must be 1 image or more, got 0'),
        (('--size', 0, 64), '--size must be a height and a width of 1 pixel or more'),
        (('--out', 'backbone.pth'), 'name a file that ends with .onnx'),
        (('--window-size', 0), 'window_size must be ints of at least 1 token'),
        (('--part', 'neck', '--cfg-options', 'model.neck=None'), 'model MaskRCNN of'),
        (('--part', 'neck', '--cfg-options', 'model.neck.conv_cfg.type=DCNv2'), 'FPN has ModulatedDeformConv2dPack'),
        (
            ('--cfg-options', 'model.backbone.arch=giant', 'model.backbone.out_indices=(3,)'),
            'an ONNX file holds 2 GiB at most',
        ),
        (('--cfg-options', 'model.backbone.type=ResNet'), 'backbone ResNet of'),
        (('--cfg-options', 'model.backbone.window=4'), 'window is window_size'),
    ],
)
def test_what_can_not_be_exported_is_one_line_at_once(fails, configs, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.onnx, 'export', None)
    assert says in fails(configs.det, 'none', '--out', 'backbone.onnx', '--size', 16, 16, *flags)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_missing_or_of_another_config_is_one_line(fails, configs, trained, tmp_path):
    _, of_seg = trained(configs.seg)
    flags = ('--out', tmp_path / 'backbone.onnx', '--size', 16, 16)
    assert 'missing.pth' in fails(configs.det, tmp_path / 'missing.pth', *flags)
    assert 'backbone: it has arch=' in fails(configs.det, of_seg, *flags)
    assert 'has no neck: use --part backbone' in fails(configs.seg, of_seg, *flags, '--part', 'neck')
    assert not list(tmp_path.iterdir())


def constant_model(value, batch=1, domain=''):
    """An ONNX model that gives maps of one value, whatever the image."""
    maps = {'stride4': (batch, 8, 2, 2), 'stride8': (batch, 16, 1, 1)}

    def info(name, shape):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('Identity', [f'{name}_value'], [name], domain=domain) for name in maps],
        'graph',
        [info('image', (1, 3, 8, 8))],
        [info(name, shape) for name, shape in maps.items()],
        [onnx.numpy_helper.from_array(np.full(shape, value, 'f4'), f'{name}_value') for name, shape in maps.items()],
    )
    opsets = [onnx.helper.make_opsetid(name, 20 if name == '' else 1) for name in {'', domain}]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ('wrong', 'says'),
    [
        (dict(value=0), 'differ by 1.0e+00 of the largest value of a map, more than 1e-04: nothing is written'),
        (dict(value=np.nan), 'differ by inf'),
        (dict(value=0, batch=2), 'differ by inf'),
        (dict(value=0, domain='custom'), 'needs operators beyond the standard, of custom'),
    ],
)
def test_a_wrong_file_is_not_left_and_does_not_replace_one(fails, tool, configs, tmp_path, monkeypatch, wrong, says):
    monkeypatch.setattr(tool, 'export', lambda *args: constant_model(**wrong))
    path = tmp_path / 'backbone.onnx'
    path.write_text('an old file')
    assert says in fails(configs.seg, 'none', '--out', path, '--size', 8, 8, code=1)
    assert path.read_text() == 'an old file'
    assert list(tmp_path.iterdir()) == [path]


def test_what_torch_can_not_export_is_one_line(fails, configs, tmp_path, monkeypatch):
    def export(*args, **kwargs):
        raise torch.onnx.OnnxExporterError('a long story') from RuntimeError('no such operator\nand a trace')

    monkeypatch.setattr(torch.onnx, 'export', export)
    line = fails(configs.seg, 'none', '--out', tmp_path / 'backbone.onnx', '--size', 8, 8)
    assert line.endswith('does not export the backbone: no such operator')
    assert not list(tmp_path.iterdir())


def test_random_weights_of_a_trial_reach_the_maps_through_attention(tool, configs):
    args = tool.parse_args([str(configs.seg), 'none', '--out', 'backbone.onnx', '--size', '8', '8'])
    pyramid = tool.build(tool.read_config(args), args)
    image = torch.randn(1, 3, 8, 8)
    (before, _), _ = pyramid(image), pyramid.backbone.layers[0].blocks[0].attn.proj.weight.data.mul_(2).add_(0.1)
    assert (pyramid(image)[0] - before).abs().max() > 0.1
