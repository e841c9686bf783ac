"""Mixed precision: features in bfloat16, heads in float32."""

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from swinv2_mm import BFloat16OptimWrapper


class Detector(nn.Module):
    """Remembers the dtypes that its parts compute in."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(16, 1, 1)

    def extract_feat(self, image):
        features = self.backbone(image)
        self.product = image.flatten(1) @ image.flatten(1).T
        return features

    def forward(self, image):
        features = self.extract_feat(image)
        return features, self.head(features[0])


def test_features_are_extracted_in_bfloat16_and_heads_compute_in_float32(build_small):
    detector = Detector(build_small())
    config = dict(type='BFloat16OptimWrapper', optimizer=torch.optim.SGD(detector.parameters(), 0.1))
    wrapper = OPTIM_WRAPPERS.build(config)
    assert type(wrapper) is BFloat16OptimWrapper
    assert isinstance(wrapper, OptimWrapper)
    image = torch.randn(2, 3, 40, 56)
    expected, _ = detector(image)
    with wrapper.optim_context(detector):
        features, out = detector(image)
    assert detector.product.dtype == torch.bfloat16
    assert all(feature.dtype == torch.float32 for feature in features)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, detector.head(features[0]), rtol=0, atol=0)
    assert not torch.equal(features[0], expected[0])
    relative = (features[0] - expected[0]).norm() / expected[0].norm()
    assert relative < 0.05  # bfloat16 has 8 bits
    wrapper.update_params(out.square().mean())
    assert 'extract_feat' not in vars(detector)
    detector(image)
    assert detector.product.dtype == torch.float32
