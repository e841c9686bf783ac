"""Checks of data before training and testing: mistakes that the hosts report late, with a traceback, or not at all.

mmdet's `CocoDataset`, mmseg's `BaseSegDataset` and classes derived from them are checked, as long as these read files
in the same way. Other data sets, and data that are not on a disk, are left to the host.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from ..messages import first_line
from .coco import Needs, check_annotations, check_same, read_json, select_images
from .heads import check_heads, ignore_index
from .images import first_missing, read_header, spread
from .label_maps import check_headers, check_pairs, check_some_images, check_values
from .registered import class_name, find

READ = 1000  # images of a detection data set whose headers are read, evenly spread
HOSTS = ('mmdet', 'mmseg')
COCO, PANOPTIC, SEGMENTATION = 'mmdet.CocoDataset', 'mmdet.CocoPanopticDataset', 'mmseg.BaseSegDataset'
READING = ('load_data_list', 'parse_data_info', 'filter_data', 'full_init')


def innermost_datasets(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[ConfigDict]:
    """The data sets of some splits, inside wrappers like `RepeatDataset` and `ConcatDataset`."""
    nodes = [(cfg.get(f'{split}_dataloader') or {}).get('dataset') for split in splits]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, (list, tuple)):
            nodes.extend(node)
        elif isinstance(node, dict) and ('dataset' in node or 'datasets' in node):
            nodes += [node.get('dataset'), node.get('datasets')]
        elif isinstance(node, dict):
            yield node


def check_contents(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check annotations, images, label maps and numbers of classes.

    Annotations are read in full. All images in use must exist. Of a detection data set, the headers of 1000 images are
    read; of a segmentation data set, those of all images and label maps, and the values of 50 label maps.

    Args:
        cfg (Config): the config, whose paths exist (`launch.check_data`).
        splits (tuple[str]): any of train, val and test.

    Raises:
        ValueError: something is wrong; the message names the file, the value and the cure.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for split in splits:
            source = f'{split}_dataloader.dataset'
            opened = [(open_dataset(node, source), node) for node in innermost_datasets(cfg, (split,))]
            known = [(dataset, node) for dataset, node in opened if dataset is not None]
            for dataset, _ in known:
                check_heads(cfg.model, dataset, source)
            detection = [(dataset, node) for dataset, node in known if _is_a(dataset, COCO)]
            _check_detection(cfg, split, detection, whole=len(detection) == len(opened))
            for dataset, node in known:
                if _is_a(dataset, SEGMENTATION):
                    _check_segmentation(cfg, dataset, node, source)


def open_dataset(node: ConfigDict, source: str) -> BaseDataset | None:
    """Build a data set without reading its files.

    Args:
        node (dict): its config.
        source (str): its dotted name in the config, for messages.

    Returns:
        BaseDataset: None if its class is not known here, or its data are not on a disk.

    Raises:
        ValueError: an argument is wrong.
    """
    kind = find(DATASETS, node.get('type'))
    known = tuple(filter(None, map(_imported, (COCO, SEGMENTATION))))
    if not isinstance(kind, type) or not issubclass(kind, known) or has_remote_images(node):
        return None
    _check_classes(node, source)
    arguments = {key: value for key, value in node.items() if key not in ('type', '_scope_', 'pipeline', 'lazy_init')}
    try:
        return kind(**arguments, lazy_init=True)
    except Exception as error:
        if kind.__module__.split('.')[0] not in HOSTS:
            return None  # it may do anything
        raise ValueError(f'{source} cannot be built as {kind.__name__}: {first_line(error)}') from error


def _check_classes(node, source):
    """Check that class names are a tuple, or a file with one name per line."""
    classes = (node.get('metainfo') or {}).get('classes')
    if isinstance(classes, str) and not os.path.isfile(classes):
        raise ValueError(f'metainfo.classes of {source} is {classes!r}, must be a tuple of names: ({classes!r},)')
    if isinstance(classes, (list, tuple)):
        wrong = [name for name in classes if not isinstance(name, str)]
        if wrong or not classes:
            raise ValueError(f'metainfo.classes of {source} has {wrong[0] if wrong else "none"!r}, must be names')


def _is_a(dataset, name):
    kind = _imported(name)
    return kind is not None and isinstance(dataset, kind)


def _imported(name):
    """A data set of a host that has been imported; None if it has not."""
    return find(DATASETS, name) if name.split('.')[0] in sys.modules else None


def is_remote(node: Mapping) -> bool:
    """Whether a data set or a metric reads its annotations through a backend of mmengine, not from a disk."""
    return _has_backend(node) or '://' in str(node.get('data_root') or '')


def has_remote_images(node: Mapping) -> bool:
    """Whether a data set reads its images through a backend of mmengine, such as LMDB, not from a disk."""
    return is_remote(node) or _has_backend(_step(node, 'LoadImageFromFile'))


def _has_backend(node):
    return (node.get('backend_args') or {}).get('backend', 'local') != 'local'


def _step(node, name):
    """The step of a pipeline with this name, whichever host it is from; {} if there is none."""
    for step in node.get('pipeline') or ():
        if isinstance(step, Mapping) and class_name(step.get('type')) == name:
            return step
    return {}


def _select(entries, indices, source):
    """The entries that ``indices`` of a data set selects, as mmengine selects them."""
    try:
        if isinstance(indices, int):
            entries = entries[:indices] if indices >= 0 else entries[indices:]
        elif indices is not None:
            entries = [entries[i] for i in indices]
    except (IndexError, TypeError) as error:
        raise ValueError(f'indices of {source} are {indices!r}, and it has {len(entries)} images: {error}') from error
    if not entries:
        raise ValueError(f'indices of {source} are {indices!r}, which leaves no image')
    return entries


def _check_detection(cfg, split, opened, whole):
    """Check annotations and images of mmdet's data sets of a split."""
    source = f'{split}_dataloader.dataset'
    metrics, checked, objects = _metric_files(cfg, split), {}, 0
    for dataset, node in opened:
        if not _reads_as_coco(dataset):
            whole = False
            continue
        path, classes = dataset.ann_file, dataset.metainfo.get('classes')
        if not path or not classes:
            raise ValueError(
                f'{source} has no {"classes in its metainfo" if path else "ann_file"}: name them in the config'
            )
        evaluated = metrics.get(os.path.realpath(path), ())
        filtered = None if dataset.test_mode else dataset.filter_cfg
        needs = Needs(
            masks=bool(_step(node, 'LoadAnnotations').get('with_mask')),
            metrics=evaluated,
            panoptic=_is_a(dataset, PANOPTIC),
            ordered='classes' in (node.get('metainfo') or {}),
            labelled=bool(evaluated) or bool(filtered and filtered.get('filter_empty_gt')),
        )
        found = _read(path, classes, needs)
        images = select_images(found, filtered)
        if not images:
            raise ValueError(f'{path} has no image with an object of the classes: correct it or name another file')
        _check_photos(dataset, node, _select(images, dataset._indices, source), source)
        things = dataset.metainfo['thing_classes'] if needs.panoptic else classes  # what an instance metric evaluates
        checked[os.path.realpath(path)] = path, things, found
        objects += found.objects
    if split == 'train' and whole and opened and not objects:
        raise ValueError(f'{opened[0][0].ann_file} has no object to learn: correct it or name another file')
    for other in set(metrics) - set(checked):
        for path, classes, found in checked.values():
            check_same(path, found, other, _read(other, classes, Needs(metrics=metrics[other])))


