"""Links between the pages, and from pages to files and pictures, lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md'))]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#+ (.*)', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)]+)\)', prose(page)):
        target, _, anchor = link.partition('#')
        if target.startswith('https:'):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f'{page.name} links to {link}'
        assert not anchor or anchor in anchors(path), f'{page.name} links to {link}'


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / 'README.md']
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = (link.partition('#')[0] for link in re.findall(r'\]\(([^)]+\.md[^)]*)\)', prose(page)))
        waiting += {(page.parent / link).resolve() for link in links} - reached
    assert set(PAGES) - {ROOT / 'CHANGELOG.md'} <= reached
