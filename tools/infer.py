"""Run a trained detector or segmentor on images. No data set is needed.

DIR gets overlays/, the images with the predictions drawn in, and

  from a detector, with or without instance masks:
    predictions.json  COCO results, a list for COCO(...).loadRes(...) of pycocotools. loadRes fails on an empty list: if
                      nothing was found, evaluate COCO('image_info.json') instead
    image_info.json   the images and categories with their ids, as COCO publishes them for images without annotations
  from a segmentor:
    labels/           PNGs as large as the images, with the classes of the model, counted from 0, in 8 bits, or in 16
                      if there are more than 256. If the model was trained with reduce_zero_label, as on ADE20K, the
                      values of the data set are larger by 1.

Images may have any channels and depth that the config's test pipeline loads, for example with color_type='unchanged' or
imdecode_backend='tifffile'. Overlays show the first three channels as blue, green and red (red, green and blue if
tifffile or GDAL loads them), or the first of one or two channels in grey. Integers from 0 to 255 are shown as they are.
Other values are scaled: the darkest hundredth of an image is black, the brightest white. Labels and lines are drawn in
proportion to the image, but never too small to read. Images smaller than 160 x 160 pixels get no labels, which would
cover what they name.

Ids are taken from the config's test annotations if that file exists and lists the classes, or all of the images.
Otherwise the 80 classes of COCO have their official ids, and other classes count from 1. Image ids are the numbers in
the file names, as in 000000008193.jpg, or count from 1 if not all files are named so.

Folders are searched recursively, each once even if links lead to it again, and outputs keep the relative paths. If two
images differ only in their extension (a.jpg, a.png), their outputs keep it (a.jpg.png). Output names that would be too
long are cut and end in a hash of the whole name.

An image that can't be read, has more pixels than --max-pixels or fails in the model is skipped and listed at the end,
and the exit code is 1. Files are always complete: overlays and labels are written one by one, the JSON files every ten
seconds and at the end, even if Ctrl-C, SIGTERM or a full disk ends the run.
"""

from __future__ import annotations

from swinv2_tools import ending  # isort: split

import argparse
import importlib.util
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from swinv2_tools.coco_results import coco_results, list_categories, list_image_ids, read_annotations
from swinv2_tools.image_files import EXTENSIONS, find_images, output_stems, picture_extension
from swinv2_tools.overlays import HOSTS, draw_to_scale
from swinv2_tools.pictures import check_pixels, check_whole, to_picture
from swinv2_tools.progress import track
from torch import nn

from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.checks.options import ConfigOptions
from swinv2_mm.checks.registered import class_name
from swinv2_mm.engine import launch
from swinv2_mm.engine.tta import TTA_HELP, TTA_WARNING, augment_test, count_views, is_panoptic
from swinv2_mm.messages import first_line
from swinv2_mm.writing import check_folder, unwritten, whole

OVERLAYS, LABELS = 'overlays', 'labels'  # folders of results
INTERVAL = 10  # seconds between two rewrites of the JSON files
MAX_PIXELS = 50_000_000
SHARE = 0.1  # of the time that this may take at most


