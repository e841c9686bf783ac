"""An exported file gives what the host's model gives, by standard operators, or it isn't there."""

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS, DefaultScope
from torch import nn

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
    decode_head=dict(in_channels=[8, 16], in_index=[0, 1], pool_scales=(1, 3), channels=8, num_classes=4),
    auxiliary_head=dict(in_channels=16, in_index=1, num_classes=4),
)
"""
RETINA = """_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['swinv2_mm'])
arch = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))
model = dict(
    backbone=dict(_delete_=True, type='SwinTransformerV2', arch=arch, window_size=4, out_indices=(0, 1)),
    neck=dict(in_channels=[8, 16], out_channels=8, num_outs=3, start_level=0),
    bbox_head=dict(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=3,
                   anchor_generator=dict(strides=[4, 8, 16])),
    test_cfg=dict(nms_pre=100, score_thr=0.3, max_per_img=20),
)
"""
MASK = """_base_ = '{root}/configs/mask_rcnn_swinv2.py'
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=8, depths=(2, 1), num_heads=(1, 2)), window_size=4, out_indices=(0, 1)
    ),
    neck=dict(in_channels=[8, 16], out_channels=8, num_outs=3),
    rpn_head=dict(in_channels=8, feat_channels=8, anchor_generator=dict(strides=[4, 8, 16])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8]),
        mask_roi_extractor=dict(out_channels=8, featmap_strides=[4, 8]),
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=3),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1, num_classes=3),
    ),
    test_cfg=dict(rpn=dict(nms_pre=60, max_per_img=40), rcnn=dict(score_thr=0.2, max_per_img=10)),
)
"""


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """The files of a detector whose window divides no map, a segmentor without a neck, and two detectors with heads."""
    folder = tmp_path_factory.mktemp('configs')
    texts = dict(det=DET, seg=SEG, retina=RETINA, mask=MASK)
    for name, text in texts.items():
        (folder / f'{name}.py').write_text(text.replace('{root}', str(Path(__file__).parents[1])))
    return SimpleNamespace(**{name: folder / f'{name}.py' for name in texts})


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

    def trained(config, std=0.3, **backbone):
        cfg = launch.load_config(config)
        launch.set_initial_weights(cfg, 'none')
        cfg.model.backbone.update(backbone)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = randomize(MODELS.build(cfg.model), std).eval().requires_grad_(False)
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
    graph = onnx.load(path).graph
    assert not any(node.metadata_props for node in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info))
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
        (('--part', 'model', '--cfg-options', 'model.type=CascadeRCNN'), 'model is CascadeRCNN'),
        *(
            (('--part', 'model', '--cfg-options', f'model.{option}'), f'--part model: {says}')
            for option, says in (
                ('test_cfg.rcnn.nms.type=soft_nms', 'test_cfg.rcnn.nms is'),
                ('test_cfg.rcnn.nms.class_agnostic=True', 'test_cfg.rcnn.nms is'),
                ('test_cfg.rcnn.nms=None', 'test_cfg.rcnn.nms is {}'),
                ('test_cfg.rcnn.max_per_img=-1', 'test_cfg.rcnn.max_per_img is -1'),
                ('test_cfg.rpn.nms_pre=0', 'test_cfg.rpn.nms_pre is 0'),
                ('rpn_head.loss_cls.use_sigmoid=False', 'loss_cls.use_sigmoid is False'),
                ('rpn_head.bbox_coder.clip_border=False', 'bbox_coder.clip_border is False'),
                ('roi_head.bbox_head.with_reg=False', 'roi_head.bbox_head.with_reg is False'),
                ('roi_head.bbox_roi_extractor.roi_layer.pool_mode=max', 'roi_layer.pool_mode is max'),
                ('roi_head.mask_roi_extractor.roi_layer.output_size=(14,10)', 'roi_layer.output_size is (14, 10)'),
                ('roi_head.mask_head.type=CoarseMaskHead', 'mask_head is CoarseMaskHead'),
            )
        ),
        (('--preprocess', '--cfg-options', 'model.backbone.in_channels=4'), 'the backbone takes 4: leave it out'),
        (('--part', 'model', '--output', 'scores'), '--output scores is for a whole segmentor'),
        (('--repeat', '-1'), '--repeat must be 0 runs or more, got -1'),
        (('--dynamic', 'batch', '--batch', 2), 'leave one out'),
        (('--batch', 0), '--batch must be 1 image or more, got 0'),
        (('--size', 0, 64), '--size must be a height and a width of 1 pixel or more'),
        (('--out', 'backbone.pth'), 'name a file that ends with .onnx'),
        (('--window-size', 0), 'window_size must be ints of at least 1 token'),
        (('--part', 'neck', '--cfg-options', 'model.neck=None'), 'model MaskRCNN of'),
        (
            ('--part', 'neck', '--cfg-options', 'model.neck.conv_cfg.type=DCNv2'),
            'neck FPN has ModulatedDeformConv2dPack',
        ),
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
        (dict(value=0), 'onnxruntime and PyTorch differ by 1.0e+00, more than 1e-04: nothing is written'),
        (dict(value=np.nan), 'differ by inf'),
        (dict(value=0, batch=2), 'differ by inf'),
        (dict(value=0, domain='custom'), 'needs operators beyond the standard, of custom'),
    ],
)
def test_a_wrong_file_is_not_left_and_does_not_replace_one(fails, tool, configs, tmp_path, monkeypatch, wrong, says):
    monkeypatch.setattr(tool.onnx_files, 'export', lambda *args: constant_model(**wrong))
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
    before, _ = pyramid(image)
    pyramid.model.backbone.layers[0].blocks[0].attn.proj.weight.data.mul_(2).add_(0.1)
    assert (pyramid(image)[0] - before).abs().max() > 0.1


# Whole models, against the hosts' own predictions


def predict(model, images):
    """What the host's model predicts for images (B, H, W, 3) of 8 bits, in their own pixels."""
    height, width = images.shape[1:3]
    if model.data_preprocessor.__class__.__module__.startswith('mmseg'):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    samples = [Sample(metainfo=dict(meta)) for _ in images]
    return model.test_step(dict(inputs=[image.permute(2, 0, 1) for image in images], data_samples=samples))


