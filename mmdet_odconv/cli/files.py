"""Files, folders and packages that a tool needs, and what it says where they are missing."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import cv2

from ..safe_running.dataset_checks import not_found

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def require_file(path: str, what: str) -> None:
    """End the program unless ``path`` is a file, or lies elsewhere than on this disk.

    A checkpoint of DeepSpeed is a folder, and the message says how to make a file from it.

    Args:
        path (str): A path; one with a scheme (``https://``, ``torchvision://``, ``s3://``) is
            left to mmengine.
        what (str): What the file is, for the message.

    Raises:
        SystemExit: There is no such file; the message has the path looked for and near names.
    """
    if '://' in path or Path(path).expanduser().is_file():
        return
    if Path(path).is_dir():
        raise SystemExit(f'{path} is a folder, where the {what} should be a file{_inside(path)}')
    raise SystemExit(not_found(path, what))


def _inside(folder: str) -> str:
    """What a folder has that its user may have meant."""
    script = Path(folder) / 'zero_to_fp32.py'
    if script.is_file():
        return (
            f". It is a checkpoint of DeepSpeed; 'python {script} {folder} weights.pth' makes a "
            'file of its weights'
        )
    last = Path(folder) / 'last_checkpoint'
    if last.is_file():
        return f'; is it {os.fsdecode(last.read_bytes()).strip()}?'
    files = sorted(path for path in Path(folder).glob('*.pth') if path.is_file())
    return f'; is it {files[-1]}?' if files else ''


def require_writable(folder: str, what: str, option: str) -> None:
    """Make a folder, and end the program unless files can be written to it.

    Args:
        folder (str): The folder.
        what (str): What it is, for the message.
        option (str): The option that sets another.

    Raises:
        SystemExit: It cannot be made, or not be written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f'the {what} {folder} cannot be written ({error.strerror}); set another by {option}'
        ) from error


def require_new_file(path: str, force: bool) -> None:
    """End the program if writing ``path`` would destroy a file or cannot succeed.

    Args:
        path (str): The file that is to be written.
        force (bool): Whether an existing file may be overwritten.

    Raises:
        SystemExit: The file exists and ``force`` is off, it is a folder, or its own folder does
            not exist or cannot be written to.
    """
    if Path(path).is_dir():
        raise SystemExit(f'{path} is a folder, where a file is to be written')
    if Path(path).exists() and not force:
        raise SystemExit(f'{path} exists; --force overwrites it')
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise SystemExit(f'the folder of {path} does not exist')
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(f'{path} cannot be written ({error.strerror})') from error


def require_packages(*names: str, install: str = '-r requirements/onnx.txt') -> None:
    """End the program unless these optional packages are installed, and say what to install."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SystemExit(f'not installed: {", ".join(missing)}; pip install {install}')


def find_images(path: str) -> list[Path]:
    """The image ``path``, or those in the folder ``path``, in the order of their names.

    Raises:
        SystemExit: There is no such file, no image in the folder, or a file that is not an image.
            A single file is decoded; of the files in a folder the first bytes are read.
    """
    if not Path(path).is_dir():
        require_file(path, 'image')
        if cv2.imread(path) is None:
            raise SystemExit(f'cannot be read as an image: {path}')
        return [Path(path)]
    images = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise SystemExit(f'no image ({", ".join(IMAGE_SUFFIXES)}) in {Path(path).absolute()}')
    for image in images:
        if not cv2.haveImageReader(str(image)):
            raise SystemExit(f'cannot be read as an image: {image}')
    return images
