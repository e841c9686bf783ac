"""The benchmark's arithmetic against counters that nobody here wrote, and a small run of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swinv2_mm import ops
from swinv2_mm.windows import partition

BENCHMARK = Path(__file__).parents[1] / 'tools/analysis_tools/benchmark.py'


@pytest.fixture(scope='module')
def work_module(load_tool):
    return load_tool('benchmark_work')


@pytest.fixture(scope='module')
def benchmark(load_tool):
    return load_tool('benchmark')


@pytest.fixture(scope='module')
def peers(load_tool):
    return load_tool('peers')


SETTINGS = [(96, 160, 4, 1), (96, 160, 8, 2), (130, 90, 5, 1)]


@pytest.mark.parametrize('height, width, window, batch', SETTINGS)
def test_operations_are_those_that_pytorch_counts(work_module, monkeypatch, height, width, window, batch):
    work = work_module.Work('swinv2_mm', 'infer', height, width, window, batch=batch)
    backbone = work_module.peers.build('swinv2_mm', 'tiny', (height, width), window).double()  # without oneDNN
    monkeypatch.setattr(ops, 'forced', 'reference')
    with FlopCounterMode(display=False) as counter:
        backbone(torch.randn(batch, 3, height, width, dtype=torch.float64))
    tables = 0  # of the position MLPs, which the benchmark leaves out
    for size, heads, depth in zip(work_module.map_sizes(work), (3, 6, 12, 24), (2, 2, 6, 2)):
        for shift in (0, window // 2):
            rows, columns = (2 * side - 1 for side in partition(batch, *size, window, shift).largest)
            tables += depth // 2 * 2 * rows * columns * 512 * (2 + heads)
    assert work_module.flops(work) == counter.get_total_flops() - tables


@pytest.mark.parametrize('mode', ['infer', 'train'])
@pytest.mark.parametrize('height, width, window, batch', SETTINGS)
def test_the_matrix_products_have_the_operations_of_the_backbone(work_module, mode, height, width, window, batch):
    work = work_module.Work('gemm', mode, height, width, window, batch=batch)
    total = 0
    for a, b, times in work_module.matrix_products(work):
        assert a[-1] == b[-2] and a[:-2] == b[:-2]
        total += 2 * math.prod(a) * b[-1] * times
    assert total == work_module.flops(work)


def test_peak_memory_counts_what_was_released_again(work_module):
    before = work_module.reset_memory('cpu')
    block = torch.ones(50 * 2**20)  # 200 MiB
    del block
    assert 195 * 2**20 < work_module.peak_memory('cpu') - before < 230 * 2**20
    assert work_module.peak_memory('cpu') - work_module.reset_memory('cpu') > 150 * 2**20


def test_shares_of_time_add_up_and_name_the_products(work_module):
    a = torch.randn(600, 600)
    shares = work_module.shares_of_time(lambda: [torch.mm(a, a), torch.cat([a, a])], 'cpu')
    assert sum(shares.values()) == pytest.approx(1)
    assert shares['matrix products'] > shares['copies'] > 0


@pytest.mark.parametrize('name', ['swinv2_mm', 'transformers', 'timm', 'mmpretrain', 'torchvision'])
def test_a_peer_gives_four_maps_with_the_parameters_of_its_architecture(peers, name):
    model = peers.build(name, 'tiny', (65, 90), 4)
    model.eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 65, 90))
    sizes = [(96, 17, 23), (192, 9, 12), (384, 5, 6), (768, 3, 3)]
    assert [sorted(x.shape[1:]) for x in maps] == [sorted(size) for size in sizes]
    norms = 2 * sum(size[0] for size in sizes[:3])  # of the outputs, which some do not have
    parameters = sum(p.numel() for p in model.parameters())
    assert 27_578_154 - 2 * 768 <= parameters <= 27_578_154 + norms + 768 * 1000 + 1000


def test_official_code_is_named_where_it_is_not_to_be_had(peers):
    with pytest.raises(peers.NotAvailableError, match=r'pass --official PATH'):
        peers.build('official', 'tiny', (256, 256), 8)
    with pytest.raises(peers.NotAvailableError, match=r'needs maps that divide into windows, not 800x1333'):
        peers.build('official', 'tiny', (800, 1333), 8, 'swin_transformer_v2.py')


OFFICIAL = """
from torch import nn

def twice(x):
    return 2 * x

class Twice(nn.Module):
    downsample = None
    blocks = ()

    def forward(self, x):
        return twice(x)

