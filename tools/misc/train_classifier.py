"""Train a small SwinV2 classifier on crops of single objects, and save it as the official repository would.

It stands in for a published ImageNet checkpoint where none can be downloaded: low resolution, small windows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from pycocotools.coco import COCO
from swinv2_tools.classifier import Accuracy, Classifier
from torch.utils.data import Dataset

from swinv2_mm.arch import parse_arch
from swinv2_mm.checkpoints.files import check_suffix, write_checkpoint
from swinv2_mm.checkpoints.formats import export
from swinv2_mm.engine.launch import bad_input, load_config
from swinv2_mm.position_bias import ContinuousPositionBias
from swinv2_mm.writing import check_file

SIZE, WINDOW = 64, 4  # pixels, tokens
MARGIN = 1.1  # side of a crop over the longer side of its object, in validation
MARGINS, SHIFT = (0.7, 1.5), 0.15  # in training: range of the same, and how far the object is off the centre, in sides
BATCH_SIZE, LEARNING_RATE, WARM_UP = 16, 2e-3, 20  # images, of AdamW, iterations
BIAS_RATE = 10  # times the learning rate: else the position bias, near constant at first, takes most of the epochs


class Crops(Dataset):
    """Square crops around the objects of a data set in COCO layout, (3, 64, 64), uint8, BGR, and their labels.

    Args:
        root (Path): folder of the data set.
        split (str): train or val. Crops of val just hold the object. Crops of train are turned, mirrored and shifted at
            random, and show anything from most of the object to the object and its surroundings.
    """

    def __init__(self, root: Path, split: str):
        coco = COCO(root / f'annotations/instances_{split}2017.json')
        self.augment = split == 'train'
        self.categories = sorted(coco.cats)
        self.objects, self.labels = [], []  # an object is its image and its box
        for image_id, image in coco.imgs.items():
            pixels = cv2.imread(str(root / f'{split}2017' / image['file_name']))
            for annotation in coco.imgToAnns[image_id]:
                self.objects.append((pixels, annotation['bbox']))
                self.labels.append(self.categories.index(annotation['category_id']))

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, i: int) -> dict:
        if self.augment:
            margin, shift = np.exp(np.random.uniform(*np.log(MARGINS))), np.random.uniform(-SHIFT, SHIFT, 2)
            pixels = crop(*self.objects[i], margin, *shift)
            pixels = np.rot90(pixels, np.random.randint(4))[:, :: np.random.choice((-1, 1))]
        else:
            pixels = crop(*self.objects[i], MARGIN)
        return dict(inputs=torch.from_numpy(pixels.transpose(2, 0, 1).copy()), data_samples=self.labels[i])


def crop(pixels: np.ndarray, bbox: list[float], margin: float, x_shift: float = 0, y_shift: float = 0) -> np.ndarray:
    """A square of an image, resized.

    Args:
        pixels (ndarray): (H, W, 3); what lies outside is mirrored.
        bbox (list[float]): x, y, width and height of an object in pixels.
        margin (float): side of the square over the longer side of the object.
        x_shift (float), y_shift (float): from the centre of the object to that of the square, in sides of the square.

    Returns:
        ndarray: (64, 64, 3).
    """
    x, y, width, height = bbox
    side = margin * max(width, height)
    left, top = x + width / 2 + (x_shift - 0.5) * side, y + height / 2 + (y_shift - 0.5) * side
    scale = SIZE / side
    to_crop = np.array([[scale, 0, -scale * left], [0, scale, -scale * top]])
    return cv2.warpAffine(pixels, to_crop, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)


def build_classifier(config: str, num_classes: int) -> Classifier:
    """A classifier with the backbone of a detector's config, from scratch, at the low resolution's windows."""
    arguments = dict(load_config(config).model.backbone)
    arch = parse_arch(arguments['arch'])
    num_stages = len(arch.depths)
    last_map = SIZE // (4 * 2 ** (num_stages - 1))
    windows = (*[WINDOW] * (num_stages - 1), min(WINDOW, last_map))  # a window is no larger than its map
    arguments.update(window_size=windows, out_indices=(num_stages - 1,), init_cfg=None)
    return Classifier(MODELS.build(arguments), num_classes)


def train(config: str, data_root: Path, work_dir: Path, epochs: int, seed: int) -> tuple[Classifier, float]:
    """Train the backbone of a detector's config as a classifier.

    Returns:
        tuple: the model, and its accuracy on the validation split in percent.
    """
    splits = {split: Crops(data_root, split) for split in ('train', 'val')}
    loaders = {
        split: dict(
            batch_size=BATCH_SIZE,
            num_workers=0,
            dataset=crops,
            sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
            collate_fn=dict(type='default_collate'),
        )
        for split, crops in splits.items()
    }
    torch.manual_seed(seed)
    runner = Runner(
        model=build_classifier(config, len(splits['train'].categories)),
        work_dir=str(work_dir),
        train_dataloader=loaders['train'],
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=epochs),
        val_dataloader=loaders['val'],
        val_cfg=dict(),
        val_evaluator=[Accuracy()],
        optim_wrapper=dict(
            constructor='SwinV2OptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=LEARNING_RATE, weight_decay=0.05),
            paramwise_cfg=dict(custom_keys={ContinuousPositionBias.name: dict(lr_mult=BIAS_RATE)}),
            clip_grad=dict(max_norm=5),
        ),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=WARM_UP),
            dict(type='CosineAnnealingLR', by_epoch=True, T_max=epochs, convert_to_iter_based=True),
        ],
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=20)),
        randomness=dict(seed=seed),
    )
    model = runner.train()
    return model, runner.message_hub.get_scalar('val/accuracy').current()


def official(model: Classifier) -> dict:
    """The checkpoint that the official repository would write of a classifier."""
    backbone = model.backbone
    weights = export(backbone.state_dict(), backbone.pretrained_window_sizes, 'official')
    head = {f'head.{name}': value for name, value in model.head.state_dict().items()}
    return dict(model={**weights, **head})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/misc/train_classifier.py configs/demo/mask-rcnn_swinv2_shapes.py classifier.pth '
        '--data-root data/shapes',
    )
    parser.add_argument('config', help='config of a detector or segmentor: the classifier gets its backbone')
    parser.add_argument('out', type=Path, help='checkpoint to write')
    parser.add_argument(
        '--data-root', type=Path, default=Path('data/shapes'), help='COCO layout (default: %(default)s)'
    )
    parser.add_argument('--epochs', type=int, default=14, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='seed of all randomness (default: %(default)s)')
    args = parser.parse_args()
    try:
        check_suffix(args.out)
        check_file(args.out, 'out')
        work_dir = args.out.parent / 'classifier'
        model, accuracy = train(args.config, args.data_root, work_dir, args.epochs, args.seed)
        write_checkpoint(official(model), args.out)
    except (OSError, ValueError) as error:
        return bad_input(error)
    print(f'wrote {args.out}: accuracy {accuracy:.1f} % on crops of the validation split')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
