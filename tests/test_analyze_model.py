"""Counts against PyTorch's counter and the official figures, memory against what autograd and the allocator hold.

Without a GPU, CUDA is compared with what autograd saves of fake tensors for the operator that PyTorch calls there.
"""

import math
import re
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from swinv2_mm import SwinTransformerV2, backbone, ops
from swinv2_mm.ops import flash_cpu, flash_cuda, sdpa

FRONT_DOOR = Path(__file__).parents[1] / 'configs/mask_rcnn_swinv2.py'
OFFICIAL = {  # multiply-adds of the official `flops()` at 256 pixels, and the figure that its model zoo prints
    ('tiny', 8): (5_925_697_536, 5.9),
    ('small', 8): (11_514_869_760, 11.5),
    ('base', 8): (20_285_661_184, 20.3),
    ('tiny', 16): (6_605_174_784, 6.6),
    ('small', 16): (12_647_331_840, 12.6),
    ('base', 16): (21_795_610_624, 21.8),
}
SMALL = dict(embed_dims=24, depths=(2, 2, 1), num_heads=(1, 3, 6), extra_norm_every_n_blocks=2)
SIZE = (101, 174)


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analyze_model')


def on_meta(**kwargs):
    with torch.device('meta'):
        return SwinTransformerV2(**kwargs)