def photos(batch, height, width):
    return torch.randint(256, (batch, height, width, 3), dtype=torch.uint8)


def runtimes(path):
    """Functions that run a file with onnxruntime and with OpenVINO."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return (
        lambda image: [torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})],
        lambda image: [torch.from_numpy(out) for out in compiled([image.numpy()]).values()],
    )


def test_a_whole_segmentor_for_any_size_gives_the_labels_of_the_host(run, configs, trained, tmp_path):
    model, checkpoint = trained(configs.seg)
    path = tmp_path / 'segmentor.onnx'
    flags = ('--size', 40, 52, '--part', 'model', '--preprocess', '--dynamic', 'batch', 'size')
    run(configs.seg, checkpoint, '--out', path, *flags)
    assert_standard(path)
    for infer in runtimes(path):
        for shape in ((1, 12, 12), (2, 33, 61), (3, 52, 40)):
            image = photos(*shape)
            (labels,) = infer(image)
            samples = predict(model, image)
            wanted = torch.stack([sample.pred_sem_seg.data[0] for sample in samples])
            best = torch.stack([sample.seg_logits.data for sample in samples]).topk(2, 1).values
            clear = best[:, 0] - best[:, 1] > 1e-3
            assert clear.float().mean() > 0.99 and len(wanted.unique()) > 1
            assert torch.equal(labels[clear], wanted[clear])


def test_scores_of_a_whole_segmentor_are_the_probabilities_of_the_host(tool, configs, trained):
    model, checkpoint = trained(configs.seg)
    flags = ('--out', 'x.onnx', '--size', '8', '8', '--part', 'model', '--preprocess', '--output', 'scores')
    args = tool.parse_args([str(configs.seg), str(checkpoint), *flags])
    image = photos(2, 21, 28)
    (scores,) = tool.build(tool.read_config(args), args)(image)
    wanted = torch.stack([sample.seg_logits.data for sample in predict(model, image)]).softmax(1)
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-6)


def paste_of_the_docs():
    namespace = {}
    text = (Path(__file__).parents[1] / 'docs/export.md').read_text()
    exec(re.search(r'```python\n(.*?)session =', text, re.DOTALL)[1], namespace)
    return namespace['paste']


PASTE = paste_of_the_docs()
STD = 0.1  # of weights: with larger ones many scores are 1, order among them is chance, and rounding grows large


def assert_detected(outs, samples, height, width):
    """Assert that the boxes of a file are those of the host, and the masks after they are pasted."""
    for i, sample in enumerate(samples):
        wanted = sample.pred_instances
        boxes, scores, labels, *masks = (out[i, : len(wanted)] for out in outs)
        assert len(wanted) > 2
        assert (outs[2][i, len(wanted) :] == -1).all() and (outs[1][i, len(wanted) :] == -1).all()
        assert torch.equal(labels, wanted.labels)
        torch.testing.assert_close(scores, wanted.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(boxes, wanted.bboxes, rtol=0, atol=1e-4 * max(height, width))
        for box, mask, whole in zip(boxes, *masks, wanted.masks if masks else ()):
            pasted = _do_paste_mask(mask[None, None], box[None], height, width, skip_empty=False)[0][0]
            assert ((pasted >= 0.5) != whole)[(pasted - 0.5).abs() > 1e-3].sum() == 0
            by_docs = torch.from_numpy(PASTE(mask.numpy(), box.numpy(), height, width))
            assert (by_docs - pasted).abs().max() < 0.05  # OpenCV counts in 32nds of a pixel


@pytest.mark.parametrize('kind', ['retina', 'mask'])
def test_a_detector_of_standard_operators_detects_what_the_host_does(tool, configs, trained, kind):
    model, checkpoint = trained(getattr(configs, kind), STD)
    flags = ('--out', 'x.onnx', '--size', '8', '8', '--part', 'model', '--preprocess')
    args = tool.parse_args([str(getattr(configs, kind)), str(checkpoint), *flags])
    detector = tool.build(tool.read_config(args), args)
    for shape in ((2, 64, 96), (1, 70, 51), (1, 33, 40)):  # padded to multiples of 32
        image = photos(*shape)
        assert_detected(detector(image), predict(model, image), *shape[1:])


@pytest.mark.parametrize(('kind', 'dynamic'), [('retina', ('batch', 'size')), ('mask', ('batch',))])
def test_a_file_of_a_whole_detector_detects_what_the_host_does(run, configs, trained, tmp_path, capsys, kind, dynamic):
    model, checkpoint = trained(getattr(configs, kind), STD)
    path = tmp_path / 'detector.onnx'
    flags = ('--size', 64, 88, '--part', 'model', '--preprocess', '--repeat', 1, '--dynamic', *dynamic)
    run(getattr(configs, kind), checkpoint, '--out', path, *flags)
    said = capsys.readouterr().out
    for runtime in ('onnxruntime', 'OpenVINO'):
        assert re.search(rf'^{runtime} and PyTorch differ by \d', said, re.MULTILINE)
        assert re.search(rf'^{runtime}: \d+\.\d+ s, \d+\.\d+ of PyTorch$', said, re.MULTILINE)
    assert f'NonMaxSuppression {1 if kind == "retina" else 2},' in said
    assert_standard(path)
    for infer in runtimes(path):
        for shape in ((2, 64, 88), (1, 64, 88), *([(1, 90, 50)] if 'size' in dynamic else ())):
            image = photos(*shape)
            assert_detected(infer(image), predict(model, image), *shape[1:])


def test_boxes_that_are_moved_or_have_another_label_differ(tool, configs, trained):
    _, checkpoint = trained(configs.retina, STD)
    flags = ('--out', 'x.onnx', '--size', '8', '8', '--part', 'model')
    args = tool.parse_args([str(configs.retina), str(checkpoint), *flags])
    detector = tool.build(tool.read_config(args), args)
    expected = detector.expected(torch.randn(1, 3, 64, 64))
    assert (expected[2] >= 0).all()  # 20 boxes, of which none may be left out
    assert detector.difference(expected, expected) == 0
    backwards = [part.flip(1) for part in expected]
    assert detector.difference(backwards, expected) == 0
    for part, change in ((0, 10.0), (1, 0.1), (1, np.nan), (2, 7)):
        changed = copy.deepcopy(expected)
        changed[part][0, 3] += change
        assert detector.difference(changed, expected) > 0.01
        assert detector.difference(expected, changed) > 0.01
    fewer = copy.deepcopy(expected)
    fewer[2][0, 5:] = -1
    assert detector.difference(fewer, expected) > 0.01


def test_a_segmentor_that_slides_is_refused_in_one_line(fails, configs, tmp_path):
    flags = ('--out', tmp_path / 'x.onnx', '--size', 16, 16, '--part', 'model')
    line = fails(configs.seg, 'none', *flags, '--cfg-options', 'model.test_cfg.mode=slide')
    assert '--cfg-options model.test_cfg.mode=whole' in line


def test_other_segmentors_and_preprocessors_are_refused_in_one_line(fails, configs, tmp_path):
    flags = ('--out', tmp_path / 'x.onnx', '--size', 16, 16, '--part', 'model', '--preprocess', '--cfg-options')
    for option, says in (
        ('model.type=DepthEstimator', 'model is DepthEstimator'),
        ('model.data_preprocessor.test_cfg.size=(32,32)', 'pads images to one size'),
    ):
        assert says in fails(configs.seg, 'none', *flags, option)
    with pytest.raises(ValueError, match='data_preprocessor is BaseDataPreprocessor'):
        sys.modules['swinv2_tools.onnx_models'].Preprocess(BaseDataPreprocessor())


def test_labels_that_are_none_or_of_another_shape_differ(tool, configs):
    flags = ('--out', 'x.onnx', '--size', '8', '8', '--part', 'model')
    args = tool.parse_args([str(configs.seg), 'none', *flags])
    segmentor = tool.build(tool.read_config(args), args)
    image = torch.randn(2, 3, 16, 20)
    (scores,), (labels,) = segmentor.expected(image), segmentor(image)
    assert segmentor.difference([labels, scores], [scores]) == 0
    for wrong in (labels - 9, labels + 4, labels[:1], labels[:, :1]):
        assert segmentor.difference([wrong, scores], [scores]) == np.inf
    assert 0.01 < segmentor.difference([(labels + 1) % 4, scores], [scores]) < 1
    assert segmentor.difference([labels, scores + 0.1], [scores]) > 0.1
    nothing = torch.zeros(1, 2)
    assert segmentor.difference.__globals__['difference'](nothing, nothing) == 0


def test_a_size_below_one_window_is_refused_in_one_line(fails, configs, tmp_path):
    line = fails(configs.seg, 'none', '--out', tmp_path / 'x.onnx', '--size', 11, 16, '--dynamic', 'size')
    assert line == 'error: --dynamic size starts at one window, 12 pixels: --size [11, 16] is smaller'


@pytest.mark.parametrize('size', [1, 3, (2, 5)])
def test_a_pool_for_any_size_averages_as_the_adaptive_one(tool, size):
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(size))
    for height in range(1, 14):
        x = torch.randn(2, 3, height, 17 - height, dtype=torch.float64)
        wanted = nn.AdaptiveAvgPool2d(size)(x)
        with tool.any_size_pools(layers):
            assert type(layers[0]) is not nn.AdaptiveAvgPool2d
            torch.testing.assert_close(layers(x), wanted, rtol=0, atol=1e-12)
        assert type(layers[0]) is nn.AdaptiveAvgPool2d
