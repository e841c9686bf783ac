"""The recipes: each as it is, built on the meta device, and each shrunk, trained and tested for a step.

They are found by looking into `configs/`. CONTRIBUTING.md says what is asked of a new one.
"""

import re
import runpy
import sys
import types
from pathlib import Path

import cv2
import mmengine
import modelindex
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData

from swinv2_mm.arch import ARCHS, parse_arch
from swinv2_mm.engine import launch
from swinv2_mm.engine.optim import SwinV2OptimWrapperConstructor

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*.py'))
SHARED = [path for path in CONFIGS if path.startswith('configs/_base_/')]
RECIPES = [path for path in CONFIGS if not path.startswith(('configs/_base_/', 'configs/demo/'))]
STRATEGY, VIEWS = 'configs/_base_/sharded.py', 'configs/_base_/coco_tta.py'
UNSHARDED = {  # by the sharded recipe, the one that it is otherwise
    'configs/coco/dino-4scale_swinv2-l-w24_8xb2-fsdp-amp-12e_coco.py': (
        'configs/coco/dino-4scale_swinv2-l-w24_8xb2-amp-12e_coco.py'
    ),
    'configs/coco/htc_swinv2-g-w32_fpn_fsdp-amp-ms-400-1400-72e_coco.py': (
        'configs/coco/htc_swinv2-g-w32_fpn_amp-ms-400-1400-72e_coco.py'
    ),
    'configs/coco/htc_swinv2-l-w32_fpn_fsdp-amp-ms-400-1400-72e_coco.py': 'configs/htc_swinv2.py',
}
# What a recipe may be trained on, by the class of its data set. Another one needs a small one here, to train a step on.
DATA = {'CocoDataset': 'COCO', 'CocoPanopticDataset': 'COCO', 'ADE20KDataset': 'ADE20K'}
METRICS = {
    'Object Detection': 'coco/bbox_mAP',
    'Instance Segmentation': 'coco/segm_mAP',
    'Semantic Segmentation': 'mIoU',
}  # by task of the metafile
RELEASES = 'https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
# What Microsoft released: arch, and the pretrained window per stage.
RELEASED = {
    f'swinv2_{arch}_patch4_window{window}_256': (arch, (window, window, window, 8))
    for arch in ('tiny', 'small', 'base')
    for window in (8, 16)
} | {
    f'swinv2_{arch}_patch4_window12{variant}': (arch, (12, 12, 12, 6))
    for arch in ('base', 'large')
    for variant in ('_192_22k', 'to16_192to256_22kto1k_ft', 'to24_192to384_22kto1k_ft')
}
SMALL = dict(embed_dims=16, depths=(2, 1, 1, 1), num_heads=(1, 1, 2, 4))
SIZES = ('scale', 'scales', 'crop_size', 'size', 'max_size')  # settings in pixels
FEWER = dict(num=16, nms_pre=50, max_per_img=8)  # samples for a head, proposals, predictions


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def build(cfg, device):
    launch.set_initial_weights(cfg, 'none')
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        return MODELS.build(cfg.model)


def consumers(model):
    """What takes maps of the backbone: module, and the indices of the maps it takes."""
    if getattr(model, 'neck', None) is not None:
        return [(model.neck, range(len(model.backbone.out_indices)))]
    heads = [getattr(model, name, None) for name in ('panoptic_head', 'decode_head', 'auxiliary_head')]
    return [(head, getattr(head, 'in_index', None) or range(4)) for head in heads if head is not None]


def channels_taken(module):
    if hasattr(module, 'in_channels'):
        taken = module.in_channels
    elif hasattr(module, 'convs'):  # a ChannelMapper
        taken = [conv.conv.in_channels for conv in module.convs]
    else:  # a Mask2FormerHead
        decoder = module.pixel_decoder
        taken = [conv.conv.in_channels for conv in [*decoder.lateral_convs, *list(decoder.input_convs)[::-1]]]
    return list(taken) if isinstance(taken, list | tuple) else [taken]


def window_trained_at(name):
    """The window that a released checkpoint was last trained with."""
    return int(re.search(r'window(?:12to)?(\d+)_', name)[1])


