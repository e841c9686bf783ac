"""The tool that measures on a GPU, without one: its plan, its budget, what parts leave, and its page."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch


@pytest.fixture
def tool(load_tool):
    return load_tool('measure_gpu')


@pytest.fixture(scope='module')
def report(load_tool):
    return load_tool('gpu_report')


ABOUT = dict(gpu='NVIDIA H200', cuda='13.0', versions=dict(python='3.12.3', torch='2.11.0', timm='1.0.31'))


def result(name, seconds, megabytes, window=16, compiled=False, **more):
    setting = dict(mode='train', height=800, width=1333, window=window, dtype='bf16', compile=compiled)
    seconds = dict(seconds=[seconds], best=seconds, memory_mb=megabytes) if seconds else dict(seconds=[])
    return dict(setting, name=name, **seconds, **more)


def part(name, kind='rows', **more):
    return dict(dict(name=name, title='Title', kind=kind, command=f'python {name}', state='done', why='done'), **more)


def test_the_plan_begins_with_the_tests_and_training_and_compiles_late(tool, load_tool, monkeypatch):
    parts = tool.plan()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[:4] == ['tests', 'train_bf16_800x1333_w16-32', 'infer_bf16_800x1333_w16-32', 'memcheck']
    assert min(i for i, name in enumerate(names) if 'compiled' in name) == 4
    eager = {setting for part in parts if part.kind == 'rows' for setting in part.settings if not setting[-1]}
    sizes = ((800, 1333), (1024, 1024))
    modes, dtypes = ('train', 'infer'), ('bf16', 'fp32')
    assert eager == {(m, *s, w, d, False) for m in modes for s in sizes for w in (16, 32) for d in dtypes}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    benchmark = load_tool('benchmark')
    for part in parts:
        if part.kind != 'test':
            rows = benchmark.plan(benchmark.parse_args(part.command[2:]))
            of_row = [(w.mode, w.height, w.width, w.window, w.dtype, w.compile) for w, *_ in rows]
            assert tuple(of_row) == part.settings
            assert {(w.device, w.batch, w.profile) for row in rows for w in row} == {('cuda', 2, True)}


def test_a_part_that_does_not_fit_or_lacks_something_is_not_started(tool, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(tool, 'run', lambda part, seconds, _: started.append((part.name, seconds)) or {})
    absent = tool.Part('detector', '', (), 10, 20, requires=(('module', 'torch'), ('module', 'no_such_module')))
    assert tool.attempt(absent, 100, tmp_path)['why'] == 'no_such_module not found here'
    sanitizer = tool.Part('memcheck', '', (), 10, 20, requires=(('program', 'no-such-program'), ('file', 'setup.cfg')))
    assert tool.attempt(sanitizer, 100, tmp_path)['why'] == 'no-such-program not found here'
    long = tool.Part('rows', '', (), 70, 140, requires=(('file', 'setup.cfg'),))
    assert tool.attempt(long, 69, tmp_path)['why'] == 'no time, because it takes about 70 s and 69 s were left'
    assert started == []
    tool.attempt(long, 71, tmp_path)
    tool.attempt(long, 500, tmp_path)
    assert started == [('rows', 71), ('rows', 140)]


def test_a_part_leaves_what_it_said_and_measured(tool, tmp_path):
    code = """import pathlib, sys
