"""The study's tables from logs, and which runs its runner starts."""

import json
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/study'))

    def load(name):
        sys.modules.pop(name, None)
        return __import__(name)

    return load


def log(arm, seed, ap, loss):
    metrics = dict.fromkeys(('mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l'), 0.5)
    return {
        'arm': arm,
        'seed': seed,
        'parameters': 1_500_000,
        'multiply_adds': 20_000_000,
        'seconds_per_step': 0.25,
        'training': [{'iteration': 100, 'loss': loss, 'seconds': 0.25}],
        'evaluations': [{'epoch': 1, 'mAP': 0.1, **metrics}, {'epoch': 2, 'mAP': ap, **metrics}],
    }


def test_table_and_figures(tool, tmp_path, capsys):
    logs = tmp_path / 'logs'
    logs.mkdir()
    for entry in (log('a', 0, 0.42, 0.5), log('a', 1, 0.46, 0.7), log('b', 0, 0.30, 0.9)):
        (logs / f'{entry["arm"]}-{entry["seed"]}.json').write_text(json.dumps(entry))
    tool('table').main(['--logs', str(logs), '--out', str(tmp_path)])
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines()]
    assert rows[2][:3] == ['| b', '1', '30.0']
    # The deviation of 42 and 46 is √8, that of 0.5 and 0.7 is √0.02.
    assert rows[3][:3] == ['| a', '2', '44.0 ± 2.8']
    assert rows[3][7] == '0.600 ± 0.141'
    assert rows[3][-2:] == ['1.50 M', '20 M |']
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    assert (tmp_path / 'costs.png').stat().st_size > 10_000


def test_no_logs(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool('table').main(['--logs', str(tmp_path)])
    assert 'has no log' in capsys.readouterr().err


def test_every_arm_builds_with_the_counts_of_its_convolutions(tool):
    run = tool('run')
    counts = {arm: run.count(run.arm_config(arm, 0)) for arm in run.ARMS}
    plain = counts['plain']
    assert counts['od_k1']['multiply_adds'] == plain['multiply_adds']
    # A bank is mixed once for an image: as many multiply-adds as it has entries.
    banks = sum(
        layer.weight.numel()
        for layer in run.MODELS.build(run.arm_config('od_k4', 0).model).modules()
        if isinstance(layer, run._ODConvNd)
    )
    assert counts['od_k4']['multiply_adds'] == plain['multiply_adds'] + banks
    assert counts['plain_wide_madds']['multiply_adds'] >= counts['od_k4']['multiply_adds']


def test_only_what_is_missing_is_started(tool, tmp_path, monkeypatch):
    run = tool('run')
    (tmp_path / 'plain-0.json').write_text('{}')
    started = []
    monkeypatch.setattr(run, 'run', lambda arm, seed, *rest: started.append((arm, seed)))
    run.main(['plain', '--seeds', '0', '1', '--logs', str(tmp_path)])
    assert started == [('plain', 1)]


def test_unknown_arm(tool, capsys):
    with pytest.raises(SystemExit):
        tool('run').main(['odconv'])
    assert "there is no arm 'odconv'" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on(tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    tool('make_shapes_dataset').make_shapes_dataset(
        tmp_path / 'data', train=4, val=0, size=(64, 64), hard=True
    )
    run = tool('run')
    options = dict.fromkeys(
        f'{split}_{part}'
        for split in ('val', 'test')
        for part in ('dataloader', 'cfg', 'evaluator')
    )
    options |= {
        'train_dataloader.dataset.data_root': str(tmp_path / 'data'),
        'train_dataloader.batch_size': 2,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
        'default_scope': 'mmdet',
    }

    def losses(name, *epochs):
        for number in epochs:
            own = {'train_cfg.max_epochs': number, 'visualizer.name': f'{name}{number}'}
            config = run.arm_config('od_k1', 0, options | own)
            run.train(config, tmp_path / name)
        return [(e['iteration'], e['loss']) for e in run.scalars(tmp_path / name)['training']]

    whole, parts = losses('whole', 2), losses('parts', 1, 2)
    assert [iteration for iteration, _ in whole] == [1, 2, 3, 4]
    assert [iteration for iteration, _ in parts] == [1, 2, 3, 4]
    # Which images are flipped is drawn anew.
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=0.02)
