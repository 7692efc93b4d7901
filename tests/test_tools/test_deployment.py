"""The tools that put a detector elsewhere: export_onnx.py, test.py --onnx and onnx_demo.py."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config

from tests.conftest import ROOT
from tests.forked_tools import run
from tests.test_deployment.test_detections import CONFIGS, build, small_config
from tests.test_docs import BLOCK
from tests.test_tools.test_train_and_test import CONFIG, SMALL, metrics, run_tool
from tests.tiny_training import InChild

SIZE = 96


class Family:
    """A detector with random weights that finds boxes, and images with these as annotations."""

    def __init__(self, root, shapes, family):
        self.root, self.shapes = root, shapes
        self.annotations = root / 'annotations.json'
        self.annotations.write_text((shapes / 'annotations/instances_val.json').read_text())
        with mock.patch.dict(os.environ, SHAPES_ROOT=str(shapes)):
            config = Config.fromfile(ROOT / CONFIG)
        config.model = small_config(family)
        resize = next(t for t in config.test_dataloader.dataset.pipeline if t.type == 'Resize')
        resize.scale = (SIZE, SIZE)
        if family == 'mask-rcnn':
            config.test_dataloader.dataset.pipeline[2].with_mask = True
            config.test_evaluator.metric = ['bbox', 'segm']
        config.test_evaluator.ann_file = str(self.annotations)
        config.test_dataloader.dataset.ann_file = str(self.annotations)
        config.dump(root / 'config.py')
        self.config, self.checkpoint = root / 'config.py', root / 'weights.pth'
        torch.manual_seed(0)
        torch.save(dict(meta=dict(), state_dict=build(family).state_dict()), self.checkpoint)

    def run(self, tool, *args):
        options = [option for option in SMALL if not option.startswith('model.')]
        log, args = self.root / 'log', [*args, '--cfg-options', *options]
        assert InChild(run, tool, log, args, self.shapes).wait() == 0, log.read_text()[-3000:]

    def test(self, name, *args):
        work_dir = self.root / name
        self.run('test.py', self.config, self.checkpoint, '--work-dir', work_dir, *args)
        return {k: v for k, v in metrics(work_dir).items() if k.startswith('coco/')}

    def annotate(self):
        """Let some of the boxes that the detector finds be the annotations, a little moved."""
        self.test('first', '--out', self.root / 'found.pkl')
        content = json.loads(self.annotations.read_text())
        content['annotations'] = []
        for sample in pickle.loads((self.root / 'found.pkl').read_bytes()):
            found = sample['pred_instances']
            for box, label in list(zip(found['bboxes'], found['labels'], strict=True))[::2]:
                x1, y1, x2, y2 = (box + torch.rand(4)).tolist()
                content['annotations'].append(
                    dict(
                        id=len(content['annotations']) + 1,
                        image_id=sample['img_id'],
                        category_id=content['categories'][int(label)]['id'],
                        bbox=[x1, y1, x2 - x1, y2 - y1],
                        area=(x2 - x1) * (y2 - y1),
                        iscrowd=0,
                        segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]],
                    )
                )
        self.annotations.write_text(json.dumps(content))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Four images of 96 × 128 pixels, which the detectors here take as they are."""
    root = tmp_path_factory.mktemp('shapes')
    args = [root / 'shapes', '--train', 1, '--val', 4, '--size', SIZE, SIZE]
    subprocess.run(
        [sys.executable, ROOT / 'tools/study/make_shapes_dataset.py', *map(str, args)], check=True
    )
    return root / 'shapes'


@pytest.mark.slow
@pytest.mark.usefixtures('_onnx_export')
@pytest.mark.parametrize('family', CONFIGS)
def test_the_file_has_the_ap_of_the_detector(tmp_path, shapes, family):
    detector = Family(tmp_path, shapes, family)
    detector.annotate()
    out = tmp_path / 'detector.onnx'
    detector.run(
        'deployment/export_onnx.py', detector.config, detector.checkpoint,
        *('--out', out, '--shape', SIZE, SIZE, '--fixed-shape', '--images', shapes / 'val'),
    )  # fmt: skip
    expected = detector.test('torch')
    actual = detector.test('onnx', '--onnx', out)
    assert expected['coco/bbox_mAP'] > 0.2
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, abs=1e-3), key


