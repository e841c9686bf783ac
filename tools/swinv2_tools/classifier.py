"""A small SwinV2 classifier: a stand-in for published ImageNet checkpoints, and the subject of studies of transfer."""

from __future__ import annotations

import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, ImgDataPreprocessor
from torch import Tensor, nn

from swinv2_mm import SwinTransformerV2


class Classifier(BaseModel):
    """A backbone, the mean over its last map, and a linear layer.

    Args:
        backbone (SwinTransformerV2): returns its last stage alone.
        num_classes (int): the classes.
        grid (int): the backbone sees canvases of ``grid`` x ``grid`` images. Each image is classified by the mean over
            its own part of the map.
    """

    def __init__(self, backbone: SwinTransformerV2, num_classes: int, grid: int = 1):
        statistics = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])  # of ImageNet, as in recipes
        super().__init__(ImgDataPreprocessor(**statistics, bgr_to_rgb=True))
        self.backbone = backbone
        self.head = nn.Linear(backbone.arch.embed_dims * 2 ** (len(backbone.layers) - 1), num_classes)
        self.grid = grid

    def features(self, inputs: Tensor) -> Tensor:
        """The mean features (B, C) of normalised images (B, 3, H, W). B is a multiple of grid**2."""
        maps = self.backbone(tile(inputs, self.grid))[-1]
        return F.adaptive_avg_pool2d(maps, self.grid).permute(0, 2, 3, 1).reshape(len(inputs), -1)

    def forward(self, inputs: Tensor, data_samples: Tensor, mode: str = 'tensor') -> Tensor | dict | list[bool]:
        """Logits (B, num_classes) of images (B, 3, H, W). Mode loss: the loss. Mode predict: whether each is right.

        ``data_samples`` (B,) are the labels, under the name that mmengine's preprocessor gives them.
        """
        logits = self.head(self.features(inputs))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, data_samples, label_smoothing=0.1))
        return (logits.argmax(1) == data_samples).tolist() if mode == 'predict' else logits


def tile(images: Tensor, grid: int) -> Tensor:
    """Lay images (B, C, H, W) out on canvases (B / grid**2, C, grid * H, grid * W), row by row."""
    channels, height, width = images.shape[1:]
    cells = images.reshape(-1, grid, grid, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, grid * height, grid * width)


class Accuracy(BaseMetric):
    """The share of images that are classified right, in percent."""

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(accuracy=100 * sum(results) / len(results))
