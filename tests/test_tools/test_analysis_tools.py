"""The analysis tools on a detector with one dynamic and one static layer."""

import importlib.util
import json
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import METRICS, MODELS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric

from mmdet_odconv.analysis import attention_statistics
from tests.conftest import ROOT

CONFIG = f"""
_base_ = {str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')!r}
model = dict(
    type='ODConvModel',
    detector='RetinaNet',
    odconv=dict(include='backbone.layer4.1', kernel_num=2),
    backbone=dict(type='ResNet', base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64]),
    test_cfg=dict(score_thr=0.0),
)
test_dataloader = dict(batch_size=3, num_workers=0, persistent_workers=False)
test_dataloader['dataset'] = dict(
    data_root='ROOT', ann_file='val.json', data_prefix=dict(img='val/')
)
test_evaluator = dict(_delete_=True, type='MeanScore')
"""
DYNAMIC, STATIC = 'backbone.layer4.1.conv1', 'backbone.layer4.1.conv2'


@METRICS.register_module(force=True)
class MeanScore(BaseMetric):
    """A metric that depends on each image, also for weights that detect nothing."""

    def process(self, data_batch, data_samples):
        self.results += [1000 * s['pred_instances']['scores'].mean().item() for s in data_samples]

    def compute_metrics(self, results):
        return {'score': float(np.mean(results))}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Its config, checkpoint and seven images with their annotation file."""
    root = tmp_path_factory.mktemp('tiny')
    (root / 'val').mkdir()
    generator = np.random.default_rng(0)
    images = []
    for i in range(7):
        # Of another colour each, so that the averages differ, with noise.
        image = generator.integers(0, 255, 3) + generator.normal(0, 60, (64, 96, 3))
        name = f'{i}.png'
        cv2.imwrite(str(root / 'val' / name), image.clip(0, 255).astype(np.uint8))
        images.append(dict(id=i, file_name=name, height=64, width=96))
    names = ('circle', 'square', 'triangle', 'star', 'cross')
    categories = [dict(id=i, name=name) for i, name in enumerate(names)]
    annotations = dict(images=images, annotations=[], categories=categories)
    (root / 'val.json').write_text(json.dumps(annotations))
    config = root / 'tiny.py'
    config.write_text(CONFIG.replace('ROOT', str(root)))

    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    attention = model.get_submodule(DYNAMIC).attention  # constant, as after each conversion
    for head in (attention.channel_fc, attention.filter_fc, attention.kernel_fc):
        torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.1)
    torch.save({'state_dict': model.state_dict()}, root / 'tiny.pth')
    return SimpleNamespace(
        root=root, config=str(config), checkpoint=str(root / 'tiny.pth'), images=str(root / 'val')
    )


@pytest.fixture
def run(monkeypatch):
    """Runs a tool in this process, as importing all of it again takes long."""

    def run(name, *args):
        path = ROOT / 'tools/analysis_tools' / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        module.main()

    return run


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects what the page refers to."""

    EMPTY = {'meta', 'link', 'img', 'br', 'wbr'}

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.rows, self.headings = [], [], set(), {}, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs['id']} if 'id' in attrs else set()
        self.links += [attrs[key] for key in ('src', 'href') if key in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == 'tr':
            self.row = []
        elif tag in ('th', 'td'):
            self.row.append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == 'tr':
            self.rows[self.row[1]] = self.row[2:]

    def handle_data(self, data):
        if 'th' in self.open or 'td' in self.open:
            self.row[-1] += data
        if self.open and self.open[-1] in ('h1', 'h2'):
            self.headings.append(data)


def test_the_page_shows_each_layer(tiny, run, tmp_path, capsys):
    run(
        *('visualize_attention.py', tiny.config, tiny.checkpoint, tiny.images),
        *('--out-dir', tmp_path, '--limit', 5, '--score-thr', 0),
    )
    text = (tmp_path / 'index.html').read_text()
    page = Page(text)
    assert '1 of the 2 is dynamic' in page.headings[0]
    assert 'over 5 images' in page.headings[0]
    assert page.headings[0] in capsys.readouterr().out
    assert page.headings[-2:] == [DYNAMIC, STATIC]
    assert page.rows[STATIC][:4] == ['0.000'] * 4

    model = init_detector(
        Config.fromfile(tiny.config), tiny.checkpoint, device='cpu', cfg_options={}
    )
    paths = [f'{tiny.images}/{i}.png' for i in range(5)]
    record, _ = attention_statistics(model, paths, lambda path: inference_detector(model, path))
    assert page.rows[DYNAMIC] == [
        *(f'{std:.3f}' for std in record.std.values()),
        f'{record.kernel_entropy:.2f}',
        f'{record.kernel_similarity:.2f}',
    ]
    figures = {f'{layer}.{name}.png' for layer in (DYNAMIC, STATIC) for name in record.std}
    assert {path.name for path in (tmp_path / 'figures').iterdir()} == figures | {'overview.png'}


def test_the_page_needs_nothing_from_outside(tiny, run, tmp_path):
    run(
        *('visualize_attention.py', tiny.config, tiny.checkpoint, tiny.images),
        *('--out-dir', tmp_path, '--limit', 2, '--score-thr', 2),
    )
    text = (tmp_path / 'index.html').read_text()
    page = Page(text)
    assert all(link.startswith('data:') or link[1:] in page.ids for link in page.links)
    assert '://' not in text
    assert text.count('nothing found') >= 2


def test_the_layers_that_pay_come_first(tiny, run, tmp_path, capsys):
    out = tmp_path / 'layers.json'
    run(
        *('which_layers.py', tiny.config, tiny.checkpoint, '--out', out, '--keep-one'),
        *('--work-dir', tmp_path),
    )
    results = json.loads(out.read_text())
    assert results['metric'] == 'score'
    by_name = {entry['name']: entry for entry in results['layers']}
    dynamic, static = by_name[DYNAMIC], by_name[STATIC]
    # What is constant anyway brings nothing, and the other one brings it all.
    assert static['drop'] == pytest.approx(0, abs=1e-5)
    assert abs(dynamic['drop']) > 1e-4
    assert dynamic['without'] == pytest.approx(results['static'])
    assert dynamic['alone'] == pytest.approx(results['dynamic'])
    assert static['alone'] == pytest.approx(results['static'])
    assert dynamic['drop'] == pytest.approx(results['dynamic'] - results['static'])
    drops = [entry['drop'] for entry in results['layers']]
    assert drops == sorted(drops, reverse=True)
    drops = {entry['name']: entry['drop'] for entry in results['attentions']}
    assert drops.keys() == {'kernel', 'channel', 'filter', 'spatial'}
    assert list(drops.values()) == sorted(drops.values(), reverse=True)
    gains = {entry['name']: entry['gain'] for entry in results['attentions']}
    assert any(abs(gain) > 1e-4 for gain in gains.values())
    printed = capsys.readouterr().out
    first, second = (printed.rindex(entry['name']) for entry in results['layers'])
    assert first < second

    with pytest.raises(SystemExit, match='exists; --force overwrites it'):
        run('which_layers.py', tiny.config, tiny.checkpoint, '--out', out)


def test_the_page_of_one_image_says_nothing_of_a_spread(tiny, run, tmp_path):
    run(
        *('visualize_attention.py', tiny.config, tiny.checkpoint, f'{tiny.images}/0.png'),
        *('--out-dir', tmp_path, '--score-thr', 0),
    )
    text = (tmp_path / 'index.html').read_text()
    page = Page(text)
    assert 'in one image' in page.headings[0]
    assert page.headings[-2:] == [DYNAMIC, STATIC]
    assert page.rows[DYNAMIC][:4] == page.rows[STATIC][:4] == ['–'] * 4
    assert 'standard deviation 0.000' not in text
    figures = {path.name for path in (tmp_path / 'figures').glob('*.png')}
    assert f'{DYNAMIC}.kernel.png' in figures
    assert 'overview.png' not in figures


@pytest.mark.parametrize('tool', ['visualize_attention.py', 'which_layers.py'])
def test_bad_input_is_said_in_one_sentence(tiny, run, tmp_path, tool):
    args = [tiny.checkpoint, *([tiny.images] if tool == 'visualize_attention.py' else [])]
    with pytest.raises(SystemExit, match=r'config not found: no\.py'):
        run(tool, 'no.py', *args)
    with pytest.raises(SystemExit, match=r'checkpoint not found: no\.pth'):
        run(tool, tiny.config, 'no.pth', *args[1:])
    config = Config.fromfile(tiny.config)
    config.model.type = config.model.pop('detector')
    del config.model.odconv
    config.work_dir = str(tmp_path)
    config.dump(tmp_path / 'plain.py')
    with pytest.raises(SystemExit, match=r'plain\.py: .*\(RetinaNet\) has no ODConv layer'):
        run(tool, tmp_path / 'plain.py', *args)


def test_bad_images(tiny, run, tmp_path):
    page = ('visualize_attention.py', tiny.config, tiny.checkpoint)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match='no image'):
        run(*page, tmp_path / 'empty')
    for name in ('a.png', 'b.png'):
        (tmp_path / name).write_text('text')
    with pytest.raises(SystemExit, match=r'cannot be read as an image: .*a\.png'):
        run(*page, tmp_path, '--out-dir', tmp_path)
