"""Bad input by its name, what is said about it, and good input that is like it. `test_data_checks.py` uses both.

Data are those of `tools/misc/draw_dataset.py`: eight images for training and two for validation, as COCO and as ADE20K.
"""

import copy
import functools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

TRAIN, VAL = 'annotations/instances_train2017.json', 'annotations/instances_val2017.json'
MAPS, PHOTOS = 'ade/annotations/training', 'ade/images/training'
CLASSES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring')


def write(path, coco):
    path.write_text(json.dumps(coco))


def rewrite(path, change):
    """Change the annotations of a file in place."""
    coco = json.loads(path.read_text())
    change(coco)
    write(path, coco)


def put(*place):
    """A change that sets one value, the last argument."""
    *place, value = place

    def change(coco):
        node = coco
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value

    return change


def drop(*place):
    def change(coco):
        node = coco
        for key in place[:-1]:
            node = node[key]
        del node[place[-1]]

    return change


shape, image, category = (functools.partial(put, key) for key in ('annotations', 'images', 'categories'))
drop_shape, drop_image, drop_category = (
    functools.partial(drop, key) for key in ('annotations', 'images', 'categories')
)


def each(key, **values):
    """A change of all entries of a list."""
    return lambda coco: [entry.update(values) for entry in coco[key]]


def again(key):
    """A change that lists the first entry twice."""
    return lambda coco: coco[key].append(dict(coco[key][0]))


