"""What the benchmark makes of its measurements: derived figures, tables, and the machine that they are of."""

from __future__ import annotations

import os
import statistics
import sys
from importlib import metadata
from pathlib import Path

import torch

from swinv2_tools import peers

DISTRIBUTIONS = ('torch', 'triton', 'mmengine', 'mmcv', 'mmdet', 'transformers', 'timm', 'mmpretrain', 'torchvision')


def summarise(results: list[dict]) -> None:
    """Add the derived figures to each result of a row."""
    bound = next((min(r['seconds']) for r in results if r['name'] == 'gemm' and r['seconds']), None)
    for result in filter(was_measured, results):
        result['best'], result['median'] = min(result['seconds']), statistics.median(result['seconds'])
        result['spread'] = (max(result['seconds']) - result['best']) / result['median']
        result['memory_mb'] = min(result['peak_mb'])
        if 'flops' in result:
            result['tflops'] = result['flops'] / result['best'] / 1e12
        if bound:
            result['gemm_share'] = bound / result['best']
        if 'gpu_seconds' in result:
            result['gpu_busy'] = result['gpu_seconds'] / result['wall']
    for compiled in (False, True):
        first, *rest = alike(results, compiled) or [None]
        for result in filter(was_measured, rest if first and was_measured(first) else []):
            result['times_first'] = result['best'] / first['best']
            result['memory_of_first'] = result['memory_mb'] / first['memory_mb']


def was_measured(result: dict) -> bool:
    return bool(result['seconds'])


def alike(results: list[dict], compiled: bool) -> list[dict]:
    """The implementations of a row that are compiled, or those that are not: ours first, then its peers."""
    return [r for r in results if r['name'] != 'gemm' and bool(r.get('compile')) == compiled]


def beside_peers(results: list[dict], compiled: bool) -> dict | None:
    """Compare ours with its best peers, compiled with compiled.

    Args:
        results (list[dict]): a row after `summarise`.
        compiled (bool): which of them to compare.

    Returns:
        dict, optional: ``faster``, the time of the ``fastest`` peer over ours, and ``memory``, ours over that of the
        ``leanest`` peer; None if ours or all peers were not measured.
    """
    ours, *others = alike(results, compiled) or [dict(seconds=[])]
    others = list(filter(was_measured, others))
    if not was_measured(ours) or not others:
        return None
    fastest, leanest = (min(others, key=lambda r: r[key]) for key in ('best', 'memory_mb'))
    faster, memory = fastest['best'] / ours['best'], ours['memory_mb'] / leanest['memory_mb']
    return dict(faster=faster, fastest=fastest['name'], memory=memory, leanest=leanest['name'])


def table(results: list[dict]) -> str:
    """Format a row of the benchmark: its title, a line for each implementation, and ours beside its best peers."""
    r = results[0]
    title = f'{r["arch"]}, {r["mode"]}, {r["height"]}x{r["width"]}, window {r["window"]}, {r["dtype"]}, {r["device"]}'
    head = f'{"":32}    best   median spread  TFLOP/s  GEMM    memory'
    head += '  launches   GPU busy' if r['device'] == 'cuda' else ''
    lines = [f'{title}, batch {r["batch"]}', f'{head}   time, memory of the first']
    for r in results:
        name = r['name'] + ', compiled' * r['compile']
        if not was_measured(r):
            lines.append(f'{name:32} {r["skipped"]}')
            continue
        lines.append(f'{name:32}{_figures(r)}' + (f'   then: {r["skipped"]}' if 'skipped' in r else ''))
        if r['profile'] and 'shares' in r:
            shares = sorted(r['shares'].items(), key=lambda item: -item[1])
            lines.append('   ' + ', '.join(f'{kind} {share:.0%}' for kind, share in shares))
    for compiled in (False, True):
        beside = beside_peers(results, compiled)
        if beside:
            text = (
                'speed-up over the fastest peer {faster:.2f}x ({fastest}), memory relative to the leanest {memory:.2f}x'
            )
            lines.append('compiled: ' * compiled + (text + ' ({leanest})').format(**beside))
    return '\n'.join(lines)


def _figures(r):
    line = f'{r["best"]:7.3f}s {r["median"]:7.3f}s {r["spread"]:5.0%}'
    line += f' {r["tflops"]:8.3f}' if 'tflops' in r else ' ' * 9
    line += f' {r["gemm_share"]:5.0%}' if 'gemm_share' in r else ' ' * 6
    line += f' {r["memory_mb"]:6.0f} MB' if r['name'] != 'gemm' else ''
    line += f' {r["launches"]:9} {r["gpu_busy"]:10.0%}' if 'gpu_busy' in r else ''
    return line + (f'   {r["times_first"]:.2f}x, {r["memory_of_first"]:.2f}x' if 'times_first' in r else '')


def machine() -> dict:
    """Describe the hardware and the versions of libraries."""
    cpu = 'unknown CPU'
    if Path('/proc/cpuinfo').exists():
        models = [line for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
        cpu = models[0].partition(':')[2].strip() if models else cpu
    versions = {'python': sys.version.split()[0]}
    sys.path.append(str(peers.FOLDER))
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    sys.path.remove(str(peers.FOLDER))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    simd = torch.backends.cpu.get_cpu_capability()
    return dict(cpu=cpu, simd=simd, cores=os.cpu_count(), gpu=gpu, cuda=torch.version.cuda, versions=versions)
