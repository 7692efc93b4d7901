import copy
import json
import re

import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from PIL import Image

from mmdet_odconv.safe_running import dataset_checks as module
from mmdet_odconv.safe_running import require_datasets


def dataset_config(root):
    dataset = dict(data_root=str(root), ann_file='train.json', data_prefix=dict(img='images/'))
    return Config(dict(train_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize('missing', ['train.json', 'images'])
def test_a_missing_data_set_is_named_with_the_path_looked_for(tmp_path, missing):
    (tmp_path / 'train.json').write_text(json.dumps({}))
    (tmp_path / 'images').mkdir()
    require_datasets(dataset_config(tmp_path))
    target = tmp_path / missing
    target.rmdir() if target.is_dir() else target.unlink()
    with pytest.raises(SystemExit) as error:
        require_datasets(dataset_config(tmp_path))
    assert f'of train_dataloader.dataset not found: {target}' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda d: dict(type='RepeatDataset', times=2, dataset=d),
        lambda d: dict(type='ConcatDataset', datasets=[d]),
        lambda d: dict(type='MultiImageMixDataset', dataset=dict(type='Repeat', dataset=d)),
    ],
)
def test_wrapped_data_sets_are_looked_into(tmp_path, wrap):
    config = dataset_config(tmp_path)
    config.train_dataloader.dataset = wrap(config.train_dataloader.dataset)
    with pytest.raises(SystemExit, match=r'train\.json') as error:
        require_datasets(config)
    key = re.search(r'set data_root, .* of (\S+) ', str(error.value))[1]
    node = config
    for part in key.split('.'):
        node = node[int(part) if part.isdigit() else part]
    assert node.ann_file == 'train.json'
    require_datasets(config, ('val_dataloader',))


def coco_content():
    return dict(
        images=[dict(id=1, file_name='1.jpg', width=64, height=64)],
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 8, 8], area=64)],
    )


def config_with_classes(folder, classes, number):
    (folder / 'images').mkdir()
    Image.new('RGB', (64, 64)).save(folder / 'images/1.jpg')
    (folder / 'train.json').write_text(json.dumps(coco_content()))
    config = dataset_config(folder)
    dataset = config.train_dataloader.dataset
    dataset.type = 'CocoDataset'
    if classes:
        dataset.metainfo = dict(classes=classes)
    config.model = dict(roi_head=dict(bbox_head=[dict(num_classes=number)]))
    return config


@pytest.mark.parametrize(
    ('classes', 'number', 'message'),
    [
        (('cat', 'dog'), 80, r'bbox_head\.0\.num_classes is 80, but \S+\.dataset has 2 classes'),
        (None, 2, r'num_classes is 2, but \S+\.dataset has 80 classes \(person, '),
        (('cat', 'dgo'), 2, r"\.classes has 'dgo', but \S+train\.json has 2 classes \(cat, dog\)"),
    ],
)
def test_classes_that_mmdet_would_leave_out_are_named(tmp_path, classes, number, message):
    with pytest.raises(SystemExit, match=message):
        require_datasets(config_with_classes(tmp_path, classes, number))


def test_classes_that_fit_are_accepted(tmp_path):
    require_datasets(config_with_classes(tmp_path, ('cat', 'dog'), 2))


def test_a_python_config_is_looked_into_as_well(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dgo'), 2)
    config.train_dataloader.dataset.type = CocoDataset
    with pytest.raises(SystemExit, match=r"has 'dgo', but \S+train\.json has 2 classes"):
        require_datasets(config)
    config.train_dataloader.dataset.metainfo.classes = ('cat', 'dog')
    config.model.roi_head.bbox_head[0].num_classes = 3
    with pytest.raises(SystemExit, match='num_classes is 3'):
        require_datasets(config)


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('dog', 'cat'), r"must have the order of \S+train.json, .*: classes=\('cat', 'dog'\)$"),
        (('cat', 'cat'), "has 'cat' more than once"),
    ],
)
def test_classes_in_another_order_or_twice_are_named(tmp_path, classes, message):
    with pytest.raises(SystemExit, match=message):
        require_datasets(config_with_classes(tmp_path, classes, 2))