def fake(model):
    """Give a model fake parameters and buffers, which have a size but no memory; within a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Let fake tensors take the paths of a GPU: whole maps, our kernels, and where they can't serve PyTorch's."""

    def kernel(q, k, v, attn_mask, scale):
        bias = attn_mask.expand(*q.shape[:2], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[0]

    monkeypatch.setattr(flash_cuda, 'DEVICE', 'cpu')
    monkeypatch.setattr(flash_cuda, 'unable_on', lambda *args: None)
    monkeypatch.setattr(flash_cpu, 'unable', lambda *args: 'is for CPU')
    monkeypatch.setattr(sdpa, '_on_cuda', lambda x: True)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', kernel)
    monkeypatch.setattr(backbone, 'runs_in_parts', lambda x: False)


@pytest.mark.parametrize(('arch', 'window'), OFFICIAL)
def test_flops_agree_with_the_official_figures(tool, arch, window):
    model = tool.build(arch, [window])
    cost = tool.total(row.cost for row in tool.analyze(model, (256, 256), tool.Training()))
    exact, printed = OFFICIAL[arch, window]
    counted = cost.linear + cost.masked
    assert round(counted / 1e9, 1) == printed
    channels = [layer.blocks[0].norm1.weight.numel() for layer in model.layers]
    norms = sum(64 * 64 // 4**i * c for i, c in enumerate(channels))
    last_norm = channels[-1] * 64 * 64 // 2**4  # as the official code has it: four times the values that there are
    assert counted - norms + last_norm + 1000 * channels[-1] == exact


def test_ragged_windows_attend_to_less_than_whole_ones_and_to_the_same_where_they_are_whole(tool):
    first, *_, last = tool.analyze(tool.build('tiny', [8]), (256, 256), tool.Training())[1:]
    # Along an axis of 64 tokens a shifted grid of window 8 has segments of 4, 8, ..., 8, 4.
    segments = [4, *[8] * 7, 4]
    shifted = sum((h * w) ** 2 for h in segments for w in segments)
    assert first.cost.attention == 2 * 96 * (64 * 64**2 + shifted)
    assert first.cost.masked == 2 * 96 * 2 * 64 * 64**2
    assert last.cost.attention == last.cost.masked == 2 * 768 * 2 * 64**2


def stage_of(name):
    """The index of the row that has the module of a name."""
    digits = re.search(r'\d+', name)
    return 1 + int(digits[0]) if digits and not name.startswith('patch_embed') else 0


@pytest.mark.parametrize('kwargs', [dict(window_size=(7, 4, 9)), dict(window_size=32, mlp_ratio=3.0, patch_size=3)])
def test_flops_and_parameters_of_every_stage_at_ragged_sizes(tool, monkeypatch, kwargs):
    monkeypatch.setattr(ops, 'forced', 'reference')
    model = on_meta(arch=SMALL, out_indices=(0, 2), **kwargs)
    rows = tool.analyze(model, SIZE, tool.Training())
    expected, normalised = Counter(), Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            i = stage_of(name)
            module.register_forward_hook(lambda module, inputs, out, i=i: normalised.update({i: out.numel()}))
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        fake(model)(torch.empty(1, 3, *SIZE))
    for name, counts in counter.get_flop_counts().items():
        _, _, name = name.partition('.')
        if name in ('patch_embed', 'layers.0', 'layers.1', 'layers.2') or name.endswith('.downsample'):
            expected[stage_of(name)] += sum(counts.values())
        elif name.endswith('.cpb_mlp'):
            expected[stage_of(name)] -= sum(counts.values())
    for i, row in enumerate(rows):
        assert 2 * (row.cost.flops - normalised[i]) == expected[i] > 0, row.name
        of_stage = [p.numel() for name, p in model.named_parameters() if stage_of(name) == i]
        assert row.cost.parameters == sum(of_stage)
    assert max(len(groups) for row in rows for groups in row.groups) >= 6


KEPT = [
    (2, dict()),
    (2, dict(with_cp=True)),
    (2, dict(position_bias='parameterized', drop_path_rate=0.3)),
    (2, dict(out_indices=(0,), window_size=32)),
    (1, dict(out_indices=(1,), in_channels=2, patch_size=2, mlp_ratio=2.5, qkv_bias=False, position_bias='linear_cpb')),
    (2, dict(frozen_stages=1)),
    (1, dict(drop_rate=0.1, attn_drop_rate=0.1)),
]
COMMON = dict(arch=SMALL, window_size=6, out_indices=(0, 1, 2), drop_path_rate=0.0)


def said_to_be_kept(tool, size, batch, training, kwargs):
    rows = tool.analyze(on_meta(**kwargs), size, training._replace(with_cp=kwargs.get('with_cp', False)))
    return tool.total(row.cost for row in rows).at(batch)


@pytest.mark.parametrize(('batch', 'kwargs'), KEPT, ids=str)
@pytest.mark.parametrize('half', [False, True])
def test_kept_memory_on_cpu_is_what_a_forward_pass_leaves_allocated(tool, half, batch, kwargs):
    kwargs = {**COMMON, **kwargs}
    said = said_to_be_kept(tool, (61, 90), batch, tool.Training(half, 'cpu'), kwargs)
    model = SwinTransformerV2(**kwargs).train()
    image = torch.zeros(batch, kwargs.get('in_channels', 3), 61, 90)
    model(image)  # index tensors and coordinates are cached, and so not allocated again
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler, torch.autocast('cpu', enabled=half):
        maps = model(image)
    events = profiler.profiler.kineto_results.events()
    left = sum(event.nbytes() for event in events if event.name() == '[memory]')
    left -= sum(x.nbytes for x in maps)
    assert left <= said <= 1.03 * left


def saved(model, image, half):
    """The bytes that autograd saves, without parameters, and the bias of every offset that checkpoints hold."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    tables = backbone.tables_at_once
    with_cp = any(stage.with_cp and stage.training for stage in model.layers)
    keep_tables = mock.patch.object(backbone, 'tables_at_once', lambda *args: [keep(x) for x in tables(*args)])
    with keep_tables if with_cp else nullcontext(), torch.autograd.graph.saved_tensors_hooks(
        keep, lambda x: x
    ), torch.autocast('cpu', enabled=half):
        model(image)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)


@pytest.mark.parametrize(('batch', 'kwargs'), KEPT[:-1], ids=str)
@pytest.mark.parametrize('half', [False, True])
def test_kept_memory_on_cuda_is_what_autograd_saves_and_indices(tool, as_on_cuda, half, batch, kwargs):
    kwargs = {**COMMON, **kwargs}
    said = said_to_be_kept(tool, (61, 90), batch, tool.Training(half, 'cuda'), kwargs)
    model = on_meta(**kwargs).train()
    with FakeTensorMode():
        fake(model)
        expected = saved(model, torch.zeros(batch, kwargs.get('in_channels', 3), 61, 90), half)
    assert expected <= said <= 1.03 * expected


class Held(TorchDispatchMode):
    """The most bytes that new tensors hold at once."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key, size):
        self.known.remove(key)
        self.now -= size


def train(model, image, half):
    with torch.autocast(image.device.type, torch.bfloat16, enabled=half):
        out = model(image)
    torch.autograd.backward(out, [torch.ones_like(x) for x in out])


def peak_without_optimizer(tool, model, size, training, batch):
    """What the tool says without the weights and AdamW's two moments: with the gradients, which a step allocates."""
    peak = tool.peak(tool.analyze(model, size, training), batch)
    return peak.total - 3 * peak.parameters // 4


WIDE = dict(embed_dims=96, depths=(2, 1), num_heads=(3, 6))


@pytest.mark.parametrize('window', [8, 32])
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('half', [False, True])
def test_peak_on_cuda_is_at_least_that_of_fake_tensors_and_at_most_half_more(tool, as_on_cuda, half, with_cp, window):
    model = on_meta(arch=WIDE, window_size=window, with_cp=with_cp, drop_path_rate=0.0, out_indices=(0, 1))
    size = (300, 312)
    said = peak_without_optimizer(tool, model, size, tool.Training(half, 'cuda', with_cp), 2)
    with FakeTensorMode():
        fake(model)
        with Held(model) as held:
            train(model, torch.empty(2, 3, *size), half)
    assert held.most <= said <= 1.5 * held.most


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('window', [8, 32])
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('half', [False, True])
def test_peak_on_a_gpu_is_what_is_requested_but_for_workspaces_and_at_most_half_more(tool, half, with_cp, window):
    model = SwinTransformerV2(WIDE, window_size=window, with_cp=with_cp, drop_path_rate=0.0, out_indices=(0, 1)).cuda()
    size = (300, 312)
    said = peak_without_optimizer(tool, model, size, tool.Training(half, 'cuda', with_cp), 2)
    image = torch.randn(2, 3, *size, device='cuda')
    train(model, image, half)  # the workspaces of libraries stay
    model.zero_grad()
    held = torch.cuda.memory_stats()['requested_bytes.all.current']
    torch.cuda.reset_peak_memory_stats()
    train(model, image, half)
    # The allocator gives more than is requested: up to 1 MiB of a large block stays with a tensor.
    most = torch.cuda.memory_stats()['requested_bytes.all.peak'] - held
    workspaces = 1.02 if half else 1  # for the gradient of queries in bfloat16, which no operator returns
    assert most / workspaces <= said <= 1.5 * most


@pytest.mark.parametrize('with_cp', [False, True])
def test_peak_on_cpu_is_at_least_what_is_allocated_and_at_most_half_more(tool, with_cp):
    arch, size = dict(embed_dims=64, depths=(2,), num_heads=(2,)), (320, 400)
    model = SwinTransformerV2(arch, window_size=16, with_cp=with_cp, drop_path_rate=0.0, out_indices=(0,)).train()
    said = peak_without_optimizer(tool, model, size, tool.Training(False, 'cpu', with_cp), 1)
    image = torch.randn(1, 3, *size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(model, image, False)
    events = profiler.profiler.kineto_results.events()
    most = max(accumulate(event.nbytes() for event in events if event.name() == '[memory]'))
    assert most <= said <= 1.5 * most


def test_parameters_take_sixteen_bytes_and_frozen_ones_four(tool):
    model = on_meta(arch=SMALL, out_indices=(0, 1, 2), frozen_stages=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    peak = tool.peak(tool.analyze(model, SIZE, tool.Training()), 3)
    assert frozen > 0 and peak.parameters == 16 * trained + 4 * frozen
    maps = sum(math.ceil(101 / s) * math.ceil(174 / s) * c for s, c in ((4, 24), (8, 48), (16, 96)))
    assert peak.outputs == 3 * 2 * 4 * maps


def test_the_backward_pass_has_freed_the_stages_after_the_one_where_most_is_held(tool):
    """With checkpoints most is held in stage 0, whose blocks are the largest; without, at the beginning."""
    for with_cp, stages in ((True, 1), (False, 4)):
        rows = tool.analyze(tool.build('tiny'), (800, 1333), tool.Training(with_cp=with_cp))
        peak = tool.peak(rows, 2)
        assert peak.stage == rows[stages].name
        assert peak.kept == sum(2 * row.cost.kept + row.cost.kept_once for row in rows[: stages + 1])


def test_a_gpu_runs_the_same_kernels_for_any_windows_and_few_of_them(tool, monkeypatch):
    """As often for one size of windows as for nine, which have a launch each through `scaled_dot_product_attention`."""

    def kernels(size, depth):
        model = on_meta(arch=dict(WIDE, depths=(depth, 1)), window_size=8, drop_path_rate=0.0, out_indices=(0, 1))
        return tool.analyze(model, size, tool.Training())[1].cost.kernels

    even, ragged = (64, 64), (76, 100)
    block = kernels(even, 3) - kernels(even, 2)
    # Forward: 4 products, attention, GELU, 2 norms with sums, 2 for the scale, 2 for the bias of queries and values.
    # Backward: 8 products, 6 of attention, 2 of GELU, 4 of norms, 2 sums of biases, 3 for the scale, 3 sums and copies.
    assert block == 12 + 28
    assert kernels(ragged, 3) - kernels(ragged, 2) == block
    monkeypatch.setattr(ops, 'forced', 'sdpa')
    assert kernels(ragged, 3) - kernels(ragged, 2) > 3 * block


def test_the_largest_batch_fits_and_one_more_does_not(tool):
    rows = tool.analyze(tool.build('giant'), (1024, 1024), tool.Training(half=True, with_cp=True))
    for gib in (80, 160, 640):
        batch = tool.largest_batch(rows, gib * 2**30)
        assert tool.peak(rows, batch).total <= gib * 2**30 < tool.peak(rows, batch + 1).total
    exactly = tool.peak(rows, 7).total
    assert (tool.largest_batch(rows, exactly), tool.largest_batch(rows, exactly - 1)) == (7, 6)
    assert tool.largest_batch(rows, rows[-1].cost.parameters) == 0


@pytest.mark.parametrize('processes', [3, 64])
def test_of_a_sharded_backbone_the_largest_batch_fits_and_one_more_does_not(tool, processes):
    backbone = tool.build('tiny')
    rows = tool.analyze(backbone, (256, 256), tool.Training(half=True, with_cp=True))
    share = tool.share(backbone, rows, processes, 4 * 2**30)
    pieces = [math.ceil(p.shape[0] / processes) * p[0].numel() for p in backbone.parameters()]
    assert share.shards == 16 * sum(pieces)
    assert share.batch > 10 and share.total <= 4 * 2**30
    one_more = tool.share(backbone, rows, processes, share.total + rows[1].held)
    assert one_more.batch == share.batch + 1 and one_more.shards == share.shards
    nothing = tool.share(backbone, rows, processes, share.shards)
    assert nothing.batch == 0 and nothing.total > share.shards


def test_stages_after_the_last_map_are_not_counted(tool):
    whole = tool.analyze(on_meta(arch=SMALL, out_indices=(0, 1, 2)), SIZE, tool.Training())
    rows = tool.analyze(on_meta(arch=SMALL, out_indices=(0,)), SIZE, tool.Training())
    assert [row.name for row in rows] == ['patch embed', 'stage 0']
    merging = 4 * 24 * 48 + 2 * 48  # its weight and its norm
    assert rows[1].cost.parameters == whole[1].cost.parameters - merging
    assert whole[1].cost.linear - rows[1].cost.linear == 13 * 22 * (4 * 24 * 48 + 48)  # the merging to stage 1


def run(tool, monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['analyze_model.py', *map(str, args)])
    code = tool.main()
    return code, *capsys.readouterr()


def test_the_command_line_prints_the_table_and_the_parts_of_the_batch(tool, monkeypatch, capsys):
    args = ('--size', 256, '--memory', 8, 0.1)
    code, out, _ = run(tool, monkeypatch, capsys, 'tiny', *args)
    assert code == 0
    lines = {line.split('  ')[0]: line.split() for line in out.splitlines() if line}
    assert lines['patch embed'][-1] == '5'  # layout, convolution, norm, and the gradients of the last two
    assert ' '.join(lines['stage 0'][2:-2]) == '64x64 96 2 3 16 16 (1) / 25 (4) 0.30 1.34 0.36 1.39'
    assert lines['total'][1:5] == ['27.58', '6.51', '0.83', '6.60']
    assert '0.1 GiB: the largest batch is 0' in out
    words = out[out.index('8 GiB:') :].replace(';', '').split()
    batch = int(words[words.index('is') + 1])
    rows = tool.analyze(tool.build('tiny'), (256, 256), tool.Training())
    assert batch == tool.largest_batch(rows, 8 * 2**30) > 1
    parts = [float(line.split()[0]) for line in out[out.index('8 GiB:') :].splitlines()[1:6]]
    assert sum(parts[:4]) == pytest.approx(parts[4], abs=0.03)


def test_the_command_line_says_what_gpus_hold_and_send_and_what_a_step_takes(tool, monkeypatch, capsys):
    sharded = ('--memory', 2, '--gpus', 2, 4, '--bandwidth', 10, '--tflops', 20)
    code, out, _ = run(
        tool, monkeypatch, capsys, 'tiny', '--size', 64, '--with-cp', '--device', 'cpu', '--measure', *sharded
    )
    assert code == 0
    table = [line.split() for line in out[out.index('sharded, 2 GiB per GPU, at 10 GB/s') :].splitlines()[2:]]
    backbone, training = tool.build('tiny'), tool.Training(device='cpu', with_cp=True)
    rows = tool.analyze(backbone, (64, 64), training)
    for processes, line in zip((2, 4), table):
        share = tool.share(backbone, rows, processes, 2 * 2**30)
        assert line[:2] == [str(processes), str(share.batch)]
        assert float(line[6]) == pytest.approx(share.sent / 1e9, abs=0.06)
        of_one = 4 * 2 * tool.total(row.cost for row in rows).flops / 20e12
        assert float(line[-1]) == pytest.approx(100 / (1 + of_one / (share.sent / 10e9)), abs=0.6)
    measured, calculated = (float(word) for word in re.findall(r'(\d+\.\d+) GiB', out[out.index('measured for') :])[:2])
    assert calculated == pytest.approx(tool.peak(rows, 1).total / 2**30, abs=0.006)
    assert 0.5 * calculated < measured < 3 * calculated


def test_a_config_gives_its_backbone_without_its_weights(tool, monkeypatch, capsys):
    """And flags change it: the front door is of tiny and window 16."""
    flags = ('--size', 200, 300, '--window-size', 8, 8, 8, 4, '--with-cp', '--dtype', 'bf16')
    code, of_config, _ = run(tool, monkeypatch, capsys, FRONT_DOOR, *flags)
    _, of_arch, _ = run(tool, monkeypatch, capsys, 'tiny', *flags)
    assert code == 0 and of_config.splitlines()[1:] == of_arch.splitlines()[1:]
    _, of_other_window, _ = run(tool, monkeypatch, capsys, 'tiny', '--size', 200, 300, '--window-size', 8)
    assert of_other_window.splitlines()[6] != of_arch.splitlines()[6]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('swin', '--size', 256), 'swin is neither an architecture (tiny,'),
        (('no.py', '--size', 256), 'config no.py does not exist'),
        (('tiny', '--size', 0), '--size must be one or two positive numbers'),
        (('tiny', '--size', 1, 2, 3), '--size must be one or two positive numbers'),
        (('tiny', '--size', 256, '--window-size', 8, 8), 'window_size must be an int or 4 ints'),
        (('tiny', '--size', 256, '--memory', -1), '--memory must be positive numbers'),
        (('tiny', '--size', 256, '--memory', 'nan'), '--memory must be positive numbers'),
        (('tiny', '--size', 256, '--gpus', 8), '--gpus must be 2 or more, with --memory GIB of each, got 8'),
        (('tiny', '--size', 256, '--memory', 8, '--gpus', 1), '--gpus must be 2 or more'),
        (('tiny', '--size', 256, '--memory', 8, '--gpus', 8, '--tflops', 0), '--bandwidth and --tflops must be posit'),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(tool, monkeypatch, capsys, args, message):
    code, out, err = run(tool, monkeypatch, capsys, *args)
    assert (code, out) == (2, '')
    assert err.startswith(f'error: {message}') and err.count('\n') == 1


@pytest.mark.parametrize(
    ('backbone', 'message'),
    [
        (dict(type='ResNet', depth=50), "is 'ResNet', not SwinTransformerV2"),
        (dict(type='SwinTransformerV2', windows=8), 'windows is window_size'),
    ],
)
def test_a_config_of_another_backbone_is_refused(tool, monkeypatch, capsys, tmp_path, backbone, message):
    config = tmp_path / 'config.py'
    config.write_text(f"default_scope = 'mmdet'\nmodel = dict(type='FasterRCNN', backbone={backbone!r})\n")
    code, out, err = run(tool, monkeypatch, capsys, config, '--size', 64)
    assert (code, out) == (2, '') and message in err and err.count('\n') == 1