def checkpoint_name(backbone):
    """The stem of the released checkpoint that a config of a backbone names."""
    url = backbone.init_cfg.checkpoint
    assert url == f'{RELEASES}{Path(url).stem}.pth'
    return Path(url).stem


@pytest.fixture(scope='module')
def recipes():
    """Every recipe's config, by its path."""
    return {recipe: launch.load_config(ROOT / recipe) for recipe in RECIPES}


@pytest.fixture(scope='module')
def entries():
    """Every entry of the metafile, by the config that it is for."""
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert len(index.models) == len({model.config for model in index.models})
    return {model.config: model for model in index.models}


def test_the_front_doors_are_there():
    doors = ('mask_rcnn', 'cascade_mask_rcnn', 'htc', 'upernet', 'mask2former')
    assert {f'configs/{door}_swinv2.py' for door in doors} == {path for path in RECIPES if path.count('/') == 1}


def test_every_released_checkpoint_has_a_backbone_to_inherit():
    found = set()
    for path in (path for path in SHARED if 'swinv2_' in path):
        backbone = Config.fromfile(path).backbone
        name = checkpoint_name(backbone)
        assert name == Path(path).stem
        assert backbone.arch == RELEASED[name][0]
        assert backbone.window_size == window_trained_at(name)
        found.add(name)
    assert found == set(RELEASED)


@pytest.mark.parametrize('recipe', [recipe for recipe in RECIPES if recipe not in UNSHARDED])
def test_a_recipe_builds_as_it_is(recipe):
    cfg = launch.load_config(recipe)
    wrapper = cfg.optim_wrapper
    model = build(cfg, 'meta')
    backbone = model.backbone
    arch = parse_arch(cfg.model.backbone.arch)
    for module, indices in consumers(model):
        indices = [indices] if isinstance(indices, int) else indices
        expected = [arch.embed_dims * 2 ** backbone.out_indices[i] for i in indices]
        assert channels_taken(module) == expected
    assert cfg.model.backbone.arch in ARCHS
    assert (wrapper.type == 'BFloat16OptimWrapper') == (cfg.model.backbone.arch != 'tiny')
    assert wrapper.constructor == SwinV2OptimWrapperConstructor.__name__
    built = build_optim_wrapper(model, wrapper)
    trained = sum(len(group['params']) for group in built.optimizer.param_groups)
    assert trained == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_recipe_shares_what_is_shared_and_leaves_no_name_of_it_behind(recipes):
    names = {name for path in SHARED if path not in (STRATEGY, VIEWS) for name in Config.fromfile(path)}
    for recipe, cfg in recipes.items():
        assert not names & set(cfg), f'{recipe}: take it out of _base_ with pop'
        assert RELEASES not in Path(recipe).read_text(), f'{recipe}: inherit the file of configs/_base_'


@pytest.mark.parametrize('recipe', [recipe for recipe in RECIPES if recipe.count('/') > 1])
def test_the_name_of_a_recipe_says_its_arch_window_and_precision(recipe):
    cfg = launch.load_config(recipe)
    backbone = cfg.model.backbone
    said = re.search(r'swinv2-(?:(\w)-w|(\w)\w+-patch4-window)(\d+)', recipe)
    assert (said[1] or said[2]) == backbone.arch[0]
    assert int(said[3]) == backbone.window_size
    assert bool(re.search('[-_]amp-', recipe)) == (cfg.optim_wrapper.type == 'BFloat16OptimWrapper')


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_starts_from_the_released_checkpoint_that_fits_it(recipe):
    backbone = launch.load_config(recipe).model.backbone
    if backbone.arch == 'giant':
        assert backbone.init_cfg is None  # never released
        return
    assert 'pretrained_window_sizes' not in backbone  # the file says them
    name = checkpoint_name(backbone)
    assert backbone.arch == RELEASED[name][0]
    released = {window_trained_at(other) for other, (arch, _) in RELEASED.items() if arch == backbone.arch}
    if backbone.window_size in released:
        assert window_trained_at(name) == backbone.window_size
    else:
        assert window_trained_at(name) < backbone.window_size
    # the smaller archs and windows start from ImageNet-1K, unless the name says otherwise
    assert ('22k' in name) == ('in22k' in recipe or backbone.arch == 'large' or backbone.window_size == 24)
    assert not ('22k' in name and 'in1k' in recipe)


