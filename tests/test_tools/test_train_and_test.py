"""The tools as a user runs them, on a handful of generated images."""

import json
import os
import pickle
import re
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.tiny_training import InChild

CONFIG = 'configs/odconv/retinanet_od_r18_shapes.py'
SMALL = [
    'model.backbone.base_channels=8',
    'model.neck.in_channels=[8,16,32,64]',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'train_dataloader.batch_size=4',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.logger.interval=1',
    'randomness.seed=0',
]


def run_tool(name, *args, shapes=None, ok=True, folder=ROOT, **env):
    """A tool in a process forked from this one, which need not import MMDetection again.

    Returns:
        SimpleNamespace: With the texts ``stdout`` and ``stderr``.
    """
    if shapes:
        env['SHAPES_ROOT'] = str(shapes)
    with tempfile.TemporaryDirectory() as logs:
        paths = [Path(logs, name) for name in ('stdout', 'stderr')]
        exit_code = InChild(run_in_this_process, name, args, folder, env, *paths).wait()
        result = SimpleNamespace(**{path.name: path.read_text() for path in paths})
    assert (exit_code == 0) == ok, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def run_in_this_process(name, args, folder, env, stdout, stderr=None):
    """A tool, as its own process would be; its output goes to one file, or to two."""
    sys.stdout = stdout.open('w', buffering=1)
    sys.stderr = sys.stdout if stderr is None else stderr.open('w', buffering=1)
    for number, file in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.update(env)
    sys.argv = [name, *map(str, args)]
    tool = ROOT / 'tools' / name
    sys.path.insert(0, str(tool.parent))
    runpy.run_path(str(tool), run_name='__main__')