class SwinTransformerV2(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.patch_embed, self.layers = Twice(), nn.ModuleList([Twice()])
"""


def test_code_from_a_file_compiles(peers, tmp_path):
    path = tmp_path / 'swin_transformer_v2.py'
    path.write_text(OFFICIAL)
    model = peers.build('official', 'tiny', (256, 256), 8, path)
    (doubled,) = torch.compile(model, backend='eager', fullgraph=True)(torch.ones(3))
    assert doubled.tolist() == [2, 2, 2]


def test_every_row_has_all_implementations(benchmark):
    flags = '--sizes 64x96 32x32 --windows 4 8 --mode infer train --dtype fp32 bf16 --peers timm --threads 1'
    args = benchmark.parse_args(flags.split())
    rows = benchmark.plan(args)
    assert len(rows) == 16
    assert [work.name for work in rows[0]] == ['swinv2_mm', 'timm', 'gemm']
    assert len({work[1:] for row in rows for work in row}) == 16
    assert {(work.height, work.width) for row in rows for work in row} == {(64, 96), (32, 32)}
    args = benchmark.parse_args(['--detector'])
    assert [work.name for work in benchmark.plan(args)[0]] == ['mask-rcnn swinv2_mm', 'mask-rcnn swin v1 w7']


def test_figures_of_a_row_follow_from_its_measurements(benchmark):
    row = [
        dict(name='swinv2_mm', seconds=[2.0, 3.0, 2.5], peak_mb=[100, 110], flops=4e12),
        dict(name='timm', seconds=[6.0, 5.0], peak_mb=[300], flops=4e12),
        dict(name='official', seconds=[], peak_mb=[], skipped='no'),
        dict(name='gemm', seconds=[1.0, 1.5], peak_mb=[5], flops=4e12),
    ]
    benchmark.summarise(row)
    ours, timm, official, _ = row
    assert (ours['best'], ours['median'], ours['spread'], ours['memory_mb']) == (2.0, 2.5, 0.4, 100)
    assert (ours['tflops'], ours['gemm_share']) == (2.0, 0.5)
    assert (timm['times_first'], timm['memory_of_first'], timm['gemm_share']) == (2.5, 3.0, 0.2)
    assert 'best' not in official


def run(*arguments):
    return subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True)


def test_a_run_leaves_a_table_its_figures_and_a_plot(tmp_path):
    flags = '--sizes 64x64 --windows 4 --peers timm official --mode train --rounds 1 --steps 2 --profile --out'
    done = run(*flags.split(), str(tmp_path / 'out'))
    assert done.returncode == 0, done.stderr
    assert 'official is in no package: pass --official' in done.stdout
    record = json.loads((tmp_path / 'out/benchmark.json').read_text())
    assert record['machine']['versions']['torch'] == torch.__version__
    ours, timm, official, gemm = record['rows'][0]
    assert [len(r['seconds']) for r in (ours, timm, official, gemm)] == [2, 2, 0, 2]
    assert all(r['memory_mb'] > 27_500_000 * 4 * 4 / 2**20 for r in (ours, timm))  # weights, gradients and AdamW's two
    assert f'{timm["times_first"]:.2f}x, {timm["memory_of_first"]:.2f}x' in done.stdout
    assert sum(ours['shares'].values()) == pytest.approx(1)
    assert matplotlib.image.imread(tmp_path / 'out/benchmark.png').std() > 0.02


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--sizes', '800'], "invalid image size '800': write it as 800x1333"),
        (['--sizes', '0x8'], "invalid image size '0x8': write it as 800x1333"),
        (['--peers', 'none', 'timm'], '--peers none timm: none excludes all others'),
        (['--out', 'setup.cfg'], '--out setup.cfg cannot be created as a folder: File exists'),
        (['--windows', '0'], "invalid positive number value: '0'"),
        (
            ['--official', 'missing.py'],
            '--official missing.py does not exist: name the swin_transformer_v2.py of a clone',
        ),
        pytest.param(
            ['--device', 'cuda'],
            '--device cuda: PyTorch sees no GPU; leave it out, or install a PyTorch with CUDA',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there'),
        ),
    ],
    ids=str,
)
def test_a_mistake_costs_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith(message)
    assert 'Traceback' not in done.stderr


@pytest.mark.usefixtures('no_traces')
def test_detectors_are_measured(work_module):
    for name in work_module.DETECTORS:
        result = work_module.measure(work_module.Work(name, 'infer', 64, 96, 8, steps=1))
        assert len(result['seconds']) == 1 and result['peak_mb'] > 0
