"""What must be true of the data sets of a config before a run; mmdet itself often says nothing."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.logging import print_log
from PIL import Image

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Reading COCO's own annotations takes mmdet half a minute, which is not to be spent twice.
_MOST_BYTES = 50_000_000
# The share of odd entries up to which there is only a warning, because mmdet leaves them out.
_MANY = 0.2
_ORIENTATION = 0x0112  # of EXIF; with more than 4, mmcv turns the image by a quarter


def require_datasets(config: Config, dataloaders: Sequence[str] = DATALOADERS) -> None:
    """End the program unless the data sets are there and have the classes of the detector.

    Args:
        config (Config): A whole config.
        dataloaders (Sequence[str]): The data loaders to look at. Default: all three.

    Raises:
        SystemExit: A file is missing, broken or empty, the classes are not those of the
            annotation file in its order, a head has another number of classes, or training and
            validation have each other's files. Or a good part of the boxes, sizes or categories
            cannot be right; if it is a small part, which mmdet leaves out, there is a warning.
    """
    _require_order(config)
    for name in dataloaders:
        datasets = list(_datasets(config.get(name), name))
        for key, dataset in datasets:
            _require_files(key, dataset)
            if _is_coco(dataset):
                classes = _classes(key, dataset)
                for head, number in _class_numbers(config.get('model'), 'model'):
                    if classes is not None and number != len(classes):
                        raise SystemExit(
                            f'{head}.num_classes is {number}, but {key} has {_counted(classes)}; '
                            f'set {head}.num_classes, or the names in {key}.metainfo.classes'
                        )
                _require_annotations(key, dataset, classes, training=name == DATALOADERS[0])
        if name != DATALOADERS[0]:
            _require_evaluator(config, name.replace('dataloader', 'evaluator'), datasets)


def not_found(path: str, what: str) -> str:
    """A sentence that says where a file or folder was looked for."""
    relative = '' if Path(path).is_absolute() else f' (looked for {Path(path).absolute()})'
    return f'{what} not found: {path}{relative}'


def _datasets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The data-set configs with files of their own in a data-loader config, wrapped ones too.

    Each comes with its dotted key.
    """
    if isinstance(node, dict):
        inner = [child for child in ('dataset', 'datasets') if child in node]
        for child in inner:
            yield from _datasets(node[child], f'{key}.{child}')
        # With a file backend of its own (an object store, say) the files are not on this disk.
        own_files = not inner and (node.get('ann_file') or node.get('data_root'))
        if own_files and not node.get('backend_args'):
            yield key, node
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _datasets(item, f'{key}.{i}')


def _kind(dataset: Any) -> Any:
    """The class of a data set, which a config has as its name, and a Python config as itself."""
    kind = dataset.get('type')
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _is_coco(dataset: Any) -> bool:
    """Whether a data set is read from one file in COCO's format."""
    kind, file = _kind(dataset), dataset.get('ann_file')
    return isinstance(kind, type) and issubclass(kind, CocoDataset) and bool(file)


def _full(dataset: Any, path: str) -> str:
    return os.path.join(dataset.get('data_root') or '', path)


def _require_order(config: Config) -> None:
    """End the program where training and validation read each other's annotations."""
    names = [
        [Path(d['ann_file']).name for _, d in _datasets(config.get(key), key) if d.get('ann_file')]
        for key in DATALOADERS[:2]
    ]
    of_train, of_val = ({('train' in n, 'val' in n) for n in each} for each in names)
    if of_train == {(False, True)} and of_val == {(True, False)}:
        raise SystemExit(
            f'train_dataloader reads {names[0][0]} and val_dataloader {names[1][0]}: are the two '
            'the wrong way round?'
        )


def _require_files(key: str, dataset: Any) -> None:
    prefix = dataset.get('data_prefix') or {}
    folders = [prefix] if isinstance(prefix, str) else list(prefix.values())
    # An annotation file or folder with a path of its own does not need the root.
    wanted = [('annotation file', dataset.get('ann_file')), *(('image folder', f) for f in folders)]
    if not any(path for _, path in wanted):
        wanted = [('data_root', '.')]
    for what, path in wanted:
        full = os.path.normpath(_full(dataset, path)) if path else ''
        if full and '://' not in _full(dataset, path) and not os.path.exists(full):
            raise SystemExit(
                f'{not_found(full, f"{what} of {key}")}; put the data there, or set data_root, '
                f'ann_file and data_prefix of {key} (docs/own_data.md)'
            )