def records(work_dir):
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two epochs on 16 shapes images."""
    root = tmp_path_factory.mktemp('tools')
    shapes, work_dir = root / 'shapes', root / 'work'
    run_tool('study/make_shapes_dataset.py', shapes, '--train', 16, '--val', 8, '--size', 96, 96)
    args = ['--resume', '--work-dir', work_dir, '--cfg-options', *SMALL, 'train_cfg.max_epochs=2']
    run_tool('train.py', CONFIG, *args, shapes=shapes)
    return SimpleNamespace(shapes=shapes, work_dir=work_dir, checkpoint=work_dir / 'epoch_2.pth')


def test_with_nothing_to_resume_the_training_starts_anew_and_says_so(trained):
    log = min(trained.work_dir.glob('*/*.log')).read_text()
    assert f'WARNING - There is nothing to resume in {trained.work_dir}, so the training' in log


def test_training_lowers_the_loss_and_validates(trained):
    losses = [r['loss'] for r in records(trained.work_dir) if 'loss' in r]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert trained.checkpoint.is_file()


def test_testing_a_checkpoint_gives_the_metrics_of_the_runs_own_validation(trained, tmp_path):
    validated = [r for r in records(trained.work_dir) if 'coco/bbox_mAP' in r]
    out = tmp_path / 'predictions.pkl'
    run_tool(
        *('test.py', CONFIG, trained.checkpoint, '--work-dir', tmp_path, '--out', out),
        *('--show-dir', 'painted', '--cfg-options', *SMALL),
        shapes=trained.shapes,
    )
    tested = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    for key, value in tested.items():
        if key.startswith('coco/') and validated:
            assert value == validated[-1][key], key
    assert len(pickle.loads(out.read_bytes())) == 8
    assert len(list(tmp_path.glob('*/painted/*.jpg'))) == 8


def metrics(work_dir):
    """The metrics that tools/test.py left in its work folder."""
    return json.loads(next(work_dir.glob('*/*.json')).read_text())


def check_metrics_stay(trained, folder, config, *option):
    """Test the checkpoint without and with ``option`` of tools/test.py."""
    for name, own in (('without', []), ('with', option)):
        run_tool(
            *('test.py', config, trained.checkpoint, *own, '--work-dir', folder / name),
            *('--cfg-options', *SMALL),
            shapes=trained.shapes,
        )
    changed = metrics(folder / 'with')
    for key, value in metrics(folder / 'without').items():
        if key.startswith('coco/'):
            assert changed[key] == pytest.approx(value, abs=1e-3), key


def test_testing_with_augmentation(trained, tmp_path):
    run_tool(
        *('test.py', CONFIG, trained.checkpoint, '--tta', '--work-dir', tmp_path),
        *('--cfg-options', *SMALL),
        shapes=trained.shapes,
    )


@pytest.mark.parametrize('ema', [True, False])
def test_fused_norms_and_collapsed_layers_leave_the_metrics(trained, tmp_path, ema):
    config = tmp_path / 'config.py'
    hooks = "custom_hooks = [dict(type='EMAHook')]" if ema else ''
    config.write_text(f'_base_ = {str(ROOT / CONFIG)!r}\n{hooks}\n')
    # After two epochs no attention has moved by much.
    collapse = [] if ema else ['--collapse-static', 8]
    check_metrics_stay(trained, tmp_path, config, '--fuse-conv-bn', *collapse)
    if collapse:
        log = next((tmp_path / 'with').glob('*/*.log')).read_text()
        assert 'dynamic layers vary by less than 0.003' in log


@pytest.mark.slow
@pytest.mark.usefixtures('_onnx_export')
def test_an_onnx_file_has_the_metrics_of_the_detector(trained, tmp_path):
    out, options = tmp_path / 'detector.onnx', ('--cfg-options', *SMALL)
    export = ('deployment/export_onnx.py', CONFIG, trained.checkpoint, '--out', out)
    result = run_tool(*export, '--images', trained.shapes / 'val', *options, shapes=trained.shapes)
    assert re.search(r'(\d+) of \1 detections in it and in PyTorch', result.stdout)
    check_metrics_stay(trained, tmp_path, CONFIG, '--onnx', out)
    result = run_tool(*export, *options, shapes=trained.shapes, ok=False)
    assert result.stderr.splitlines()[-1] == f'{out} exists; --force overwrites it'


def test_a_run_can_be_resumed(trained):
    run_tool(
        *('train.py', CONFIG, '--resume', '--work-dir', trained.work_dir),
        *('--cfg-options', *SMALL, 'train_cfg.max_epochs=3'),
        shapes=trained.shapes,
    )
    assert (trained.work_dir / 'epoch_3.pth').is_file()
    steps = [r['iter'] for r in records(trained.work_dir) if 'loss' in r]
    assert steps == [9, 10, 11, 12]


def test_detections_are_drawn_into_png_files(trained, tmp_path):
    run_tool(
        *('image_demo.py', trained.shapes / 'val', CONFIG, trained.checkpoint, '--limit', 2),
        *('--out-dir', tmp_path, '--score-thr', 0.0, '--fuse-conv-bn', '--cfg-options', *SMALL[:2]),
        shapes=trained.shapes,
    )
    pictures = sorted(p.name for p in tmp_path.iterdir())
    assert pictures == ['000000.png', '000001.png']


def test_no_drawing_takes_the_place_of_an_image_or_of_another():
    outputs = runpy.run_path(str(ROOT / 'tools/image_demo.py'))['output_files']
    images = [Path('in/a.jpg'), Path('in/b.jpg'), Path('in/b.png')]
    names = ['a.png', 'b.jpg.png', 'b.png.png']
    assert outputs(images, Path('in')) == [Path('in', name) for name in names]
    with pytest.raises(SystemExit, match=r'b\.png would be overwritten; .* --out-dir$'):
        outputs(images[2:], Path('in'))


def test_curves_of_a_run_that_was_killed_and_went_on(tmp_path):
    """The first log is of another run, the second ends within a line."""
    texts = (
        '{"loss": 9.0, "step": 1}\n{"loss": 8.0, "step": 5}',
        '{"loss": 2.5, "step": 1}\n{"coco/bbox_mAP": 0.5, "step": 1}\n'
        '{"loss": 2.0, "step": 2}\n{"loss": 1.5, "st',
        '{"loss": 1.9, "step": 2}\n{"loss": 1.0, "step": 3}\n{"coco/bbox_mAP": 0.6, "step": 2}',
        '{"coco/bbox_mAP": 0.6, "step": 0}',
    )
    for time, text in enumerate(texts):
        log = tmp_path / f'{time}/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(text)
    tool = runpy.run_path(str(ROOT / 'tools/analysis_tools/plot_curves.py'))
    losses, scores = tool['read_curves'](tool['logs_of_run'](tmp_path), ['bbox_mAP'])
    assert losses == dict(loss={1: 2.5, 2: 1.9, 3: 1.0})
    assert scores == dict(bbox_mAP={1: 0.5, 2: 0.6})


def test_curves_are_drawn(trained, tmp_path):
    run_tool('analysis_tools/plot_curves.py', trained.work_dir, '--out', tmp_path / 'c.png')
    assert (tmp_path / 'c.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['train.py', 'configs/odconv/retinanet_od_r05.py'], 'config not found: configs/odconv/'),
        (['train.py', 'configs/odconv/retinanet_od_r50.py'], 'not found: data/coco/annotations/'),
        (['train.py', CONFIG, '--resume', 'x.pth'], 'checkpoint not found: x.pth'),
        (['test.py', CONFIG, 'x.pth'], 'checkpoint not found: x.pth (looked for '),
        (['image_demo.py', 'no.jpg', CONFIG, 'x.pth'], 'image not found: no.jpg'),
        (['analysis_tools/plot_curves.py', 'nowhere'], 'no training log in '),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(trained, args, message):
    result = run_tool(*args, shapes=trained.shapes, ok=False)
    assert message in result.stderr.splitlines()[-1]
    assert 'Traceback' not in result.stderr


def test_a_metric_that_there_is_not_ends_in_one_sentence(trained, tmp_path):
    result = run_tool(
        *('test.py', CONFIG, trained.checkpoint, '--work-dir', tmp_path),
        *('--cfg-options', *SMALL, 'test_evaluator.metric=bbx'),
        shapes=trained.shapes,
        ok=False,
    )
    assert 'but got bbx' in result.stderr.splitlines()[-1]
    assert 'Traceback' not in result.stderr
