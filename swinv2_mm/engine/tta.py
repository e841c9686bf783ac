"""Test-time augmentation: a model predicts several views of each image, scaled or flipped, and these are merged."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain

from mmengine.config import Config, ConfigDict
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from ..checks.data import innermost_datasets
from ..messages import inform

TTA_HELP = (
    'test-time augmentation: merge what is found in several views of each image, those of tta_pipeline in the config, '
    'or the image and its mirror image where the config has none'
)
MASK_AXES = {'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}
DEFAULT_MODELS = {
    'mmdet': dict(type='InstanceTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    'mmseg': dict(type='SegTTAModel'),
}


def augment_test(cfg: Config) -> None:
    """Make a config test each image in several views, with its ``tta_model`` and ``tta_pipeline`` as in the hosts.

    A config without ``tta_pipeline`` gets two views: the image as its test pipeline prepares it, and its mirror image.
    Without ``tta_model`` instances are merged by `InstanceTTAModel` and label maps by mmseg's `SegTTAModel`. mmdet's
    `DetTTAModel` becomes `InstanceTTAModel`, which merges boxes in the same way and does not fail on masks.

    Args:
        cfg (Config): the config of a detector or segmentor.

    Raises:
        ValueError: the model is panoptic, or ``tta_pipeline`` does not give views.
    """
    if is_panoptic(cfg):
        raise ValueError(
            '--tta merges instances and label maps, and the model is panoptic; for the instances of a Mask2Former pass '
            '--cfg-options model.test_cfg.panoptic_on=False model.test_cfg.instance_on=True, with CocoMetric alone in '
            'test_evaluator'
        )
    views = 0
    for dataset in innermost_datasets(cfg, ('test',)):
        dataset.pipeline = copy.deepcopy(cfg.get('tta_pipeline')) or mirrored(dataset.pipeline)
        check_views(dataset.pipeline)
        views = count_views(dataset.pipeline)
    augmented = ConfigDict(cfg.get('tta_model') or DEFAULT_MODELS[cfg.default_scope])
    if augmented.type == 'DetTTAModel':
        augmented.type = 'InstanceTTAModel'
    preprocessor = cfg.pop('data_preprocessor', None)
    if preprocessor:  # the wrapper would put it in the place of the model's own
        cfg.model.setdefault('data_preprocessor', preprocessor)
    cfg.model = ConfigDict(augmented, module=cfg.model)
    # Of mmseg's SegTTAModel, once for every size of images.
    warnings.filterwarnings('ignore', 'The shape of value will convert from')
    inform(f'--tta: {augmented.type} merges what is found in {views} views of each image')


def is_panoptic(cfg: Config) -> bool:
    """Whether the model of a config gives panoptic maps."""
    return 'panoptic_fusion_head' in cfg.model and (cfg.model.get('test_cfg') or {}).get('panoptic_on', True)


def mirrored(pipeline: Sequence[Mapping]) -> list[dict]:
    """A test pipeline that gives two views: the image of another one, and that of the mirrored image."""
    annotations = [step for step in pipeline if 'Annotation' in str(step['type'])]
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
        raise ValueError(f'tta_pipeline ends with {last["type"]}: must end with TestTimeAug, which makes the views')
    for pack in last['transforms'][-1]:
        if not {'flip', 'flip_direction'} <= set(pack.get('meta_keys', ('flip', 'flip_direction'))):
            raise ValueError(
                f'meta_keys of {pack["type"]} in tta_pipeline lack flip and flip_direction, without which no view is '
                'flipped back: add both'
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
        """
        for sample in chain.from_iterable(data['data_samples']):
            # The heads of mmdet's cascades would flip the masks of a sample that says that it is flipped.
            flip = sample.flip_direction if sample.flip else None
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

        found = InstanceData.cat([unflipped(sample) for sample in samples])
        if len(found):
            boxes, kept = batched_nms(found.bboxes, found.scores, found.labels, self.nms)
            found = found[kept[: self.max_per_img]]
            found.scores = boxes[: self.max_per_img, 4]  # Soft-NMS lowers them
        samples[0].pred_instances = found
        return samples[0]


def unflipped(sample: BaseDataElement) -> InstanceData:
    """The instances found in a view, where they are in the original image."""
    from mmdet.structures.bbox import bbox_flip

    found = sample.pred_instances
    if sample.flip_of_view is None:
        return found
    found = found.new()
    found.bboxes = bbox_flip(found.bboxes, sample.ori_shape, sample.flip_of_view)  # (N, 4)
    if 'masks' in found:
        found.masks = found.masks.flip(MASK_AXES[sample.flip_of_view])  # (N, H, W)
    return found
