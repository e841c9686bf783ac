"""Attention on CUDA against the specification in float64, its costs, and when it is taken."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from across_versions import strict_zip
from map_kernels import (  # before anything that imports Triton
    DEVICE,
    HALF,
    ON_GPU,
    Launches,
    attend_map,
    error,
    kernels,  # noqa: F401
    needs_triton,  # noqa: F401
    on_gpu,
    terms_of_scale_gradient,
)
from torch._subclasses import FakeTensorMode

from swinv2_mm import ops
from swinv2_mm.ops import flash_cuda, reference, sdpa
from swinv2_mm.windows import partition

pytestmark = pytest.mark.usefixtures('kernels')
DTYPES = (torch.float32, *HALF)
GROUPS = {1: (1, 4, 8, 8, 4), 2: (1, 3, 6, 4, 2), 6: (1, 7, 6, 4, 2), 9: (1, 7, 7, 4, 2)}  # by their number
CASES = {  # map, batch first, window and shift; heads; channels per head
    'a whole window': ((1, 8, 8, 8, 0), 1, 32),
    'a map smaller than the window': ((2, 7, 5, 8, 4), 2, 16),
    'one row': ((1, 1, 7, 4, 2), 3, 16),
    'windows of one token': ((1, 2, 3, 1, 0), 1, 16),
    'nine groups': ((1, 7, 7, 4, 2), 1, 16),
    'many images': ((17, 1, 2, 2, 0), 1, 16),
    'tiles below each other': ((1, 9, 2, 10, 5), 1, 16),
    'tiles beside each other': ((1, 2, 11, 10, 5), 1, 64),
}
LARGE = {
    'window 16': ((3, 41, 37, 16, 8), 4, 32),
    'window 7': ((2, 30, 44, 7, 3), 3, 32),
    'window 24': ((1, 50, 19, 24, 12), 2, 64),
    'window 32': ((2, 70, 40, 32, 16), 2, 16),
    'window 48': ((1, 60, 97, 48, 24), 2, 32),
    'many images, large': ((17, 20, 26, 12, 6), 2, 32),
}
cases = pytest.mark.parametrize('case', [*CASES, *(pytest.param(name, marks=on_gpu) for name in LARGE)])
in_all_dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)


def operands(cut, heads=1, head_dim=16, dtype=torch.float32, extra=0):
    """``qkv``, ``scale``, ``table``, the windows, and the gradient of the output."""
    windows = partition(*cut, DEVICE)
    rows, columns = (side + extra for side in windows.largest)
    qkv = torch.randn(*cut[:3], 3 * heads * head_dim, device=DEVICE).to(dtype)
    scale = torch.linspace(20, 2, heads, device=DEVICE).view(-1, 1, 1)
    table = 2 * torch.randn(heads, 2 * rows - 1, 2 * columns - 1, device=DEVICE)
    return (qkv, scale, table), windows, torch.randn(*cut[:3], heads * head_dim, device=DEVICE).to(dtype)


def values_and_gradients(path, leaves, windows, grad):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = path.attention(*leaves, windows) if path is flash_cuda else attend_map(path, *leaves, windows)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def in_float64(leaves, windows, grad):
    return [x.double() for x in leaves], windows, grad.double()


def errors(results, leaves, windows, grad):
    """Of the output and the gradients of qkv, scale and table."""
    exact = in_float64(leaves, windows, grad)
    true = values_and_gradients(reference, *exact)
    sizes = [x.square().mean().sqrt() for x in true]
    sizes[2] = terms_of_scale_gradient(*exact)
    return [error(a, e, size) for a, e, size in strict_zip(results, true, sizes)]


def assert_accurate(leaves, windows, grad, results=None):
    """Exact in float32, else as good as `sdpa` in the same dtype, or as the dtype.

    On CPU `sdpa` rounds operands alone. Of the gradient of the scale, all terms are as good as the dtype.
    """
    dtype = leaves[0].dtype
    ours = errors(results or values_and_gradients(flash_cuda, leaves, windows, grad), leaves, windows, grad)
    if dtype == torch.float32:
        assert max(ours) < 1e-5, ours
        return
    limits = errors(values_and_gradients(sdpa, leaves, windows, grad), leaves, windows, grad)
    eps = torch.finfo(dtype).eps
    limits[2] = 4 * eps
    assert all(e <= max(limit, eps) for e, limit in strict_zip(ours, limits)), (ours, limits)


@cases
@in_all_dtypes
def test_values_and_gradients_are_those_of_the_formula(case, dtype):
    assert_accurate(*operands(*{**CASES, **LARGE}[case], dtype))


@pytest.mark.parametrize('number', GROUPS)
def test_maps_have_one_to_nine_groups_of_windows(number):
    leaves, windows, grad = operands(GROUPS[number])
    assert len(windows.groups) == number
    assert_accurate(leaves, windows, grad)


@in_all_dtypes
def test_at_the_largest_scale(dtype):
    (qkv, scale, table), windows, grad = operands((1, 6, 9, 8, 4), 2, 16, dtype)
    assert_accurate((qkv, torch.full_like(scale, 100), table), windows, grad)


def test_large_inputs_stay_in_the_range_of_float16():
    """Keys beyond a window repeat its border with another bias: what they would add may be infinite."""
    (qkv, scale, table), windows, grad = operands((1, 6, 9, 8, 4), dtype=torch.float16)
    assert_accurate((1e3 * qkv, scale, table), windows, grad)


@in_all_dtypes
def test_zero_queries_and_keys_spoil_no_other(dtype):
    (qkv, scale, table), windows, grad = operands((1, 6, 9, 8, 4), dtype=dtype)
    qkv[0, 1, :2] = 0
    zero = torch.zeros(qkv.shape, dtype=torch.bool, device=DEVICE)
    zero[0, 1, :2, :32] = True  # whose true gradients are of the order of 1e12
    out, of_qkv, of_scale, of_table = values_and_gradients(flash_cuda, (qkv, scale, table), windows, grad)
    _, true, *_ = values_and_gradients(reference, *in_float64((qkv, scale, table), windows, grad))
    if dtype == torch.float16:
        assert not of_qkv[zero].isfinite().any()
    else:
        assert error(of_qkv[zero], true[zero]) < (1e-5 if dtype == torch.float32 else 0.01)
    limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert error(of_qkv[~zero], true[~zero]) < limit
    assert all(x.isfinite().all() for x in (out, of_scale, of_table))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_what_lies_beyond_a_window_counts_nothing_however_large_its_bias(dtype):
    """Keys that fill up the last strip of a window have offsets that no pair has, here with e^90 times the weight."""
    (qkv, scale, table), windows, grad = operands((1, 3, 2, 4, 0), dtype=dtype)
    assert_accurate((qkv, scale, table - 90), windows, grad)


@pytest.mark.parametrize('setting', ['allow_tf32', 'fp32_precision'])
def test_products_of_float32_are_in_tf32_if_pytorch_is_set_to_it(monkeypatch, setting):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, setting):
        pytest.skip(f'this PyTorch has no {setting}')
    before = getattr(matmul, setting)
    on, off = (True, False) if setting == 'allow_tf32' else ('tf32', 'ieee')
    try:
        for value, precision in ((on, 'tf32'), (off, 'tf32x3')):
            setattr(matmul, setting, value)
            tile = flash_cuda.tile_of('forward', torch.float32, 32)
            assert flash_cuda._compiled(tile, torch.float32)['PRECISION'] == precision
            assert flash_cuda._compiled(tile, torch.bfloat16)['PRECISION'] == 'ieee'
    finally:
        setattr(matmul, setting, before)


def test_a_larger_table_gets_no_gradient_beyond_the_windows():
    leaves, windows, grad = operands((1, 7, 6, 4, 2), extra=7)
    results = values_and_gradients(flash_cuda, leaves, windows, grad)
    assert_accurate(leaves, windows, grad, results)
    of_table = results[3].clone()
    assert of_table[:, 7:-7, 7:-7].abs().max() > 0
    of_table[:, 7:-7, 7:-7] = 0
    assert not of_table.any()


def test_operands_need_not_be_contiguous():
    (qkv, scale, table), windows, grad = operands((1, 3, 3, 4, 2), 2)
    expected = values_and_gradients(flash_cuda, (qkv, scale, table), windows, grad)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (qkv, grad)]
    table = table.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in (*transposed, table))
    actual = values_and_gradients(flash_cuda, (transposed[0], scale, table), windows, transposed[1])
    assert all(torch.equal(a, e) for a, e in strict_zip(actual, expected))
    wide = values_and_gradients(
        flash_cuda, (qkv, scale, table), windows, torch.ones_like(grad[..., :1]).expand_as(grad)
    )
    ones = values_and_gradients(flash_cuda, (qkv, scale, table), windows, torch.ones_like(grad))
    assert all(torch.equal(a, e) for a, e in strict_zip(wide, ones))


def test_an_empty_batch_gives_an_empty_map_and_zero_gradients():
    leaves, windows, grad = operands((0, 5, 6, 4, 2), 2)
    out, of_qkv, of_scale, of_table = values_and_gradients(flash_cuda, leaves, windows, grad)
    assert out.shape == (0, 5, 6, 32) and of_qkv.shape == (0, 5, 6, 96)
    assert of_scale.shape == (2, 1, 1) and not of_scale.any()
    assert of_table.shape == leaves[2].shape and not of_table.any()


@pytest.mark.parametrize('dtype', [torch.float32, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str)
def test_two_runs_and_runs_of_one_head_at_a_time_are_bit_equal(monkeypatch, dtype):
    case = ((4, 70, 45, 16, 8), 6, 32) if ON_GPU else ((1, 2, 3, 4, 2), 2, 16)
    arguments = operands(*case, dtype)
    expected = values_and_gradients(flash_cuda, *arguments)
    again = values_and_gradients(flash_cuda, *arguments)
    monkeypatch.setattr(flash_cuda, 'SCRATCH', 1)
    one_by_one = values_and_gradients(flash_cuda, *arguments)
    assert all(torch.equal(a, e) for results in (again, one_by_one) for a, e in strict_zip(results, expected))


@pytest.fixture
def launches(monkeypatch):
    from swinv2_mm.ops import attention_kernels

    return Launches.of(monkeypatch, attention_kernels)


@pytest.mark.parametrize('stage', range(4))
@pytest.mark.parametrize('window', [8, 32])
def test_giant_needs_less_than_200_megabytes_of_scratch(launches, stage, window):
    heads, side = 16 * 2**stage, 384 // 2**stage
    qkv = torch.empty(1, side, side, 96 * heads, dtype=torch.bfloat16, device='meta')
    table = torch.empty(heads, 2 * window - 1, 2 * window - 1, device='meta')
    flash_cuda._table_gradient(flash_cuda._shape(qkv, table, window, window // 2), qkv, *[table] * 5)
    scratch = {x.shape: 4 * math.prod(x.shape) for args, _ in launches['fold_kernel'].calls for x in args[:2]}
    assert sum(scratch.values()) < 200e6
    heads_taken = sum(args[-1] for args, _ in launches['fold_kernel'].calls)
    assert heads_taken == heads


@in_all_dtypes
def test_one_compiled_kernel_serves_all_sizes(launches, dtype):
    for batch, (height, width), (window, shift), heads in zip(
        (1, 2, 3, 16, 17) * 4,
        ((1, 1), (8, 8), (16, 16), (5, 31), (64, 48), (33, 17), (128, 1)) * 3,
        ((8, 0), (8, 4), (16, 8), (7, 3), (1, 0), (32, 16)) * 4,
        (1, 2, 16) * 7,
    ):
        qkv = torch.zeros(batch, height, width, 96 * heads, dtype=dtype, device=DEVICE, requires_grad=True)
        table = torch.zeros(heads, 2 * window - 1, 2 * window - 1, device=DEVICE, requires_grad=True)
        out = flash_cuda._Attention.apply(qkv, torch.ones(heads, 1, 1, device=DEVICE), table, window, shift)
        out.sum().backward()
    for name, launched in launches.items():
        assert len(launched.calls) >= 20 and len(launched.variants()) == 1, (name, launched.variants())


@on_gpu
def test_on_a_gpu_nothing_is_compiled_for_a_new_size():
    from swinv2_mm.ops import attention_kernels

    launched = [getattr(attention_kernels, f'{name}_kernel') for name in ('forward', 'query', 'key', 'pair', 'fold')]
    values_and_gradients(flash_cuda, *operands((2, 16, 24, 8, 4), 2, 32, torch.bfloat16))
    before = [compiled_variants(kernel) for kernel in launched]
    assert all(before)
    for i in range(20):
        values_and_gradients(flash_cuda, *operands((1 + i % 3, 1 + 7 * i, 64 - i, 1 + i, i), 1 + i, 32, torch.bfloat16))
    assert [compiled_variants(kernel) for kernel in launched] == before


def compiled_variants(kernel):
    device = torch.cuda.current_device()
    return len(kernel.device_caches[device][0] if hasattr(kernel, 'device_caches') else kernel.cache[device])


KERNELS = {  # and the channels to compile them for: of a head, or of the map
    **dict.fromkeys(('forward', 'query', 'key', 'pair'), flash_cuda.HEAD_DIMS),
    **dict.fromkeys(('post_norm', 'post_norm_backward'), (96, 1024, 4096)),
}
COMPILED = [
    [name, capability, dtype, channels]
    for name, widths in KERNELS.items()
    for capability in (80, 90)
    for dtype in ('bf16', 'fp16', 'fp32')
    for channels in widths
    if dtype != 'fp16' or channels == 32  # which compiles as bf16 does
] + [['fold', capability, 'fp32', 1] for capability in (80, 90)]


@pytest.fixture(scope='module')
def resources(needs_triton):  # noqa: F811
    """What all kernels need, as the compiler says; compiled without a GPU, and without the interpreter."""
    root = Path(__file__).parents[1]
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, (str(root), env.get('PYTHONPATH'))))
    program = [sys.executable, str(root / 'tests/kernel_resources.py'), json.dumps(COMPILED)]
    run = subprocess.run(program, env=env, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    needs, specialized = json.loads(run.stdout)
    return list(zip(COMPILED, needs)), specialized


def test_compiled_kernels_fit_small_gpus_and_hardly_spill(resources):
    for case, needs in resources[0]:
        assert needs['registers'] > 0
        assert needs['spills'] <= 16, (case, needs)  # bytes per thread
        assert needs['shared'] <= 99 * 1024, (case, needs)  # what consumer GPUs have


def test_no_size_is_a_parameter_that_compiles_a_kernel_anew(resources):
    assert resources[1] == {name: [] for name in (*KERNELS, 'fold')}


# which path is taken


@pytest.fixture
def messages(monkeypatch):
    """What is logged, as if nothing had been said before, on a machine with an NVIDIA GPU."""
    messages = []
    monkeypatch.setattr(flash_cuda, 'DEVICE', 'cuda')
    monkeypatch.setattr(ops, 'inform', messages.append)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(flash_cuda, '_try_triton', lambda *args: None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Some GPU')
    caches = flash_cuda._unable_on, ops._say_why_not
    for cache in caches:
        cache.cache_clear()
    yield messages
    for cache in caches:
        cache.cache_clear()


CUDA = torch.device('cuda', 0)


@in_all_dtypes
@pytest.mark.parametrize('needs_grad', [False, True])
def test_it_is_taken_by_itself_on_cuda(messages, dtype, needs_grad):
    for head_dim in (16, 32, 64):
        assert ops.path_of(CUDA, dtype, head_dim, needs_grad=needs_grad) is flash_cuda
    assert ops.path_of(torch.device('cpu'), dtype, 32) is not flash_cuda
    assert not messages


try_triton = flash_cuda._try_triton  # a fixture replaces it


def without_triton(patch):
    patch.setattr(flash_cuda, '_try_triton', try_triton)
    patch.setitem(sys.modules, 'triton', None)


def with_triton_2(patch):
    import triton

    patch.setattr(flash_cuda, '_try_triton', try_triton)
    patch.setattr(triton, '__version__', '2.3.1')


def without_compiler(patch):
    def fail(*args):
        raise RuntimeError('Failed to find C compiler.\nSet CC.')

    patch.setattr(flash_cuda, '_try_triton', fail)


REASONS = {  # settings of the machine, arguments of `path_of`, the path taken instead, and why
    'float64': (
        None,
        dict(dtype=torch.float64),
        sdpa,
        'is for float32, bfloat16 and float16, not float64: unset it, or set it to sdpa',
    ),
    'head dim': (
        None,
        dict(head_dim=8),
        sdpa,
        'is for 16, 32, 64 channels per head, not 8: unset it, or set it to sdpa',
    ),
    'dropout': (
        None,
        dict(dropout=0.1),
        reference,
        'cannot drop attention weights: unset it, or set attn_drop_rate=0',
    ),
    'no Triton': (
        without_triton,
        {},
        sdpa,
        'needs Triton, which does not work here (import of triton halted; None in sys.modules): '
        'repair it, unset it, or set it to sdpa',
    ),
    'old Triton': (
        with_triton_2,
        {},
        sdpa,
        'needs Triton, which does not work here (version 2.3.1 is older than 3): '
        'repair it, unset it, or set it to sdpa',
    ),
    'no C compiler': (
        without_compiler,
        {},
        sdpa,
        'needs Triton, which does not work here (Failed to find C compiler.): repair it, unset it, or set it to sdpa',
    ),
    'old PyTorch': (
        lambda patch: patch.setattr(flash_cuda.compat, 'HAS_CUSTOM_OP', False),
        {},
        sdpa,
        f'needs PyTorch 2.4 or later, not {torch.__version__}: unset it, or set it to sdpa',
    ),
    'old GPU': (
        lambda patch: patch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5)),
        {},
        sdpa,
        'needs an NVIDIA GPU from Ampere on, not Some GPU: unset it, or set it to sdpa',
    ),
    'ROCm': (
        lambda patch: patch.setattr(torch.version, 'hip', '6.0'),
        {},
        sdpa,
        'needs an NVIDIA GPU from Ampere on, not Some GPU: unset it, or set it to sdpa',
    ),
}


@pytest.mark.parametrize('case', REASONS)
def test_where_it_cannot_serve_another_path_does_and_the_log_says_why_once(messages, monkeypatch, case):
    change, arguments, path, reason = REASONS[case]
    if change:
        change(monkeypatch)
    arguments = dict(dict(dtype=torch.bfloat16, head_dim=32), **arguments)
    for _ in range(2):
        assert ops.path_of(CUDA, **arguments) is path
    name = path.__name__.rpartition('.')[2]
    why = reason.rpartition(':')[0]
    assert messages == [f'attention on this GPU runs through {name}, which is slower: flash_cuda {why}']
    monkeypatch.setattr(ops, 'forced', 'flash_cuda')
    with pytest.raises(ValueError) as raised:
        ops.path_of(CUDA, **arguments)
    assert str(raised.value) == f'SWINV2_MM_ATTENTION=flash_cuda {reason}'


@pytest.fixture
def small_trial(monkeypatch):
    """The trial of the kernels, on a map that does not take the interpreter long."""
    monkeypatch.setattr(flash_cuda, '_try_triton', try_triton)
    if not ON_GPU:
        monkeypatch.setattr(flash_cuda, 'TRIAL', (1, 3, 5, 4, 2))


@in_all_dtypes
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, FakeTensorMode, torch.enable_grad])
def test_a_trial_on_a_small_map_finds_no_fault_and_leaves_no_trace(small_trial, dtype, mode):
    random_state = torch.get_rng_state()
    assert flash_cuda._error_of_trial(torch.device(DEVICE), dtype, 16) < (1e-4 if dtype == torch.float32 else 0.01)
    with mode(), torch.autocast(DEVICE, torch.bfloat16):
        flash_cuda._try_triton(torch.device(DEVICE), dtype, 16)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize('result', ['out', 'gradient of qkv', 'gradient of the table'])
def test_kernels_that_compute_wrong_numbers_are_not_taken(small_trial, monkeypatch, result):
    name, i = {
        'out': ('map_attention', 0),
        'gradient of qkv': ('map_attention_backward', 0),
        'gradient of the table': ('map_attention_backward', 2),
    }[result]
    right = getattr(flash_cuda, name)

    def wrong(*args):
        results = list(right(*args))
        results[i] = results[i] * 1.05
        return results

    monkeypatch.setattr(flash_cuda, name, wrong)
    flash_cuda._unable_on.cache_clear()
    try:
        device = torch.device(DEVICE)
        said = flash_cuda.unable_on(device, torch.float32, 16)
        off = float(
            re.search(r'results in float32 are ([\d.]+)% off\): repair it, unset it, or set it to sdpa$', said)[1]
        )
        assert off == 5 if result != 'out' else 5 <= off < 50  # a wrong output spoils the gradients too
        assert ops.path_of(device, torch.float32, 16, needs_grad=True) is not flash_cuda
    finally:
        flash_cuda._unable_on.cache_clear()


def test_forcing_it_upon_a_cpu_or_upon_some_windows_is_an_error(messages, monkeypatch):
    monkeypatch.setattr(ops, 'forced', 'flash_cuda')
    with pytest.raises(ValueError, match='flash_cuda is for CUDA, and the tensors are on cpu: unset it'):
        ops.path_of(torch.device('cpu'), torch.float32, 32)
    with pytest.raises(ValueError, match='flash_cuda takes whole maps, and these are tokens of some windows: unset it'):
        ops.path_of(CUDA, torch.float32, 32, on_map=False)


def test_tokens_of_some_windows_go_another_way_with_the_same_values():
    (qkv, scale, table), windows, _ = operands((1, 5, 6, 4, 2), 2)
    on_map = ops.attention(qkv, scale, table, windows)
    in_order = ops.attention(qkv.flatten(0, 2)[windows.order], scale, table, windows)
    assert error(in_order, on_map.flatten(0, 2)[windows.order]) < 1e-5


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
@pytest.mark.parametrize('reason', [None, 'needs something: install it'])
def test_a_compiler_takes_the_machine_for_a_constant(monkeypatch, reason):
    """It neither looks into what asks for it, nor warns that the answer is kept."""
    torch._dynamo.reset()
    monkeypatch.setattr(flash_cuda, '_unable_on', torch.compiler.disable(lambda *args: reason))

    def call(x):
        return x + (1 if ops.path_of(x.device, x.dtype, 32, needs_grad=True) is flash_cuda else 2)

    compiled = torch.compile(call, backend='eager', fullgraph=True)
    assert compiled(torch.zeros(1, device=DEVICE)) == (1 if reason is None else 2)


# as an operator


def test_a_second_derivative_is_an_error():
    leaves, windows, _ = operands((1, 2, 3, 4, 0))
    leaves = [x.requires_grad_() for x in leaves]
    out = flash_cuda.attention(*leaves, windows)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        first.square().sum().backward()


def test_its_operators_are_what_a_compiler_is_told():
    leaves, _, grad = operands((1, 3, 3, 4, 2), 2)
    tests = 'test_schema', 'test_faketensor'
    torch.library.opcheck(flash_cuda.map_attention, (*leaves, 4, 2), test_utils=tests)
    kept = flash_cuda.map_attention(*leaves, 4, 2)
    torch.library.opcheck(flash_cuda.map_attention_backward, (grad, *leaves, *kept, 4, 2), test_utils=tests)


# on a GPU


@on_gpu
@in_all_dtypes
def test_on_a_gpu_attention_runs_through_it(monkeypatch, dtype):
    (qkv, scale, table), windows, _ = operands((2, 20, 24, 16, 8), 3, 32, dtype)
    expected = flash_cuda.attention(qkv, scale, table, windows)
    calls, attend = [], flash_cuda.attention
    monkeypatch.setattr(flash_cuda, 'attention', lambda *args: calls.append(args) or attend(*args))
    assert torch.equal(ops.attention(qkv, scale, table, windows), expected) and len(calls) == 1


@on_gpu
def test_on_a_gpu_backward_at_window_32_needs_no_memory_for_pairs_of_every_window():
    leaves, windows, grad = operands((2, 128, 128, 32, 16), 4, 32, torch.bfloat16)
    leaves = [x.requires_grad_() for x in leaves]
    out = flash_cuda.attention(*leaves, windows)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(out, leaves, grad)
    needed = torch.cuda.max_memory_allocated() - before
    kept = sum(x.numel() * x.element_size() for x in gradients)
    assert needed < kept + flash_cuda.SCRATCH + 2**25


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_it_runs_on_a_gpu_that_is_not_the_current_one():
    leaves, windows, grad = operands((2, 20, 24, 16, 8), 3, 32, torch.bfloat16)
    expected = values_and_gradients(flash_cuda, leaves, windows, grad)
    leaves = [x.to('cuda:1') for x in leaves]
    actual = values_and_gradients(flash_cuda, leaves, windows, grad.to('cuda:1'))
    assert torch.cuda.current_device() == 0
    assert all(a.device.index == 1 and torch.equal(a.cpu(), e.cpu()) for a, e in strict_zip(actual, expected))


@on_gpu
def test_sanitized_small_case():
    """For compute-sanitizer: every kernel of attention and of the post-norm once."""
    from swinv2_mm.ops import fused_block

    values_and_gradients(flash_cuda, *operands((2, 9, 11, 8, 4), 2, 32, torch.bfloat16))
    x, scale = torch.randn(3, 5, 48, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    branch, weight = x.bfloat16(), torch.ones(48, device=DEVICE)
    out, half = fused_block.post_norm(x, branch, weight, weight, scale, 1e-5, torch.bfloat16)
    results = fused_block.post_norm_backward(out, half, branch, weight, scale, 1e-5)
    torch.cuda.synchronize()
    assert all(result.isfinite().all() for result in results)