NAN, INF = float('nan'), float('inf')
FILES = {  # what stands in the file, and what the line says
    'an empty file': (b'', 'is not readable JSON'),
    'half a file': (b'{"images": [{"id": 1', 'is not readable JSON'),
    'bytes': (b'\x89PNG\r\n\x1a\n\xff', 'is not readable JSON'),
    'deep nesting': (b'[' * 100000, 'is not readable JSON'),
    'a list': (b'[]', 'holds a list, not a dict'),
    'null': (b'null', 'holds a NoneType, not a dict'),
    'a string': (b'"images"', 'holds a str, not a dict'),
    'an empty dict': (b'{}', "has no 'images'"),
}
COCO_CHANGES = {  # changes of the annotations, and what the line says
    'no images': (drop('images'), "has no 'images'"),
    'no annotations': (drop('annotations'), "has no 'annotations'"),
    'no categories': (drop('categories'), "has no 'categories'"),
    'images are a dict': (put('images', {}), 'has images as {}'),
    'annotations are null': (put('annotations', None), 'has annotations as None'),
    'images are empty': (put('images', []), 'lists no images'),
    'annotations are empty': (put('annotations', []), 'has no '),
    'categories are empty': (put('categories', []), "has no category 'disc'"),
    'an image is a name': (put('images', 1, 'a.jpg'), "images[1] is 'a.jpg', must be a dict"),
    'an annotation is null': (put('annotations', 2, None), 'annotations[2] is None, must be a dict'),
    'categories are names': (put('categories', list(CLASSES)), "categories[0] is 'disc', must be a dict"),
    'an image has no id': (drop_image(0, 'id'), "images[0]: has no 'id'"),
    'an image has the id null': (image(0, 'id', None), 'images[0]: id is None'),
    'an image has a list as id': (image(0, 'id', [1]), 'images[0]: id is [1]'),
    'an image occurs twice': (again('images'), 'id 1 occurs twice'),
    'an image has no file_name': (drop_image(0, 'file_name'), "images[0]: has no 'file_name'"),
    'a file_name is a number': (image(0, 'file_name', 7), 'file_name is 7'),
    'a file_name is empty': (image(0, 'file_name', ''), "file_name is ''"),
    'an image is not on the disk': (image(1, 'file_name', 'no.jpg'), '/no.jpg of'),
    'images have another suffix': (image(1, 'file_name', '000000000002.png'), '000000000002.png of'),
    'an image has no height': (drop_image(0, 'height'), "images[0]: has no 'height'"),
    'a height is 0': (image(0, 'height', 0), 'height is 0, must be the pixels'),
    'a height is text': (image(0, 'height', '256'), "height is '256', must be the pixels"),
    'a width is NaN': (image(0, 'width', NAN), 'width is nan, must be the pixels'),
    'sizes are of other images': (
        lambda coco: (each('images', width=640, height=480)(coco), polygons(coco)),
        '256 x 256 pixels, and 640 x 480 in',
    ),
    'a category is misspelt': (
        category(1, 'name', 'sqare'),
        "'square' of the config: correct the name, the nearest in the file is 'sqare'",
    ),
    'a category is in upper case': (category(0, 'name', 'Disc'), "the nearest in the file is 'Disc'"),
    'a category is missing': (drop('categories', 5), "has no category 'ring' of the config: it has 'disc'"),
    'categories are others': (
        lambda coco: [c.update(name=f'{c["id"]}th') for c in coco['categories']],
        "no category 'disc' of the config, nor 5 more of the 6 classes",
    ),
    'categories are in another order': (
        lambda coco: coco['categories'].reverse(),
        "has 'ring' where metainfo.classes has 'disc'",
    ),
    'a category occurs twice': (
        lambda coco: coco['categories'].append(dict(id=9, name='disc')),
        "has 2 categories 'disc'",
    ),
    'an id of a category occurs twice': (category(1, 'id', 1), 'categories[1]: id 1 occurs twice'),
    'a category has no name': (drop_category(0, 'name'), "categories[0]: has no 'name'"),
    'a name is a number': (category(0, 'name', 1), 'name is 1, must be a string'),
    'a category has no id': (drop_category(0, 'id'), "categories[0]: has no 'id'"),
    'an annotation has no id': (drop_shape(0, 'id'), "annotations[0]: has no 'id'"),
    'an annotation occurs twice': (again('annotations'), 'id 1 occurs twice'),
    'an annotation has the id null': (shape(0, 'id', None), 'id is None'),
    'an image_id exists nowhere': (shape(1, 'image_id', 999), 'image_id 999 is not the id of an image'),
    'an image_id is text': (shape(1, 'image_id', '1'), "image_id '1' is not the id of an image"),
    'an annotation has no image_id': (drop_shape(0, 'image_id'), "has no 'image_id'"),
    'a category_id exists nowhere': (shape(1, 'category_id', 77), 'category_id 77 is not the id of a category'),
    'a category_id counts from 0': (shape(1, 'category_id', 0), 'category_id 0 is not the id'),
    'a category_id is text': (shape(1, 'category_id', 'disc'), "category_id 'disc' is not the id"),
    'an annotation has no category_id': (drop_shape(0, 'category_id'), "has no 'category_id'"),
    'an annotation has no bbox': (drop_shape(0, 'bbox'), "annotations[0]: has no 'bbox'"),
    'a bbox is null': (shape(0, 'bbox', None), 'bbox is None, must be x, y, width, height'),
    'a bbox has three numbers': (shape(0, 'bbox', [1, 2, 3]), 'bbox is [1, 2, 3], must be x, y'),
    'a bbox has five numbers': (shape(0, 'bbox', [1, 2, 3, 4, 5]), 'bbox is [1, 2, 3, 4, 5]'),
    'a bbox is a dict': (shape(0, 'bbox', dict(x=1)), "bbox is {'x': 1}"),
    'a bbox has NaN': (shape(3, 'bbox', 0, NAN), 'annotations[3]: bbox is [nan, '),
    'a bbox is infinite': (shape(3, 'bbox', 2, INF), 'inf, '),
    'a bbox has text': (shape(3, 'bbox', 1, '12'), "'12', "),
    'a bbox has null': (shape(3, 'bbox', 1, None), 'None, '),
    'a width is negative': (shape(3, 'bbox', 2, -5), 'no size negative'),
    'a height is negative': (shape(3, 'bbox', 3, -5.5), '-5.5], must be finite'),
    'all boxes are empty': (each('annotations', bbox=[0, 0, 0, 0]), 'has no object'),
    'all boxes are fractions of the image': (each('annotations', bbox=[0.1, 0.2, 0.3, 0.4]), 'has no object'),
    'all boxes are outside': (each('annotations', bbox=[900, 900, 50, 50]), 'has no object'),
    'an annotation has no area': (drop_shape(0, 'area'), "has no 'area'"),
    'an area is text': (shape(0, 'area', '9'), "area is '9', must be pixels"),
    'an area is negative': (shape(0, 'area', -9), 'area is -9, must be pixels'),
    'an object has no segmentation': (drop_shape(0, 'segmentation'), 'segmentation is None, and masks are'),
    'a segmentation is empty': (shape(0, 'segmentation', []), 'segmentation is [], and masks are'),
    'a segmentation is text': (shape(0, 'segmentation', 'x'), "segmentation is 'x', must be polygons"),
    'a polygon is not in a list': (shape(0, 'segmentation', [9, 9, 60, 9, 60, 60]), 'segmentation has 9, must be'),
    'a polygon has points': (
        shape(0, 'segmentation', [[[9, 9], [60, 9], [60, 60], [9, 60]]]),
        'must be finite numbers',
    ),
    'a polygon lacks a coordinate': (shape(0, 'segmentation', [[9, 9, 60, 9, 60, 60, 9]]), 'must be lists x, y'),
    'a polygon has NaN': (shape(0, 'segmentation', [[9, 9, 60, NAN, 60, 60]]), 'nan, '),
    'a polygon has a point far away': (shape(0, 'segmentation', [[9, 9, 60, 1e9, 60, 60]]), 'far outside the image'),
    'a polygon has text': (shape(0, 'segmentation', [['9', 9, 60, 9, 60, 60]]), "'9', "),
    'a code has no counts': (drop_shape(0, 'segmentation', 'counts'), 'must be polygons or a code with counts'),
    'a code has no size': (drop_shape(0, 'segmentation', 'size'), 'segmentation has size None'),
    'a code is of another size': (shape(0, 'segmentation', 'size', [480, 640]), 'size [480, 640], must be [256, 256]'),
    'a code is cut off': (
        lambda coco: coco['annotations'][0]['segmentation'].update(counts='fX12'),
        'annotations[0]: segmentation has counts',
    ),
    'a code has other characters': (
        shape(0, 'segmentation', 'counts', '~~~'),
        "has counts '~~~', which are not a run-length code",
    ),
    'a code has no Latin letters': (shape(0, 'segmentation', 'counts', 'диск'), 'which are not a run-length code'),
    'counts are of too few pixels': (
        shape(0, 'segmentation', 'counts', [100, 50]),
        'has counts for 150 pixels, must be 65536',
    ),
    'a count is negative': (shape(0, 'segmentation', 'counts', [70000, -4464]), 'has counts for 65536 pixels'),
    'counts are words': (shape(0, 'segmentation', 'counts', ['many']), 'which are not a run-length code'),
}


