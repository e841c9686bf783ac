"""Plot the position bias of a head at its pretrained window, and transferred to another window in three ways."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from swinv2_mm import CheckpointError, SwinTransformerV2
from swinv2_mm.checkpoints.fitting import check_complete
from swinv2_mm.checkpoints.loading import named_in_errors, read_weights
from swinv2_mm.engine.launch import bad_input
from swinv2_mm.position_bias import POSITION_BIASES, ContinuousPositionBias, LinearContinuousPositionBias, resize_table
from swinv2_mm.writing import whole

FIT_STEPS = 300


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/analysis_tools/plot_position_bias.py swinv2_base_patch4_window12_192_22k.pth '
        '--window 32 --stage 2 --block 5 --head 3',
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='path or URL of any Swin V2 checkpoint')
    parser.add_argument(
        '--window', type=int, default=32, help='window to transfer to, in tokens (default: %(default)s)'
    )
    parser.add_argument('--stage', type=int, default=0, help='from 0 (default: %(default)s)')
    parser.add_argument('--block', type=int, default=0, help='within the stage, from 0 (default: %(default)s)')
    parser.add_argument('--head', type=int, default=0, help='from 0 (default: %(default)s)')
    parser.add_argument('--out', default='position_bias.png', help='PNG to write (default: %(default)s)')
    return parser.parse_args(argv)


def read_position_bias(source, stage: int, block: int, head: int) -> ContinuousPositionBias:
    """The position MLP of one head of a block, in float64.

    Raises:
        CheckpointError: the file does not load, has no such head, no position MLP, or does not say its windows.
    """
    converted, windows = read_weights(source)
    with named_in_errors(source):
        kind = check_complete(converted, windows, SwinTransformerV2)['position_bias']
    if not POSITION_BIASES[kind].has_pretrained_window:
        raise CheckpointError(f'{source} has a learned table of biases ({kind}) and no position MLP to evaluate')
    if windows.pretrained_window_sizes is None:
        raise CheckpointError(
            f'nothing says which windows {source} was trained with: store them with '
            'tools/model_converters/convert_checkpoint.py --pretrained-window-sizes, and plot the file that it writes'
        )
    marker = f'layers.{stage}.blocks.{block}.attn.'
    weights = {name.replace(marker, ''): value for name, value in converted.weights.items() if marker in name}
    if not weights or not 0 <= head < len(weights['logit_scale']):
        raise CheckpointError(f'{source} has no head {head} in block {block} of stage {stage}')
    mlp = POSITION_BIASES[kind](1, windows.pretrained_window_sizes[stage]).double()
    mlp.load_state_dict(
        {
            '0.weight': weights[f'{mlp.name}.0.weight'],
            '0.bias': weights[f'{mlp.name}.0.bias'],
            '2.weight': weights[f'{mlp.name}.2.weight'][head : head + 1],
        }
    )
    return mlp.eval().requires_grad_(False)


def refit(mlp: ContinuousPositionBias, kind: type[ContinuousPositionBias]) -> ContinuousPositionBias:
    """The MLP trained on other coordinates to give the same bias within the pretrained window, as nearly as it can.

    A checkpoint holds the MLP of one kind of coordinates; this is what one of the other kind may have learned.
    """
    window = mlp.pretrained_window
    target = mlp.table(window, window)
    fitted = kind(1, window).double()
    fitted.load_state_dict(mlp.state_dict())
    optimizer = torch.optim.LBFGS(
        fitted.parameters(),
        max_iter=FIT_STEPS,
        max_eval=2 * FIT_STEPS,
        tolerance_grad=0,  # the defaults stop at gradients of 1e-7, where losses of 1e-6 still fall
        tolerance_change=0,
        line_search_fn='strong_wolfe',
    )

    def evaluate():
        optimizer.zero_grad()
        loss = (fitted.table(window, window) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    return fitted.eval().requires_grad_(False)


def tables(mlp: ContinuousPositionBias, window: int) -> dict[str, Tensor]:
    """The transferred bias by method, each (2*window-1, 2*window-1): every vertical and horizontal offset."""
    pretrained = mlp.pretrained_window
    original = mlp.table(pretrained, pretrained)[0]
    moved = {}
    for kind, title in ((ContinuousPositionBias, 'log-spaced'), (LinearContinuousPositionBias, 'linear-spaced')):
        source = mlp
        if type(mlp) is not kind:
            source = refit(mlp, kind)
            error = (source.table(pretrained, pretrained)[0] - original).square().mean().sqrt()
            title += f', fitted to RMSE {error:.2g}'
        moved[title] = source.table(window, window)[0]
    resized = resize_table(original.flatten()[:, None], window)
    return {**moved, 'bicubic': resized.view(2 * window - 1, -1)}


def plot(mlp: ContinuousPositionBias, window: int, title: str, out: Path) -> None:
    """Write a PNG of the bias at the pretrained window and transferred: as maps, and along the row of offset 0."""
    pretrained = mlp.pretrained_window
    original, moved = mlp.table(pretrained, pretrained)[0], tables(mlp, window)
    figure = plt.figure(figsize=(15, 8), layout='constrained')
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    maps = {f'pretrained, window {pretrained}': original}
    maps.update({f'{name.split(",")[0]}, window {window}': table for name, table in moved.items()})
    draw_maps(upper, maps, pretrained)

    axes = lower.subplots()
    for (name, table), style in zip(moved.items(), ('-', '--', ':')):
        axes.plot(range(1 - window, window), table[window - 1].numpy(), style, label=f'{name}, window {window}')
    offsets = range(1 - pretrained, pretrained)
    axes.plot(offsets, original[pretrained - 1].numpy(), 'k.', label=f'pretrained, window {pretrained}', zorder=0)
    axes.axvspan(1 - pretrained, pretrained - 1, color='0.93', zorder=-1)
    axes.set(xlabel='horizontal offset (tokens), vertical offset 0', ylabel='bias')
    axes.grid(alpha=0.3)
    lower.legend(loc='outside lower center', ncols=4)
    figure.suptitle(title)
    with whole(out) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def draw_maps(figure, maps: dict[str, Tensor], pretrained: int) -> None:
    """Draw maps of biases side by side in one scale of colours, with the pretrained window as a dashed square."""
    low, high = min(table.min() for table in maps.values()), max(table.max() for table in maps.values())
    all_axes = figure.subplots(1, len(maps))
    for axes, (name, table) in zip(all_axes, maps.items()):
        reach = len(table) / 2
        image = axes.imshow(table.numpy(), vmin=low, vmax=high, extent=(-reach, reach, reach, -reach))
        axes.set(title=name, xlabel='horizontal offset (tokens)')
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(7, integer=True))
        side = 2 * pretrained - 1
        if side < len(table):
            square = plt.Rectangle((-side / 2, -side / 2), side, side, fill=False, color='white', linestyle='--')
            axes.add_patch(square)
    all_axes[0].set_ylabel('vertical offset (tokens)')
    figure.colorbar(image, ax=all_axes, label='bias', shrink=0.9)


def main() -> int:
    args = parse_args()
    try:
        if not args.out.endswith('.png'):
            raise CheckpointError(f'--out must end in .png, got {args.out}')
        if args.window < 2:
            raise CheckpointError(f'--window must be at least 2 tokens, got {args.window}')
        mlp = read_position_bias(args.checkpoint, args.stage, args.block, args.head)
        title = f'{Path(args.checkpoint).name}: stage {args.stage}, block {args.block}, head {args.head}'
        plot(mlp, args.window, title, Path(args.out))
    except (OSError, ValueError) as error:
        return bad_input(error)
    print(f'wrote {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