class Prepared(NamedTuple):
    """An image on its way into the model."""

    name: str  # path, relative to the folder of all inputs
    path: Path
    picture: np.ndarray  # (H, W, 3), RGB, 8 bits: the image as loaded, to draw on
    data: dict  # what the test pipeline gives: inputs, data_samples
    shapes: tuple  # what images of one batch share: then none is padded, and each gives what it gives alone


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/infer.py configs/mask_rcnn_swinv2.py work_dirs/mask_rcnn_swinv2/epoch_12.pth '
        'photos --out results',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file of a detector (mmdet) or segmentor (mmseg)')
    parser.add_argument('checkpoint', help='checkpoint file that training wrote')
    parser.add_argument(
        'images',
        nargs='+',
        metavar='IMAGE_OR_FOLDER_OR_GLOB',
        help='image files, folders and patterns like "photos/**/*.jpg"; of folders and patterns, files that end in '
        f'{", ".join(EXTENSIONS)}',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the results; older ones are replaced')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        metavar='N',
        help='put up to N images into a batch: neighbours in the order of names and equal in size, so that results do '
        'not depend on it (default: 1)',
    )
    parser.add_argument('--tta', action='store_true', help=TTA_HELP)
    parser.add_argument('--device', help='for example cpu or cuda:1 (default: cuda if there is a GPU, else cpu)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='leave out detections with lower scores, in overlays and in predictions.json; pass 0 for evaluation '
        '(default: 0.3; no effect on a segmentor)',
    )
    parser.add_argument(
        '--max-pixels',
        type=int,
        metavar='N',
        help=f'skip images with more pixels, to save memory (default: {MAX_PIXELS}; for a segmentor, which needs four '
        'bytes per pixel and class, at most a quarter of the memory; OpenCV reads up to 2**30)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='override values of the config, for example model.test_cfg.rcnn.max_per_img=20',
    )
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Config, dict[str, Path], dict]:
    """Check the flags, and find what they ask for.

    Returns:
        tuple: the config, the images by name, and the classes and palette of the checkpoint.

    Raises:
        ValueError: a flag, the config or the checkpoint is wrong; the message says what to do.
    """
    if args.batch_size < 1:
        raise ValueError(f'--batch-size must be 1 or more, got {args.batch_size}')
    if args.max_pixels is not None and args.max_pixels < 1:
        raise ValueError(f'--max-pixels must be 1 or more, got {args.max_pixels}')
    if not 0 <= args.score_thr <= 1:
        raise ValueError(f'--score-thr must be from 0 to 1, got {args.score_thr}')
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    check_device(args.device)
    cfg = launch.load_config(args.config, args.cfg_options)
    check_supported(cfg, args.config)
    launch.drop_initial_weights(cfg)
    launch.check_backbone(cfg)
    if args.tta:
        augment_test(cfg, args.cfg_options or ())
        warnings.filterwarnings('ignore', TTA_WARNING)
    init_default_scope(cfg.default_scope)
    build_pipeline(cfg)
    meta = class_meta(cfg, read_checkpoint(args.checkpoint))
    if args.max_pixels is None:
        args.max_pixels = pixels_that_fit(cfg, len(meta['classes']), args.device)
    return cfg, find_images(args.images, [f'{args.out}/{OVERLAYS}', f'{args.out}/{LABELS}']), meta


def pixels_that_fit(cfg: Config, classes: int, device: str) -> int:
    """Limit the pixels of an image: a segmentor holds scores of each pixel and class, for all views at once."""
    if cfg.default_scope == 'mmdet':
        return MAX_PIXELS
    if torch.device(device).type == 'cuda':
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    scores = 3 + count_views(test_dataset(cfg).pipeline)  # of a pixel and class: those of each view, and three copies
    return min(MAX_PIXELS, memory // scores // (4 * classes))


def check_device(device: str) -> None:
    """Check that PyTorch can use the device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {device} is not available: {first_line(error)}') from error


def check_supported(cfg: Config, path: str) -> None:
    """Check that the config says how images are loaded, and that the model gives no panoptic maps."""
    pipeline = test_dataset(cfg).get('pipeline')
    if not pipeline or not re.search('LoadImage|LoadSingleRSImage', str(pipeline[0].get('type'))):
        raise ValueError(f'the test pipeline of {path} does not start with loading an image')
    if class_name(pipeline[-1].type) == 'TestTimeAug':
        raise ValueError(f'the test pipeline of {path} ends with TestTimeAug: name it tta_pipeline, and pass --tta')
    if is_panoptic(cfg):
        raise ValueError(
            f'the model of {path} is panoptic, which is not supported; for the instances of a MaskFormer or '
            'Mask2Former pass --cfg-options model.test_cfg.panoptic_on=False model.test_cfg.instance_on=True'
        )


def test_dataset(cfg: Config) -> ConfigDict:
    """The test data set of a config, the first one inside wrappers like `ConcatDataset`; empty where there is none."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or ConfigDict()
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset.get('dataset') or dataset.datasets[0]
    return dataset


def class_meta(cfg: Config, checkpoint: dict) -> dict:
    """Get the classes and palette that the model was trained with, or else those of the config's test data set."""
    meta = checkpoint.get('meta') or {}
    saved = (meta.get('dataset_meta') or {}) if isinstance(meta, dict) else meta
    classes = saved.get('classes', ()) if isinstance(saved, dict) else None
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f'the checkpoint is damaged: its dataset_meta is {str(saved)[:80]}, and lists no classes')
    if {'classes', 'palette'} <= saved.keys():
        return saved
    dataset = dict(test_dataset(cfg), pipeline=[], lazy_init=True)  # reads no data
    return {**DATASETS.build(dataset).metainfo, **saved}