def _classes(key: str, dataset: Any) -> list[str] | None:
    """The names of the classes as mmdet will take them; None where there are none."""
    metainfo = {**_kind(dataset).METAINFO, **(dataset.get('metainfo') or {})}
    classes = metainfo.get('thing_classes') or metainfo.get('classes')
    if classes is None:
        return None
    if isinstance(classes, str) and os.path.isfile(classes):
        classes = list_from_file(classes)
    names = list(classes)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SystemExit(f'{key}.metainfo.classes has {twice!r} more than once')
    return names


def _class_numbers(model: Any, key: str) -> Iterator[tuple[str, int]]:
    """The ``num_classes`` of the box heads in a model's config, with the keys of the heads."""
    if isinstance(model, (list, tuple)):
        for i, item in enumerate(model):
            yield from _class_numbers(item, f'{key}.{i}')
    # Detectors that read text have an output for each word, not for each class.
    elif isinstance(model, dict) and 'language_model' not in model:
        if '.bbox_head' in key and 'num_classes' in model:
            yield key, model['num_classes']
        else:
            for name, child in model.items():
                yield from _class_numbers(child, f'{key}.{name}')


def _require_evaluator(config: Config, key: str, datasets: list[tuple[str, Any]]) -> None:
    """Let the evaluators read annotations that are there, best those of the images they judge."""
    evaluators = config.get(key) or []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        path = evaluator.get('ann_file')
        if not path or '://' in path or evaluator.get('backend_args'):
            continue
        if not os.path.isfile(path):
            raise SystemExit(f'{not_found(path, f"annotation file of {key}")}; set {key}.ann_file')
        for name, dataset in datasets if len(datasets) == 1 else []:
            own = _full(dataset, dataset.get('ann_file') or '')
            if _is_coco(dataset) and os.path.isfile(own) and not os.path.samefile(own, path):
                _refuse(
                    f'{key} judges by {path}, but {name} reads {own}: where the two have other '
                    'images, there is no AP, or one that is too low',
                    False,
                )


def _require_annotations(key: str, dataset: Any, classes: list[str] | None, training: bool) -> None:
    """Look into the annotation file, unless it is a large one with the classes of its type."""
    path = _full(dataset, dataset.ann_file)
    own = dataset.get('metainfo')
    if not os.path.isfile(path) or (not own and os.path.getsize(path) > _MOST_BYTES):
        return
    where = f'{path}, the annotation file of {key},'
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        raise SystemExit(f'{where} is not JSON: {error}') from error
    needed = ('images', 'categories', 'annotations') if training else ('images', 'categories')
    for name in needed:
        if not isinstance(content, dict) or not content.get(name):
            raise SystemExit(f"{where} has no {name}, which a file in COCO's format has")
    try:
        categories = [category['name'] for category in content['categories']]
        files = [image.get('file_name') for image in content['images']]  # LVIS has none
        _require_objects(where, content)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise SystemExit(f"{where} is not in COCO's format: {error!r}") from error
    for name in (classes or []) if own else []:
        if name not in categories:
            raise SystemExit(
                f'{key}.metainfo.classes has {name!r}, but {path} has {_counted(categories)}'
            )
    ordered = [name for name in categories if name in (classes or ())]
    if own and ordered != classes and _kind(dataset).load_data_list is CocoDataset.load_data_list:
        raise SystemExit(
            f'{key}.metainfo.classes must have the order of {path}, because MMDetection numbers '
            f'the labels by the file: classes={tuple(ordered)}'
        )
    prefix = dataset.get('data_prefix') or {}
    folder = _full(dataset, prefix if isinstance(prefix, str) else prefix.get('img') or '')
    paths = [os.path.join(folder, file or '') for file in files] if '://' not in folder else []
    missing = [image for image in paths if not os.path.exists(image)]
    if missing:
        raise SystemExit(
            f'{not_found(missing[0], f"image of {key}")}; {len(missing)} of the {len(paths)} '
            f'images in {path} are missing: set {key}.data_prefix.img to their folder, or leave '
            'them out'
        )
    empty = [path for path in paths if not os.path.getsize(path)]
    if empty:
        raise SystemExit(f'{empty[0]} is empty, where an image should be ({len(empty)} such files)')
    _require_sizes(where, content['images'], paths)


