"""What `tools/misc/measure_gpu.py` found, as text and tables for docs/performance.md."""

from __future__ import annotations

import textwrap

from swinv2_tools.benchmark_report import alike, beside_peers, was_measured
from swinv2_tools.kernel_kinds import KERNELS

MODES = {'infer': 'inference', 'train': 'training step'}
DTYPES = {'bf16': 'bfloat16 autocast', 'fp32': 'float32'}
KINDS = [kind for kind, _ in KERNELS]
Setting = tuple  # mode, height and width in pixels, window in tokens, dtype, and whether it is compiled


def markdown(record: dict) -> str:
    """Describe all that was measured, and list what was not.

    Args:
        record (dict): ``machine``, ``minutes``, ``seconds`` and ``parts`` of gpu.json.

    Returns:
        str: Markdown without a heading.
    """
    by_kind = {kind: [part for part in record['parts'] if part['kind'] == kind] for kind in ('rows', 'detector')}
    rows, detectors = (measured(parts) for parts in by_kind.values())
    sections = [_about(record)]
    for dtype, title in DTYPES.items():
        chosen = {setting: results for setting, results in rows.items() if setting[4] == dtype}
        sections += [f'{title}:', _table(chosen)] if chosen else []
    profiled = {setting: _ours(results) for setting, results in rows.items() if 'shares' in (_ours(results) or {})}
    if profiled:
        sections += ['Shares of the time of all kernels of swinv2_mm, by kind of kernel:', _profile(profiled)]
    for setting, results in detectors.items():
        sections.append(_paragraph(f'Mask R-CNN, {_title(setting)}, {setting[4]}: {_cells(results)}.'))
    sections += [_test(part) for part in record['parts'] if part['kind'] == 'test' and not not_measured(part)]
    commands = [part['command'] for parts in by_kind.values() for part in parts if measured([part])]
    if commands:
        sections += ['The commands:', '\n'.join(['```bash', *commands, '```'])]
    missing = [f'- {text}' for part in record['parts'] for text in not_measured(part)]
    if missing:
        sections += ['Not measured:', '\n'.join(missing)]
    return '\n\n'.join(sections) + '\n'


def measured(parts: list[dict]) -> dict[Setting, list[dict]]:
    """The results of all implementations at each setting at which ours was measured."""
    found = {}
    for row in (row for part in parts for row in part.get('rows', ())):
        for compiled in (False, True):
            results = alike(row, compiled)
            if results and was_measured(results[0]):
                r = results[0]
                found[(r['mode'], r['height'], r['width'], r['window'], r['dtype'], compiled)] = results
    return found


def not_measured(part: dict) -> list[str]:
    """What a part should have measured and did not, each with the reason."""
    if part['kind'] == 'test':
        return [] if part['state'] in ('done', 'failed') else [f'{part["title"]}: {part["why"]}']
    found, lines = measured([part]), []
    for setting in map(tuple, part['settings']):
        title = f'{"Mask R-CNN, " * (part["kind"] == "detector")}{_title(setting)}, {setting[4]}'
        for result in found.get(setting, ()):
            if not was_measured(result):
                lines.append(f'{title}, {result["name"]}: {result["skipped"]}')
        if setting not in found:
            lines.append(f'{title}: {_reason(part, setting)}')
    return lines


def _reason(part, setting):
    """Why ours was not measured: what it said, or what became of the part."""
    for row in part.get('rows', ()):
        for result in alike(row, setting[5])[:1]:
            if (result['mode'], result['window']) == (setting[0], setting[3]) and 'skipped' in result:
                return result['skipped']
    return part['why']


def _about(record):
    about = record['machine']
    versions = about['versions']
    peers = ' and '.join(f'{name} {versions[name]}' for name in ('transformers', 'timm') if name in versions)
    libraries = f'torch {versions["torch"]} (CUDA {about["cuda"]})'
    libraries += f' and triton {versions["triton"]}' if 'triton' in versions else ''
    return _paragraph(
        f'An {about["gpu"]}, with Python {versions["python"]}, {libraries}. '
        f'The peers are {peers or "not installed"}. SwinV2-T, batch 2, random weights. A time is the best of twenty '
        'steps, in two turns, between CUDA events: the CPU does not wait between steps, as in a training loop. Memory '
        'is the most that PyTorch had allocated, less what it held before the model was built. "Kernels" counts those '
        'of a step, and "GPU busy" is their time over that of a step, by a profile after the timing. Products of '
        '"Share of GEMM" write attention weights to memory, which a fused kernel does not. All of it took '
        f'{record["seconds"] / 60:.1f} minutes, by `{record["command"]}`.',
    )


def _title(setting):
    mode, height, width, window, _, compiled = setting
    return f'{MODES[mode]} {height}x{width}, window {window}{", compiled" * compiled}'


def _table(rows):
    names = list(dict.fromkeys(r['name'] for results in rows.values() for r in results))
    head = ['Work', *names, 'Speed-up over the fastest peer', 'Memory, relative to the leanest peer']
    lines = [[*head, 'Share of GEMM', 'Kernels', 'GPU busy']]
    for setting, results in rows.items():
        of_name, ours = {r['name']: r for r in results}, results[0]
        beside = beside_peers(results, setting[5])
        line = [_title(setting), *(_cell(of_name.get(name)) for name in names)]
        line += [f'**{beside["faster"]:.2f}x**', f'**{beside["memory"]:.2f}x**'] if beside else ['', '']
        line.append(f'{ours["gemm_share"]:.0%}' if 'gemm_share' in ours else '')
        line += [f'{ours["launches"]:,}', f'{ours["gpu_busy"]:.0%}'] if 'launches' in ours else ['', '']
        lines.append(line)
    return _grid(lines)


def _profile(profiled):
    kinds = [kind for kind in [*KINDS, 'rest'] if any(kind in r['shares'] for r in profiled.values())]
    lines = [['Work', *(kind[0].upper() + kind[1:] for kind in kinds)]]
    for setting, ours in profiled.items():
        shares = [f'{ours["shares"][kind]:.0%}' if kind in ours['shares'] else '' for kind in kinds]
        lines.append([f'{_title(setting)}, {setting[4]}', *shares])
    return _grid(lines)


def _ours(results):
    return results[0] if was_measured(results[0]) else None


def _cells(results):
    return '; '.join(f'{r["name"]} {_cell(r)}' for r in results if was_measured(r))


def _cell(result):
    """Time and memory of an implementation; nothing if it was not measured."""
    if not result or not was_measured(result):
        return ''
    seconds, megabytes = result['best'], result['memory_mb']
    digits = 0 if seconds >= 0.01 else 1
    span = f'{seconds:.2f} s' if seconds >= 1 else f'{1e3 * seconds:.{digits}f} ms'
    return f'{span}, ' + (f'{megabytes / 1e3:.2f} GB' if megabytes >= 1e3 else f'{megabytes:.0f} MB')


def _grid(lines):
    head, *rest = ['| ' + ' | '.join(line) + ' |' for line in lines]
    return '\n'.join([head, '|' + '---|' * len(lines[0]), *rest])


def _test(part):
    said = '; '.join(part['said']) or part['why']
    return _paragraph(f'{part["title"]}, by `{part["command"]}`: {"failed, " * (part["state"] == "failed")}{said}.')


def _paragraph(text):
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
