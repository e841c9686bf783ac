"""What is exported: a backbone, with or without its neck, or a segmentor, from image to output.

Each also says how far what a runtime computes is from what PyTorch computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Preprocess(nn.Module):
    """What a model's data preprocessor does in a test: order of channels, normalisation, padding to a multiple.

    Args:
        preprocessor (nn.Module): of mmdet, mmseg or mmengine.

    Raises:
        ValueError: it is of another class, or pads images to one size.
    """

    CLASSES = 'DetDataPreprocessor', 'SegDataPreProcessor', 'ImgDataPreprocessor'

    def __init__(self, preprocessor: nn.Module):
        super().__init__()
        kind = type(preprocessor)
        if kind.__name__ not in self.CLASSES or kind.__module__.partition('.')[0] not in ('mmdet', 'mmseg', 'mmengine'):
            raise ValueError(
                f'--preprocess: data_preprocessor is {kind.__name__}, and {", ".join(self.CLASSES)} are exported: '
                'leave --preprocess out'
            )
        config = getattr(preprocessor, 'test_cfg', None) or {}
        if config.get('size') is not None:
            raise ValueError(
                f'--preprocess: data_preprocessor.test_cfg.size={config["size"]} pads images to one size: pass '
                '--cfg-options model.data_preprocessor.test_cfg=None'
            )
        self.divisor = config.get('size_divisor') or getattr(preprocessor, 'pad_size_divisor', 1)
        self.pad_value = getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))
        flips = getattr(preprocessor, 'channel_conversion', getattr(preprocessor, '_channel_conversion', False))
        self.flips_channels = bool(flips)
        for name in ('mean', 'std'):
            value = getattr(preprocessor, name, None)
            neutral = torch.full((1, 1, 1), float(name == 'std'))
            self.register_buffer(name, neutral if value is None else value.clone())

    def forward(self, image: Tensor) -> Tensor:
        """An image (B, H, W, 3) of integers, BGR as OpenCV loads it, as the model takes it: (B, 3, H', W')."""
        height, width = image.shape[1:3]
        image = image.permute(0, 3, 1, 2).float()
        image = image.flip(1) if self.flips_channels else image
        image = (image - self.mean) / self.std
        if self.divisor == 1:
            return image
        # Of positive numbers: division in ONNX rounds to 0.
        right, bottom = ((side + self.divisor - 1) // self.divisor * self.divisor - side for side in (width, height))
        return F.pad(image, (0, right, 0, bottom), value=self.pad_value)


class Exported(nn.Module, ABC):
    """A part of a model, with or without its preprocessing. ``image`` is (B, 3, H, W), or (B, H, W, 3) with it.

    Args:
        model (nn.Module): a detector or segmentor.
        preprocess (bool): whether the preprocessing of images is a part of it.
    """

    def __init__(self, model: nn.Module, preprocess: bool):
        super().__init__()
        self.model = model
        self.preprocess = Preprocess(model.data_preprocessor) if preprocess else None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.compute(*self.prepare(image))

    def prepare(self, image: Tensor) -> tuple[Tensor, int, int]:
        """What the model takes of an image, and the height and width of the image itself."""
        if self.preprocess is None:
            return image, *image.shape[2:]
        return self.preprocess(image), *image.shape[1:3]

    @abstractmethod
    def compute(self, image: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """The outputs of a normalised image (B, 3, H, W), without padding as large as this."""

    @abstractmethod
    def names(self, count: int) -> list[str]:
        """Of that many outputs."""

    def predict(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs, computed by the host where that is another way."""
        return self(image)

    def spread_scores(self) -> None:
        """For a trial without a checkpoint: where rounding would choose among equal scores, make them differ."""

    def translations(self) -> dict:
        """How the exporter writes operators that PyTorch does not have."""
        return {}

    def on_trial(self, onnx_model):
        """The ONNX model to compare, which may differ from the one that is written in a constant."""
        return onnx_model

    def expected(self, image: Tensor) -> tuple[Tensor, ...]:
        """What to compare with."""
        return self.predict(image)

    def difference(self, outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """The largest difference of outputs from the expected ones; infinite if they can't be compared."""
        return max(map(difference, outs, expected))


class Pyramid(Exported):
    """The maps of the backbone, or of the backbone and its neck."""

    def __init__(self, model: nn.Module, preprocess: bool, has_neck: bool):
        super().__init__(model, preprocess)
        self.has_neck = has_neck

    def __str__(self):
        return f'the backbone with its neck, {type(self.model.neck).__name__}' if self.has_neck else 'the backbone'

    def compute(self, image: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        maps = self.model.backbone(image)
        return tuple(self.model.neck(maps)) if self.has_neck else maps

    def names(self, count: int) -> list[str]:  # by stride for maps of a backbone
        if self.has_neck:
            return [f'level{i}' for i in range(count)]
        backbone = self.model.backbone
        return [f'stride{backbone.patch_embed.patch_size * 2**i}' for i in backbone.out_indices]


class Segmentor(Exported):
    """The label of each pixel, (B, H, W), or the scores of all classes, (B, classes, H, W).

    Raises:
        ValueError: the segmentor is of another kind, or slides a crop over the image, which is many runs of a graph.
    """

    def __init__(self, model: nn.Module, preprocess: bool, output: str):
        from mmseg.models import CascadeEncoderDecoder, EncoderDecoder
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        super().__init__(model, preprocess)
        self.output = output
        check_class('model', model, EncoderDecoder, CascadeEncoderDecoder)
        head = model.decode_head[-1] if type(model) is CascadeEncoderDecoder else model.decode_head
        if not isinstance(head, BaseDecodeHead):  # such as MaskFormer's, which gives no map of each class
            raise ValueError(f'--part model: decode_head {type(head).__name__} is not exported: export --part backbone')
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ValueError(
                f'--part model: test_cfg.mode={model.test_cfg.mode} runs the model on crops of an image: pass '
                '--cfg-options model.test_cfg.mode=whole, and run the file on each crop or on the whole image'
            )

    def __str__(self):
        return f'the segmentor {type(self.model).__name__}'

    def scores(self, image: Tensor, height: int, width: int) -> Tensor:
        """Probabilities (B, classes, height, width); of the one class against none if there is only one."""
        size = tuple(image.shape[2:])
        first = dict(img_shape=size, ori_shape=size, pad_shape=size)  # a `BaseDecodeHead` looks at no other
        logits = self.model.encode_decode(image, [first])[..., :height, :width]
        return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()

    def compute(self, image: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        scores = self.scores(image, height, width)
        if self.output == 'scores':
            return (scores,)
        if scores.shape[1] > 1:
            return (scores.argmax(1),)
        return ((scores[:, 0] > self.model.decode_head.threshold).long(),)

    def on_trial(self, onnx_model):
        """The same with the scores as its last output."""
        if self.output == 'scores':
            return onnx_model
        import onnx

        trial = onnx.ModelProto()
        trial.CopyFrom(onnx_model)
        last = [node for node in trial.graph.node if node.op_type in ('Softmax', 'Sigmoid')][-1]
        trial.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
        return trial

    def expected(self, image: Tensor) -> tuple[Tensor, ...]:
        """The scores, whatever the output."""
        output, self.output = self.output, 'scores'
        try:
            return self(image)
        finally:
            self.output = output

    def difference(self, outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Of scores, and by how much more another label scores than the one that was chosen."""
        (*labels, out), (scores,) = outs, expected
        worst = difference(out, scores)
        if self.output == 'scores' or not math.isfinite(worst):
            return worst
        if labels[0].shape != scores[:, 0].shape or not ((labels[0] >= 0) & (labels[0] < max(len(scores[0]), 2))).all():
            return math.inf
        if scores.shape[1] == 1:  # above the threshold it is 1, else 0
            scores = torch.cat((2 * self.model.decode_head.threshold - scores, scores), 1)
        missed = scores.amax(1) - scores.gather(1, labels[0][:, None])[:, 0]
        return max(worst, missed.max().item())

    def names(self, count: int) -> list[str]:
        return [self.output]


def difference(out: Tensor, value: Tensor) -> float:
    """The largest difference from what a map should be, over its largest value; infinite if the shapes differ."""
    if out.shape != value.shape:
        return math.inf
    largest, apart = value.abs().max(), (out - value).abs().max()
    return 0.0 if apart == 0 else (apart / largest).nan_to_num(math.inf).item()


def check_class(place: str, part: nn.Module, *allowed: type) -> None:
    """Check the class of a part; a subclass may compute something else.

    Raises:
        ValueError: it is another one.
    """
    if type(part) not in allowed:
        raise ValueError(
            f'--part model: {place} is {type(part).__name__}, and whole models are exported with '
            f'{" or ".join(kind.__name__ for kind in allowed)}: export --part neck or backbone'
        )


class AnySizePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix products, which a graph holds for maps of any size.

    Args:
        output_size (tuple[int, int]): rows and columns of the output.
    """

    def __init__(self, output_size: tuple[int, int]):
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """Average (B, C, H, W) to (B, C, rows, columns)."""
        rows, columns = (mean_weights(*sizes, x) for sizes in zip(x.shape[2:], self.output_size))
        return rows @ x @ columns.mT


def mean_weights(length: int, count: int, like: Tensor) -> Tensor:
    """(count, length): row i averages from ``floor(i * length / count)`` to ``ceil((i + 1) * length / count)``."""
    i, place = torch.arange(count, device=like.device)[:, None], torch.arange(length, device=like.device)
    start, end = i * length // count, ((i + 1) * length + count - 1) // count
    return ((place >= start) & (place < end)).to(like.dtype) / (end - start)


@contextmanager
def any_size_pools(model: nn.Module) -> Iterator[None]:
    """A context in which `AnySizePool` stands in the place of each `nn.AdaptiveAvgPool2d`."""
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.AdaptiveAvgPool2d
    ]
    for module, name, child in found:
        size = child.output_size
        setattr(module, name, AnySizePool((size, size) if isinstance(size, int) else tuple(size)))
    try:
        yield
    finally:
        for module, name, child in found:
            setattr(module, name, child)