def write_map(path, value, mode='L', size=(256, 256)):
    Image.new(mode, size, value).save(path)


def in_all(folder, change):
    return lambda data: [change(path) for path in (data / folder).iterdir()]


MAP = f'{MAPS}/000000000002.png'
SEGMENTATION = {  # what is done to the data, options, and what the line says
    'a map is missing': (lambda data: (data / MAP).unlink(), (), f'{MAP} does not exist: put the label map'),
    'maps have another suffix': (
        in_all(MAPS, lambda path: path.rename(path.with_suffix('.bmp'))),
        (),
        "set seg_map_suffix of train_dataloader.dataset to '.bmp'",
    ),
    'maps have a longer name': (
        in_all(MAPS, lambda path: path.rename(path.with_name(f'{path.stem}_labelIds.png'))),
        (),
        "to '_labelIds.png'",
    ),
    'there are no maps': (in_all(MAPS, Path.unlink), (), 'does not exist'),
    'a map is RGB': (
        lambda data: write_map(data / MAP, (1, 1, 1), 'RGB'),
        (),
        'mode RGB, must have one channel',
    ),
    'a map is RGBA': (lambda data: write_map(data / MAP, (1, 1, 1, 255), 'RGBA'), (), 'mode RGBA'),
    'a map has an alpha channel': (lambda data: write_map(data / MAP, (1, 255), 'LA'), (), 'mode LA'),
    'a map is smaller than its image': (
        lambda data: write_map(data / MAP, 1, size=(128, 64)),
        (),
        '128 x 64 pixels, and its image',
    ),
    'a map is turned': (
        lambda data: (
            write_map(data / MAP, 1, size=(256, 192)),
            cv2.imwrite(str(data / PHOTOS / '000000000002.jpg'), np.zeros((256, 192, 3), np.uint8)),
        ),
        (),
        '256 x 192 pixels, and its image',
    ),
    'a map is empty': (lambda data: (data / MAP).write_bytes(b''), (), 'is not a readable image'),
    'a map is text': (lambda data: (data / MAP).write_text('1 2 3'), (), 'is not a readable image'),
    'a map is cut off': (
        lambda data: (data / MAP).write_bytes((data / MAP).read_bytes()[:200]),
        (),
        'is not a readable image',
    ),
    'a value is too high': (
        lambda data: write_map(data / MAP, 7),
        (),
        'has the value 7, and with 7 classes and reduce_zero_label=False values go from 0 to 6, 255 to be ignored',
    ),
    'a value is 254': (lambda data: write_map(data / MAP, 254), (), 'has the value 254'),
    'a value has 16 bits': (lambda data: write_map(data / MAP, 257, 'I;16'), (), 'has the value 257'),
    'a value is negative': (
        lambda data: Image.fromarray(np.full((256, 256), -3, np.int32)).save(data / MAP.replace('.png', '.tiff')),
        ['train_dataloader.dataset.seg_map_suffix=.tiff'],
        'does not exist',
    ),
    'all is to be ignored': (in_all(MAPS, lambda path: write_map(path, 255)), (), 'only pixels to be ignored'),
    'all is ignored for being 0': (
        in_all(MAPS, lambda path: write_map(path, 0)),
        [
            'train_dataloader.dataset.reduce_zero_label=True',
            'train_dataloader.dataset.pipeline.1.reduce_zero_label=True',
        ],
        'only pixels to be ignored, with reduce_zero_label=True',
    ),
    'reduce_zero_label is there in two ways': (
        None,
        ['train_dataloader.dataset.reduce_zero_label=True'],
        'reduce_zero_label is True in train_dataloader.dataset and False in LoadAnnotations',
    ),
    'a label that is ignored is not that of the head': (
        lambda data: write_map(data / MAP, 255),
        ['model.decode_head.ignore_index=9'],
        'has the value 255',
    ),
    'there are no photos': (in_all(PHOTOS, Path.unlink), (), f"{PHOTOS} holds no images that end with '.jpg': put"),
    'photos have another suffix': (
        in_all(PHOTOS, lambda path: path.rename(path.with_suffix('.JPG'))),
        (),
        "it holds 8 of '.JPG': set img_suffix of train_dataloader.dataset",
    ),
    'a photo is text': (
        lambda data: (data / PHOTOS / '000000000004.jpg').write_text('x'),
        (),
        'images/training/000000000004.jpg is not a readable image',
    ),
    'a folder is missing': (lambda data: shutil.rmtree(data / PHOTOS), (), f'{PHOTOS} does not exist'),
    'a list names what is not there': (
        lambda data: (data / 'ade/list.txt').write_text('000000000001\nother\n'),
        ['train_dataloader.dataset.ann_file=list.txt'],
        'other.jpg does not exist',
    ),
    'a list is empty': (
        lambda data: (data / 'ade/list.txt').write_text(''),
        ['train_dataloader.dataset.ann_file=list.txt'],
        'list.txt names no images',
    ),
    'a list has suffixes': (
        lambda data: (data / 'ade/list.txt').write_text('000000000001.jpg\n'),
        ['train_dataloader.dataset.ann_file=list.txt'],
        '000000000001.jpg.jpg does not exist',
    ),
    'a metric is none': (
        None,
        ['val_evaluator.iou_metrics=[mIoU,mAP]'],
        "val_evaluator.iou_metrics is 'mAP': must be one of",
    ),
    'indices leave nothing': (
        None,
        ['train_dataloader.dataset.indices=0'],
        'indices of train_dataloader.dataset are 0',
    ),
    'indices are beyond the end': (
        None,
        ['train_dataloader.dataset.indices=[0,8]'],
        'indices of train_dataloader.dataset are [0, 8], and it has 8',
    ),
    'the head has fewer classes': (
        None,
        ['model.decode_head.num_classes=6'],
        'model.decode_head.num_classes is 6, and train_dataloader.dataset has 7 classes',
    ),
    'the head has more classes': (
        None,
        ['model.decode_head.num_classes=150'],
        'add --cfg-options model.decode_head.num_classes=7',
    ),
    'the auxiliary head has other classes': (
        None,
        ['model.auxiliary_head.num_classes=19'],
        'model.auxiliary_head.num_classes is 19',
    ),
    'classes are one string': (
        None,
        ['train_dataloader.dataset.metainfo.classes=disc'],
        "is 'disc', must be a tuple of names: ('disc',)",
    ),
    'a palette has other colours': (
        None,
        ['train_dataloader.dataset.metainfo.palette=[(1,2,3)]'],
        'palette does not match classes',
    ),
    'an argument is unknown': (None, ['train_dataloader.dataset.test_mod=True'], "did you mean 'test_mode'?"),
}


