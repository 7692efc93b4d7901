"""Checks at import that the OpenMMLab packages are there and of a version we support."""

from importlib import import_module
from importlib.util import find_spec

_SUPPORTED = {
    'mmengine': ('0.8.0', '1.0.0'),
    'mmcv': ('2.0.0', '3.0.0'),
    'mmdet': ('3.0.0', '4.0.0'),
}


def check_openmmlab() -> None:
    """Import mmengine, mmcv and mmdet.

    Raises:
        ImportError: One is missing, does not import, lacks its compiled operators, or has a
            version outside the supported range; the message names it, the version found and the
            versions supported.
    """
    for name, (least, below) in _SUPPORTED.items():
        supported = f'mmdet_odconv supports {name}>={least},<{below}'
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f'{name} is not installed; {supported}') from error
        except AssertionError as error:
            # mmdet asserts the versions of mmcv and mmengine that it goes with.
            raise ImportError(f'{name} does not import ({error}); {supported}') from error
        found = module.__version__
        if not _numbers(least) <= _numbers(found) < _numbers(below):
            raise ImportError(f'{name} {found} is installed; {supported}')
        if name == 'mmcv' and find_spec('mmcv._ext') is None:
            raise ImportError(
                f'mmcv {found} is installed without its compiled operators (mmcv-lite?), which '
                f'mmdet needs; {supported}'
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.1.0rc1+cpu' to (2, 1, 0)."""
    numbers = []
    for part in version.split('+')[0].split('.')[:3]:
        digits = part[: len(part) - len(part.lstrip('0123456789'))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
