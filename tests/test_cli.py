import json

import pytest
from mmengine.config import Config

from mmdet_odconv import cli
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
    assert f'of train_dataloader not found: {target}' in str(error.value)
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
    with pytest.raises(SystemExit, match=r'train\.json'):
        cli.require_datasets(config)
    cli.require_datasets(config, ('val_dataloader',))
