"""The study's tables from logs, and which runs its runner starts."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mmdet_odconv import ODConv2d
from tests.conftest import ROOT

OPTIONS = {
    'model.backbone.base_channels': 4,
    'model.neck.in_channels': [4, 8, 16, 32],
    'train_cfg.max_epochs': 3,
    'train_dataloader.batch_size': 4,
    'default_hooks.logger.interval': 1,
}


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
        'step_time': 1.25,
        'training': [{'iteration': 100, 'loss': loss, 'seconds': 0.25}],
        'evaluations': [{'epoch': 1, 'mAP': 0.1, **metrics}, {'epoch': 2, 'mAP': ap, **metrics}],
    }


def test_table_and_figures(tool, tmp_path, capsys):
    logs = tmp_path / 'logs'
    main = logs / 'narrow'
    main.mkdir(parents=True)
    for entry in (log('a', 0, 0.42, 0.5), log('a', 1, 0.46, 0.7), log('b', 0, 0.30, 0.9)):
        (main / f'{entry["arm"]}-{entry["seed"]}.json').write_text(json.dumps(entry))
    table = tool('table')
    small = logs / 'light'
    small.mkdir()
    (small / 'a-0.json').write_text(json.dumps(log('a', 0, 0.2, 0.9)))
    tuned = logs / 'fine_tune'
    tuned.mkdir()
    for entry in (log('a', 0, 0.2, 0.9), log('a_rate2', 0, 0.3, 0.9)):
        (tuned / f'{entry["arm"]}-0.json').write_text(json.dumps(entry))
    narrow, other = table.START.format('narrow'), table.START.format('light')
    page = tmp_path / 'page.md'
    page.write_text(f'one\n{narrow}\nold\n{table.END}\ntwo\n{other}\n{table.END}\nthree\n')
    table.main(['--logs', str(logs), '--out', str(tmp_path), '--pages', str(page)])
    capsys.readouterr()
    first, second = page.read_text().split('two')
    assert first.startswith(f'one\n{narrow}\n| arm |')
    assert 'old' not in first
    assert second.startswith(f'\n{other}\n| arm |')
    assert second.endswith(f'{table.END}\nthree\n')
    assert '| a | 1 | 20.0 |' in second
    rows = [line.split(' | ') for line in first.splitlines()[2:]]
    # The deviation of 42 and 46 is √8, that of 0.5 and 0.7 is √0.02.
    assert rows[3][:3] == ['| a', '2', '44.0 ± 2.8']
    assert rows[3][7] == '0.600 ± 0.141'
    assert rows[3][-2:] == ['1.50 M', '20 M |']
    for figure in ('curves.png', 'costs.png', 'rates.png'):
        assert (tmp_path / figure).stat().st_size > 10_000


def test_the_pages_are_made_from_the_logs(tool):
    table = tool('table')
    folder = ROOT / 'docs/study'
    tasks = {path.name: table.read(path) for path in sorted(folder.glob('logs/*/'))}
    texts = [path.read_text() for path in (ROOT / 'docs/study.md', *folder.glob('*.md'))]
    for text in texts:
        assert table.with_tables(text, tasks) == text, 'run make study'
    for name in tasks:
        assert sum(table.START.format(name) in text for text in texts) == 1, name
    for name, rows in table.QUESTIONS.items():
        assert sum(table.ANSWER.format(name) in text for text in texts) == 1, name
        assert table.finished(rows, tasks) == rows


def test_the_table_of_a_question_compares_seed_by_seed(tool):
    table = tool('table')
    runs = [('plain', 0, 0.40), ('plain', 1, 0.50), ('od_k4', 1, 0.54), ('od_k4', 0, 0.42)]
    arms = {}
    for arm, seed, ap in runs:
        arms.setdefault(arm, []).append(log(arm, seed, ap, 0.5))
    rows = [('ours', 'task', 'od_k4', 'plain'), ('no run of it yet', 'task', 'od_k1', 'plain')]
    done = table.finished(rows, {'task': arms})
    assert done == rows[:1]
    # Seed 0 gains 2 points and seed 1 gains 4.
    (line,) = table.answer(done, {'task': arms}).splitlines()[2:]
    assert line == '| ours | 2 | 45.0 ± 7.1 | 48.0 ± 8.5 | 3.0 ± 1.4 | 0.0 ± 0.0 | 1.0 × |'


def test_arms_are_compared_seed_by_seed(tool):
    arms = {
        'plain': [log('plain', 0, 0.40, 0.5), log('plain', 1, 0.50, 0.5)],
        'od_k4': [log('od_k4', 1, 0.54, 0.4), log('od_k4', 2, 0.9, 0.4), log('od_k4', 0, 0.42, 1)],
    }
    # Seed 0 gains 2 points and seed 1 gains 4; seed 2 has no twin.
    rows = [line.split(' | ') for line in tool('table').differences(arms).splitlines()[2:]]
    assert rows == [['| 1', 'od_k4', '3.0 ± 1.4', '0.0 ± 0.0', ' |']]


def test_arms_are_compared_at_their_best_rates(tool):
    arms = {
        'plain': [log('plain', 0, 0.40, 0.5), log('plain', 1, 0.42, 0.5)],
        'plain_rate4': [log('plain_rate4', 0, 0.50, 0.5), log('plain_rate4', 1, 0.54, 0.5)],
        'od_k4': [log('od_k4', 0, 0.56, 0.4), log('od_k4', 1, 0.58, 0.4)],
        'od_k4_rate4': [log('od_k4_rate4', 0, 0.45, 0.4)],
        'od_k1': [log('od_k1', 0, 0.45, 0.4)],
    }
    rows = [line.split(' | ') for line in tool('table').differences(arms).splitlines()[2:]]
    # At the rate 4, ODConv loses 5 points.
    assert rows == [
        ['| 1', 'od_k1', '5.0', '0.0', '11.0 |'],
        ['| 1', 'od_k4', '16.0 ± 0.0', '0.0 ± 0.0', ' |'],
        ['| 4', 'od_k4', '-5.0', '0.0', ' |'],
    ]
    rows = [line.split(' | ') for line in tool('table').best_rates(arms).splitlines()[2:]]
    # 6 points with one seed, 4 with the other.
    assert rows == [
        ['| plain', '1: 41.0, 4: 52.0', '4', '2', '52.0 ± 2.8', '', '', '5.0 ± 1.4 |'],
        ['| od_k4', '1: 57.0, 4: 45.0', '1', '2', '57.0 ± 1.4', '5.0 ± 1.4', '0.0 ± 0.0', ' |'],
    ]


def test_how_dynamic_the_arms_are(tool):
    dynamics = tool('table').dynamics
    assert dynamics({'plain': [log('plain', 0, 0.4, 0.5)]}) == ''
    std = dict(channel=0.01, filter=0.02, spatial=0.03, kernel=0.04)
    awake = [
        log('od_k4', seed, 0.42, 0.5)
        | dict(attention_std=std, dynamic_layers=share, mAP_static=static)
        for seed, share, static in ((0, 0.5, 0.40), (1, 1.0, 0.38))
    ]
    rows = [r.split(' | ') for r in dynamics({'od_k4': awake}).splitlines()[2:]]
    stds = ['0.0100', '0.0200', '0.0300', '0.0400']
    assert rows == [['| od_k4', *stds, '75%', '42.0 ± 0.0', '39.0 ± 1.4 |']]


def test_there_is_no_table_without_two_arms_to_compare(tool):
    assert not tool('table').differences({'plain_rate4': [log('plain_rate4', 0, 0.5, 0.5)]})


def test_an_arm_at_another_rate(tool):
    run = tool('run')
    slow, fast = (run.arm_config(arm, 0, task='fine_tune') for arm in ('plain', 'plain_rate2.5'))
    assert fast.optim_wrapper.optimizer.lr == 2.5 * slow.optim_wrapper.optimizer.lr
    assert fast.model == slow.model


def test_no_logs(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool('table').main(['--logs', str(tmp_path)])
    assert 'has no log' in capsys.readouterr().err


@pytest.mark.parametrize(
    'task',
    ['narrow', 'mobile', *(pytest.param(t, marks=pytest.mark.slow) for t in ('shapes', 'light'))],
)
def test_every_arm_builds_with_the_counts_of_its_convolutions(tool, task):
    run = tool('run')
    counts = {arm: run.count(run.arm_config(arm, 0, task=task)) for arm in run.TASKS[task][1]}
    plain = counts['plain']
    assert counts['od_k1']['multiply_adds'] == plain['multiply_adds']
    # A bank is mixed once for an image: as many multiply-adds as it has entries.
    banks = sum(
        layer.weight.numel()
        for layer in run.MODELS.build(run.arm_config('od_k4', 0, task=task).model).modules()
        if isinstance(layer, ODConv2d)
    )
    assert counts['od_k4']['multiply_adds'] == plain['multiply_adds'] + banks
    assert counts['plain_wide_madds']['multiply_adds'] >= counts['od_k4']['multiply_adds']


@pytest.mark.parametrize(
    'task', ['pretrained', 'light_pretrained', 'fine_tune', 'fine_tune_deeppcb']
)
def test_the_rates_of_arms_from_static_weights(tool, task):
    run = tool('run')
    rates = {}
    for arm in ('plain', 'od_k4_ln', 'od_k4_ln_spread0.1', 'od_k4_ln_frozen_banks'):
        config = run.arm_config(arm, 0, task=task)
        model = run.MODELS.build(config.model)
        groups = run.build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
        lrs = {
            id(p): g['lr'] / config.optim_wrapper.optimizer.lr for g in groups for p in g['params']
        }
        rates[arm] = {name: lrs[id(p)] for name, p in model.named_parameters() if id(p) in lrs}
    assert set(rates['plain'].values()) == {1}
    assert set(rates['od_k4_ln_spread0.1'].values()) == {1}
    bank, attention = (
        'backbone.layer{}.1.conv2.weight',
        'backbone.layer{}.1.conv2.attention.fc.weight',
    )
    assert rates['od_k4_ln'][bank.format(3)] == rates['od_k4_ln_frozen_banks'][bank.format(3)] == 2
    assert rates['od_k4_ln'][attention.format(3)] == 1
    assert rates['od_k4_ln_frozen_banks'][bank.format(1)] == 0
    assert rates['od_k4_ln_frozen_banks']['backbone.layer1.1.bn2.weight'] == 0
    assert rates['od_k4_ln_frozen_banks'][attention.format(1)] == 1


def test_only_what_is_missing_is_started(tool, tmp_path, monkeypatch, capsys):
    run = tool('run')
    (tmp_path / 'plain-0.json').write_text('{}')
    started = []
    monkeypatch.setattr(run, 'run', lambda arm, seed, *rest: started.append((arm, seed)))
    run.main(['plain', '--seeds', '0', '1', '--logs', str(tmp_path)])
    assert started == [('plain', 1)]
    run.main(['plain', '--seeds', '0', '--logs', str(tmp_path)])
    assert started == [('plain', 1)]
    assert f'nothing to do: these runs have logs in {tmp_path}' in capsys.readouterr().out


@pytest.mark.parametrize('arm', ['odconv', 'plain_ratefast', 'odconv_rate2'])
def test_unknown_arm(tool, capsys, arm):
    with pytest.raises(SystemExit):
        tool('run').main([arm])
    assert f"there is no arm '{arm}'" in capsys.readouterr().err


def test_a_checkpoint_counts_once_it_has_been_evaluated(tool, tmp_path):
    last_checkpoint = tool('run').last_checkpoint
    assert last_checkpoint(tmp_path) is None
    for epoch in (9, 10):
        (tmp_path / f'epoch_{epoch}.pth').touch()
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    metrics = {
        f'coco/bbox_{n}': 0.1 for n in ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    }
    # The second line was cut off by a kill.
    log.write_text(json.dumps({**metrics, 'step': 9}) + '\n{"loss": 0.')
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_9.pth'
    for not_evaluated in (dict(val_begin=11), dict(val_interval=3)):
        assert last_checkpoint(tmp_path, **not_evaluated) == tmp_path / 'epoch_10.pth'


@pytest.fixture
def images(tmp_path):
    """The environment that names a few small images of the task."""
    tool = [
        sys.executable,
        ROOT / 'tools/study/make_shapes_dataset.py',
        tmp_path / 'data',
        '--hard',
    ]
    subprocess.run([*tool, '--train', '8', '--val', '4', '--size', '64', '64'], check=True)
    return {**os.environ, 'SHAPES_HARD_ROOT': str(tmp_path / 'data')}


@pytest.mark.slow
def test_costs_are_measured_again_for_all_rates_of_an_arm(tmp_path, images):
    logs = [tmp_path / f'{arm}-0.json' for arm in ('od_k1', 'od_k1_rate2')]
    for path in logs:
        path.write_text(json.dumps({'step_time': 0, 'evaluations': []}))
    command = [sys.executable, ROOT / 'tools/study/run.py', 'od_k1', 'od_k1_rate2', '--recount']
    command += ['--logs', tmp_path, '--options', json.dumps(OPTIONS)]
    subprocess.run(command, env=images, check=True)
    first, second = (json.loads(path.read_text()) for path in logs)
    assert first == second
    assert first['step_time'] > 0.5  # of the plain network's
    assert first['evaluations'] == []


@pytest.mark.slow
def test_a_run_killed_between_checkpoint_and_evaluation_has_a_whole_log(tmp_path, images):
    command = [sys.executable, ROOT / 'tools/study/run.py', 'plain', '--seeds', '0']
    command += ['--work-dirs', tmp_path / 'work', '--logs', tmp_path / 'logs']
    command += ['--options', json.dumps(OPTIONS)]
    log, second = tmp_path / 'logs/plain-0.json', tmp_path / 'work/plain-0/epoch_2.pth'

    with subprocess.Popen(command, env=images, stdout=subprocess.DEVNULL) as process:
        while not second.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert second.exists()
    assert not log.exists()

    subprocess.run(command, env=images, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(log.read_text())
    assert [entry['epoch'] for entry in found['evaluations']] == [1, 2, 3]
    assert [entry['iteration'] for entry in found['training']] == [1, 2, 3, 4, 5, 6]
    assert found['step_time'] == 1
    before = log.stat().st_mtime_ns
    subprocess.run(command, env=images, check=True)
    assert log.stat().st_mtime_ns == before


class Scores:
    """An evaluator whose AP is the mean of what the model gave."""

    def process(self, data_samples, data_batch):
        self.scores = [*getattr(self, 'scores', []), *data_samples]

    def evaluate(self, size):
        scores, self.scores = self.scores, []
        assert len(scores) == size
        return {'coco/bbox_mAP': sum(scores) / size}


def runner_with(layer):
    images = torch.randn(6, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    loader = torch.utils.data.DataLoader(images.flatten(0, 1), batch_size=2)
    model = torch.nn.Sequential(layer)
    model.val_step = lambda batch: model(batch).square().mean((1, 2, 3)).tolist()
    return SimpleNamespace(model=model, val_dataloader=loader, val_evaluator=Scores())


def test_logs_say_how_dynamic_the_layers_are(tool):
    dynamics = tool('run').dynamics
    assert dynamics(runner_with(torch.nn.Conv2d(4, 4, 3))) == {}

    asleep = runner_with(ODConv2d(4, 4, 3))
    found = dynamics(asleep)
    assert found['attention_std'] == dict(channel=0, filter=0, spatial=0, kernel=0)
    assert found['dynamic_layers'] == 0
    assert found['mAP_static'] == pytest.approx(tool('run').evaluate(asleep)['coco/bbox_mAP'])

    awake = runner_with(ODConv2d(4, 4, 3, attention_init='published'))
    found = dynamics(awake)
    assert min(found['attention_std'].values()) > 0.02
    assert found['dynamic_layers'] == 1
    assert found['mAP_static'] != pytest.approx(tool('run').evaluate(awake)['coco/bbox_mAP'])