def _read(path, classes, needs):
    found = check_annotations(path, read_json(path), classes, needs)
    if needs.metrics and not found.objects:
        raise ValueError(f'{path} has no object of the classes to evaluate on: correct it or name another file')
    return found


def _reads_as_coco(dataset):
    """Whether a data set reads files as mmdet's own classes do."""
    bases = [_imported(COCO), _imported(PANOPTIC)]
    return all(getattr(type(dataset), name) in [getattr(base, name) for base in bases] for name in READING)


def _metric_files(cfg, split):
    """What COCO's evaluation computes, by the real path of the annotations that it reads.

    Raises:
        ValueError: the annotations do not exist.
    """
    evaluators = cfg.get(f'{split}_evaluator') or []
    evaluators = evaluators.get('metrics', [evaluators]) if isinstance(evaluators, Mapping) else evaluators
    files = {}
    for metric in evaluators:
        path = metric.get('ann_file') if isinstance(metric, Mapping) else None
        if not path or is_remote(metric) or class_name(metric.get('type')) != 'CocoMetric':
            continue
        if not os.path.isfile(path):
            raise ValueError(f'{path}, the ann_file of {split}_evaluator, does not exist: name that of the data set')
        computed = metric.get('metric', 'bbox')
        computed = [computed] if isinstance(computed, str) else computed
        files[os.path.realpath(path)] = () if metric.get('format_only') else tuple(computed)
    return files