def build_model(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    """The model of a config with all weights of a checkpoint, ready for inference."""
    model = MODELS.build(cfg.model)
    launch.load_weights(model, checkpoint)
    return model.to(device).eval()


def build_pipeline(cfg: Config) -> tuple[Compose, Compose]:
    """Build the step of the test pipeline that loads an image, and those after it, without annotations."""
    steps = without_annotations(test_dataset(cfg).pipeline)
    if steps[0].get('imdecode_backend') == 'tifffile' and not importlib.util.find_spec('tifffile'):
        raise ValueError("imdecode_backend='tifffile' needs a package: pip install tifffile")
    try:
        return Compose(steps[:1]), Compose(steps[1:])
    except Exception as error:  # each transform raises its own kind
        raise ValueError(f'the test pipeline of {cfg.filename} cannot be built: {first_line(error)}') from error


def without_annotations(steps: Sequence[dict]) -> list[dict]:
    """The steps of a pipeline that load no annotations, also inside those that give several views."""
    kept = [dict(step) for step in steps if 'Annotation' not in str(step['type'])]
    for step in kept:
        if 'TestTimeAug' in str(step['type']):
            step['transforms'] = [views for views in map(without_annotations, step['transforms']) if views]
    return kept


def read_images(images: dict[str, Path], cfg: Config, max_pixels: int, skipped: dict[Path, str]) -> Iterator[Prepared]:
    """Read images and prepare them with the test pipeline of a config.

    Args:
        images (dict): paths by name.
        cfg (Config): the config.
        max_pixels (int): an image of more is skipped.
        skipped (dict): gets the path of each image that can't be read or prepared, and the reason.
    """
    load, transform = build_pipeline(cfg)
    is_rgb = keeps_order(test_dataset(cfg).pipeline[0])
    for name, path in track(list(images.items())):
        failing = ''
        try:
            check_whole(path, max_pixels)
            loaded = load(dict(img_path=str(path), img_id=name))
            height, width = loaded['img'].shape[:2]
            check_pixels(width, height, max_pixels)
            picture = to_picture(loaded['img'], is_rgb)  # now, as transforms may change the image in place
            failing = f'the test pipeline fails on {width} x {height} pixels: '
            data = transform(loaded)
            views = data['inputs'] if isinstance(data['inputs'], list) else [data['inputs']]
            prepared = Prepared(name, path, picture, data, (picture.shape, *(view.shape for view in views)))
        except Exception as error:  # decoders raise all kinds
            skipped[path] = failing + first_line(error)
        else:
            yield prepared


def keeps_order(loader: ConfigDict) -> bool:
    """Whether a loader keeps the order of the channels in the file. Other loaders give BGR."""
    return loader.get('imdecode_backend') == 'tifffile' or 'RSImage' in str(loader.type)


def batches(items: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    """Group neighbours of equal shapes, up to ``size`` of them."""
    batch = []
    for item in items:
        if batch and item.shapes != batch[0].shapes:
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def encode_labels(labels: torch.Tensor, classes: int) -> bytes:
    """A PNG of (H, W) labels, of 8 bits, or of 16 if there are more than 256 classes."""
    dtype = np.uint8 if classes <= 256 else np.uint16
    return cv2.imencode('.png', labels.numpy().astype(dtype))[1].tobytes()


def predict(model: nn.Module, batch: list[Prepared], skipped: dict[Path, str]) -> list[tuple]:
    """Predict a batch of images. If the model fails on it, they are tried one by one.

    Args:
        model (nn.Module): a detector or segmentor.
        batch (list): the images.
        skipped (dict): gets the path of each image that the model fails on alone, and the reason.

    Returns:
        list: tuples of an image and its data sample.
    """
    try:
        samples = model.test_step(pseudo_collate([item.data for item in batch]))
        return list(zip(batch, samples))
    except Exception as error:  # such as out of memory
        if len(batch) == 1:
            skipped[batch[0].path] = f'the model fails: {first_line(error)}'
            return []
    return [pair for item in batch for pair in predict(model, [item], skipped)]


def write_results(out: Path, done: list[tuple[dict, list[dict]]], categories: list[dict]) -> None:
    """Write the JSON files of a detector: the images first, so that every prediction is of a listed image.

    Args:
        out (Path): the folder.
        done (list): for each image, its entry and its predictions.
        categories (list): by label.
    """
    info = {'images': [image for image, _ in done], 'categories': categories}
    results = [result for _, results in done for result in results]
    with whole(out / 'predictions.json') as last, whole(out / 'image_info.json') as first:
        first.write_text(json.dumps(info))
        last.write_text(json.dumps(results))


def build_visualizer(cfg: Config, meta: dict) -> Visualizer:
    """The visualizer of a config or else of the host, which draws classes in the colors of ``meta``."""
    own = cfg.get('visualizer') or dict(type=HOSTS[cfg.default_scope][0])
    visualizer = VISUALIZERS.build({'name': 'visualizer', **own, 'vis_backends': None})  # mmengine keeps it by its name
    visualizer.dataset_meta = meta
    return draw_to_scale(visualizer)


class Results:
    """What is written: pictures and label maps one by one, the JSON files of a detector when `save` is called.

    Args:
        cfg (Config): the config.
        images (dict): paths by name.
        meta (dict): classes and palette.
        out (Path): the folder.
        score_thr (float): detections below it are left out.
    """

    def __init__(self, cfg: Config, images: dict[str, Path], meta: dict, out: Path, score_thr: float):
        self.out, self.score_thr, self.num_classes = out, score_thr, len(meta['classes'])
        self.stems = output_stems(images)
        self.visualizer = build_visualizer(cfg, meta)
        self.is_detector = cfg.default_scope == 'mmdet'
        if self.is_detector:
            annotations = read_annotations(test_dataset(cfg))
            self.categories, self.image_ids = list_categories(meta, annotations), list_image_ids([*images], annotations)
        self.done = []  # for each image of a detector, its entry and its predictions
        self._due = time.monotonic() + INTERVAL

    def add(self, name: str, picture: np.ndarray, sample: BaseDataElement) -> None:
        """Draw what is found in an image. Write labels; keep detections until `save`."""
        if self.is_detector:
            instances = sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
        self._draw(name, picture, sample)
        if self.is_detector:
            height, width = picture.shape[:2]
            image = {'id': self.image_ids[name], 'file_name': name, 'width': width, 'height': height}
            self.done.append((image, coco_results(instances, image['id'], self.categories)))
        else:
            with whole(self.out / LABELS / f'{self.stems[name]}.png') as partial:
                partial.write_bytes(encode_labels(sample.pred_sem_seg.data[0], self.num_classes))

    def _draw(self, name, picture, sample):
        threshold = {'pred_score_thr': -1} if self.is_detector else {}  # draw all that is left
        with whole(self.out / OVERLAYS / f'{self.stems[name]}{picture_extension(name)}') as partial:
            # as NumPy arrays: mmseg takes a tensor of 1 x 1 labels for an index
            self.visualizer.add_datasample(
                name, picture, sample.numpy(), draw_gt=False, out_file=str(partial), **threshold
            )

    def save(self) -> None:
        """Write the JSON files of a detector."""
        if self.is_detector:
            write_results(self.out, self.done, self.categories)

    def save_when_due(self) -> None:
        """Call `save` every ten seconds, in a tenth of the time at most."""
        started = time.monotonic()
        if started >= self._due:
            self.save()
            ended = time.monotonic()
            self._due = ended + max(INTERVAL, (ended - started) / SHARE)


@torch.no_grad()
def infer(
    model: nn.Module, cfg: Config, images: dict[str, Path], meta: dict, args: argparse.Namespace
) -> dict[Path, str]:
    """Run a model on images and write results as they come.

    Returns:
        dict: the paths of images that were skipped, and the reasons.

    Raises:
        OSError: a file can't be written; its ``filename`` is the path.
    """
    results, skipped = Results(cfg, images, meta, Path(args.out), args.score_thr), {}
    try:
        for batch in batches(read_images(images, cfg, args.max_pixels, skipped), args.batch_size):
            for item, sample in predict(model, batch, skipped):
                try:
                    results.add(item.name, item.picture, sample.cpu())
                except OSError:
                    raise
                except Exception as error:  # such as out of memory
                    skipped[item.path] = first_line(error)
            results.save_when_due()
    except BaseException:  # also a signal
        if results.done:  # else results of an earlier run stay
            results.save()
        raise
    results.save()
    if results.is_detector and not any(found for _, found in results.done):
        print(
            f'nothing scores {args.score_thr} or more: predictions.json is an empty list, which pycocotools does not '
            "load; evaluate COCO('image_info.json') in its place"
        )
    return skipped


def main():
    args = parse_args()
    try:
        cfg, images, meta = prepare(args)
        model = build_model(cfg, args.checkpoint, args.device)
        check_folder(Path(args.out), '--out')
    except ValueError as error:
        sys.exit(launch.bad_input(error))
    try:
        skipped = infer(model, cfg, images, meta, args)
    except OSError as error:
        sys.exit(launch.bad_input(unwritten(error)))
    print(f'{len(images) - len(skipped)} of {len(images)} images done, results in {args.out}')
    for path, reason in skipped.items():
        print(f'skipped {path}: {reason}', file=sys.stderr)
    sys.exit(1 if skipped else 0)


if __name__ == '__main__':
    ending.run(main)