def test_the_docs_list_the_released_checkpoints_with_their_pretrained_windows():
    rows = re.findall(r'^\| `(swinv2_\w+)\.pth` \| (\(.*?\)) \|', Path('docs/checkpoints.md').read_text(), re.MULTILINE)
    assert dict(rows) == {name: str(windows) for name, (_, windows) in RELEASED.items()}


def test_the_docs_list_every_recipe():
    page = runpy.run_path('docs/list_recipes.py')['page']()
    assert Path('docs/recipes.md').read_text() == page, 'run: python docs/list_recipes.py'
    assert sorted(re.findall(r'\]\(\.\./(configs/[^)]*\.py)\)', page)) == RECIPES


def test_there_are_detectors_of_windows_8_16_24_and_32(recipes):
    windows = {cfg.model.backbone.window_size for cfg in recipes.values() if cfg.default_scope == 'mmdet'}
    assert windows >= {8, 16, 24, 32}


def test_only_panoptic_recipes_need_more_than_photos_and_annotations(recipes):
    photos = dict(train='train2017/', val='val2017/', test='val2017/')
    coco = {recipe: cfg for recipe, cfg in recipes.items() if cfg.train_dataloader.dataset.type == 'CocoDataset'}
    assert len(coco) == sum(cfg.default_scope == 'mmdet' and 'panoptic' not in path for path, cfg in recipes.items())
    for recipe, cfg in coco.items():
        for split, folder in photos.items():
            assert cfg[f'{split}_dataloader'].dataset.data_prefix == dict(img=folder), recipe


def test_the_recipes_of_the_paper(recipes):
    cascade = recipes['configs/cascade_mask_rcnn_swinv2.py']
    assert cascade.train_cfg.max_epochs == 36
    resize = next(step for step in cascade.train_dataloader.dataset.pipeline if 'scales' in step)
    assert min(resize.scales) == (480, 1333)
    assert max(resize.scales) == (800, 1333)
    assert cascade.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    htc = recipes['configs/htc_swinv2.py']
    assert htc.model.test_cfg.rcnn.nms.type == 'soft_nms'
    assert [sorted(scale)[0] for scale in htc.train_dataloader.dataset.pipeline[2].scale] == [400, 1400]
    ade20k = {path: cfg for path, cfg in recipes.items() if cfg.train_dataloader.dataset.type == 'ADE20KDataset'}
    assert set(ade20k) == {path for path in RECIPES if path.startswith(('configs/ade20k/', 'configs/upernet'))}
    for path, cfg in ade20k.items():
        assert cfg.train_cfg.max_iters == 160000, path
        assert cfg.model.backbone.drop_path_rate == 0.3, path
        assert cfg.optim_wrapper.paramwise_cfg.decay_rate == 0.95, path
        assert cfg.train_dataloader.batch_size * 8 == 16, path
        if 'mask2former' not in path:
            assert cfg.optim_wrapper.optimizer.lr == 4e-5, path


def test_the_views_of_a_recipe_surround_the_scale_that_it_is_tested_at(recipes):
    for path, cfg in recipes.items():
        plain = cfg.test_dataloader.dataset.pipeline
        [scale] = [step.scale for step in plain if step.type == 'Resize']
        if 'panoptic' in path:
            assert 'tta_model' not in cfg, path
            continue
        resizes, flips, annotations, _ = cfg.to_dict()['tta_pipeline'][1]['transforms']
        ratios = (1, 0.75, 1.25) if cfg.default_scope == 'mmdet' else (0.5, 0.75, 1, 1.25, 1.5, 1.75)
        scales = [tuple(round(side * ratio) for side in scale) for ratio in ratios]
        assert resizes == [dict(type='Resize', scale=scale, keep_ratio=True) for scale in scales], path
        assert [step['prob'] for step in flips] == [0, 1], path
        if cfg.default_scope == 'mmseg':
            assert cfg.tta_model.type == 'SegTTAModel', path
            continue
        assert annotations == [step for step in plain if step.type == 'LoadAnnotations'], path
        own = (cfg.model.test_cfg.get('rcnn') or {}).get('nms') or dict(type='nms', iou_threshold=0.5)
        assert cfg.tta_model == dict(type='InstanceTTAModel', tta_cfg=dict(nms=own, max_per_img=100)), path


