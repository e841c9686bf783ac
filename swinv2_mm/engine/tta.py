"""Test-time augmentation: a model predicts several views of each image, scaled or flipped, and these are merged."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from ..checks.data import innermost_datasets
from ..checks.registered import class_name
from ..messages import inform

TTA_HELP = (
    'test-time augmentation: merge what is found in several views of each image, those of tta_pipeline in the config, '
    'or the image and its mirror image where the config has none'
)
TTA_WARNING = 'The shape of value will convert from'  # of mmseg's SegTTAModel, once for every size of images
MASK_AXES = {None: (), 'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}
DEFAULT_MODELS = {
    'mmdet': dict(type='InstanceTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    'mmseg': dict(type='SegTTAModel'),
}


class NoBoxesError(ValueError):
    """Instances can't be merged, because they have no boxes."""


def augment_test(cfg: Config, options: Iterable[str] = ()) -> None:
    """Make a config test each image in several views, with its ``tta_model`` and ``tta_pipeline`` as in the hosts.

    A config without ``tta_pipeline`` gets two views: the image as its test pipeline prepares it, and its mirror image.
    Without ``tta_model`` instances are merged by `InstanceTTAModel` and label maps by mmseg's `SegTTAModel`. mmdet's
    `DetTTAModel` becomes `InstanceTTAModel`, which merges boxes in the same way and does not fail on masks.

    Args:
        cfg (Config): the config of a detector or segmentor.
        options (Iterable[str]): the names that ``--cfg-options`` has set in it.

    Raises:
        ValueError: the model is panoptic, the pipeline does not give views, ``tta_model`` can't merge them, or one of
            ``options`` has no effect.
    """
    if is_panoptic(cfg):
        raise ValueError(
            '--tta merges instances and label maps, and the model is panoptic; for the instances of a Mask2Former pass '
            '--cfg-options model.test_cfg.panoptic_on=False model.test_cfg.instance_on=True, with CocoMetric alone in '
            'test_evaluator'
        )
    for name in options:
        if cfg.get('tta_pipeline') and name.startswith('test_dataloader.') and 'pipeline' in name.split('.'):
            raise ValueError(
                f'--cfg-options {name} has no effect with --tta, which takes the views of tta_pipeline: '
                'set tta_pipeline in its place'
            )
    views = 0
    for dataset in innermost_datasets(cfg, ('test',)):
        dataset.pipeline = copy.deepcopy(cfg.get('tta_pipeline')) or mirrored(dataset.get('pipeline') or ())
        check_views(dataset.pipeline)
        views = count_views(dataset.pipeline)
    default = DEFAULT_MODELS[cfg.default_scope]
    augmented = ConfigDict({'type': default['type'], **(cfg.get('tta_model') or default)})
    if class_name(augmented.type) == 'DetTTAModel':
        augmented.type = 'InstanceTTAModel'
    if class_name(augmented.type) == 'InstanceTTAModel':
        for key in ('nms', 'max_per_img'):
            if key not in (augmented.get('tta_cfg') or ()):
                raise ValueError(f'tta_cfg of tta_model has no {key}: add it, as in {default}')
    preprocessor = cfg.pop('data_preprocessor', None)
    if preprocessor:  # the wrapper would put it in the place of the model's own
        cfg.model.setdefault('data_preprocessor', preprocessor)
    cfg.model = ConfigDict(augmented, module=cfg.model)
    inform(f'--tta: {class_name(augmented.type)} merges what is found in {views} views of each image')


def is_panoptic(cfg: Config) -> bool:
    """Whether the model of a config gives panoptic maps."""
    return 'panoptic_fusion_head' in cfg.model and (cfg.model.get('test_cfg') or {}).get('panoptic_on', True)


