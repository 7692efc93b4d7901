"""What MkDocs cannot do by its own settings for the documentation of this package.

- Files of the repository that are pages too (the changelog, how to contribute, the configs) are
  read from where they are, and links between them and the folder docs lead to the pages.
- Docstrings are brought into the form that mkdocstrings reads, computed ones too.
"""

import inspect
import posixpath
import re
from importlib import import_module
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
    'pretraining.md': 'configs/pretrain/README.md',
}
_LINK = re.compile(r'\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)')
# Several names before one description, and the description with its further lines.
_TOGETHER = re.compile(
    r'^(?P<indent> +)(?P<names>(?:\*{0,2}\w+,\s+)+\*{0,2}\w+)(?P<rest>(?: \([^)\n]*\))?: .*'
    r'(?:\n(?P=indent) +.*)*)$',
    re.MULTILINE,
)
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
    docs = ROOT / 'docs'
    pages |= {path: path.relative_to(docs).as_posix() for path in docs.rglob('*.md')}
    pages[ROOT / 'README.md'] = 'index.md'
    here = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        if '://' in match['target']:
            return match[0]
        target = (folder / match['target']).resolve()
        if target in pages:
            # The sections of the README are other pages here.
            anchor = '' if target.name == 'README.md' else match['anchor'] or ''
            return f'[{match["text"]}]({posixpath.relpath(pages[target], here or ".")}{anchor})'
        outside = ROOT in target.parents and docs not in target.parents
        return f'{match["text"]} (`{target.relative_to(ROOT)}`)' if outside else match[0]

    return _LINK.sub(replaced, markdown)


class Docstrings(griffe.Extension):
    """Brings the docstrings into the form that mkdocstrings reads.

    Sphinx' roles become links, where the page ``api.md`` has what they name, or else code. ``::``
    before code becomes a colon, and arguments that are described together get a line each.
    """

    def __init__(self) -> None:
        text = (ROOT / 'docs/api.md').read_text(encoding='utf-8')
        self.documented = set(re.findall(r'^::: (\S+)$', text, re.MULTILINE))

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of each object that has one."""
        if obj.docstring is not None:
            text = _ROLE.sub(self._link, obj.docstring.value)
            text = re.sub(r'::$', ':', text, flags=re.MULTILINE)
            obj.docstring.value = _TOGETHER.sub(_one_by_one, text)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Give a class that computes its docstring the one that it has."""
        if cls.docstring is None and '__doc__' in cls.members:
            text = inspect.getdoc(getattr(import_module(cls.module.path), cls.name))
            cls.docstring = griffe.Docstring(text or '', parent=cls)
            self.on_instance(obj=cls)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Give the layers the docstring that they share at run time."""
        base = pkg['layers.odconv._ODConvNd']
        for dimensions in (1, 2, 3):
            pkg[f'layers.odconv.ODConv{dimensions}d'].docstring = base.docstring

    def _link(self, match: re.Match[str]) -> str:
        path = match[1].rstrip('()')
        name = path.rpartition('.')[2]
        return f'[`{name}`][{path}]' if path in self.documented else f'`{name}`'


def _one_by_one(match: re.Match[str]) -> str:
    names = re.split(r',\s+', match['names'])
    return '\n'.join(f'{match["indent"]}{name}{match["rest"]}' for name in names)
