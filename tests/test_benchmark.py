"""The benchmark's arithmetic against counters that nobody here wrote, and a small run of it."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from entries import run_tool
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from swinv2_mm import ops
from swinv2_mm.windows import partition

BENCHMARK = Path(__file__).parents[1] / 'tools/analysis_tools/benchmark.py'


@pytest.fixture(scope='module')
def work_module(load_tool):
    return load_tool('benchmark_work')


@pytest.fixture(scope='module')
def operations(load_tool):
    return load_tool('benchmark_operations')


@pytest.fixture(scope='module')
def benchmark(load_tool):
    return load_tool('benchmark')


@pytest.fixture(scope='module')
def report(load_tool):
    return load_tool('benchmark_report')


@pytest.fixture(scope='module')
def processes(load_tool):
    return load_tool('benchmark_processes')


@pytest.fixture(scope='module')
def peers(load_tool):
    return load_tool('peers')


SETTINGS = [(96, 160, 4, 1), (96, 160, 8, 2), (130, 90, 5, 1)]


@pytest.mark.parametrize('height, width, window, batch', SETTINGS)
def test_operations_are_those_that_pytorch_counts(operations, work_module, monkeypatch, height, width, window, batch):
    work = work_module.Work('swinv2_mm', 'infer', height, width, window, batch=batch)
    backbone = work_module.peers.build('swinv2_mm', 'tiny', (height, width), window).double()  # without oneDNN
    monkeypatch.setattr(ops, 'forced', 'reference')
    with FlopCounterMode(display=False) as counter:
        backbone(torch.randn(batch, 3, height, width, dtype=torch.float64))
    tables = 0  # of the position MLPs, which the benchmark leaves out
    for size, heads, depth in zip(operations.map_sizes(work), (3, 6, 12, 24), (2, 2, 6, 2)):
        for shift in (0, window // 2):
            rows, columns = (2 * side - 1 for side in partition(batch, *size, window, shift).largest)
            tables += depth // 2 * 2 * rows * columns * 512 * (2 + heads)
    assert operations.flops(work) == counter.get_total_flops() - tables


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('mode', ['infer', 'train'])
@pytest.mark.parametrize('height, width, window, batch', SETTINGS)
def test_the_matrix_products_have_the_operations_of_the_backbone(
    operations, work_module, mode, height, width, window, batch, device
):
    work = work_module.Work('gemm', mode, height, width, window, device=device, batch=batch)
    total = 0
    for a, b, times in operations.matrix_products(work):
        assert a[-1] == b[-2] and a[:-2] == b[:-2]
        total += 2 * math.prod(a) * b[-1] * times
    assert total == operations.flops(work)


def test_matrix_products_fit_the_cache_of_a_cpu_and_are_whole_on_a_gpu(operations, work_module):
    work = work_module.Work('gemm', 'infer', 800, 1333, 16, batch=2)
    largest = max(a[0] for a, _, _ in operations.matrix_products(work) if len(a) == 2)
    assert largest == 4096
    on_gpu = list(operations.matrix_products(work._replace(device='cuda')))
    tokens = 2 * 200 * 334
    assert [(a, times) for a, b, times in on_gpu if b == (96, 288)] == [((tokens, 96), 2)]
    assert (2 * 12 * 20 * 3, 256, 32) in [a for a, _, _ in on_gpu]  # all whole windows of the first stage, three heads


def test_peak_memory_counts_what_was_released_again(work_module):
    before = work_module.reset_memory('cpu')
    block = torch.ones(50 * 2**20)  # 200 MiB
    del block
    assert 195 * 2**20 < work_module.peak_memory('cpu') - before < 230 * 2**20
    assert work_module.peak_memory('cpu') - work_module.reset_memory('cpu') > 150 * 2**20


def test_shares_of_time_add_up_and_name_the_products(work_module):
    a = torch.randn(600, 600)
    shares = work_module.profiled(lambda: [torch.mm(a, a), torch.cat([a, a])], 'cpu')['shares']
    assert sum(shares.values()) == pytest.approx(1)
    assert shares['matrix products'] > shares['copies'] > 0


GELU = 'void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl'


def test_a_profile_of_a_gpu_counts_kernels_and_sorts_their_time(work_module, monkeypatch):
    def event(name, microseconds, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)

    ran = [event('nvjet_tst_64x64_TNT', 30), event(GELU, 10), event('Memset (Device)', 5), event(GELU, 5)]
    others = [event('aten::mm', 70, DeviceType.CPU), event('Optimizer.step#AdamW.step', 50, annotation=True)]
    profiler = SimpleNamespace(events=lambda: ran + others)
    monkeypatch.setattr(work_module, 'profile', lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    assert work_module.profiled(lambda: None, 'cuda') == dict(
        shares={'matrix products': 0.6, 'GELU and other elementwise': 0.3, 'copies and casts': 0.1},
        gpu_seconds=50e-6,
        launches=3,
    )


def test_a_gpu_is_timed_between_events_without_waiting_between_steps(work_module, monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(calls)
            calls.append('event')

        def elapsed_time(self, end):
            return 1000.0 * (end.place - self.place)

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: calls.append('wait'))
    assert work_module.timed(lambda: calls.append('step'), 2, 'cuda') == [2.0, 2.0]
    assert calls == ['wait', 'event', 'step', 'event', 'step', 'event', 'wait']


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


@pytest.mark.parametrize(
    'flags, columns',
    [
        ('', [('swinv2_mm', False), ('timm', False), ('gemm', False)]),
        ('--compile', [('swinv2_mm', True), ('timm', True), ('gemm', False)]),
        (
            '--compile no yes',
            [('swinv2_mm', False), ('timm', False), ('swinv2_mm', True), ('timm', True), ('gemm', False)],
        ),
    ],
)
def test_one_row_has_what_is_compiled_and_what_is_not(benchmark, flags, columns):
    [row] = benchmark.plan(benchmark.parse_args(['--peers', 'timm', *flags.split()]))
    assert [(work.name, work.compile) for work in row] == columns


def test_figures_of_a_row_follow_from_its_measurements(report):
    row = [
        dict(name='swinv2_mm', seconds=[2.0, 3.0, 2.5], peak_mb=[100, 110], flops=4e12),
        dict(name='timm', seconds=[6.0, 5.0], peak_mb=[300], flops=4e12),
        dict(name='official', seconds=[], peak_mb=[], skipped='no'),
        dict(name='gemm', seconds=[1.0, 1.5], peak_mb=[5], flops=4e12),
    ]
    report.summarise(row)
    ours, timm, official, _ = row
    assert (ours['best'], ours['median'], ours['spread'], ours['memory_mb']) == (2.0, 2.5, 0.4, 100)
    assert (ours['tflops'], ours['gemm_share']) == (2.0, 0.5)
    assert (timm['times_first'], timm['memory_of_first'], timm['gemm_share']) == (2.5, 3.0, 0.2)
    assert 'best' not in official
    assert report.beside_peers(row, False) == dict(faster=2.5, fastest='timm', memory=1 / 3, leanest='timm')
    assert report.beside_peers(row, True) is None


def result(name, compiled, seconds, megabytes, **more):
    setting = dict(arch='tiny', mode='train', height=64, width=96, window=8, dtype='bf16', device='cuda', batch=2)
    return dict(setting, name=name, compile=compiled, profile=True, seconds=[seconds], peak_mb=[megabytes], **more)


def test_the_table_of_a_gpu_compares_with_the_best_peers(report):
    kernels = dict(gpu_seconds=0.05, wall=0.1, launches=1234, shares={'attention': 0.25, 'matrix products': 0.75})
    row = [
        result('swinv2_mm', False, 0.1, 200, **kernels),
        result('timm', False, 0.25, 500),
        result('transformers', False, 0.2, 800),
        result('swinv2_mm', True, 0.1, 300),
        result('timm', True, 0.15, 400),
        dict(result('transformers', True, 0, 0), seconds=[], peak_mb=[], skipped='took longer than 150 seconds'),
        result('gemm', False, 0.05, 10),
    ]
    report.summarise(row)
    text = report.table(row)
    assert [line for line in text.splitlines() if 'speed-up' in line] == [
        'speed-up over the fastest peer 2.00x (transformers), memory relative to the leanest 0.40x (timm)',
        'compiled: speed-up over the fastest peer 1.50x (timm), memory relative to the leanest 0.75x (timm)',
    ]
    (first,) = (line.split() for line in text.splitlines() if line.startswith('swinv2_mm  '))
    assert first == ['swinv2_mm', '0.100s', '0.100s', '0%', '50%', '200', 'MB', '1234', '50%']
    assert 'matrix products 75%, attention 25%' in text
    assert 'timm, compiled' in text and 'took longer than 150 seconds' in text


def test_one_process_measures_a_row_of_a_gpu_and_another_one_what_is_left(processes, work_module, monkeypatch):
    runs = []

    def run(works, turns, rounds, limit):
        runs.append(([work.name for work in works], turns, rounds, limit))
        for place, work in enumerate(works):
            yield place, dict(doing='round 1 of 2')
            if work.name == 'timm':
                yield place, dict(skipped='CUDA error')
                return
            yield place, dict(seconds=[1.0], peak_mb=5)
            yield place, dict(launches=7)

    monkeypatch.setattr(processes, 'run', run)
    row = [work_module.Work(name, 'infer', 64, 64, 8, device='cuda') for name in ('swinv2_mm', 'timm', 'transformers')]
    said = []
    ours, timm, transformers = processes.measure_row(row, 2, 60, said.append)
    assert said == [f'{name}: round 1 of 2' for name in ('swinv2_mm', 'timm', 'transformers')]
    assert runs == [(['swinv2_mm', 'timm', 'transformers'], [0, 1], 2, 60), (['transformers'], [0, 1], 2, 60)]
    assert (ours['seconds'], ours['peak_mb'], ours['launches']) == ([1.0], [5], 7)
    assert (timm['seconds'], timm['skipped']) == ([], 'CUDA error')
    assert transformers['seconds'] == [1.0]


def test_a_process_measures_several_works_in_turns(processes, work_module):
    works = [
        work_module.Work(name, 'infer', 64, 64, 4, steps=2, threads=1) for name in ('swinv2_mm', 'official', 'gemm')
    ]
    got = list(processes.run(works, [0, 1], 2, 600))
    doing = [(place, figures['doing']) for place, figures in got if 'doing' in figures]
    assert doing == [
        *((place, 'round 1 of 2') for place in range(3)),
        *((place, 'round 2 of 2') for place in (0, 2)),
    ]
    figures = [(place, figures) for place, figures in got if 'doing' not in figures]
    assert [(place, len(of_place.get('seconds', ()))) for place, of_place in figures] == [
        *((0, 2), (1, 0), (2, 2), (0, 2), (2, 2))
    ]
    assert [place for place, of_place in figures if 'peak_mb' in of_place] == [0, 2]
    assert figures[1][1]['skipped'].startswith('official is in no package')


def test_a_measurement_that_takes_too_long_is_given_up(processes, work_module):
    work = work_module.Work('swinv2_mm', 'infer', 64, 64, 4, steps=10**7, threads=1)
    assert list(processes.run([work], [0], 1, 2))[-1] == (0, dict(skipped='took longer than 2 seconds'))


def test_a_failure_is_its_last_line(processes, work_module):
    work = work_module.Work('swinv2_mm', 'infer', 64, 64, 4, arch='colossal')
    ((place, figures),) = (got for got in processes.run([work], [0], 1, None) if 'doing' not in got[1])
    assert place == 0 and figures['skipped'].startswith('ValueError: arch must be one of tiny')


def test_a_run_leaves_a_table_its_figures_and_a_plot(tmp_path):
    flags = '--sizes 64x64 --windows 4 --peers timm official --mode train --rounds 1 --steps 2 --profile --out'
    command = [sys.executable, BENCHMARK, *flags.split(), str(tmp_path / 'out')]
    done = subprocess.run(command, capture_output=True, text=True)
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
        (['--compile', 'maybe'], "argument --compile: invalid choice: 'maybe'"),
        (['--limit', '0'], "argument --limit: invalid positive number value: '0'"),
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
def test_a_mistake_costs_one_line(load_tool, capsys, arguments, message):
    assert run_tool(load_tool, 'benchmark', *arguments) == 2
    err = capsys.readouterr().err
    assert message in err.strip().splitlines()[-1]
    assert 'Traceback' not in err


@pytest.mark.usefixtures('no_traces')
def test_detectors_are_measured(work_module):
    for name in work_module.DETECTORS:
        work = work_module.Work(name, 'infer', 64, 96, 8, steps=1)
        _, (_, figures) = work_module.measure([work], [0], 1)
        assert len(figures['seconds']) == 1 and figures['peak_mb'] > 0
        assert list(work_module.measure([work._replace(compile=True)], [0], 1))[1] == (
            0,
            dict(skipped='Mask R-CNN is not compiled: its heads break the graph'),
        )
