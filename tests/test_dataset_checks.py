import json
import re

import pytest
from mmengine.config import Config

from mmdet_odconv.dataset_checks import require_datasets


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
    (folder / 'images/1.jpg').touch()
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
    require_datasets(config_with_classes(tmp_path, ('dog', 'cat'), 2))


@pytest.mark.parametrize(
    ('metainfo', 'message'),
    [
        (
            ('cat', 'dog'),
            r"metainfo must be dict\(classes=\(.*\)\), got \('cat', 'dog'\)",
        ),
        (dict(CLASSES=('cat', 'dog')), "has 'CLASSES', which MMDetection 3 does not read; .*'cla"),
        (dict(classes='cat'), r"classes is the text 'cat', .* for a single class write \('cat',\)"),
        (
            dict(palette=[(1, 2, 3)]),
            r"metainfo has no classes, so those of CocoDataset hold, with 'person', but \S+train",
        ),
    ],
)
def test_metainfo_that_mmdet_would_not_read_is_named(tmp_path, metainfo, message):
    config = config_with_classes(tmp_path, None, 80)
    config.train_dataloader.dataset.metainfo = metainfo
    with pytest.raises(SystemExit, match=message):
        require_datasets(config)


def test_the_classes_may_be_the_lines_of_a_file(tmp_path):
    (tmp_path / 'classes.txt').write_text('dog\ncat\n')
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
        (lambda text: text.replace('"bbox"', '"box"'), r'.* its annotations \(id 1\) has no bbox'),
        (lambda text: text.replace('"width"', '"w"'), r'.* its images \(id 1\) has no width'),
        (lambda text: text.replace('"image_id": 1', '"image_id": 7'), '.* image_id .* first has 7'),
        (
            lambda text: text.replace('"category_id": 1', '"category_id": 0'),
            'has no annotation whose category_id .* the first has 0, and they have 1, 2$',
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


def test_images_that_are_not_tested_but_count_as_missed_are_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        'mmdet_odconv.dataset_checks.print_log', lambda message, **_: warnings.append(message)
    )
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    config.test_dataloader = config.pop('train_dataloader')
    own, other = (str(tmp_path / name) for name in ('train.json', 'other.json'))
    config.test_evaluator = dict(type='CocoMetric', ann_file=own)
    require_datasets(config)
    assert not warnings
    config.test_dataloader.dataset.indices = 1
    require_datasets(config)
    assert 'test_dataloader.dataset.indices leaves images' in warnings.pop()
    del config.test_dataloader.dataset.indices
    more = [*coco_content()['images'], dict(id=2, file_name='2.jpg')]
    (tmp_path / 'other.json').write_text(json.dumps(coco_content() | dict(images=more)))
    config.test_evaluator.ann_file = other
    require_datasets(config)
    assert f'{own} lacks 1 of the images of {other}' in warnings.pop()


def test_an_evaluator_has_to_know_the_images(tmp_path):
    config = config_with_classes(tmp_path, ('cat', 'dog'), 2)
    config.val_dataloader = config.pop('train_dataloader')
    config.val_evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'other.json'))
    with pytest.raises(
        SystemExit, match=r'^annotation file of val_evaluator not found: \S+other\.'
    ):
        require_datasets(config)
    images = coco_content()['images']
    for content in (images, [*images, dict(id=2, file_name='2.jpg')]):
        (tmp_path / 'other.json').write_text(json.dumps(coco_content() | dict(images=content)))
        require_datasets(config)
    images[0]['file_name'] = '2.jpg'
    (tmp_path / 'other.json').write_text(json.dumps(coco_content() | dict(images=images)))
    with pytest.raises(
        SystemExit, match=r'other\.json does not have the images of \S+/train\.json'
    ):
        require_datasets(config)
