"""Mixed precision: features in bfloat16, heads in float32."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from swinv2_mm import BFloat16OptimWrapper
from swinv2_mm.engine.amp import feature_extractors


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


class Wrapped(BaseModel):
    """A model that uses the backbone of a detector in a way of its own."""

    def __init__(self, detector, use):
        super().__init__()
        self.detector, self.use = detector, use

    def forward(self, image):
        return self.use(self.detector, image)


class Inner(Detector, BaseModel):
    pass


def wrapped(build_small, use):
    detector = Inner(build_small())
    model = Wrapped(detector, use)
    return model, BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))


def test_features_of_a_detector_inside_are_extracted_in_bfloat16(build_small):
    model, wrapper = wrapped(build_small, lambda detector, image: detector.extract_feat(image))
    own = model.detector.extract_feat = lambda image: Detector.extract_feat(model.detector, image)
    image = torch.randn(1, 3, 40, 56)
    with torch.autocast('cpu', torch.bfloat16):
        expected = model.detector.backbone(image)
    with wrapper.optim_context(model):
        features = model(image)
    assert all(torch.equal(each, right.float()) for each, right in zip(features, expected))
    assert model.detector.product.dtype == torch.bfloat16
    assert model.detector.extract_feat is own  # what was set on the detector is there again


def test_a_model_that_extracts_no_features_is_refused(build_small):
    model, wrapper = wrapped(build_small, lambda detector, image: detector.backbone(image))
    assert feature_extractors(model) == [model.detector]
    message = r'^Inner does not call its extract_feat, .*optim_wrapper\.type=OptimWrapper'
    with pytest.raises(ValueError, match=message), wrapper.optim_context(model):
        model(torch.randn(1, 3, 32, 32))
    assert 'extract_feat' not in vars(model.detector)
    for context in (feature_extractors, lambda backbone: wrapper.optim_context(backbone).__enter__()):
        with pytest.raises(ValueError, match=r'^SwinTransformerV2 has no extract_feat, and only that runs'):
            context(model.detector.backbone)


def test_an_error_of_the_model_is_not_replaced(build_small):
    model, wrapper = wrapped(build_small, lambda detector, image: image.nothing)
    with pytest.raises(AttributeError, match='nothing'), wrapper.optim_context(model):
        model(torch.randn(1, 3, 32, 32))