def test_a_part_of_the_classes_is_accepted(tmp_path):
    require_datasets(config_with_classes(tmp_path, ('dog',), 1))


def test_training_on_what_is_called_validation_is_named(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    config.val_dataloader = copy.deepcopy(config.train_dataloader)
    (tmp_path / 'train.json').rename(tmp_path / 'instances_val.json')
    config.train_dataloader.dataset.ann_file = 'trainval.json'
    (tmp_path / 'instances_val.json').rename(tmp_path / 'trainval.json')
    (tmp_path / 'train.json').write_text((tmp_path / 'trainval.json').read_text())
    require_datasets(config)
    (tmp_path / 'trainval.json').rename(tmp_path / 'instances_val.json')
    config.train_dataloader.dataset.ann_file = 'instances_val.json'
    with pytest.raises(
        SystemExit, match=r'reads instances_val\.json and val_dataloader train\.json'
    ):
        require_datasets(config)


def with_boxes(folder, boxes, size=(64, 48), categories=(1,)):
    """A config whose file has an image of 64 x 48 pixels for each of these boxes."""
    config = config_with_classes(folder, ('cat', 'dog'), 2)
    content = coco_content()
    content['images'], content['annotations'] = [], []
    for i, box in enumerate(boxes, 1):
        width, height = size
        content['images'].append(dict(id=i, file_name=f'{i}.jpg', width=width, height=height))
        category = categories[i % len(categories)]
        content['annotations'].append(
            dict(id=i, image_id=i, category_id=category, bbox=box, area=64)
        )
        Image.new('RGB', (64, 48)).save(folder / f'images/{i}.jpg')
    (folder / 'train.json').write_text(json.dumps(content))
    return config


BOXES = [[40, 30, 20, 10], [0, 0, 64, 48], [1, 2, 3, 4], [30, 20, 10, 10]] * 3


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        (
            lambda x, y, w, h: [x, y, x + w, y + h],
            {},
            r'has 6 of 12 boxes that end outside .*\[40, 30, 60, 40\] .*64x48 .*are they x1, y1,',
        ),
        (
            lambda x, y, w, h: [2 * x, 2 * y, 2 * w, 2 * h],
            {},
            'has 9 of 12 boxes that end outside of their images',
        ),
        (
            lambda x, y, w, h: [x / 64, y / 48, w / 64, h / 48],
            {},
            'has its 12 boxes as fractions of the images, such as',
        ),
        (
            lambda *box: [v / 2 for v in box],
            dict(size=(48, 64)),
            r'than 12 of 12 images looked at: \S+1.jpg has 64x48 .* 48x64; are width and height',
        ),
        (
            lambda *box: list(box),
            dict(categories=(0, 1, 1, 1, 1, 1)),
            'has 2 of 12 annotations without a category, .*category_id 0; are all .* one too low',
        ),
        (
            lambda *box: list(box),
            dict(categories=(7, 2, 2)),
            'has 4 of 12 annotations without a category, as the one with category_id 7$',
        ),
    ],
)
def test_boxes_sizes_and_categories_that_cannot_be_right_are_counted(
    tmp_path, change, options, message
):
    config = with_boxes(tmp_path, [change(*box) for box in BOXES], **options)
    with pytest.raises(SystemExit, match=message):
        require_datasets(config)


def test_a_few_odd_boxes_are_warned_of(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module, 'print_log', lambda message, **_: said.append(message))
    require_datasets(with_boxes(tmp_path, BOXES))
    assert said == []
    (tmp_path / 'other').mkdir()
    require_datasets(with_boxes(tmp_path / 'other', [*BOXES, [60, 0, 9, 9]]))
    (message,) = said
    assert 'has 1 of 13 boxes that end outside' in message