def mirrored(pipeline: Sequence[Mapping]) -> list[dict]:
    """A test pipeline that gives two views: the image of another one, and that of the mirrored image.

    Raises:
        ValueError: the other one does not load and pack an image, or gives several views itself.
    """
    annotations = [step for step in pipeline if 'Annotation' in str(step['type'])]
    if len(pipeline) - len(annotations) < 2:
        raise ValueError(f'the test pipeline has {len(pipeline)} steps: --tta needs one that loads and packs an image')
    if class_name(pipeline[-1]['type']) == 'TestTimeAug':
        raise ValueError('the test pipeline ends with TestTimeAug: for --tta, name it tta_pipeline in the config')
    load, *steps, pack = [copy.deepcopy(step) for step in pipeline if step not in annotations]
    if 'meta_keys' in pack:
        pack['meta_keys'] = (*pack['meta_keys'], 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
    # Images are flipped before they are padded, or the padding would be on the other side. Annotations are loaded last,
    # so that no view changes them.
    return [load, dict(type='TestTimeAug', transforms=[flips, *([step] for step in (*steps, *annotations, pack))])]


def check_views(pipeline: Sequence[Mapping]) -> None:
    """Check that a pipeline gives views, and that these say how they were flipped.

    Raises:
        ValueError: it does not.
    """
    last = pipeline[-1]
    if 'TestTimeAug' not in str(last['type']):
        raise ValueError(
            f'tta_pipeline ends with {class_name(last["type"])}: must end with TestTimeAug, which makes the views'
        )
    choices = last.get('transforms')
    if not choices or not all(steps and isinstance(steps, (list, tuple)) for steps in choices):
        raise ValueError(
            'transforms of TestTimeAug in tta_pipeline must be a list of lists: for each step, what views choose from'
        )
    if not any('Flip' in class_name(step['type']) for steps in choices for step in steps):
        return
    for pack in choices[-1]:
        if not {'flip', 'flip_direction'} <= set(pack.get('meta_keys', ('flip', 'flip_direction'))):
            raise ValueError(
                f'meta_keys of {class_name(pack["type"])} in tta_pipeline lack flip and flip_direction, without '
                'which no view is flipped back: add both'
            )


def count_views(pipeline: Sequence[Mapping]) -> int:
    """How many views a test pipeline gives of an image, 1 without test-time augmentation."""
    return math.prod(len(choices) for choices in pipeline[-1].get('transforms', ()))


@MODELS.register_module()
class InstanceTTAModel(BaseTTAModel):
    """Merges what a detector finds in the views of an image: boxes as mmdet's `DetTTAModel` does, and masks too.

    Non-maximum suppression among the boxes of all views decides which instances are kept. Each keeps the mask of the
    view that it was found in.

    Args:
        module (dict or nn.Module): the detector, which predicts boxes and masks at the size of the original image.
        tta_cfg (dict): ``nms``, as for mmcv's `batched_nms`, and ``max_per_img``, how many instances to keep.
        data_preprocessor (dict or nn.Module, optional): replaces that of the detector.
    """

    def __init__(
        self,
        module: dict | nn.Module,
        tta_cfg: Mapping,
        data_preprocessor: dict | nn.Module | None = None,
    ):
        super().__init__(module, data_preprocessor)
        self.nms, self.max_per_img = tta_cfg['nms'], tta_cfg['max_per_img']

    def test_step(self, data: Mapping) -> list[BaseDataElement]:
        """Predict a batch.

        Args:
            data (dict): ``inputs`` and ``data_samples``, each a list of views with one item for each image.

        Returns:
            list: for each image, its data sample with the merged instances.

        Raises:
            NoBoxesError: the detector gives masks without boxes.
        """
        for sample in chain.from_iterable(data['data_samples']):
            # The heads of mmdet's cascades would flip the masks of a sample that says that it is flipped.
            flip = sample.get('flip_direction') if sample.get('flip') else None
            sample.set_metainfo(dict(flip_of_view=flip, flip=False, flip_direction=None))
        return super().test_step(data)

    def merge_preds(self, data_samples_list: Sequence[Sequence[BaseDataElement]]) -> list[BaseDataElement]:
        """Merge the predictions of each image.

        Args:
            data_samples_list (list): for each image, the data samples of its views.

        Returns:
            list: for each image, the data sample of its first view, with the merged instances.
        """
        return [self._merge(samples) for samples in data_samples_list]

    def _merge(self, samples):
        from mmcv.ops import batched_nms  # only detectors need mmcv's operators

        found = InstanceData.cat([without_masks(sample) for sample in samples])
        has_masks = 'masks' in samples[0].pred_instances
        if has_masks and len(found) and torch.equal(found.bboxes[:, :2], found.bboxes[:, 2:]):
            name = type(self.module).__name__
            raise NoBoxesError(f'--tta merges instances by their boxes, and {name} gives masks alone: leave it out')
        kept = found.labels.new_zeros(0)
        if len(found):
            boxes, kept = batched_nms(found.bboxes, found.scores, found.labels, self.nms)
            kept = kept[: self.max_per_img]
            found = found[kept]
            found.scores = boxes[: self.max_per_img, 4]  # Soft-NMS lowers them
        if has_masks:
            found.masks = masks_of(samples, kept)
        samples[0].pred_instances = found
        return samples[0]


def without_masks(sample: BaseDataElement) -> InstanceData:
    """The instances found in a view, where they are in the original image, without their masks."""
    from mmdet.structures.bbox import bbox_flip

    found = sample.pred_instances.new()
    found.pop('masks', None)
    if sample.flip_of_view is not None:
        found.bboxes = bbox_flip(found.bboxes, sample.ori_shape, sample.flip_of_view)  # (N, 4)
    return found


def masks_of(samples: Sequence[BaseDataElement], kept: torch.Tensor) -> torch.Tensor:
    """The masks of some instances, where they are in the original image.

    Args:
        samples (list): the data samples of the views of an image.
        kept (Tensor): (N,), numbers of instances, counted over all views.

    Returns:
        Tensor: (N, H, W).
    """
    masks, start = None, 0
    for sample in samples:
        found = sample.pred_instances.masks  # (M, H, W)
        if masks is None:
            masks = found.new_empty(len(kept), *found.shape[1:])
        here = (kept >= start) & (kept < start + len(found))
        masks[here] = found[kept[here] - start].flip(MASK_AXES[sample.flip_of_view])
        start += len(found)
    return masks
