"""The code of the documentation, run as it is written.

The blocks of a page run in their order, in one process and one folder with the repository's configs
and tools in it. A block with ``title="x.py"`` is written to that file, and read as a config if it
has a ``_base_``. A comment above a block can say why it does not run, ``<!-- not run: reason -->``,
or which packages it needs, ``<!-- needs: onnx, onnxscript -->``.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch.distributed.fsdp
import yaml

from tests.conftest import ROOT

# Pages whose commands take hours or need data sets; their figures say with which they were made.
NOT_RUN = {
    'analysis.md',
    'own_data.md',
    'performance.md',
    'recipes.md',
    'small_objects.md',
    'study.md',
    'zoo.md',
}
# The details of such a page are in the folder of its name.
PAGES = sorted(
    page.as_posix()
    for page in (path.relative_to(ROOT / 'docs') for path in (ROOT / 'docs').rglob('*.md'))
    if page.name not in NOT_RUN and f'{page.parts[0]}.md' not in NOT_RUN
)
BLOCK = re.compile(
    r'(?:<!-- (?P<mark>not run|needs): (?P<what>.+?) -->\n)?'
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    language: str
    title: str | None
    code: str


def blocks(page):
    """The blocks of a page that can run here, and the reasons why others do not."""
    run, left = [], []
    for match in BLOCK.finditer((ROOT / 'docs' / page).read_text()):
        block = Block(match['language'], match['title'], match['code'])
        if block.language not in ('python', 'shell'):
            continue
        missing = []
        if match['mark'] == 'needs':
            missing = [n for n in re.split(r',\s*', match['what']) if find_spec(n) is None]
        if match['mark'] == 'not run':
            left.append(match['what'])
        elif missing:
            left.append(f'not installed: {", ".join(missing)}')
        else:
            run.append(block)
    return run, left


def run(command, folder, **kwargs):
    path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, 'PATH': path, 'PYTHONPATH': str(ROOT)},
        **kwargs,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def folder(tmp_path):
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES)
def test_the_code_of_a_page_runs(page, folder):
    code, left = blocks(page)
    print(*left, sep='\n')
    if not code:
        pytest.skip('; '.join(left) or 'the page has no code')
    script = ['import mmdet_odconv', 'from mmengine.config import Config']
    for block in code:
        assert block.language == 'python', f'{page}: say why this is not run:\n{block.code}'
        if block.title:
            (folder / block.title).write_text(block.code)
            if '_base_' in block.code:
                script.append(f'assert Config.fromfile({block.title!r}).model')
        else:
            script.append(block.code)
    (folder / 'page.py').write_text('\n'.join(script))
    run([sys.executable, 'page.py'], folder)


@pytest.mark.slow
@pytest.mark.skipif('DOCS_CHECK' not in os.environ, reason='half a minute: make docs-check')
def test_the_training_in_shards(folder):
    if not hasattr(torch.distributed.fsdp, 'fully_shard'):
        pytest.skip('torch has no fully_shard')
    script = next(block for block in blocks('distributed.md')[0] if block.title == 'shard.py')
    (folder / script.title).write_text(script.code)
    config = 'configs/odconv/retinanet_od_r18_shapes.py'
    torchrun = ['torchrun', '--standalone', '--nproc-per-node', '2']
    output = run([*torchrun, script.title, config], folder)
    sizes = re.findall(r'rank (\d): (\w+) (\S+) MiB', output)
    assert len(sizes) == 6
    weights = torch.load(folder / 'sharded.pth')['state_dict']
    whole = sum(value.nbytes for value in weights.values()) / 2**20
    for _, what, size in sizes:
        each = whole / 2 if what != 'optimizer' else whole  # AdamW has two moments
        assert float(size) == pytest.approx(each, rel=0.05), what


def test_every_page_is_in_the_navigation():
    # MkDocs has tags of its own in this file, which are not needed here.
    text = re.sub(r'!!\S+', '', (ROOT / 'mkdocs.yml').read_text())
    pages = re.findall(r'[\w/]+\.md', str(yaml.safe_load(text)['nav']))
    assert len(pages) == len(set(pages))
    docs = ROOT / 'docs'
    assert {path.relative_to(docs).as_posix() for path in docs.rglob('*.md')} <= set(pages)