def shrink(node):
    """Divide what the settings say in pixels by 8, and take few proposals and predictions."""

    def divided(value):
        return type(value)(map(divided, value)) if isinstance(value, list | tuple) else value // 8

    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in SIZES and not isinstance(value, dict):
            node[key] = divided(value)
        elif key in FEWER:
            node[key] = FEWER[key]
        elif isinstance(value, dict | list):
            shrink(value)


def shrink_config(cfg):
    """Make a recipe one of a small backbone, small images and few of them, and one iteration."""
    model = cfg.model
    model.backbone.update(arch=SMALL, drop_path_rate=0.0)  # so that one step trains every branch
    widths = [16 * 2**i for i in model.backbone.get('out_indices', range(4))]
    if 'neck' in model:
        model.neck.in_channels = widths
    for name in ('panoptic_head', 'decode_head'):
        if name in model:
            model[name].in_channels = widths
    if 'auxiliary_head' in model:
        model.auxiliary_head.in_channels = widths[model.auxiliary_head.in_index]
    for head in (model.get('decode_head', {}), model.get('auxiliary_head', {})):
        if 'channels' in head:
            head.channels = 32
    heads = model.get('roi_head', {}).get('bbox_head', [])
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 64
    if model.type == 'DINO':
        model.num_queries = 20  # small maps have fewer tokens than 900
    for test_cfg in (model.test_cfg, model.test_cfg.get('rcnn') or {}):
        if 'score_thr' in test_cfg:
            test_cfg.score_thr = 0.0  # or an untrained model finds nothing
    for part in (model.data_preprocessor, model.train_cfg, model.test_cfg):
        shrink(part)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        shrink(loader.dataset)
        loader.dataset.indices = 2
        loader.update(num_workers=0, persistent_workers=False)
    shrink(cfg.get('tta_pipeline') or [])
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
    else:
        cfg.train_cfg.max_epochs = 1
    cfg.update(log_level='ERROR', randomness=dict(seed=0))


def test_a_sharded_recipe_is_another_with_a_strategy(recipes):
    assert {path for path, cfg in recipes.items() if 'strategy' in cfg} == set(UNSHARDED)
    strategy = Config.fromfile(STRATEGY).to_dict()
    for recipe, other in UNSHARDED.items():
        assert recipes[recipe].to_dict() == {**recipes[other].to_dict(), **strategy}


@pytest.mark.parametrize('recipe', [recipe for recipe in RECIPES if recipe not in UNSHARDED])
@pytest.mark.usefixtures('no_traces')
def test_a_shrunk_recipe_trains_and_is_tested(recipe, entries, coco, shapes, tmp_path, monkeypatch):
    cfg = launch.load_config(recipe)
    is_panoptic = 'Panoptic Segmentation' in entries[recipe].data['Tasks']
    shrink_config(cfg)
    launch.set_initial_weights(cfg, 'none')
    roots = dict(COCO=coco, ADE20K=shapes / 'ade')
    launch.set_data_root(cfg, str(roots[DATA[cfg.train_dataloader.dataset.type]]))
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.default_hooks.checkpoint = None
    cfg.update(work_dir=str(tmp_path), launcher='none')
    if is_panoptic:
        # panopticapi is on no registry; this is all of it that training needs, and testing needs more
        utils = types.ModuleType('panopticapi.utils')
        utils.rgb2id = lambda colours: colours.astype(int) @ (1, 256, 65536)
        monkeypatch.setitem(sys.modules, 'panopticapi', types.ModuleType('panopticapi'))
        monkeypatch.setitem(sys.modules, 'panopticapi.utils', utils)
        cfg.test_evaluator = dict(type='DumpResults', out_file_path=str(tmp_path / 'predictions.pkl'))
    runner = Runner.from_cfg(cfg)
    model = runner.train()
    for stage in model.backbone.layers:
        for block in stage.blocks:  # their post-norms start at 0
            assert block.norm1.weight.abs().min() > 0
            assert block.norm2.weight.abs().min() > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    metrics = runner.test()
    if is_panoptic:
        predictions = mmengine.load(tmp_path / 'predictions.pkl')
        assert [sample['pred_panoptic_seg']['sem_seg'].shape for sample in predictions] == [(1, 256, 256)] * 2
        return
    for task in entries[recipe].data['Tasks']:
        assert 0 <= metrics[METRICS[task]] <= 100


