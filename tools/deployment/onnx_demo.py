#!/usr/bin/env python
"""Find objects with an ONNX file of export_onnx.py, without PyTorch: to be copied and changed.

It needs numpy, OpenCV and onnxruntime or openvino. It draws the boxes of an image, of the images in
a folder or of a video, and writes them to detections.json.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

KEY = 'mmdet_odconv.detector'
IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


class Detector:
    """A detector in an ONNX file; call it with images, height × width × 3 in OpenCV's order.

    Raises:
        ValueError: The file is not one of export_onnx.py, or has the outputs of a head.
    """

    def __init__(self, path, runtime='onnxruntime', threads=0):
        try:
            metadata = self._open(str(path), runtime, threads)
        except ImportError as error:
            raise ValueError(f'{runtime} is not installed') from error
        except Exception as error:  # the runtimes' own, of many kinds
            if not Path(path).is_file():
                raise ValueError(f'no such file: {path}') from error
            raise ValueError(f'{path} is not a whole ONNX file: {error}'.splitlines()[0]) from error
        if KEY not in metadata:
            raise ValueError(f'{path} is not a file that export_onnx.py wrote without --raw')
        self.about = json.loads(metadata[KEY])
        if self.about['batch'] not in (1, None):
            raise ValueError(f'{path} takes {self.about["batch"]} images at once, not one')

    def _open(self, path, runtime, threads):
        if runtime == 'onnxruntime':
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads  # 0: as many as there are cores
            session = onnxruntime.InferenceSession(path, options)
            self.run = lambda inputs: session.run(self.about['outputs'], inputs)
            return session.get_modelmeta().custom_metadata_map
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        config = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
        compiled = core.compile_model(
            model, 'CPU', config | ({'INFERENCE_NUM_THREADS': threads} if threads else {})
        )
        # Each call has a request of its own, so that threads can call at the same time.
        self.run = lambda inputs: list(compiled.create_infer_request().infer(inputs).values())
        entry = ['framework', KEY]
        return {KEY: model.get_rt_info(entry).value} if model.has_rt_info(entry) else {}

    def preprocess(self, image):
        """The network's input, its size without the last padding, and the factors of resizing."""
        about, (height, width) = self.about, image.shape[:2]
        resize, pad = about['resize'], about['pad']
        if resize:
            image = cv2.resize(image, new_size(width, height, **resize))
        scale = image.shape[1] / width, image.shape[0] / height
        if pad:
            w, h = pad['size'] or (0, 0)
            h, w = max(h, image.shape[0]), max(w, image.shape[1])
            if pad['square']:
                h = w = max(h, w)
            image = padded(image, h, w, pad['divisor'] or 1, pad['value'])
        size = image.shape[:2]
        if about['bgr_to_rgb']:
            image = image[..., ::-1]
        image = (image.astype(np.float32) - np.float32(about['mean'])) / np.float32(about['std'])
        image = padded(image, *size, about['size_divisor'], about['pad_value'])
        return np.ascontiguousarray(image.transpose(2, 0, 1)), np.float32(size), np.float32(scale)

    def __call__(self, image, score_thr=0.0):
        """A dict for each box: its corners, score and label, and its mask if the file has any."""
        inputs = (part[None] for part in self.preprocess(image))
        outputs = self.run(dict(zip(('image', 'size', 'scale'), inputs, strict=True)))
        classes = self.about['classes']
        found = []
        for box, score, label, *mask in zip(*(output[0] for output in outputs), strict=True):
            if label >= 0 and score >= score_thr:
                name = classes[label] if classes else int(label)
                found.append(dict(box=box.tolist(), score=float(score), label=name))
                if mask:
                    found[-1]['mask'] = pasted(mask[0], box, image.shape[:2]) >= 0.5
        return found


def new_size(width, height, scale, keep_ratio):
    """Width and height after resizing to ``scale``, a factor or width and height, as in mmcv."""
    if not isinstance(scale, list):
        scale = [int(width * scale + 0.5), int(height * scale + 0.5)]
    if not keep_ratio:
        return tuple(scale)
    factor = min(max(scale) / max(width, height), min(scale) / min(width, height))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def padded(image, height, width, divisor, value):
    """The image with ``value`` below and on the right, its size a multiple of ``divisor``."""
    below = -(-height // divisor) * divisor - image.shape[0]
    right = -(-width // divisor) * divisor - image.shape[1]
    value = value if isinstance(value, list) else [value] * 3
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=value)


def pasted(mask, box, shape):
    """The probabilities of a mask, given for the cells of its box, at the pixels of the image."""
    weights = []  # of each cell for each pixel, along the height and along the width
    for low, high, pixels, cells in zip(box[1::-1], box[:1:-1], shape, mask.shape, strict=True):
        place = (np.arange(pixels) + 0.5 - low) / max(high - low, 1e-6) * cells - 0.5
        weights.append(np.maximum(0, 1 - abs(place[:, None] - np.arange(cells))))
    return weights[0] @ mask @ weights[1].T


def draw(image, found):
    for one in found:
        if 'mask' in one:
            image[one['mask']] = image[one['mask']] // 2 + np.uint8([0, 100, 0])
        x1, y1, x2, y2 = (round(value) for value in one['box'])
        cv2.rectangle(image, (x1, y1), (x2, y2), (0, 200, 0), 1)
        text = f'{one["label"]} {one["score"]:.2f}'
        cv2.putText(image, text, (x1, max(y1 - 3, 8)), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 200))
    return image


def frames(path):
    """The images of a file, a folder or a video, each with its name."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        if not files:
            raise SystemExit(f'no image ({", ".join(IMAGES)}) in {path}')
    elif path.is_file():
        files = [path]
    else:
        raise SystemExit(f'no such file or folder: {path}')
    for file in files:
        image = cv2.imread(str(file))
        if image is not None:
            yield file.name, image
            continue
        video, number = cv2.VideoCapture(str(file)), 0
        while len(files) == 1:
            there, image = video.read()
            if not there:
                break
            yield f'{file.stem}-{number:06d}.jpg', image
            number += 1
        if not number:
            raise SystemExit(f'cannot be read as an image or a video: {file}')
        promised = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if number < promised:
            print(f'{file} ends after {number} of {promised} frames; these are written')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('input', type=Path, help='image, folder of images, or video')
    parser.add_argument('onnx', type=Path, help='file of export_onnx.py')
    parser.add_argument('--out-dir', type=Path, default=Path('outputs'), help='folder to write')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of a box')
    parser.add_argument('--runtime', choices=['onnxruntime', 'openvino'], default='onnxruntime')
    args = parser.parse_args()
    try:
        detector = Detector(args.onnx, args.runtime)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    args.out_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, image in frames(args.input):
        found = detector(image, args.score_thr)
        cv2.imwrite(str(args.out_dir / name), draw(image, found))
        results[name] = [{key: one[key] for key in ('box', 'score', 'label')} for one in found]
        (args.out_dir / 'detections.json').write_text(json.dumps(results, indent=1))
    print(f'wrote {len(results)} images and detections.json to {args.out_dir}')


if __name__ == '__main__':
    main()
