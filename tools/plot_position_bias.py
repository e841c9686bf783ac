"""Plot the position bias of a head at its pretrained window and moved to another, by three ways of moving it."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from swinv2_mm import CheckpointError
from swinv2_mm.checkpoint import check_complete, naming, read_weights
from swinv2_mm.launch import bad_input
from swinv2_mm.position_bias import ContinuousPositionBias, LinearContinuousPositionBias, resize_table

KINDS = {'log_cpb': ContinuousPositionBias, 'linear_cpb': LinearContinuousPositionBias}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/plot_position_bias.py swinv2_base_patch4_window12_192_22k.pth --window 32 '
        '--stage 2 --block 5 --head 3',
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='path or URL of any Swin V2 checkpoint')
    parser.add_argument('--window', type=int, default=32, help='window to move to, in tokens (default: %(default)s)')
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
    with naming(source):
        kind = check_complete(converted, windows)['position_bias']
    if kind not in KINDS:
        raise CheckpointError(f'{source} has a learned table of biases ({kind}) and no position MLP to evaluate')
    if windows.pretrained_window_sizes is None:
        raise CheckpointError(
            f'nothing says the windows {source} was trained with: store them with tools/convert_checkpoint.py '
            '--pretrained-window-sizes, and plot what that writes'
        )
    marker = f'layers.{stage}.blocks.{block}.attn.'
    weights = {name.removeprefix(marker): value for name, value in converted.weights.items() if marker in name}
    if not weights or not 0 <= head < len(weights['logit_scale']):
        raise CheckpointError(f'{source} has no head {head} in block {block} of stage {stage}')
    holder = next(name.split('.')[0] for name in weights if name.endswith('cpb_mlp.2.weight'))
    mlp = KINDS[kind](1, windows.pretrained_window_sizes[stage]).double()
    mlp.load_state_dict(
        {
            '0.weight': weights[f'{holder}.0.weight'],
            '0.bias': weights[f'{holder}.0.bias'],
            '2.weight': weights[f'{holder}.2.weight'][head : head + 1],
        }
    )
    return mlp.eval().requires_grad_(False)


def refit(mlp: ContinuousPositionBias, kind: type[ContinuousPositionBias]) -> ContinuousPositionBias:
    """The MLP with other coordinates, its output layer fitted to give the same bias within the pretrained window.

    A ridge regression on the hidden features, of the bias before its sigmoid: what an MLP on these coordinates may have
    learned, for a checkpoint holds only one of the two.
    """
    window = mlp.pretrained_window
    fitted = kind(1, window).double()
    fitted.load_state_dict(mlp.state_dict())
    coordinates = kind.coordinates(window, window, window, dtype=torch.float64).flatten(0, 1)
    features = fitted[1](fitted[0](coordinates)).detach()  # (offsets, 512)
    target = torch.logit(mlp.table(window, window).flatten() / 16, eps=1e-6)
    gram = features.T @ features
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    fitted[2].weight.data = torch.linalg.solve(gram + ridge, features.T @ target)[None]
    return fitted.eval().requires_grad_(False)


def tables(mlp: ContinuousPositionBias, window: int) -> dict[str, Tensor]:
    """The bias by way of moving it, each (2*window-1, 2*window-1): every vertical and horizontal offset."""
    moved = {}
    for kind, title in ((ContinuousPositionBias, 'log-spaced'), (LinearContinuousPositionBias, 'linear-spaced')):
        is_own = type(mlp) is kind
        source = mlp if is_own else refit(mlp, kind)
        moved[title if is_own else f'{title} (fitted)'] = source.table(window, window)[0]
    pretrained = mlp.table(mlp.pretrained_window, mlp.pretrained_window)[0]
    resized = resize_table(pretrained.flatten()[:, None], window)
    moved['bicubic'] = resized.view(2 * window - 1, -1)
    return moved


def plot(mlp: ContinuousPositionBias, window: int, title: str, out: Path) -> None:
    """Write a PNG: the bias at the pretrained window and moved, as maps, and along the row of offset 0."""
    pretrained = mlp.pretrained_window
    original, moved = mlp.table(pretrained, pretrained)[0], tables(mlp, window)
    maps = {f'pretrained, window {pretrained}': original} | {f'{name}, window {window}': m for name, m in moved.items()}
    low, high = (float(pick(m.min() if pick is min else m.max() for m in maps.values())) for pick in (min, max))
    figure = plt.figure(figsize=(15, 8), layout='constrained')
    grid = figure.add_gridspec(2, len(maps), height_ratios=(1.1, 1))
    axes = [figure.add_subplot(grid[0, i]) for i in range(len(maps))]
    for ax, (name, table) in zip(axes, maps.items()):
        reach = len(table) // 2 + 0.5
        image = ax.imshow(table.numpy(), vmin=low, vmax=high, extent=(-reach, reach, reach, -reach))
        ax.set(title=name, xlabel='horizontal offset (tokens)')
        if window > pretrained and table is not original:
            side = 2 * pretrained - 1
            corner = (-side / 2, -side / 2)
            ax.add_patch(plt.Rectangle(corner, side, side, fill=False, color='white', linestyle='--'))
    axes[0].set_ylabel('vertical offset (tokens)')
    figure.colorbar(image, ax=axes, label='bias', shrink=0.8)
    profile = figure.add_subplot(grid[1, :])
    for (name, table), style in zip(moved.items(), ('-', '--', ':')):
        profile.plot(range(1 - window, window), table[window - 1].numpy(), style, label=name)
    offsets = range(1 - pretrained, pretrained)
    profile.plot(offsets, original[pretrained - 1].numpy(), 'k.', label=f'pretrained, window {pretrained}', zorder=0)
    profile.axvspan(1 - pretrained, pretrained - 1, color='0.93', zorder=-1)
    profile.set(xlabel='horizontal offset (tokens), vertical offset 0', ylabel='bias', ylim=(min(low, 0), None))
    profile.legend()
    profile.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> int:
    args = parse_args()
    try:
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
    sys.exit(main())
