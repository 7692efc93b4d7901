"""The benchmark's rows, on networks small enough to wait for; no test looks at a time."""

import argparse
import importlib
import json
import sys

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module by its name, under which its child processes find it too."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    yield importlib.import_module('benchmark')
    sys.modules.pop('benchmark')


@pytest.fixture
def args():
    return argparse.Namespace(
        what='table', device='cpu', rounds=1, strategy='auto', without_published=False
    )


def test_table_is_written_as_json(tool, monkeypatch, tmp_path, capsys):
    cases = (
        tool.Case('inference', 'MobileNetV2', 1, 64, 1, 9.0),
        tool.Case('training', 'MobileNetV2', 2, 64, 2),
        tool.Case('saved bytes', 'MobileNetV2', 2, 64, 4),
    )
    monkeypatch.setattr(tool, 'TABLE', cases)
    out = tmp_path / 'new' / 'table.json'
    monkeypatch.setattr(sys, 'argv', ['', '--table', '--rounds', '1', '--out', str(out)])
    tool.main()
    report = json.loads(out.read_text())
    assert report['torch'] == torch.__version__
    assert [r['input'] for r in report['results']] == ['1×3×64×64', *['2×3×64×64'] * 2]
    assert report['results'][0]['target'] == 9.0
    saved = report['results'][2]
    assert saved['published / plain'] > saved['ours / plain'] > 0.9
    assert 'MobileNetV2' in capsys.readouterr().out


def test_variants_compute_the_same(tool, args):
    case = tool.Case('inference', 'MobileNetV2', 2, 64, 3)
    x = tool.image(case, 'cpu')
    networks = {variant: tool.build(case, variant, args) for variant in tool.VARIANTS}
    networks['published'].load_state_dict(networks['ours'].state_dict())
    torch.testing.assert_close(networks['published'](x), networks['ours'](x))
    networks['ours'].load_state_dict(networks['plain'].state_dict())
    torch.testing.assert_close(networks['ours'](x), networks['plain'](x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['RetinaNet MobileNetV2', 'YOLOX-tiny'])
def test_whole_detectors(tool, args, name):
    result = tool.row(tool.Case('training', name, 1, 64, 2), args)
    assert result['network'] == name
    tool.infer(
        tool.build(tool.Case('inference', name, 1, 64, 2), 'plain', args), torch.rand(1, 3, 64, 64)
    )


def test_peak_memory_is_that_of_the_step_alone(tool, args):
    small, large = (
        tool.peak_memory(tool.Case('peak memory', 'MobileNetV2', 1, side, 1), 'plain', args)
        for side in (128, 512)
    )
    assert 0 < small < large < 2**31


def test_layers_name_their_strategy(tool, args):
    result = tool.layer_row(tool.LayerCase('training', 8, 4, 3, 5, 2, 2), args)
    assert (result['layer'], result['strategy']) == ('8→4 3×3 at 5×5', 'cpu_grouped_conv')


def test_the_published_formula_can_be_left_out(tool, args):
    args.without_published = True
    case = tool.Case('inference', 'MobileNetV2', 1, 64, 2)
    for result in (tool.row(case, args), tool.row(tool.layer_grid()[0], args)):
        assert 'ours / plain' in result
        assert 'published / plain' not in result


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_missing_gpu_is_named(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['', '--table', '--device', 'cuda'])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert '--device cuda: PyTorch sees no GPU' in capsys.readouterr().err


def test_no_rounds_are_refused(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['', '--table', '--rounds', '0'])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert '--rounds: must be a whole number of at least 1, got 0' in capsys.readouterr().err


def test_peers_need_timm(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    monkeypatch.setattr('mmdet_odconv.cli.find_spec', lambda name: None)
    monkeypatch.setattr(sys, 'argv', ['', '--peers'])
    with pytest.raises(SystemExit, match='not installed: timm; pip install timm'):
        tool.main()
