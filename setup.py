"""Packaging. `pip install -e .` is the way to work on it, `pip install .` the way to use it."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = 'mmdet_odconv'
# What MIM and mmengine's `mmdet_odconv::` configs look for in the folder .mim of a package.
MIM_PARTS = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Puts the configs and tools into the package: links where editable, copies else."""

    def run(self) -> None:
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for part in MIM_PARTS:
            source = ROOT / part
            if self.editable_mode and self.link(source, target / part):
                continue
            if source.is_dir():
                shutil.copytree(source, target / part, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(source, target / part)

    def link(self, source: Path, link: Path) -> bool:
        """Whether a link could be made; Windows and some network disks have none."""
        try:
            link.symlink_to(source)
        except (NotImplementedError, OSError) as error:
            self.warn(f'{link} is a copy ({error}): install again after you change {source}')
            return False
        return True


def version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / PACKAGE / 'version.py').read_text(encoding='utf-8'), scope)
    return scope['__version__']


def requirements(name: str) -> list[str]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name=PACKAGE,
    version=version(),
    description='Omni-Dimensional Dynamic Convolution for MMDetection',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords=['object detection', 'dynamic convolution', 'ODConv', 'MMDetection', 'OpenMMLab'],
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    package_data={PACKAGE: ['py.typed']},
    python_requires='>=3.10',
    install_requires=requirements('runtime'),
    extras_require={
        'deploy': [*requirements('onnx'), *requirements('deploy')],
        'mim': requirements('mminstall'),
        'pretrain': requirements('pretrain'),
        'tests': requirements('tests'),
    },
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
