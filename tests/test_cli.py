import json
import pickle
import re

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet_odconv import ODConv2d, cli
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')


def dataset_config(root):
    dataset = dict(data_root=str(root), ann_file='train.json', data_prefix=dict(img='images/'))
    return Config(dict(train_dataloader=dict(dataset=dataset)))


def test_a_typo_in_a_path_is_answered_with_near_names():
    with pytest.raises(SystemExit) as error:
        cli.load_config(CONFIG.replace('r18', 'r81'))
    message = str(error.value)
    assert message.startswith('config not found: ')
    assert f'is it {CONFIG}' in message


def test_paths_with_a_scheme_are_left_to_mmengine():
    cli.require_file('https://example.org/weights.pth', 'checkpoint')


def test_overrides_are_merged_and_bad_ones_refused():
    config = cli.load_config(CONFIG, {'model.backbone.kernel_num': 2})
    assert config.model.backbone.kernel_num == 2
    with pytest.raises(SystemExit, match=r'--cfg-options .*does not fit'):
        cli.load_config(CONFIG, {'train_dataloader.dataset.pipeline.77.scale': 3})


@pytest.mark.parametrize('missing', ['train.json', 'images'])
def test_a_missing_data_set_is_named_with_the_path_looked_for(tmp_path, missing):
    (tmp_path / 'train.json').write_text(json.dumps({}))
    (tmp_path / 'images').mkdir()
    cli.require_datasets(dataset_config(tmp_path))
    target = tmp_path / missing
    target.rmdir() if target.is_dir() else target.unlink()
    with pytest.raises(SystemExit) as error:
        cli.require_datasets(dataset_config(tmp_path))
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
        cli.require_datasets(config)
    key = re.search(r'set data_root, .* of (\S+) ', str(error.value))[1]
    node = config
    for part in key.split('.'):
        node = node[int(part) if part.isdigit() else part]
    assert node.ann_file == 'train.json'
    cli.require_datasets(config, ('val_dataloader',))


def config_with_classes(folder, classes, number):
    (folder / 'images').mkdir()
    categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
    (folder / 'train.json').write_text(json.dumps(dict(categories=categories)))
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
        cli.require_datasets(config_with_classes(tmp_path, classes, number))


def test_classes_that_fit_are_accepted(tmp_path):
    cli.require_datasets(config_with_classes(tmp_path, ('dog', 'cat'), 2))


def test_a_missing_base_is_named(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("_base_ = 'mmdet::yolox/yolox_tinny.py'")
    with pytest.raises(SystemExit, match=r'config\.py: .*yolox_tinny\.py'):
        cli.load_config(str(path))


@pytest.mark.parametrize(
    ('argument', 'value', 'message'),
    [
        ('include', 'backbone.stage5', 'include .*near names: backbone.stage4'),
        ('kernel_nums', 4, "there is no argument 'kernel_nums'; is it 'kernel_num'"),
        ('kernel_num', 0, 'kernel_num must be at least 1, got 0'),
    ],
)
def test_a_wrong_argument_of_the_conversion_ends_in_one_sentence(
    tmp_path, argument, value, message
):
    config = cli.load_config(str(ROOT / 'configs/odconv/yolox_od_cspdarknet-tiny.py'))
    config.model.odconv[argument] = value
    config.work_dir = str(tmp_path)
    with pytest.raises(SystemExit, match=rf'^model\.odconv: {message}'):
        cli.build_runner(config)


def dynamic(kernel_num=4, classes=3):
    return nn.ModuleDict(
        dict(
            backbone=nn.Sequential(ODConv2d(3, 8, 3, kernel_num=kernel_num), nn.BatchNorm2d(8)),
            head=nn.Conv2d(8, classes, 1),
        )
    )


@pytest.mark.parametrize('wrapped', [True, False])
def test_weights_that_fit_are_loaded(tmp_path, wrapped):
    model, other = dynamic(), dynamic()
    state = {'module.' * wrapped + name: t for name, t in model.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'a.pth')
    cli.require_weights(other, str(tmp_path / 'a.pth'))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


def test_static_weights_fit(tmp_path):
    plain = nn.ModuleDict(
        dict(backbone=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), head=nn.Conv2d(8, 3, 1))
    )
    torch.save(plain.state_dict(), tmp_path / 'a.pth')
    cli.require_weights(dynamic(), str(tmp_path / 'a.pth'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(kernel_num=2), '1 banks have K=2 in the file, K=4 in the config'),
        (
            dict(classes=5),
            r'head\.weight has shape \(5, 8, 1, 1\) in the file, \(3, 8, 1, 1\) in the config '
            r'\(and 1 more like it\)',
        ),
    ],
)
def test_weights_of_another_shape_end_the_program(tmp_path, options, message):
    torch.save(dynamic(**options).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=rf'a\.pth does not fit the config: {message}'):
        cli.require_weights(dynamic(), str(tmp_path / 'a.pth'))


def test_weights_of_another_model_end_the_program(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=r'of the \d+ weights of the model are not in the file'):
        cli.require_weights(dynamic(), str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('content', [b'', b'text', pickle.dumps(3)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(SystemExit, match=r'a\.pth (cannot be read as a checkpoint|has no state)'):
        cli.require_weights(dynamic(), str(tmp_path / 'a.pth'))


def test_a_truncated_checkpoint_is_named(tmp_path):
    torch.save(dynamic().state_dict(), tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r'a\.pth cannot be read as a checkpoint'):
        cli.require_weights(dynamic(), str(tmp_path / 'a.pth'))