def demo(*args, ok=True):
    """onnx_demo.py in a process of its own, in which PyTorch cannot be imported."""
    blocked = 'import sys; sys.modules["torch"] = sys.modules["mmcv"] = None; import runpy; '
    path = str(ROOT / 'tools/deployment/onnx_demo.py')
    code = f'sys.argv = {[path, *map(str, args)]}; runpy.run_path({path!r}, run_name="__main__")'
    result = subprocess.run([sys.executable, '-c', blocked + code], capture_output=True, text=True)
    assert (result.returncode == 0) == ok, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout if ok else result.stderr


@pytest.fixture(scope='module', params=['retinanet', 'yolox', 'mask-rcnn'])
def written(request, _onnx_export, shapes, tmp_path_factory):
    """A file of a detector whose config resizes, or pads to a square too."""
    detector = Family(tmp_path_factory.mktemp(request.param), shapes, request.param)
    config = Config.fromfile(detector.config)
    pipeline = config.test_dataloader.dataset.pipeline
    step = next(i for i, step in enumerate(pipeline) if step['type'] == 'Resize')
    pipeline[step] = dict(type='Resize', scale=(150, 100), keep_ratio=True)
    if request.param == 'yolox':
        pad = dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0)))
        pipeline.insert(step + 1, pad)
    config.dump(detector.config)
    out = detector.root / 'detector.onnx'
    # 96 × 96 become 100 × 100, and are padded to a multiple of 32.
    detector.run(
        'deployment/export_onnx.py', detector.config, detector.checkpoint,
        *('--out', out, '--shape', 128, 128, '--fixed-shape'),
    )  # fmt: skip
    return detector, out


@pytest.mark.slow
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_the_demo_finds_what_mmdet_finds(written, shapes, tmp_path, runtime):
    pytest.importorskip(runtime)
    detector, onnx = written
    demo(shapes / 'val', onnx, '--out-dir', tmp_path, '--score-thr', 0, '--runtime', runtime)
    found = json.loads((tmp_path / 'detections.json').read_text())
    model = init_detector(str(detector.config), str(detector.checkpoint), device='cpu')
    images = sorted((shapes / 'val').iterdir())
    assert sorted(found) == [image.name for image in images]
    classes = model.dataset_meta['classes']
    for image in images:
        assert (tmp_path / image.name).is_file()
        expected = inference_detector(model, str(image)).pred_instances
        boxes = np.array([one['box'] for one in found[image.name]])
        scores = np.array([one['score'] for one in found[image.name]])
        labels = np.array([classes.index(one['label']) for one in found[image.name]])
        assert len(expected) == len(boxes) > 0
        for box, score, label in zip(
            expected.bboxes.numpy(), expected.scores.numpy(), expected.labels.numpy(), strict=True
        ):
            far = np.abs(boxes - box).max(1) / max(1, np.abs(box).max())
            same = (far < 1e-3) & (np.abs(scores - score) < 1e-3) & (labels == label)
            assert same.any(), (image, box, score, label)


