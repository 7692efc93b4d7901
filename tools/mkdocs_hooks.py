"""What MkDocs cannot do by its own settings for the documentation of this package.

- Files of the repository that are pages too (the changelog, how to contribute, the configs) are
  read from where they are, and links between them and the folder docs lead to the pages.
- Sphinx' roles in docstrings, such as ``:func:`x```, become links that mkdocstrings understands.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages made of files outside of docs.
PAGES = {
    'changelog.md': 'CHANGELOG.md',
    'configs.md': 'configs/odconv/README.md',
    'contributing.md': 'CONTRIBUTING.md',
}
_LINK = re.compile(r'\]\(([^)#\s]+)(#[^)\s]*)?\)')
_ROLE = re.compile(r':\w+:`~?([^`]+)`')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of other files of the repository."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **kwargs: Any) -> str:
    """Let links to files of the repository lead to their pages, if they have one."""
    folder = (ROOT / PAGES.get(page.file.src_uri, f'docs/{page.file.src_uri}')).parent
    pages = {(ROOT / path).resolve(): name for name, path in PAGES.items()}
    pages |= {path: path.name for path in (ROOT / 'docs').glob('*.md')}
    pages[ROOT / 'README.md'] = 'index.md'

    def replaced(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        if target in pages:
            # The sections of the README are other pages here.
            anchor = '' if target.name == 'README.md' else match[2] or ''
            return f']({pages[target]}{anchor})'
        if ROOT in target.parents and target.exists() and ROOT / 'docs' not in target.parents:
            return f'] (`{target.relative_to(ROOT)}`)'
        return match[0]

    return _LINK.sub(replaced, markdown)


class SphinxRoles(griffe.Extension):
    """Turns Sphinx' roles into links of mkdocstrings, and ``::`` before code into a colon."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of each object that has one."""
        if obj.docstring is not None:
            text = _ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = re.sub(r'::$', ':', text, flags=re.MULTILINE)


def _link(match: re.Match[str]) -> str:
    """The name that a role shows, as code; where it has its full path, as a link to it."""
    path = match[1].rstrip('()')
    return f'[`{path.rpartition(".")[2]}`][{path}]' if path.count('.') else f'`{path}`'