def _check_photos(dataset, node, images, source):
    """Check that the images of a detection data set exist, and that a sample is readable and has the right sizes."""
    loading = _step(node, 'LoadImageFromFile')
    if not loading or loading.get('ignore_empty'):
        return
    if 'img' not in dataset.data_prefix:
        raise ValueError(f'data_prefix of {source} has no img: name the folder of the images with data_prefix.img')
    paths = {os.path.join(dataset.data_prefix['img'], image['file_name']): image for image in images}
    missing = first_missing(paths)
    if missing:
        raise ValueError(
            f'{missing} of {dataset.ann_file} does not exist: put the image there, or name the folder with --data-root '
            'or data_prefix.img'
        )
    maps = dataset.data_prefix.get('seg')
    if maps and _step(node, 'LoadPanopticAnnotations'):
        missing = first_missing(os.path.join(maps, image['file_name'].replace('.jpg', '.png')) for image in images)
        if missing:
            raise ValueError(f'{missing} does not exist: put the panoptic map there or correct data_prefix.seg')
    if loading.get('imdecode_backend') == 'tifffile':
        return
    for path in spread(list(paths), READ):
        header, image = read_header(path), paths[path]
        if header is None:
            raise ValueError(f'{path} is not a readable image: write or copy it again')
        if header.sizes and (image['width'], image['height']) not in header.sizes:
            width, height = header.sizes[0]
            raise ValueError(
                f'{path} has {width} x {height} pixels, and {image["width"]} x {image["height"]} in '
                f'{dataset.ann_file}: its annotations must be of this image'
            )


def _check_segmentation(cfg, dataset, node, source):
    """Check images and label maps of a data set of mmseg."""
    try:
        listed = dataset.load_data_list()
    except Exception as error:
        raise ValueError(f'{source} cannot be read: {first_line(error)}') from error
    check_some_images(dataset, listed, source)
    pairs = _select(listed, dataset._indices, source)
    photos, loading = _step(node, 'LoadImageFromFile'), _step(node, 'LoadAnnotations')
    if not photos or photos.get('ignore_empty'):
        return
    check_pairs(pairs, bool(loading), dataset.seg_map_suffix, source)
    backends = [step.get('imdecode_backend') for step in (photos, loading)]
    if loading and 'tifffile' not in backends:  # Pillow may not know its images
        for pair in pairs:
            check_headers(pair['img_path'], pair['seg_map_path'])
        reduce_zero_label = loading.get('reduce_zero_label')
        if reduce_zero_label not in (None, dataset.reduce_zero_label):
            raise ValueError(
                f'reduce_zero_label is {dataset.reduce_zero_label} in {source} and {reduce_zero_label} in '
                'LoadAnnotations of its pipeline: give both the same value'
            )
        classes = dataset.metainfo.get('classes')
        if classes is not None:
            check_values(pairs, len(classes), dataset.reduce_zero_label, ignore_index(cfg.model))