print('1 failed, 2 passed in 3.21s')
out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])
out.mkdir(exist_ok=True)
(out / 'benchmark.json').write_text('{"rows": [[1]]}')
sys.exit(int(sys.argv[1]))"""
    done = tool.run(tool.Part('p', '', ('python', '-c', code, '0'), 1, 1), 60, tmp_path)
    assert (done['state'], done['rows'], done['said']) == ('done', [[1]], ['1 failed, 2 passed in 3.21s'])
    failed = tool.run(tool.Part('p', '', ('python', '-c', 'raise SystemExit("broken")'), 1, 1), 60, tmp_path)
    assert (failed['state'], failed['why']) == ('failed', 'failed with exit code 1: broken')
    assert 'rows' not in failed  # those of the run before it are gone


def test_a_part_is_stopped_with_what_it_started(tool, tmp_path):
    inner = 'import sys, time; print("inner", flush=True); time.sleep(300)'
    code = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {inner!r}])'
    part = tool.Part('p', '', (sys.executable, '-c', code), 1, 1, kind='test')
    assert tool.run(part, 3, tmp_path)['why'] == 'stopped after 3 s'
    for _ in range(600):  # a killed process may still be listed for a while
        if not runs(inner):
            return
        time.sleep(0.1)
    pytest.fail('what the part started still runs')


def runs(code):
    """Whether a process runs such code."""
    for words in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):  # it has ended
            if code.encode() in words.read_bytes():
                return True
    return False


def test_the_page_has_the_figures(report):
    kernels = dict(launches=2712, gpu_busy=0.4, gemm_share=0.25, shares={'attention': 0.3, 'matrix products': 0.7})
    rows = [
        [result('swinv2_mm', 0.089, 3800, **kernels), result('timm', 0.104, 8380), result('gemm', 0.02, 1)],
        [
            *[result('swinv2_mm', 0.0045, 421, 32), dict(result('timm', None, 0, 32), skipped='out of memory')],
            *[result('transformers', 1.341, 24100, 32), result('gemm', 0.02, 1, 32)],
        ],
    ]
    parts = [
        part('tests', 'test', title='Tests', said=['12 passed in 34.5s']),
        part('memcheck', 'test', title='Sanitizer', state='not run', why='compute-sanitizer not found here'),
        part('w', rows=rows, settings=[('train', 800, 1333, window, 'bf16', False) for window in (16, 32)]),
        part('late', state='not run', why='no time', settings=[('infer', 800, 1333, 16, 'fp32', True)]),
    ]
    record = dict(command='python tools/misc/measure_gpu.py', seconds=462, machine=ABOUT, parts=parts)
    text = report.markdown(record)
    words = ' '.join(text.split())
    assert words.startswith('An NVIDIA H200, with Python 3.12.3, torch 2.11.0 (CUDA 13.0). The peers are timm 1.0.31.')
    assert '7.7 minutes, by `python tools/misc/measure_gpu.py`' in words
    lines = text.splitlines()
    head = lines.index('bfloat16 autocast:') + 2
    assert lines[head].startswith('| Work | swinv2_mm | timm | transformers | Speed-up')
    assert lines[head + 2 : head + 4] == [
        '| training step 800x1333, window 16 | 89 ms, 3.80 GB | 104 ms, 8.38 GB |  | **1.17x** | **0.45x** | 25% '
        '| 2,712 | 40% |',
        '| training step 800x1333, window 32 | 4.5 ms, 421 MB |  | 1.34 s, 24.10 GB | **298.00x** | **0.02x** |  |  '
        '|  |',
    ]
    assert '| training step 800x1333, window 16, bf16 | 30% | 70% |' in lines
    assert 'Tests, by `python tests`: 12 passed in 34.5s.' in lines
    assert '```bash\npython w\n```' in text
    assert lines[lines.index('Not measured:') + 2 :] == [
        '- Sanitizer: compute-sanitizer not found here',
        '- training step 800x1333, window 32, bf16, timm: out of memory',
        '- inference 800x1333, window 16, compiled, fp32: no time',
    ]


def test_the_page_of_a_detector_and_of_failures(report):
    swins = [result('mask-rcnn swinv2_mm', 0.534, 6220), result('mask-rcnn swin v1 w7', 0.514, 6350)]
    setting = ('train', 800, 1333, 16, 'bf16', False)
    failing = [dict(result('swinv2_mm', None, 0), skipped='no kernel')]
    parts = [
        part('tests', 'test', title='Tests', state='failed', said=['1 failed, 2 passed in 3s'], why='exit code 1'),
        part('d', 'detector', rows=[swins], settings=[setting]),
        part('w', rows=[failing], settings=[setting]),
    ]
    text = report.markdown(dict(command='C', seconds=60, machine=ABOUT, parts=parts))
    line = 'mask-rcnn swinv2_mm 534 ms, 6.22 GB; mask-rcnn swin v1 w7 514 ms, 6.35 GB.'
    assert f'Mask R-CNN, training step 800x1333, window 16, bf16: {line}' in ' '.join(text.split())
    assert 'Tests, by `python tests`: failed, 1 failed, 2 passed in 3s.' in text
    assert text.endswith('Not measured:\n\n- training step 800x1333, window 16, bf16: no kernel\n')


def test_every_part_rewrites_the_files(tool, monkeypatch, tmp_path, capsys):
    seen = []

    def attempt(part, seconds, folder):
        found = json.loads((tmp_path / 'gpu.json').read_text())['parts'] if seen else []
        seen.append((part.name, seconds, [each['name'] for each in found if each['state'] == 'done']))
        return dict(state='done', why='done', said=['3 passed'])

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')
    monkeypatch.setattr(tool, 'attempt', attempt)
    monkeypatch.setattr(sys, 'argv', ['measure_gpu.py', '--minutes', '2', '--out', str(tmp_path)])
    assert tool.main() == 0
    names = [part.name for part in tool.plan()]
    assert [name for name, *_ in seen] == names
    assert [done for *_, done in seen] == [names[:i] for i in range(len(names))]
    assert all(0 < seconds <= 100 for _, seconds, _ in seen)
    assert 'An NVIDIA H200' in (tmp_path / 'gpu.md').read_text()
    assert 'wrote' in capsys.readouterr().out


@pytest.mark.parametrize(
    'arguments, has_gpu, message',
    [
        (['--minutes', '0'], True, '--minutes 0: give a positive number, for example 8'),
        (['--minutes', 'nan'], True, '--minutes nan: give a positive number, for example 8'),
        (['--out', 'setup.cfg'], True, 'error: --out setup.cfg'),
        ([], False, 'error: PyTorch sees no GPU: run this on a machine with one, and a PyTorch with CUDA'),
    ],
    ids=str,
)
def test_a_mistake_costs_one_line(tool, monkeypatch, capsys, arguments, has_gpu, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')
    monkeypatch.setattr(sys, 'argv', ['measure_gpu.py', *arguments])
    monkeypatch.chdir(tool.ROOT)
    try:
        code = tool.main()
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(['--help'])
    assert 'example: python tools/misc/measure_gpu.py --minutes 8' in capsys.readouterr().out