def _require_objects(where: str, content: dict[str, Any]) -> None:
    """Look for categories that are none, and boxes that are no x, y, width, height in pixels."""
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    # Those of a panoptic segmentation have the objects of a whole image each.
    objects = [
        {'image_id': entry['image_id'], **part}
        for entry in content.get('annotations') or []
        for part in entry.get('segments_info', [entry])
    ]
    boxes = [(o['bbox'], sizes[o['image_id']]) for o in objects if o['image_id'] in sizes]
    if objects and not boxes:
        raise SystemExit(
            f'{where} has no annotation whose image_id is that of one of its images: the first '
            f'has {objects[0]["image_id"]}'
        )
    ids = {category['id'] for category in content['categories']}
    wrong = [entry['category_id'] for entry in objects if entry['category_id'] not in ids]
    if wrong:
        too_low = {entry['category_id'] + 1 for entry in objects} <= ids
        _refuse(
            f'{where} has {len(wrong)} of {len(objects)} annotations without a category, '
            f'as the one with category_id {wrong[0]}'
            + '; are all these ids one too low?'
            * too_low,
            too_low or len(wrong) > _MANY * len(objects),
        )
    if boxes and all(max(box) <= 1 for box, _ in boxes):
        raise SystemExit(
            f'{where} has its {len(boxes)} boxes as fractions of the images, such as '
            f'{boxes[0][0]}, where pixels are due'
        )
    outside = [(b, s) for b, s in boxes if b[0] + b[2] > s[0] + 1 or b[1] + b[3] > s[1] + 1]
    if outside:
        box, (width, height) = outside[0]
        as_corners = all(b[2] > b[0] and b[3] > b[1] for b, _ in boxes)
        _refuse(
            f'{where} has {len(outside)} of {len(boxes)} boxes that end outside of their images, '
            f'such as {box} in one of {width}x{height} pixels'
            + '; are they x1, y1, x2, y2, where x, y, width, height are due?'
            * as_corners,
            as_corners or len(outside) > _MANY * len(boxes),
        )


def _require_sizes(where: str, images: list[dict[str, Any]], paths: list[str]) -> None:
    """Compare the sizes of some images with those in their files."""
    step = max(len(images) // 50, 1)
    seen, wrong = 0, []
    for image, path in [*zip(images, paths, strict=False)][::step]:
        try:
            with Image.open(path) as file:
                size = file.size[:: -1 if file.getexif().get(_ORIENTATION, 1) > 4 else 1]
        except (OSError, Image.DecompressionBombError):  # no image, which others complain of
            continue
        seen += 1
        if size != (image['width'], image['height']):
            wrong.append((path, size, (image['width'], image['height'])))
    if wrong:
        path, size, given = wrong[0]
        swapped = all(size == given[::-1] for _, size, given in wrong)
        _refuse(
            f'{where} has other sizes than {len(wrong)} of {seen} images looked at: {path} has '
            f'{size[0]}x{size[1]} pixels, and the file says {given[0]}x{given[1]}'
            + '; are width and height swapped?'
            * swapped,
            len(wrong) > _MANY * seen,
        )


def _refuse(complaint: str, end: bool) -> None:
    """End the program, or only warn."""
    if end:
        raise SystemExit(complaint)
    print_log(f'{complaint}.', logger='current', level=logging.WARNING)


def _counted(names: Sequence[str]) -> str:
    shown = ', '.join(names[:5]) + (', …' if len(names) > 5 else '')
    return f'{len(names)} classes ({shown})'