OPTIONS = {  # words after --cfg-options, and what the line says
    'optim_wraper.x=1': "the config neither has nor accepts 'optim_wraper': did you mean 'optim_wrapper'?",
    'modl.backbone.with_cp=True': "did you mean 'model'?",
    'lod_from=x.pth': "did you mean 'load_from'?",
    'qqqq=1': "the config neither has nor accepts 'qqqq'",
    'model.bakbone.with_cp=True': "model neither has nor accepts 'bakbone': did you mean 'backbone'?",
    'model.neck.out_channel=3': "model.neck neither has nor accepts 'out_channel': did you mean 'out_channels'?",
    'model.roi_head.bbox_head.num_class=6': "did you mean 'num_classes'?",
    'model.test_cfg.rcnn.score_thrs=0.3': "model.test_cfg.rcnn has no 'score_thrs': did you mean 'score_thr'?",
    'train_dataloader.batchsize=4': "did you mean 'batch_size'?",
    'train_dataloader.dataset.indice=4': "did you mean 'indices'?",
    'train_dataloader.dataset.data_prefx.img=x': "did you mean 'data_prefix'?",
    'train_dataloader.sampler.shufle=False': "did you mean 'shuffle'?",
    'train_dataloader.dataset.pipeline.2.scal=(3,3)': "did you mean 'scale'?",
    'train_dataloader.dataset.pipeline.9.scale=(3,3)': 'is a list of 5, whose items are numbered from 0',
    'train_dataloader.dataset.pipeline.Resize.scale=(3,3)': "and 'Resize' is not one of them",
    'train_cfg.max_iter=3': "did you mean 'max_iters'?",
    'optim_wrapper.optimizer.weight_deacy=0': "did you mean 'weight_decay'?",
    'optim_wrapper.clip_grads.max_norm=1': "did you mean 'clip_grad'?",
    'param_scheduler.0.start_facto=1': "did you mean 'start_factor'?",
    'default_hooks.checkpoint.intervall=1': "did you mean 'interval'?",
    'default_hooks.chekpoint.interval=1': "did you mean 'checkpoint'?",
    'randomness.sead=0': "did you mean 'seed'?",
    'val_evaluator.metrics=bbox': "did you mean 'metric'?",
    'train_cfg.max_iters.x=1': "train_cfg.max_iters is 540, which has no 'x'",
    'model.backbone=tiny': 'model.backbone=tiny: it is a dict: set one of its parts',
    'model.backbone.type=Foo': "model.backbone.type=Foo: there is no model 'Foo'",
    'model.backbone.type=SwinTransformerV3': "did you mean 'SwinTransformerV2'?",
    'optim_wrapper.optimizer.type=SGD': "SGD takes no 'betas', which optim_wrapper.optimizer has: write",
    'model.backbone.type=ResNet': "ResNet takes no 'arch', which model.backbone has: write model.backbone in a config",
    'optim_wrapper.optimizer.type=AdamX': "there is no optimizer 'AdamX': did you mean 'Adam",
    'train_dataloader.dataset.type=CocoDatset': "there is no dataset 'CocoDatset': did you mean 'CocoDataset'?",
    'train_dataloader.dataset.pipeline.2.type=Resise': "there is no transform 'Resise': did you mean 'Resize'?",
    'train_dataloader.sampler.type=InfinitSampler': "did you mean 'InfiniteSampler'?",
    'train_dataloader.batch_size': 'must be KEY=VALUE',
    '=3': 'must be KEY=VALUE',
    'model..x=3': 'must be KEY=VALUE',
    'train_dataloader.dataset.indices=[1,2': 'must be KEY=VALUE',
    'train_dataloader.batch_size=0': 'train_dataloader.batch_size is 0: must be a whole number of at least 1',
    'train_dataloader.batch_size=-2': 'train_dataloader.batch_size is -2',
    'train_dataloader.batch_size=2.5': 'train_dataloader.batch_size is 2.5',
    'val_dataloader.batch_size=many': "val_dataloader.batch_size is 'many'",
    'train_dataloader.num_workers=-1': 'train_dataloader.num_workers is -1: must be a whole number of at least 0',
    'train_dataloader.num_workers=0': 'add --cfg-options train_dataloader.persistent_workers=False',
    'train_dataloader.prefetch_factor=0': 'train_dataloader.prefetch_factor is 0',
    'train_cfg.max_iters=0': 'train_cfg.max_iters is 0: must be a whole number of at least 1',
    'train_cfg.val_interval=0': 'train_cfg.val_interval is 0',
    'randomness.seed=-1': 'randomness.seed is -1: must be a whole number from 0',
    'randomness.seed=4294967296': 'seed is 4294967296: must be a whole number from 0',
    'val_evaluator.metric=box': "val_evaluator.metric is 'box': must be one of bbox, segm, proposal",
    'param_scheduler.0.end=-1': 'param_scheduler.0 has begin=0 and end=-1: must be 0 <= begin < end',
    'param_scheduler.1.begin=540': 'param_scheduler.1 has begin=540 and end=540',
    'train_dataloader=None': 'the config has no train_dataloader, must have train_dataloader, train_cfg, optim_wrapper',
    'optim_wrapper=None': 'the config has no optim_wrapper',
    'val_evaluator=None': 'the config has no val_evaluator',
    'randomness.seed=x': "seed is 'x'",
    'optim_wrapper.optimizer.lr=-1': 'optim_wrapper.optimizer.lr is -1: must be a number of at least 0',
    'optim_wrapper.optimizer.lr=fast': "optim_wrapper.optimizer.lr is 'fast'",
    'optim_wrapper.accumulative_counts=0': 'optim_wrapper.accumulative_counts is 0',
    'default_hooks.logger.interval=0': 'default_hooks.logger.interval is 0',
    'default_hooks.checkpoint.interval=0': 'default_hooks.checkpoint.interval is 0',
    'train_dataloader.dataset.indices=0': 'indices of train_dataloader.dataset are 0, which leaves no image',
    'model.roi_head.bbox_head.num_classes=80': 'bbox_head.num_classes is 80, and train_dataloader.dataset has 6',
    'model.roi_head.mask_head.num_classes=5': 'add --cfg-options model.roi_head.mask_head.num_classes=6',
    'train_dataloader.dataset.metainfo.classes=disc': "metainfo.classes of train_dataloader.dataset is 'disc'",
    'train_dataloader.dataset.metainfo.classes=[disc,ring]': 'is 6, and train_dataloader.dataset has 2',
    'train_dataloader.dataset.data_prefix.img=val2017/': '000000000003.jpg of',
}


