"""Which part of the package may import which: data goes one way, from the maths to the tools."""

import ast
import itertools
import subprocess
import sys

from tests.conftest import ROOT

PACKAGE = ROOT / 'mmdet_odconv'
# What any part may import, and which itself imports none of them.
FOUNDATION = ['_checks', 'compat', 'version', 'safe_running']
# Each wing may import those of the lines before its own.
ORDER = [
    ['functional'],
    ['layers'],
    ['backbones', 'conversion'],
    ['analysis'],
    ['training', 'deployment'],
    ['cli'],
]


def wing_of(path):
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def imported_wings(path):
    """The wings, of its own package, that a module imports anywhere in its code."""
    package = ['mmdet_odconv', *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = '.'.join([*start, *(node.module or '').split('.')]).rstrip('.')
            names = [f'{module}.{alias.name}' for alias in node.names]
        for name in names:
            parts = name.split('.')
            if parts[0] == 'mmdet_odconv':
                yield parts[1]


MODULES = sorted({*PACKAGE.glob('**/*.py')} - {PACKAGE / '__init__.py'})


def allowed(wing):
    """What the modules of a wing may import."""
    if wing in FOUNDATION:
        return {wing, '_checks', 'compat'}
    below = itertools.takewhile(lambda line: wing not in line, ORDER)
    return {wing, *FOUNDATION, *itertools.chain(*below)}


def test_a_wing_imports_only_those_below_it():
    wrong = {str(path): {*imported_wings(path)} - allowed(wing_of(path)) for path in MODULES}
    assert not {name: wings for name, wings in wrong.items() if wings}


def test_every_wing_has_its_place():
    wings = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').exists()}
    assert wings <= {*FOUNDATION, *itertools.chain(*ORDER)}


def test_safe_running_is_imported_without_the_rest():
    code = (
        'import sys, types\n'
        f'package = types.ModuleType("mmdet_odconv"); package.__path__ = [{str(PACKAGE)!r}]\n'
        'sys.modules["mmdet_odconv"] = package\n'
        'import mmdet_odconv.safe_running as wing\n'
        'assert all(hasattr(wing, name) for name in wing.__all__)\n'
        'print(*{name.split(".")[1] for name in sys.modules if name.startswith("mmdet_odconv.")})\n'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == {'safe_running', '_checks', 'compat'}
