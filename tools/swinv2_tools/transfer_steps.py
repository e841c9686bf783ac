"""Carry out the steps of a study of position biases: train, fine-tune, measure."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_mm import SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoints.files import read_checkpoint, write_checkpoint
from swinv2_mm.engine.runner import SwinV2Runner
from swinv2_mm.position_bias import POSITION_BIASES, table_centre
from swinv2_mm.writing import whole
from swinv2_tools.classifier import Classifier
from swinv2_tools.photos import Photos, RandomCrops, at_size
from swinv2_tools.transfer_plan import (
    CENTRE,
    Condition,
    Run,
    Settings,
    Step,
    has_wrong_window,
    largest_canvas,
    trained_epochs,
    training_condition,
    windows_at,
)

WARM_UP = 200  # iterations
AVERAGING = 0.005  # share of the newest weights in the averaged ones, which are measured
LOGGER = dict(type='LoggerHook', interval=20)
NUMBERS = itertools.count()  # make the names of runners unique


class Outputs(NamedTuple):
    """What a classifier gives for photos: features (N, C) and logits (N, num_classes)."""

    features: Tensor
    logits: Tensor


def carry_out(
    step: Step,
    settings: Settings,
    run: Run,
    folder: Path,
    photos: dict[str, Photos],
    device: str,
) -> None:
    """Do a step of a run and leave its file.

    Args:
        step (Step): the step; those before it are done.
        settings (Settings): of the study.
        run (Run): the run.
        folder (Path): of the run.
        photos (dict): by split, train and val.
        device (str): cpu or cuda.

    Raises:
        ValueError: the run is trained for longer already.
    """
    weights = Step(step.epochs).file(folder)
    if step.condition is None:
        if trained_epochs(folder) > step.epochs:
            found = trained_epochs(folder)
            raise ValueError(f'{folder} is trained for {found} epochs, and can be measured after {step.epochs} no more')
        train(settings, run, photos['train'], folder, step.epochs)
        averaged = read_checkpoint(folder / f'epoch_{step.epochs}.pth')['state_dict']
        write_checkpoint(dict(state_dict=averaged), weights)
        return
    outputs = []
    for wrong in (False, True)[: 1 + has_wrong_window(settings, run, step.condition)]:
        model = load(weights, settings, run, step.condition, wrong)
        if step.finetuned:
            finetune(model, settings, run, photos['train'], folder / 'finetuning', step.condition)
        outputs.append(predict(model.to(device), photos['val'], step.condition, settings.batch_size))
    labels = torch.from_numpy(photos['val'].labels)
    measured = losses_and_hits(outputs[0], labels)
    if len(outputs) == 2:
        measured.update({f'wrong_{name}': value for name, value in losses_and_hits(outputs[1], labels).items()})
        measured.update(changes(*outputs))
    if step == Step(step.epochs, training_condition(settings)):
        measured.update(shape_of_biases(model.backbone))
        largest = largest_canvas(settings)
        measured['bias_by_distance'] = bias_by_distance(load(weights, settings, run, largest, False).backbone)
        if has_wrong_window(settings, run, largest):
            measured['bias_by_distance_if_wrong'] = bias_by_distance(
                load(weights, settings, run, largest, True).backbone
            )
    with whole(step.file(folder)) as partial:
        np.savez(partial, **measured)


def build(
    settings: Settings, position_bias: str, num_classes: int, condition: Condition, pretrained: Condition | None = None
) -> Classifier:
    """A classifier for a condition, with random weights; its pretrained windows are those of another one, if given."""
    backbone = SwinTransformerV2(
        dict(embed_dims=settings.embed_dims, depths=settings.depths, num_heads=settings.num_heads),
        patch_size=settings.patch_size,
        window_size=windows_at(settings, condition),
        pretrained_window_sizes=windows_at(settings, pretrained) if pretrained else None,
        position_bias=position_bias,
        drop_path_rate=0.1,
        out_indices=(len(settings.depths) - 1,),
    )
    return Classifier(backbone, num_classes, condition.grid)


def from_scratch(settings: Settings, run: Run, num_classes: int) -> Classifier:
    """A classifier at the condition of training. Only its position bias differs from those of the other kinds."""
    torch.manual_seed(run.seed)
    model = build(settings, run.position_bias, num_classes, training_condition(settings))
    torch.manual_seed(run.seed)
    shared = dict(build(settings, 'parameterized', num_classes, training_condition(settings)).named_parameters())
    for name, parameter in model.named_parameters():
        if name in shared:  # position biases of other kinds have other names
            parameter.data.copy_(shared[name].data)
    return model


def load(weights: Path, settings: Settings, run: Run, condition: Condition, wrong: bool) -> Classifier:
    """The classifier of a file, moved to a condition.

    Args:
        weights (Path): what the step of training left.
        settings (Settings): of the study.
        run (Run): which trained it.
        condition (Condition): where to move it.
        wrong (bool): whether the pretrained windows become those of the condition, in place of those of training.
    """
    checkpoint = read_checkpoint(weights)
    head = {name[len('head.') :]: value for name, value in checkpoint['state_dict'].items() if name.startswith('head.')}
    model = build(settings, run.position_bias, len(head['bias']), condition, condition if wrong else None)
    load_pretrained(model.backbone, checkpoint)
    model.head.load_state_dict(head)
    return model


def train(settings: Settings, run: Run, photos: Photos, folder: Path, epochs: int) -> None:
    """Train a classifier from scratch, or on from the last epoch that its folder has.

    The learning rate is constant after the warm-up, so a run of 20 epochs is the beginning of one of 80.
    """
    SwinV2Runner(
        from_scratch(settings, run, len(photos.classes)),
        str(folder),
        train_dataloader=loader(photos, training_condition(settings), settings.batch_size),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=optim_wrapper(settings, run, settings.lr),
        param_scheduler=dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=WARM_UP),
        default_hooks=dict(logger=LOGGER, checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)),
        custom_hooks=[dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=AVERAGING)],
        resume=True,
        randomness=dict(seed=run.seed),
        experiment_name=f'{folder.name}_{epochs}_epochs',
        log_level='ERROR',
    ).train()


def finetune(
    model: Classifier, settings: Settings, run: Run, photos: Photos, work_dir: Path, condition: Condition
) -> None:
    """Train a classifier a little at a condition, with a learning rate that falls to 0."""
    SwinV2Runner(
        model,
        str(work_dir),
        train_dataloader=loader(photos, condition, settings.batch_size),
        train_cfg=dict(by_epoch=False, max_iters=settings.finetune_iters),
        optim_wrapper=optim_wrapper(settings, run, settings.finetune_lr),
        # one step more than iterations, so that the last of them has a learning rate too
        param_scheduler=dict(type='PolyLR', power=1, by_epoch=False, end=settings.finetune_iters + 1),
        default_hooks=dict(logger=LOGGER, checkpoint=None),
        randomness=dict(seed=run.seed),
        experiment_name=f'{work_dir.parent.name}_finetuning_{next(NUMBERS)}',
        log_level='ERROR',
    ).train()


def loader(photos: Photos, condition: Condition, batch_size: int) -> dict:
    """A data loader of random crops, as many as fill whole canvases; of one seed it is the same for all kinds."""
    return dict(
        batch_size=batch_size // condition.grid**2 * condition.grid**2,
        num_workers=0,
        drop_last=True,
        dataset=RandomCrops(photos, condition.image_size),
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )


def optim_wrapper(settings: Settings, run: Run, learning_rate: float) -> dict:
    """AdamW as in the recipes, with another learning rate for the position bias if the settings ask for it."""
    rate = settings.table_lr_mult if run.position_bias == 'parameterized' else settings.mlp_lr_mult
    of_bias = {POSITION_BIASES[run.position_bias].name: dict(lr_mult=rate)}
    return dict(
        constructor='SwinV2OptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=learning_rate, weight_decay=0.05),
        paramwise_cfg=dict(custom_keys=of_bias),
        clip_grad=dict(max_norm=5),
    )


@torch.inference_mode()
def predict(model: Classifier, photos: Photos, condition: Condition, batch_size: int) -> Outputs:
    """What a classifier gives for photos at a condition.

    Canvases hold photos in a fixed random order. The last one is filled up with the first photos.

    Returns:
        Outputs: on the CPU, in the order of the photos.
    """
    model.eval()
    number, cells = len(photos.labels), condition.grid**2
    order = np.random.RandomState(0).permutation(number)
    filled = np.resize(order, -(-number // cells) * cells)
    step = batch_size // cells * cells
    features, logits = [], []
    for first in range(0, len(filled), step):
        pixels = at_size(photos.pixels[filled[first : first + step]], condition.image_size)
        inputs = model.data_preprocessor(dict(inputs=pixels))['inputs']
        features.append(model.features(inputs))
        logits.append(model.head(features[-1]))
    back = np.argsort(order)
    return Outputs(*(torch.cat(parts).cpu()[:number][back] for parts in (features, logits)))


def losses_and_hits(outputs: Outputs, labels: Tensor) -> dict[str, np.ndarray]:
    """Cross-entropy of each photo in nats, and whether it is classified right, (N,) each."""
    return dict(
        cross_entropy=F.cross_entropy(outputs.logits, labels, reduction='none').numpy(),
        correct=(outputs.logits.argmax(1) == labels).numpy(),
    )


def changes(right: Outputs, wrong: Outputs) -> dict[str, np.ndarray]:
    """How far features and centred logits of each photo are from the right ones, over the norm of these, (N,) each."""
    centred = [outputs.logits - outputs.logits.mean(1, keepdim=True) for outputs in (right, wrong)]
    return dict(
        feature_change=((wrong.features - right.features).norm(dim=1) / right.features.norm(dim=1)).numpy(),
        logit_change=((centred[1] - centred[0]).norm(dim=1) / centred[0].norm(dim=1)).numpy(),
    )


def shape_of_biases(backbone: SwinTransformerV2) -> dict[str, np.ndarray]:
    """Of the position bias of each head in the windows of a backbone: its spread, and how much of it is at the centre.

    Returns:
        dict: ``bias_std``, the standard deviation over all offsets, and ``bias_centre``, the share of the squared
        deviations that is at offsets of up to `CENTRE` tokens, (heads of all blocks,) each.
    """
    spreads, shares = [], []
    for stage in backbone.layers:
        window = stage.window_size
        for block in stage.blocks:
            table = block.attn.position_bias(window, window).detach().cpu()  # (heads, 2W-1, 2W-1)
            squares = (table - table.mean((1, 2), keepdim=True)).square()
            centre = table_centre(squares, *[min(CENTRE + 1, window)] * 2)
            spreads.append(squares.mean((1, 2)).sqrt())
            shares.append(centre.sum((1, 2)) / squares.sum((1, 2)))
    return dict(bias_std=torch.cat(spreads).numpy(), bias_centre=torch.cat(shares).numpy())


def bias_by_distance(backbone: SwinTransformerV2) -> np.ndarray:
    """The position bias of each head, averaged over the offsets of a distance.

    Returns:
        ndarray: (heads of all blocks, W), for distances from 0 to W - 1 tokens. The distance is that in rows or in
        columns, whichever is more. W is the smallest window of the backbone.
    """
    reach = torch.arange(1 - min(backbone.window_size), min(backbone.window_size)).abs()
    distance = torch.maximum(reach[:, None], reach)
    rows = []
    for stage in backbone.layers:
        for block in stage.blocks:
            table = block.attn.position_bias(*[min(backbone.window_size)] * 2).detach().cpu()
            rows.append(torch.stack([table[:, distance == steps].mean(1) for steps in distance.unique()], dim=1))
    return torch.cat(rows).numpy()