@pytest.fixture(scope='module')
def tiny(_onnx_export, tmp_path_factory):
    """A file of a detector that finds one box, whose score is the mean of the image."""
    import onnx
    from onnx import TensorProto, helper

    about = dict(
        resize=None, pad=None, bgr_to_rgb=False, mean=[0.0] * 3, std=[255.0] * 3, size_divisor=1,
        pad_value=0.0, classes=['dot'], outputs=['boxes', 'scores', 'labels'], batch=1,
        score_threshold=0.0,
    )  # fmt: skip
    values = dict(boxes=np.float32([[[1, 2, 9, 8]]]), scores=None, labels=np.int64([[0]]))
    shape = onnx.numpy_helper.from_array(np.int64([1, 1]))
    nodes = [
        *(
            helper.make_node('Constant', [], [name], value=onnx.numpy_helper.from_array(value))
            for name, value in values.items()
            if value is not None
        ),
        helper.make_node('Constant', [], ['shape'], value=shape),
        helper.make_node('ReduceMean', ['image'], ['mean']),
        helper.make_node('Reshape', ['mean', 'shape'], ['scores']),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (('image', [1, 3, None, None]), ('size', [1, 2]), ('scale', [1, 2]))
    ]
    outputs = [
        helper.make_tensor_value_info('boxes', TensorProto.FLOAT, [1, 1, 4]),
        helper.make_tensor_value_info('scores', TensorProto.FLOAT, [1, 1]),
        helper.make_tensor_value_info('labels', TensorProto.INT64, [1, 1]),
    ]
    graph = helper.make_graph(nodes, 'tiny', inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    root = tmp_path_factory.mktemp('tiny')
    onnx.save(model, root / 'other.onnx')
    model.metadata_props.add(key='mmdet_odconv.detector', value=json.dumps(about))
    onnx.save(model, root / 'tiny.onnx')
    (root / 'cut.onnx').write_bytes((root / 'tiny.onnx').read_bytes()[:-200])
    (root / 'empty').mkdir()
    (root / 'no.jpg').write_text('no image')
    cv2.imwrite(str(root / 'image.png'), np.full((20, 30, 3), 153, np.uint8))
    video = cv2.VideoWriter(str(root / 'v.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (32, 32))
    for _ in range(8):
        video.write(np.random.randint(0, 255, (32, 32, 3), np.uint8))
    video.release()
    content = (root / 'v.avi').read_bytes()
    (root / 'cut.avi').write_bytes(content[: len(content) // 2])
    return root


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_the_demo_writes_what_it_finds(tiny, tmp_path, runtime):
    pytest.importorskip(runtime)
    options = ('--out-dir', tmp_path, '--runtime', runtime)
    output = demo(tiny / 'image.png', tiny / 'tiny.onnx', *options)
    assert output == f'wrote 1 images and detections.json to {tmp_path}\n'
    found = json.loads((tmp_path / 'detections.json').read_text())
    score = pytest.approx(0.6, abs=1e-6)
    assert found == {'image.png': [dict(box=[1, 2, 9, 8], score=score, label='dot')]}
    assert (cv2.imread(str(tmp_path / 'image.png')) != 153).any()


def test_the_demo_takes_a_video(tiny, tmp_path):
    demo(tiny / 'v.avi', tiny / 'tiny.onnx', '--out-dir', tmp_path)
    assert len(json.loads((tmp_path / 'detections.json').read_text())) == 8


def test_what_a_video_has_before_its_end_is_kept(tiny, tmp_path):
    output = demo(tiny / 'cut.avi', tiny / 'tiny.onnx', '--out-dir', tmp_path)
    number = len(json.loads((tmp_path / 'detections.json').read_text()))
    assert 0 < number < 8
    assert f'cut.avi ends after {number} of ' in output


@pytest.mark.parametrize(
    ('image', 'onnx', 'message'),
    [
        ('image.png', 'cut.onnx', r'cut\.onnx is not a whole ONNX file: .*'),
        ('image.png', 'other.onnx', r'other\.onnx is not a file that export_onnx\.py wrote .*'),
        ('image.png', 'none.onnx', r'no such file: .*none\.onnx'),
        ('empty', 'tiny.onnx', r'no image \(\.bmp, .*\) in .*empty'),
        ('none.png', 'tiny.onnx', r'no such file or folder: .*none\.png'),
        ('no.jpg', 'tiny.onnx', r'cannot be read as an image or a video: .*no\.jpg'),
    ],
)
def test_the_demo_says_in_one_sentence_what_is_wrong(tiny, tmp_path, image, onnx, message):
    error = demo(tiny / image, tiny / onnx, '--out-dir', tmp_path / 'out', ok=False)
    assert re.fullmatch(f'(.*{message})\n', error.splitlines(keepends=True)[-1]), error
    assert 'Traceback' not in error


@pytest.fixture(scope='module')
def service(tiny):
    """The service of the documentation, started as it says, and where it answers."""
    for package in ('fastapi', 'uvicorn', 'httpx'):
        pytest.importorskip(package)
    page = (ROOT / 'docs/deployment.md').read_text()
    code = next(m['code'] for m in BLOCK.finditer(page) if m['title'] == 'service.py')
    (tiny / 'service.py').write_text(code)
    (tiny / 'onnx_demo.py').write_text((ROOT / 'tools/deployment/onnx_demo.py').read_text())
    (tiny / 'detector.onnx').write_bytes((tiny / 'tiny.onnx').read_bytes())
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        port = str(one.getsockname()[1])
    (line,) = re.findall('^uvicorn .*$', page, re.MULTILINE)
    command = line.replace('8000', port).split()
    process = subprocess.Popen([sys.executable, '-m', *command], cwd=tiny)
    for _ in range(300):
        with socket.socket() as one:
            if one.connect_ex(('127.0.0.1', int(port))) == 0:
                break
        assert process.poll() is None
        time.sleep(0.1)
    yield f'http://127.0.0.1:{port}/detect'
    process.terminate()
    process.wait()


def encoded(value):
    return cv2.imencode('.png', np.full((20, 30, 3), value, np.uint8))[1].tobytes()


def test_requests_at_once_get_the_answers_of_one(service):
    import httpx

    values = range(100, 250, 15)
    alone = [httpx.post(service, content=encoded(value), timeout=60).json() for value in values]
    scores = [found[0]['score'] for found in alone]
    assert scores == pytest.approx([value / 255 for value in values], abs=1e-5)
    with ThreadPoolExecutor(10) as pool:
        ask = lambda value: httpx.post(service, content=encoded(value), timeout=60).json()  # noqa: E731
        assert list(pool.map(ask, values)) == alone


@pytest.mark.parametrize(
    ('content', 'status', 'message'),
    [
        (b'', 400, 'the body of the request must be an image file, say JPEG or PNG'),
        (b'no image', 400, 'the body of the request must be an image file, say JPEG or PNG'),
        (bytes(20_000_001), 413, 'an image has at most 20000000 bytes'),
    ],
)
def test_bad_requests_are_answered_in_one_sentence(service, content, status, message):
    import httpx

    answer = httpx.post(service, content=content, timeout=60)
    assert (answer.status_code, answer.json()) == (status, dict(detail=message))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('curl') is None, reason='curl is not installed')
def test_the_request_of_the_page(service, tiny):
    (line,) = re.findall('^curl .*$', (ROOT / 'docs/deployment.md').read_text(), re.MULTILINE)
    line = line.replace('http://127.0.0.1:8000/detect', service).replace('image.jpg', 'image.png')
    answer = subprocess.run(line.split(), cwd=tiny, capture_output=True, check=True).stdout
    assert json.loads(answer)[0]['label'] == 'dot'


@pytest.mark.slow
@pytest.mark.usefixtures('_onnx_export')
def test_the_commands_of_the_page(tmp_path, shapes):
    detector = Family(tmp_path, shapes, 'retinanet')
    values = dict(CONFIG=detector.config, CHECKPOINT=detector.checkpoint, IMAGES=shapes / 'val')
    page = (ROOT / 'docs/deployment.md').read_text().replace('\\\n', ' ')
    lines = [
        line
        for match in BLOCK.finditer(page)
        for line in match['code'].splitlines()
        if match['language'] == 'shell' and line.startswith('python ') and 'IMAGE ' not in line
    ]
    assert len(lines) >= 3
    for line in lines:
        if 'int8.xml' in line and not all(map(find_spec, ('nncf', 'openvino'))):
            continue
        for name, value in values.items():
            line = re.sub(rf'\b{name}\b', str(value), line)
        _, tool, *args = line.split()
        if tool == 'tools/test.py':
            args += ['--work-dir', tmp_path / 'work', '--cfg-options', *SMALL]
        run_tool(tool.removeprefix('tools/'), *args, folder=tmp_path, shapes=shapes)
    assert json.loads((tmp_path / 'outputs/detections.json').read_text())
