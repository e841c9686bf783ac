"""docs/architecture.md against the code: its list of files, the order of imports, the shapes of maps."""

import ast
import re
from pathlib import Path

import pytest
import torch

from swinv2_mm import SwinTransformerV2

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'swinv2_mm'
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py'))


def section(title):
    page = (ROOT / 'docs/architecture.md').read_text()
    return re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', page, re.DOTALL | re.MULTILINE)[1]


def levels():
    """The level of each file and folder in the page's list of imports: a line may import from lower levels alone."""
    lines = re.findall(r'^\d+\. (.*)', section('Which way imports go'), re.MULTILINE)
    names = [(level, re.findall(r'`([\w/.]+)`', line)) for level, line in enumerate(lines)]
    return {name: level for level, of_line in names for name in of_line}


def entry(*parts):
    """What the page calls a module of the package, by the parts of its name: a file, or the folder that holds it."""
    if parts and (PACKAGE / parts[0]).is_dir():
        return f'{parts[0]}/'
    return f'{parts[0]}.py' if parts and (PACKAGE / f'{parts[0]}.py').exists() else '__init__.py'


def imports(path):
    """Absolute names, as lists of their parts, of all that a file of the package imports."""
    package = ['swinv2_mm', *path.split('/')[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.') for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            start += node.module.split('.') if node.module else []
            yield from ([*start, alias.name] for alias in node.names)


def test_the_list_of_imports_has_every_file_and_folder_once():
    listed = re.findall(r'^\d+\. (.*)', section('Which way imports go'), re.MULTILINE)
    names = [name for line in listed for name in re.findall(r'`([\w/.]+)`', line)]
    assert sorted(names) == sorted({entry(*path.removesuffix('.py').split('/')) for path in FILES})


@pytest.mark.parametrize('path', FILES)
def test_imports_go_the_way_that_the_page_says(path):
    level, own = levels(), entry(*path.removesuffix('.py').split('/'))
    for package, *parts in imports(path):
        assert package not in ('tools', 'swinv2_tools', 'tests'), f'{path} imports {package}'
        if package == 'swinv2_mm' and entry(*parts) != own:
            assert level[entry(*parts)] < level[own], f'{path} imports {".".join(parts)}'


def test_the_page_names_every_file_and_no_other():
    named, folder = set(), ''
    for line in section('Which file does what').splitlines():
        heading = re.match(r'`(?:swinv2_mm/)?([\w/]*)`', line)
        folder = heading[1] if heading else folder
        row = re.match(r'\| `([\w/]+\.py)`', line)
        named |= {f'{folder}{row[1]}'} if row else set()
    assert named == {path for path in FILES if path == '__init__.py' or not is_empty_package(path)}


def is_empty_package(path):
    """Whether a file makes a folder a package and does nothing else."""
    body = ast.parse((PACKAGE / path).read_text()).body
    return path.endswith('/__init__.py') and all(isinstance(node, ast.Expr) for node in body)


def test_maps_have_the_shapes_that_the_page_says():
    life = section('The life of an image')
    assert 'An image (B, 3, 800, 1333)' in life
    rows = re.findall(r'^\| (\d) \| `(\w+)` \| \(B, ([\d, ]+)\) \| \(B, ([\d, ]+)\) \|', life, re.MULTILINE)
    assert [int(stage) for stage, *_ in rows] == [0, 1, 2, 3]
    arch = dict(embed_dims=96, depths=(1, 1, 1, 1), num_heads=(3, 6, 12, 24))  # SwinV2-T with fewer blocks
    backbone = SwinTransformerV2(arch, window_size=16).eval()
    entrances = [backbone.patch_embed, *(stage.downsample for stage in backbone.layers)]
    seen = []
    for module in (layer for pair in zip(entrances, backbone.layers) for layer in pair):
        module.register_forward_hook(lambda module, args, out: seen.append((type(module).__name__, tuple(out.shape))))
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 800, 1333))
    shapes = [tuple((1, *map(int, shape.split(', '))) for shape in row[2:]) for row in rows]
    assert seen == [pair for row, (inside, _) in zip(rows, shapes) for pair in ((row[1], inside), ('Stage', inside))]
    assert [tuple(x.shape) for x in maps] == [returned for _, returned in shapes]


def test_the_two_lines_of_a_block_are_those_of_the_code():
    lines = re.search(r'```python\n(.*?)```', section('The life of an image'), re.DOTALL)[1].splitlines()
    code = [line.strip() for line in (PACKAGE / 'blocks.py').read_text().splitlines()]
    assert len(lines) == 2
    assert code[code.index(lines[0]) + 1] == lines[1]


def test_names_on_the_page_exist():
    """Classes, functions and constants in backticks; files are tested above."""
    text = section('The life of an image') + section('Where to add what')
    names = {name for name in re.findall(r'`([A-Za-z_]\w*(?:\.[a-z]\w*)?)`', text) if not name.endswith('.py')}
    sources = [ast.parse((PACKAGE / path).read_text()) for path in FILES]
    nodes = [node for source in sources for node in ast.walk(source)]
    defined = {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.arg for node in nodes if isinstance(node, ast.arg)
    }
    assert {name for name in names if not set(name.split('.')) <= defined} == set()
