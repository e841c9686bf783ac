"""Write the table of docs/recipes.md from configs/metafile.yml: ``python docs/list_recipes.py``."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
METAFILE, PAGE = ROOT / 'configs/metafile.yml', ROOT / 'docs/recipes.md'
BEGIN, END = '<!-- table of docs/list_recipes.py -->\n', '<!-- end of table -->\n'


def page() -> str:
    """The text of docs/recipes.md with the table that the metafile says."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + table(yaml.safe_load(METAFILE.read_text())['Models']) + END + after


def table(models: list[dict]) -> str:
    """One row per method, tasks, data and schedule, with a link to each recipe; front doors are bold."""
    rows: dict[tuple, list[tuple]] = {}
    for model in models:
        about = model['Metadata']
        schedule = f'{about["Epochs"]} epochs' if 'Epochs' in about else f'{about["Iterations"]:,} iterations'
        tasks = ', '.join(task.lower() for task in model['Tasks'])
        row = (model['In Collection'], tasks, about['Training Data'], schedule)
        size, window = about['Architecture'][0][-1], about['Window Size']
        sharded = ' sharded' * ('FSDP' in about['Training Techniques'])
        link = f'[{size} {window}{sharded}](../{model["Config"]})'
        is_front_door = model['Config'].count('/') == 1
        link = f'**{link}**' if is_front_door else link
        rows.setdefault(row, []).append(('TSBLHG'.index(size), window, sharded, link))
    lines = ['| Method | Tasks | Data | Schedule | Size and window |', '|---|---|---|---|---|']
    for row in sorted(rows):
        links = ', '.join(link for *_, link in sorted(rows[row]))
        lines.append(f'| {" | ".join(row)} | {links} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    PAGE.write_text(page())