def test_the_metafile_lists_every_recipe_as_it_is(recipes, entries):
    assert sorted(entries) == RECIPES
    for recipe, cfg in recipes.items():
        model, said = entries[recipe], entries[recipe].metadata.data
        backbone, wrapper, schedule = cfg.model.backbone, cfg.optim_wrapper, cfg.train_cfg
        techniques = {
            wrapper.optimizer.type: True,
            'bfloat16': wrapper.type == 'BFloat16OptimWrapper',
            'FSDP': 'strategy' in cfg,
            'Layer Decay': 'decay_rate' in wrapper.get('paramwise_cfg', {}),
        }
        assert model.name == Path(recipe).stem
        assert said['Architecture'] == [f'SwinV2-{backbone.arch[0].upper()}', model.in_collection]
        assert said['Window Size'] == backbone.window_size
        assert said['Training Data'] == DATA[cfg.train_dataloader.dataset.type]
        assert said['Batch Size'] == 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size
        assert cfg.auto_scale_lr.enable is False  # the key must be there for the hosts' --auto-scale-lr
        assert said.get('Epochs', said.get('Iterations')) == schedule.get('max_epochs', schedule.get('max_iters'))
        assert said['Training Techniques'] == [name for name, used in techniques.items() if used]
        if backbone.init_cfg:
            assert said['Pretrained Checkpoint'] == f'{checkpoint_name(backbone)}.pth'
        assert model.results is None  # none was measured


def test_the_metafile_has_the_results_of_the_paper(entries):
    published = {
        model.name: said for model in entries.values() if (said := model.metadata.data.get('Results of the Paper'))
    }
    assert all('(arXiv 2111.09883, ' in said for said in published.values())
    tested_at_32 = '(arXiv 2111.09883, tested at window 32)'
    assert (
        published.items()
        >= {
            'cascade_mask_rcnn_swinv2': 'box AP 51.1 (arXiv 2111.09883, Table 1)',
            'cascade-mask-rcnn_swinv2-t-w32_fpn_ms-3x_coco': 'box AP 51.8 (arXiv 2111.09883, Table 1)',
            'upernet_swinv2': 'mIoU 47.0 (arXiv 2111.09883, Table 1)',
            'htc_swinv2': f'box AP 58.8, mask AP 51.1 {tested_at_32}',
            'htc_swinv2-g-w32_fpn_amp-ms-400-1400-72e_coco': f'box AP 61.7, mask AP 53.3 {tested_at_32}',
        }.items()
    )


ADE20K = ROOT.parent / 'shared/data/ade20k_sample'


@pytest.mark.parametrize('data', ['drawn', 'real'])
@pytest.mark.usefixtures('no_traces')
def test_the_ground_truth_of_ade20k_as_prediction_is_100_miou(data, shapes):
    root = dict(drawn=shapes / 'ade', real=ADE20K)[data]
    if not root.is_dir():
        pytest.skip(f'needs ADE20K images in {root}')
    cfg = launch.load_config('configs/upernet_swinv2.py')
    launch.set_data_root(cfg, str(root))
    init_default_scope('mmseg')

    def miou(label_of_class_0):
        """Of predictions made from the PNGs alone, whose labels 1 to 150 are classes 0 to 149 and 0 is none."""
        evaluator = Evaluator(cfg.test_evaluator)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        evaluator.dataset_meta = dataset.metainfo
        for item in dataset:
            sample = item['data_samples']
            png = Path(sample.img_path.replace('images', 'annotations')).with_suffix('.png')
            labels = torch.from_numpy(cv2.imread(str(png), cv2.IMREAD_UNCHANGED)).long()
            sample.pred_sem_seg = PixelData(data=(labels - label_of_class_0).clamp(0, 149)[None])
            evaluator.process([sample], None)
        return evaluator.evaluate(len(dataset))['mIoU']

    assert miou(1) == 100
    assert miou(0) < 50