def without_objects(coco):
    coco['annotations'] = [shape for shape in coco['annotations'] if shape['image_id'] != 2]


def degenerate(coco):
    shape = coco['annotations'][0]
    for i, box in enumerate(([5, 5, 0, 0], [5, 5, 0.5, 9], [-20, -20, 10, 10], [-3.5, 200, 900, 900], [300, 9, 5, 5])):
        coco['annotations'].append({**shape, 'id': 1000 + i, 'bbox': box})
    coco['annotations'].append({**shape, 'id': 2000, 'area': 0})


def crowd(coco):
    counts = [30000, 500, 256 * 256 - 30500]
    segmentation = dict(size=[256, 256], counts=counts)
    coco['annotations'].append({**coco['annotations'][0], 'id': 3000, 'iscrowd': 1, 'segmentation': segmentation})


def polygons(coco):
    for shape in coco['annotations']:
        x, y, width, height = shape['bbox']
        shape['segmentation'] = [[x, y, x + width, y, x + width, y + height], [x, y, x, y]]
    coco['annotations'][0]['segmentation'] = [[5, 5, 9, 9]]  # mmdet ignores it


def more_categories(coco):
    coco['categories'].insert(2, dict(id=50, name='hexagon'))
    coco['annotations'].append(dict(coco['annotations'][0], id=4000, category_id=50))


