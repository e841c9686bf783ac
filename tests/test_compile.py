"""`torch.compile` gives the values of the eager backbone: of the backbone in one graph, and of a run of mmengine's."""

import itertools

import mmengine.runner.runner
import pytest
import torch
from across_versions import strict_zip
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel

from swinv2_mm import backbone as backbone_module
from swinv2_mm.engine.runner import SwinV2Runner

runs = itertools.count()


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
@pytest.mark.parametrize('training, depths', [(False, (2,)), (True, (2, 1))])  # a second stage takes long: once
def test_the_compiled_backbone_gives_the_same_values_and_gradients_at_two_sizes(
    build_small, monkeypatch, training, depths
):
    torch._dynamo.reset()
    monkeypatch.setattr(backbone_module, 'COMPILED_PART_SIZE', 8 * 64)  # inference runs blocks part by part
    stages = range(len(depths))
    arch = dict(embed_dims=8, depths=depths, num_heads=[2**i for i in stages])
    backbone = build_small(arch=arch, out_indices=stages).train(training)
    compiled = torch.compile(backbone, fullgraph=True)
    for size in ((32, 32), (39, 50)):
        image = torch.randn(2 if training else 1, 3, *size, requires_grad=training)
        with torch.set_grad_enabled(training):
            outs, expected = compiled(image), backbone(image)
        for out, value in strict_zip(outs, expected):
            torch.testing.assert_close(out, value, rtol=1e-4, atol=1e-4)
        if training:
            weights = [torch.randn_like(value) for value in expected]
            of = (image, *backbone.parameters())
            gradients = torch.autograd.grad(outs, of, weights)
            for gradient, value in strict_zip(gradients, torch.autograd.grad(expected, of, weights)):
                torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
@pytest.mark.parametrize('in_parts', [True, False])
def test_a_graph_for_inference_holds_the_parts_of_one_image_and_one_part_of_any_batch(
    build_small, monkeypatch, in_parts
):
    torch._dynamo.reset()
    monkeypatch.setattr(backbone_module, 'COMPILED_PART_SIZE', 8 * 64 if in_parts else 8 * 256)
    depth, graphs = 2, []
    arch = dict(embed_dims=8, depths=(depth,), num_heads=(1,))
    backbone = build_small(arch=arch, window_size=8, out_indices=(0,)).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        for batch in (1, 2, 3, 5):
            image = torch.randn(batch, 3, 64, 64)
            torch.testing.assert_close(compiled(image)[0], backbone(image)[0], rtol=1e-4, atol=1e-4)
    linear = [sum(node.target is torch.ops.swinv2_mm.linear.default for node in graph.graph.nodes) for graph in graphs]
    assert linear == [4 * (4 + 4) if in_parts else 4 * depth, 4 * depth]  # four parts of 8 x 8 windows, or shifted


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))


class Detector(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def extract_feat(self, images):
        return self.backbone(images)

    def forward(self, inputs, mode):
        return dict(loss=sum(x.square().mean() for x in self.extract_feat(torch.stack(inputs))))

    def train_step(self, data, optim_wrapper):
        return super().train_step(dict(inputs=data), optim_wrapper)


def trained(build_small, work_dir, wrapper, compiled):
    """The parameters after three steps of a run that a config describes."""
    torch.manual_seed(0)
    arch = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))
    model = Detector(build_small(arch=arch, out_indices=(0, 1)))
    SwinV2Runner(
        model,
        str(work_dir),
        train_dataloader=dict(batch_size=2, dataset=Images(), sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=ConfigDict(
            type=wrapper,
            constructor='SwinV2OptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
        ),
        experiment_name=f'compiled_{next(runs)}',
        cfg=Config(dict(compile=compiled)),
    ).train()
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'BFloat16OptimWrapper'])
@pytest.mark.usefixtures('no_traces')
def test_a_run_whose_config_compiles_trains_the_same(build_small, tmp_path, monkeypatch, wrapper):
    torch._dynamo.reset()
    monkeypatch.setattr(mmengine.runner.runner, 'collect_env', dict)  # which takes seconds
    expected = trained(build_small, tmp_path, wrapper, False)
    compiled = trained(build_small, tmp_path, wrapper, dict(backend='eager'))
    for name, value in expected.items():
        assert (compiled[name] - value).norm() <= 1e-4 * value.norm(), name
    if wrapper != 'OptimWrapper':
        in_float32 = trained(build_small, tmp_path, 'OptimWrapper', False)
        assert any((in_float32[name] - value).norm() > 1e-2 * value.norm() for name, value in expected.items())