def test_images_that_their_exif_turns_have_the_size_that_mmcv_reads(tmp_path):
    config = with_boxes(tmp_path, [[0, 0, 9, 9]], size=(48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (64, 48)).save(tmp_path / 'images/1.jpg', exif=exif)
    require_datasets(config)


def test_a_panoptic_file_has_its_objects_in_segments(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    content = coco_content()
    content['annotations'] = [
        dict(
            image_id=1,
            file_name='1.png',
            segments_info=[dict(id=3, category_id=1, bbox=[0, 0, 8, 8], area=64, iscrowd=0)],
        )
    ]
    (tmp_path / 'train.json').write_text(json.dumps(content))
    dataset = config.train_dataloader.dataset
    dataset.type = 'CocoPanopticDataset'
    dataset.metainfo = dict(classes=('cat', 'dog'), thing_classes=('cat', 'dog'), stuff_classes=())
    require_datasets(config)
    content['annotations'][0]['segments_info'][0].pop('bbox')
    (tmp_path / 'train.json').write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"is not in COCO's format: KeyError\('bbox'\)"):
        require_datasets(config)


def test_the_classes_may_be_the_lines_of_a_file(tmp_path):
    (tmp_path / 'classes.txt').write_text('cat\ndog\n')
    require_datasets(config_with_classes(tmp_path, str(tmp_path / 'classes.txt'), 2))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda text: '', 'is not JSON'),
        (lambda text: text[: len(text) // 2], 'is not JSON'),
        (lambda text: '[]', 'has no images'),
        (lambda text: json.dumps(coco_content() | dict(images=[])), 'has no images'),
        (lambda text: json.dumps(coco_content() | dict(annotations=[])), 'has no annotations'),
        (lambda text: json.dumps(coco_content() | dict(categories=[1])), "is not in COCO's format"),
        (lambda text: text.replace('"bbox"', '"box"'), r'.* format: .*bbox'),
        (lambda text: text.replace('"width"', '"w"'), r'.* format: .*width'),
        (lambda text: text.replace('"image_id": 1', '"image_id": 7'), '.* image_id .* first has 7'),
        (
            lambda text: text.replace('"category_id": 1', '"category_id": 0'),
            'has 1 of 1 annotations without a category, .*category_id 0; are all these ids one',
        ),
    ],
)
def test_a_broken_or_empty_annotation_file_is_named(tmp_path, change, message):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    path = tmp_path / 'train.json'
    path.write_text(change(path.read_text()))
    with pytest.raises(SystemExit, match=rf'^{path}, the annotation file of \S+, {message}'):
        require_datasets(config)


def test_images_in_another_folder_are_named(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    (tmp_path / 'images/1.jpg').unlink()
    with pytest.raises(
        SystemExit, match=rf'image of \S+ not found: {tmp_path}/images/1.*; 1 of the 1'
    ):
        require_datasets(config)


def test_an_empty_image_is_named(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    (tmp_path / 'images/1.jpg').write_bytes(b'')
    with pytest.raises(SystemExit, match=r'^\S+images/1\.jpg is empty, where an image should be'):
        require_datasets(config)


def test_only_training_needs_annotations(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    (tmp_path / 'train.json').write_text(json.dumps(coco_content() | dict(annotations=[])))
    config.test_dataloader = config.pop('train_dataloader')
    require_datasets(config)


def test_a_root_without_an_annotation_file_is_looked_for(tmp_path):
    """mmpretrain's data sets, which are folders of images."""
    dataset = dict(type='CustomDataset', data_root=str(tmp_path / 'train'))
    config = Config(dict(train_dataloader=dict(dataset=dataset)))
    with pytest.raises(SystemExit, match=rf'data_root of \S+ not found: {tmp_path}/train;'):
        require_datasets(config)
    (tmp_path / 'train').mkdir()
    require_datasets(config)


def test_an_evaluator_that_judges_by_another_file_is_warned_of(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module, 'print_log', lambda message, **_: said.append(message))
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    config.val_dataloader = config.pop('train_dataloader')
    own, other = (str(tmp_path / name) for name in ('train.json', 'other.json'))
    config.val_evaluator = dict(type='CocoMetric', ann_file=other)
    with pytest.raises(
        SystemExit, match=r'^annotation file of val_evaluator not found: \S+other\.'
    ):
        require_datasets(config)
    (tmp_path / 'other.json').write_text(json.dumps(coco_content()))
    require_datasets(config)
    assert f'judges by {other}, but val_dataloader.dataset reads {own}' in said.pop()
    config.val_evaluator.ann_file = own
    require_datasets(config)
    assert not said
