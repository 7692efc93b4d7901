"""What README and docs/detectors.md tell, followed on generated images."""

import re
from collections import Counter

import pytest
import torch
from mmcv import imread
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmdet_odconv import ODConv2d
from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import run_tool

# The data set that make_shapes_dataset.py writes.
OWN = {
    "'cat', 'dog'": "'circle', 'square'",
    "'train.json', data_prefix=dict(img='images/')": (
        "'annotations/instances_train.json', data_prefix=dict(img='train/')"
    ),
    "'val.json', data_prefix=dict(img='images/')": (
        "'annotations/instances_val.json', data_prefix=dict(img='val/')"
    ),
    'ROOT/val.json': 'ROOT/annotations/instances_val.json',
}
SMALL = [
    'model.data_preprocessor.batch_augments=None',
    'train_dataloader.dataset.pipeline.4.scale=(64,64)',
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    *(
        f'{name}_dataloader.{option}'
        for name in ('val', 'test')
        for option in (
            'dataset.pipeline.1.scale=(64,64)',
            'num_workers=0',
            'persistent_workers=False',
        )
    ),
]


def code(page):
    return re.findall(r'```.*?\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)


def test_the_chinese_readme_has_the_same_commands_and_links():
    pages = [(ROOT / page).read_text() for page in ('README.md', 'README_zh-CN.md')]
    assert code('README.md') == code('README_zh-CN.md')
    links = [set(re.findall(r'\]\(((?!http|README)[^)#]+)', page)) for page in pages]
    assert links[0] == links[1]
    for link in links[0]:
        assert (ROOT / link).exists(), link
    for page, anchor in set(re.findall(r'\]\((docs/[^)#]+)#([^)]+)', pages[0] + pages[1])):
        headings = re.findall(r'^#+ (.+)', (ROOT / page).read_text(), re.MULTILINE)
        slugs = {re.sub(r'[^\w\- ]', '', heading).lower().replace(' ', '-') for heading in headings}
        assert anchor in slugs, f'{page}#{anchor}'


def prose(page):
    """A page without its code and without the targets of its links."""
    text = re.sub(r'```.*?```', '', (ROOT / page).read_text(), flags=re.DOTALL)
    return re.sub(r'\]\([^)]*\)', ']', text)


def test_the_chinese_readme_has_the_same_figures():
    figures = [
        Counter(re.findall(r'\d+(?:\.\d+)*', prose(page)))
        for page in ('README.md', 'README_zh-CN.md')
    ]
    assert figures[0] == figures[1]


def test_the_first_screen_of_the_readme_is_short():
    first = (ROOT / 'README.md').read_text().partition('## Install')[0]
    assert len(first.split()) <= 330
    paragraphs = re.split(r'\n\n|\n- ', re.sub(r'^[|`].*\n', '', first, flags=re.MULTILINE))
    assert all(len(paragraph.split()) <= 60 for paragraph in paragraphs)
    assert len(re.findall(r'^\|', first, re.MULTILINE)) <= 2 + 6


def test_the_code_of_the_readme(tmp_path):
    python, _, config, *_ = code('README.md')
    register_all_modules()
    path = tmp_path / 'my_yolox.py'
    path.write_text(config)
    model = MODELS.build(Config.fromfile(path).model)
    assert any(isinstance(layer, ODConv2d) for layer in model.backbone.modules())
    plain = nn.ModuleDict(dict(backbone=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))))
    scope = dict(model=plain)
    exec(python, scope)
    assert scope['report'].converted == ['backbone.1']


@pytest.mark.slow
def test_a_detector_of_the_zoo_on_ones_own_data(tmp_path):
    root = tmp_path / 'shapes'
    run_tool('study/make_shapes_dataset.py', root, '--train', 8, '--val', 4, '--size', 96, 96)
    section = (ROOT / 'docs/detectors.md').read_text().partition('## MMDetection')[2]
    text = '\n'.join(re.findall(r'```python.*?\n(.*?)```', section, re.DOTALL)[:2])
    for old, new in OWN.items():
        assert old in text
        text = text.replace(old, new)
    static = tmp_path / 'static.pth'
    path = tmp_path / 'my_yolox.py'
    path.write_text(text.replace('ROOT', str(root)).replace("'yolox_tiny.pth'", repr(str(static))))

    register_all_modules()
    model = Config.fromfile(path).model
    model.type = model.pop('detector')
    del model.odconv
    weights = MODELS.build(model).state_dict()
    torch.save({'state_dict': weights}, static)

    log = run_tool('train.py', path, '--work-dir', tmp_path, '--cfg-options', *SMALL).stdout
    assert 'ODConv in YOLOX' in log
    assert f'Load checkpoint from {static}' in log
    assert 'size mismatch' not in log
    assert 'unexpected key' not in log
    checkpoint = torch.load(tmp_path / 'epoch_1.pth')
    assert checkpoint['meta']['dataset_meta']['classes'] == ('circle', 'square')

    # A picture with boxes beyond its lower right corner still shows the image where it was.
    for name, value in checkpoint['state_dict'].items():
        if 'conv_reg.0.bias' in name:
            value[:] = torch.tensor([6.0, 6.0, 0.0, 0.0])  # in strides of 8, from the cell
        elif 'conv_reg.0.weight' in name:
            value.zero_()
        elif 'conv_cls.0.bias' in name or re.search(r'conv_obj\.\d\.bias', name):
            value.fill_(9.0 if '.0.' in name else -9.0)
    torch.save(checkpoint, tmp_path / 'beyond.pth')
    image = min((root / 'val').iterdir())
    run_tool(
        *('image_demo.py', image, path, tmp_path / 'beyond.pth', '--out-dir', tmp_path),
        *('--cfg-options', *SMALL),
    )
    drawn, given = imread(str(tmp_path / f'{image.stem}.png')), imread(str(image))
    assert drawn.shape == given.shape
    assert (drawn != given).any()
    free = (slice(20, 60), slice(5, 40))
    assert (drawn[free] == given[free]).all()
