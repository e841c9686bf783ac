"""The whole backbone against `transformers.Swinv2Backbone`, an implementation that nobody here wrote."""

import pytest
import torch
from across_versions import strict_zip
from torch import nn
from transformers import Swinv2Backbone, Swinv2Config

from swinv2_mm import SwinTransformerV2, load_pretrained

SETTINGS = [
    # window_size, pretrained_window_sizes of transformers (0: the window), ours
    (8, (0, 0, 0, 0), (8, 8, 8, 8)),
    (16, (0, 0, 0, 0), (16, 16, 16, 8)),
    (16, (12, 12, 12, 6), (12, 12, 12, 6)),
]


@pytest.fixture(params=SETTINGS, ids=str)
def models(request, randomize):
    """Their tiny backbone and ours with the same random weights."""
    window_size, their_pretrained_windows, pretrained_windows = request.param
    config = Swinv2Config(
        image_size=256,
        window_size=window_size,
        pretrained_window_sizes=their_pretrained_windows,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        drop_path_rate=0.0,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    theirs = randomize(Swinv2Backbone(config), std=0.05).eval()
    ours = SwinTransformerV2(
        'tiny', window_size=window_size, pretrained_window_sizes=pretrained_windows, drop_path_rate=0.0
    )
    load_pretrained(ours, theirs.state_dict())
    output_norms = [f'norm{i}' for i in range(4)]
    for norm in output_norms:
        setattr(ours, norm, nn.Identity())  # transformers has none
    return theirs, ours.eval()


def in_float64(theirs, ours):
    # transformers computes its coordinates in float32, and only once: do it again.
    for layer, pretrained_window in zip(theirs.encoder.layers, ours.pretrained_window_sizes):
        for block in layer.blocks:
            attention = block.attention.self
            window = attention.window_size[0]
            offsets = torch.arange(1 - window, window, dtype=torch.float64) * 8 / (pretrained_window - 1)
            coordinates = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
            attention.relative_coords_table = torch.stack(torch.meshgrid(coordinates, coordinates, indexing='ij'), -1)
    return theirs.double(), ours.double()


def assert_same(actual, expected, relative):
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


def test_four_stages_equal_transformers_in_float32(models):
    theirs, ours = models
    image = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        for model in models:  # scales near 100 amplify rounding; the comparison in float64 has them
            for name, parameter in model.named_parameters():
                if name.endswith('logit_scale'):
                    parameter.clamp_(max=3)
        for actual, expected in strict_zip(ours(image), theirs(image).feature_maps):
            assert_same(actual, expected, 1e-5)


def test_four_stages_and_input_gradients_equal_transformers_in_float64(models):
    theirs, ours = in_float64(*models)
    image = torch.randn(2, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        inference = ours(image)
    image.requires_grad_()
    expected = theirs(image).feature_maps
    actual = ours.train()(image)
    projections = [torch.randn_like(x) for x in expected]
    grad, expected_grad = (
        torch.autograd.grad(sum((x * p).sum() for x, p in zip(maps, projections)), image)[0]
        for maps in (actual, expected)
    )
    for maps in (inference, actual):
        for a, e in strict_zip(maps, expected):
            assert_same(a, e, 1e-10)
    assert_same(grad, expected_grad, 1e-10)