def extra_keys(coco):
    coco.update(licenses=None, info='x', videos=[])
    each('images', license=3, coco_url='http://x', date='?')(coco)
    each('annotations', score=NAN, attributes={}, keypoints=[])(coco)


def float_ids(coco):
    for shape in coco['annotations']:
        shape.update(id=float(shape['id']), image_id=float(shape['image_id']), category_id=float(shape['category_id']))


def ignored(coco):
    coco['annotations'].append(dict(id=5000, image_id=1, category_id=1, ignore=True))


def gaps(coco):
    for category in coco['categories']:
        category['id'] = category['id'] * 7 - 7
    for shape in coco['annotations']:
        shape.update(category_id=shape['category_id'] * 7 - 7)


def in_folders(coco):
    for image in coco['images']:
        image['file_name'] = f'../train2017/{image["file_name"]}'


GOOD = {
    'as drawn': lambda coco: None,
    'images without objects': without_objects,
    'degenerate boxes': degenerate,
    'crowds': crowd,
    'polygons, some of two points': polygons,
    'more categories': more_categories,
    'more keys': extra_keys,
    'ids are floats': float_ids,
    'objects to ignore': ignored,
    'ids with gaps, from 0': gaps,
    'images in other folders': in_folders,
    'an image without objects that is not there': lambda coco: coco['images'].append(
        dict(id=77, file_name='no.jpg', height=256, width=256)
    ),
    'a small image that is not there': lambda coco: coco['images'].append(
        dict(id=77, file_name='no.jpg', height=5, width=5)
    ),
}


