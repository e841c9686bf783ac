"""`torch.compile` in one graph gives the values of the eager backbone."""

import pytest
import torch
from across_versions import strict_zip


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
@pytest.mark.parametrize('training, depths', [(False, (2,)), (True, (2, 1))])  # a second stage takes long: once
def test_the_compiled_backbone_gives_the_same_values_and_gradients_at_two_sizes(build_small, training, depths):
    torch._dynamo.reset()
    stages = range(len(depths))
    arch = dict(embed_dims=8, depths=depths, num_heads=[2**i for i in stages])
    backbone = build_small(arch=arch, out_indices=stages).train(training)
    compiled = torch.compile(backbone, fullgraph=True)
    for size in ((32, 32), (39, 50)):
        image = torch.randn(2, 3, *size, requires_grad=training)
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