GOOD_MAPS = {
    'as drawn': (None, ()),
    'to be ignored': (lambda data: write_map(data / MAP, 255), ()),
    'with a palette': (lambda data: Image.open(data / MAP).convert('P').save(data / MAP), ()),
    'in two tones': (lambda data: write_map(data / MAP, 1, '1'), ()),
    'of 16 bits': (lambda data: write_map(data / MAP, 6, 'I;16'), ()),
    '65535 to be ignored': (lambda data: write_map(data / MAP, 65535, 'I;16'), ()),
    'more maps than images': (lambda data: write_map(data / MAPS / 'other.png', 200), ()),
    'a list': (
        lambda data: (data / 'ade/list.txt').write_text('000000000001\n000000000002\n'),
        ['train_dataloader.dataset.ann_file=list.txt'],
    ),
    'a map that is not used': (lambda data: (data / MAP).unlink(), ['train_dataloader.dataset.indices=[0,3]']),
    '0 to be ignored': (
        None,
        [
            'train_dataloader.dataset.reduce_zero_label=True',
            'train_dataloader.dataset.pipeline.1.reduce_zero_label=True',
        ],
    ),
    'images in folders': (
        lambda data: [
            ((data / folder / 'city').mkdir(), path.rename(path.parent / 'city' / path.name))
            for folder in (MAPS, PHOTOS)
            for path in [next((data / folder).glob('*2.*'))]
        ],
        (),
    ),
}


GOOD_OPTIONS = [
    'model.backbone.with_cp=True',
    'model.backbone.arch=tiny model.backbone.window_size=16',
    'train_dataloader.num_workers=2',
    'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False',
    'train_dataloader.pin_memory=True train_dataloader.drop_last=True',
    'load_from=x.pth',
    'resume=True',
    'randomness.seed=0 randomness.deterministic=True',
    'default_hooks.checkpoint.max_keep_ckpts=3 default_hooks.checkpoint.save_best=coco/bbox_mAP',
    'default_hooks.checkpoint.interval=-1',
    'default_hooks.early_stopping.type=EarlyStoppingHook default_hooks.early_stopping.monitor=coco/bbox_mAP',
    'train_dataloader.dataset.indices=3',
    'train_dataloader.dataset.pipeline.2.scale=(96,96)',
    'train_dataloader.dataset.filter_cfg.min_size=8',
    'train_dataloader.sampler.seed=3',
    'model.neck.norm_cfg.requires_grad=True',
    'model.neck.start_level=0 model.neck.add_extra_convs=on_input',
    'model.test_cfg.rcnn.score_thr=0.3 model.test_cfg.rcnn.nms.class_agnostic=True',
    'model.test_cfg.rcnn.nms.type=soft_nms',
    'optim_wrapper.type=AmpOptimWrapper optim_wrapper.loss_scale=dynamic',
    'optim_wrapper.accumulative_counts=4 optim_wrapper.clip_grad.norm_type=2',
    'optim_wrapper.optimizer.type=Adam optim_wrapper.optimizer.amsgrad=True',
    'optim_wrapper.paramwise_cfg.custom_keys.patch_embed.decay_mult=0',
    'optim_wrapper.paramwise_cfg.decay_rate=0.9',
    'param_scheduler.0.end=3 param_scheduler.1.eta_min=1',
    'train_cfg.dynamic_intervals=None',
    'train_cfg.val_interval=100.0',
    'auto_scale_lr.enable=True auto_scale_lr.base_batch_size=16',
    'find_unused_parameters=True',
    'experiment_name=mine',
    'work_dir=there log_level=DEBUG',
    'visualizer.vis_backends.0.type=TensorboardVisBackend',
    'env_cfg.cudnn_benchmark=True env_cfg.resource_limit=99',
    'log_processor.window_size=20 log_processor.num_digits=3',
    'val_evaluator.classwise=True val_evaluator.metric=bbox',
    'val_evaluator.metric=[bbox,segm]',
    'compile.backend=inductor',
    'sync_bn=torch',
    'max_iters=3',
    'runner_type=Runner',
    'val_cfg=None val_dataloader=None val_evaluator=None',
    'allow_missing=[backbone.patch_embed.proj]',
]


VALUES = (None, 0, 1, -1, 7, 1e9, 0.5, NAN, INF, '', 'disc', '1', True, [], [1], [[]], {}, [1, 2, 3, 4], {'a': 1})


def spoil_one(coco, rng):
    """Change one thing at random place."""
    node, key = coco, None
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.1:
            break
        node = node[key]
    kind = rng.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif kind == 2 and isinstance(node[key], (int, float)):
        node[key] *= rng.choice((-1, 0, 10, 0.001))
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
