"""Make a synthetic object-detection data set in COCO format, so that no download is needed.

Every image is a procedural background with 2 to 10 tilted shapes of five classes, about half of
them under 32x32 px in area. A class has a shape and a range of hues of its own: a small detector
that starts from nothing learns to tell the hues apart within minutes, the shapes alone it does not.
The folder ``OUT`` gets ``annotations/instances_{train,val}.json`` and the images
``{train,val}/000000.jpg`` onwards. Image ``i`` of a split is empty if ``i % 33 == 7``, else it also
has a crowd region if ``i % 25 == 12``: a split of 25 images has at least one of each.

``--hard`` makes a set that a small network cannot solve: each of the five shapes is plain, striped
or checked, which makes 15 classes, and nothing but shape and texture tells them apart. Hue, light,
contrast, sharpness, noise, rotation and background vary freely, most shapes are small, and bars and
half discs, which belong to no class, lie between them. No image of it is empty or has a crowd.

``--classification`` makes pictures for a classifier: each has one object of the hard set's classes
and lies in a folder of its class, ``{train,val}/striped_star/000000.jpg``. The classes take turns.

The same arguments give the same bytes with the same NumPy and OpenCV, and asking for more images
never changes the earlier ones. ``OUT/.unfinished.json`` exists only while a set is being made.

Example: python tools/study/make_shapes_dataset.py data/shapes --train 400 --val 100 --size 256 256
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Box = tuple[slice, slice]

CLASSES = ('circle', 'square', 'triangle', 'star', 'cross')
TEXTURES = ('plain', 'striped', 'checked')
SPLITS = ('train', 'val')
UNFINISHED = '.unfinished.json'
COUNT, SIDE, SEED = (0, 10**6), (64, 4096), (0, 2**63)  # least and most
LIMITS = {'train': COUNT, 'val': COUNT, 'width': SIDE, 'height': SIDE, 'seed': SEED}
CROWD_LABEL = 255  # the other labels in a scene's owner map count its objects from 1
MAX_HIDDEN = 0.25  # share of an object that later objects may hide
MIN_VISIBLE = 16  # px
HUES, HUE_RANGE = 180, 24  # of OpenCV's hues, what there is and what one class has


class _Style(NamedTuple):
    """What makes a set easy or hard. Scales are square roots of areas in px."""

    classes: tuple[str, ...]
    scales: tuple[tuple[float, float, float], ...]  # low, high, probability; see _scales
    max_turn: float
    contrast: float  # least distance of a shape's colour from what is around it
    hues: bool  # whether a class has a range of hues of its own
    backgrounds: int  # how many families there are
    distractors: int  # at most so many in an image
    disturbed: bool  # whether light, sharpness and noise vary


EASY = _Style(
    classes=CLASSES,
    scales=((10, 30, 0.58), (34, 90, 0.32), (98, 180, 0.1)),
    max_turn=np.pi / 12,  # upright enough to be told apart at 10 px
    contrast=100,
    hues=True,
    backgrounds=3,
    distractors=0,
    disturbed=False,
)
HARD = _Style(
    classes=tuple(f'{texture} {shape}' for texture in TEXTURES for shape in CLASSES),
    scales=((11, 20, 0.45), (20, 31, 0.35), (33, 60, 0.2)),
    max_turn=np.pi,
    contrast=60,
    hues=False,
    backgrounds=5,
    distractors=4,
    disturbed=True,
)


def _unit_polygons() -> list[Floats]:
    """Return one polygon of area 1 around the origin for each class."""

    def ring(corners: int, inner: float = 1.0) -> Floats:
        turns = np.exp(2j * np.pi * np.arange(corners) / corners)
        turns[1::2] *= inner
        return np.stack([turns.real, turns.imag], axis=1)

    arm = np.array([1 - 0.36j, 1 + 0.36j, 0.36 + 0.36j])
    turns = np.concatenate([arm * 1j**k for k in range(4)])
    cross = np.stack([turns.real, turns.imag], axis=1)
    polygons = [ring(48), ring(4), ring(3), ring(10, inner=0.45), cross]
    bar = np.array([[-2.5, -0.5], [2.5, -0.5], [2.5, 0.5], [-2.5, 0.5]])
    polygons += [bar, ring(48)[:25]]
    return [p / np.sqrt(cv2.contourArea(p.astype(np.float32))) for p in polygons]


# Of the classes' shapes, then of the two distractors, a bar and a half disc.
UNIT_POLYGONS = _unit_polygons()


def _colours(rng: np.random.Generator, n: int, low: Sequence[int], high: Sequence[int]) -> Floats:
    """Draw BGR colours whose hue, saturation and value lie between two bounds."""
    hsv = rng.integers(low, high, (n, 1, 3)).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[:, 0].astype(np.float64)


def _background(rng: np.random.Generator, height: int, width: int, families: int) -> Floats:
    """Return a pattern of values between 0 and 1, of one of the first few families.

    They are noise, stripes, a gradient, tiles and spots.
    """
    noise, cell = np.zeros((height, width)), rng.uniform(24, 110)
    for octave in range(4):
        rows, columns = (int(n * 2**octave / cell) + 2 for n in (height, width))
        grid = rng.random((rows, columns))
        noise += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    noise = np.asarray((noise - noise.min()) / np.ptp(noise))
    angle, period, kind = rng.uniform(0, np.pi), rng.uniform(14, 70), rng.integers(families)
    y, x = np.ogrid[:height, :width]
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == 0:
        return noise
    if kind == 1:
        return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * (along / period + noise)))
    if kind == 3:
        across = x * np.sin(angle) - y * np.cos(angle)
        tiles = (along // period).astype(int) * 7 + (across // period).astype(int) * 13
        return np.asarray(0.7 * (tiles % 5) / 4 + 0.3 * noise)
    if kind == 4:
        return np.asarray(np.clip(0.5 + 6 * (noise - np.quantile(noise, 0.6)), 0, 1))
    return np.asarray(0.65 * (along - along.min()) / np.ptp(along) + 0.35 * noise)


class _Scene:
    """One picture, and which object owns each of its pixels."""

    def __init__(
        self, rng: np.random.Generator, width: int, height: int, style: _Style = EASY
    ) -> None:
        self.rng, self.size, self.style = rng, np.array([width, height]), style
        self.palette = _colours(rng, 2, (0, 10, 50), (180, 110, 215))
        blend = _background(rng, height, width, style.backgrounds)[..., None]
        self.image = self.palette[0] * (1 - blend) + self.palette[1] * blend
        self.owner = np.zeros((height, width), np.uint8)
        self.areas = np.zeros(CROWD_LABEL + 1)  # by label, before anything hides a part
        self.objects: list[int] = []  # class indices
        self.crowd: tuple[int, Bools] | None = None

    def add_crowd(self) -> None:
        """Draw a cluster of tiny shapes of one class, and keep other objects out of it."""
        category, cell = int(self.rng.integers(len(CLASSES))), 12
        radius = np.clip(self.rng.uniform(0.2, 0.26, 2) * self.size, 13, 75)
        centre = self.rng.uniform(radius + 10, self.size - radius - 10)
        offsets = np.mgrid[-6:7, -6:7].reshape(2, -1).T * cell
        members, colour = np.zeros(self.owner.shape, np.bool_), None
        for offset in offsets[np.linalg.norm(offsets / radius, axis=1) <= 1]:
            at = centre + offset + self.rng.uniform(-1.5, 1.5, 2)
            cover, box = self._shape(category, self.rng.uniform(4.5, 6.5), at)
            colour = self._contrasting(category, box) if colour is None else colour
            self._paint(cover, box, colour * self.rng.uniform(0.8, 1.1))
            members[box] |= cover > 0.5
        around = cv2.dilate(members.astype(np.uint8), np.ones((15, 15), np.uint8))
        self.owner[around > 0] = CROWD_LABEL
        self.crowd = (category, members)

    def add_object(self, scale: float, category: int | None = None) -> None:
        """Place one shape of about ``scale ** 2`` px, smaller where room is short.

        Its class is drawn at random unless ``category`` names it.
        """
        if category is None:
            category = int(self.rng.integers(len(self.style.classes)))
        texture, shape = divmod(category, len(CLASSES))
        for _ in range(40):
            reach = scale * np.linalg.norm(UNIT_POLYGONS[shape], axis=1).max() + 3
            if (self.size > 2 * reach).all():
                centre = self.rng.uniform(reach, self.size - reach)
                cover, box = self._shape(shape, scale, centre)
                if self._fits(cover > 0.5, box):
                    self._paint(cover, box, self._contrasting(category, box), TEXTURES[texture])
                    self.objects.append(category)
                    self.owner[box][cover > 0.5] = len(self.objects)
                    self.areas[len(self.objects)] = (cover > 0.5).sum()
                    return
            scale = max(scale * 0.96, 8.0)

    def add_distractor(self) -> None:
        """Draw a bar or half disc that belongs to no class and that objects may cover."""
        shape = len(CLASSES) + int(self.rng.integers(2))
        scale = self.rng.uniform(10, 24)
        reach = scale * np.linalg.norm(UNIT_POLYGONS[shape], axis=1).max() + 3
        if (self.size > 2 * reach).all():
            cover, box = self._shape(shape, scale, self.rng.uniform(reach, self.size - reach))
            texture = TEXTURES[self.rng.integers(len(TEXTURES))]
            self._paint(cover, box, self._contrasting(0, box), texture)

    def disturb(self) -> None:
        """Change light, contrast and sharpness of the whole picture."""
        gain, middle = self.rng.uniform(0.45, 1.1), self.rng.uniform(70, 180)
        self.image = (self.image - 128) * gain + middle
        blur = self.rng.uniform(0, 1.1)
        if blur > 0.3:
            self.image = cv2.GaussianBlur(self.image, (0, 0), blur)

    def jpeg(self) -> bytes:
        """Return the picture with some sensor noise, as a JPEG file."""
        most = 14 if self.style.disturbed else 5
        grain = self.rng.normal(0, self.rng.uniform(1, most), self.owner.shape)
        pixels = np.clip(self.image + grain[..., None], 0, 255).astype(np.uint8)
        return cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    def annotations(self) -> list[dict[str, Any]]:
        """Return the annotations of the crowd and of what is visible of each object."""
        crowd = [_annotation(*self.crowd, crowd=True)] if self.crowd else []
        masks = [(c, self.owner == label) for label, c in enumerate(self.objects, 1)]
        return crowd + [_annotation(c, m, False) for c, m in masks if m.sum() >= MIN_VISIBLE]

    def _shape(self, shape: int, scale: float, centre: Floats) -> tuple[Floats, Box]:
        """Return a tilted shape's anti-aliased coverage and the image part it lies in."""
        angle = self.rng.uniform(-self.style.max_turn, self.style.max_turn)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = UNIT_POLYGONS[shape] @ turn * scale + centre
        x0, y0 = np.floor(points.min(axis=0)).astype(int) - 1
        x1, y1 = np.ceil(points.max(axis=0)).astype(int) + 2
        cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
        fixed = np.round((points - (x0, y0)) * 16).astype(np.int32)
        cv2.fillPoly(cover, [fixed], (255,), cv2.LINE_AA, shift=4)
        return cover / 255.0, (slice(y0, y1), slice(x0, x1))

    def _fits(self, mask: Bools, box: Box) -> bool:
        """Tell whether a shape here leaves enough of the earlier ones, and of itself, to see."""
        hit = np.bincount(self.owner[box][mask], minlength=len(self.areas))
        left = np.bincount(self.owner.ravel(), minlength=len(self.areas)) - hit
        if hit[CROWD_LABEL] or hit[1:].sum() > MAX_HIDDEN * mask.sum():
            return False
        return bool((left >= (1 - MAX_HIDDEN) * self.areas).all())

    def _contrasting(self, category: int, box: Box) -> Floats:
        """Draw a strong colour of the class that stands out from what the picture has here."""
        first, end = 0, HUES
        if self.style.hues:
            first = category * HUES // len(CLASSES)
            end = first + HUE_RANGE
        colours = _colours(self.rng, 24, (first, 110, 80), (end, 256, 256))
        step = max(1, (box[0].stop - box[0].start) // 12)
        pixels = self.image[box][::step, ::step].reshape(-1, 3)
        distance = np.linalg.norm(colours[:, None] - pixels, axis=2)
        contrast = np.quantile(distance, 0.05, axis=1)  # ignores a few odd pixels
        good = contrast > self.style.contrast
        return np.asarray(colours[np.argmax(good) if good.any() else np.argmax(contrast)])

    def _paint(self, cover: Floats, box: Box, colour: Floats, texture: str = 'plain') -> None:
        """Blend a shaded and finely striped colour into the picture, and a texture over it."""
        y, x = np.ogrid[-1 : 1 : cover.shape[0] * 1j, -1 : 1 : cover.shape[1] * 1j]
        angle = self.rng.uniform(0, 2 * np.pi)
        c, s = np.cos(angle), np.sin(angle)
        stripes = np.sin((x * s - y * c) * max(cover.shape) / self.rng.uniform(2, 8))
        light = 1 + 0.18 * (x * c + y * s) + self.rng.uniform(0, 0.09) * stripes
        alpha = cover[..., None]
        if texture != 'plain':
            # Stripes and checks in a much darker or lighter tone, seen from 10 px on.
            side = max(cover.shape)
            waves = [
                np.sin(along * np.pi * max(1.5, side / 9))
                for along in (x * c + y * s, x * s - y * c)
            ]
            wave = waves[0] if texture == 'striped' else waves[0] * waves[1]
            other = colour * 0.25 if colour.mean() > 110 else 255 - (255 - colour) * 0.35
            mix = np.clip(0.5 + 2.5 * wave, 0, 1)[..., None]
            colour = colour * (1 - mix) + other * mix
        self.image[box] = self.image[box] * (1 - alpha) + colour * light[..., None] * alpha


def _scales(rng: np.random.Generator, style: _Style, limit: float) -> list[float]:
    """Draw the square roots of the objects' areas, largest first so that all find room."""
    bands = [(low, min(high, limit), odds) for low, high, odds in style.scales if low < limit]
    odds = np.array([band[2] for band in bands])
    picks = rng.choice(len(bands), rng.integers(2, 11), p=odds / odds.sum())
    return sorted((float(rng.uniform(*bands[i][:2])) for i in picks), reverse=True)


def _scene(arguments: dict[str, int], split: str, index: int) -> _Scene:
    rng = np.random.default_rng([arguments['seed'], SPLITS.index(split), index])
    style = _style(arguments)
    scene = _Scene(rng, arguments['width'], arguments['height'], style)
    if style is EASY and index % 33 == 7:
        return scene
    if style is EASY and index % 25 == 12:
        scene.add_crowd()
    for _ in range(rng.integers(style.distractors + 1) if style.distractors else 0):
        scene.add_distractor()
    if arguments.get('classification'):
        scene.add_object(rng.uniform(0.22, 0.5) * min(scene.size), index % len(style.classes))
    else:
        for scale in _scales(rng, style, 0.42 * min(scene.size)):
            scene.add_object(scale)
    if style.disturbed:
        scene.disturb()
    return scene


def _style(arguments: dict[str, int]) -> _Style:
    return HARD if arguments.get('hard') or arguments.get('classification') else EASY


def _image_name(arguments: dict[str, int], index: int) -> str:
    """The path of an image within its split."""
    name = f'{index:06d}.jpg'
    if arguments.get('classification'):
        classes = _style(arguments).classes
        return f'{classes[index % len(classes)].replace(" ", "_")}/{name}'
    return name


def _polygons(mask: Bools) -> list[list[float]]:
    """Return the outlines of a mask as COCO polygons."""
    # Contours run through pixel centres, so that COCO's tools would read back too small a mask:
    # contours of doubled pixels run near the true edges and give the same mask back.
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)
    found, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contours = [cv2.approxPolyDP(contour, 0.5, closed=True) for contour in found]
    return [((c.ravel() + 0.5) / 2).tolist() for c in contours if len(c) >= 3]


def _runs(mask: Bools) -> dict[str, list[int]]:
    """Return COCO's uncompressed run lengths: by column, zeros first."""
    edges = np.flatnonzero(np.diff(mask.ravel(order='F'), prepend=False))
    counts = np.diff(edges, prepend=0, append=mask.size)
    return {'size': list(mask.shape), 'counts': counts.tolist()}


def _annotation(category: int, mask: Bools, crowd: bool) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        'category_id': category + 1,
        'iscrowd': int(crowd),
        'bbox': coco_mask.toBbox(encoded).tolist(),
        'area': float(mask.sum()),
        'segmentation': _runs(mask) if crowd else _polygons(mask),
    }


def _info(arguments: dict[str, int]) -> dict[str, Any]:
    """Return what tells one set from another."""
    text = 'Generated pictures of simple shapes for object detection'
    return {'description': text, 'tool': Path(__file__).name, 'version': '2', **arguments}


def _make_split(out: Path, arguments: dict[str, int], split: str) -> dict[str, Any]:
    """Write the images of a split and return its annotation file's content."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    size = {key: arguments[key] for key in ('width', 'height')}
    (out / split).mkdir(exist_ok=True)
    for index in range(arguments[split]):
        scene, name = _scene(arguments, split, index), _image_name(arguments, index)
        (out / split / name).parent.mkdir(exist_ok=True)
        (out / split / name).write_bytes(scene.jpeg())
        images.append({'id': index + 1, 'file_name': name, **size})
        for annotation in scene.annotations():
            ids = {'id': len(annotations) + 1, 'image_id': index + 1}
            annotations.append(ids | annotation)
    categories = [
        {'id': i, 'name': name, 'supercategory': 'shape'}
        for i, name in enumerate(_style(arguments).classes, 1)
    ]
    content = {'info': _info(arguments), 'licenses': [], 'categories': categories}
    return content | {'images': images, 'annotations': annotations}


def _json_path(split: str) -> str:
    return f'annotations/instances_{split}.json'


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is none."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _save(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(content, separators=(',', ':')), encoding='utf-8')
    os.replace(temporary, path)


def _check(arguments: dict[str, int]) -> None:
    for name, (low, high) in LIMITS.items():
        if not low <= arguments[name] <= high:
            raise ValueError(f'{name} is {arguments[name]}: expected {low} to {high}')
    if arguments['train'] + arguments['val'] == 0:
        raise ValueError('train and val are both 0: expected at least one image')


def _is_complete(out: Path, arguments: dict[str, int]) -> bool:
    """Tell whether the folder holds this very set; raise if it holds anything else."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f'{out} is a file: expected a folder')
    wanted = {_json_path(split) for split in SPLITS}
    for split in SPLITS:
        wanted |= {f'{split}/{_image_name(arguments, i)}' for i in range(arguments[split])}
    passing = {UNFINISHED, UNFINISHED + '.tmp'} | {_json_path(split) + '.tmp' for split in SPLITS}
    # Three levels are all that a set has, and listing more could take long in a foreign folder.
    depths = ('*', '*/*', '*/*/*')
    found = {p.relative_to(out).as_posix() for depth in depths for p in out.glob(depth)}
    found -= {'annotations', *SPLITS, *(str(PurePosixPath(name).parent) for name in wanted)}
    info = _info(arguments)
    resumable = not found - {UNFINISHED + '.tmp'} or _read(out / UNFINISHED) == info
    known = resumable or all(_read(out / _json_path(s)).get('info') == info for s in SPLITS)
    stray, missing = found - wanted - passing, wanted - found
    if stray or not known:
        example = min(stray or found)
        raise FileExistsError(
            f'{out} holds files that these arguments do not make, such as {example}: '
            'expected a new or empty folder, or a set made with the same arguments'
        )
    if missing and not resumable:
        raise FileExistsError(f'{out} holds this set, but without {min(missing)}: use a new folder')
    return not resumable


def make_shapes_dataset(
    out: str | Path,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    hard: bool = False,
    classification: bool = False,
) -> bool:
    """Make the data set, unless the folder holds it already.

    Args:
        out (str | Path): Folder to write to: new, empty, or left by an interrupted run with these
            arguments.
        train (int): Number of training images. Default: 400.
        val (int): Number of validation images. Default: 100.
        size (tuple[int, int]): Width and height of the images, in pixels. Default: (256, 256).
        seed (int): Seed of everything random. Default: 0.
        hard (bool): Whether to make the hard set of 15 classes in place of the easy one of five.
            Default: False.
        classification (bool): Whether to make a set for classifiers, of the same 15 classes.
            Default: False.

    Returns:
        bool: True if the set was made, False if it was there already and nothing was written.

    Raises:
        ValueError: An argument is out of its range. The message names it and its value.
        OSError: The folder cannot be written to, or holds anything else.
    """
    out, (width, height) = Path(out), size
    arguments = {'train': train, 'val': val, 'width': width, 'height': height, 'seed': seed}
    if hard and classification:
        raise ValueError('hard and classification are both on: expected one of them at most')
    arguments |= {'hard': 1} if hard else {'classification': 1} if classification else {}
    _check(arguments)
    if _is_complete(out, arguments):
        return False
    (out / 'annotations').mkdir(parents=True, exist_ok=True)
    _save(out / UNFINISHED, _info(arguments))
    contents = {split: _make_split(out, arguments, split) for split in SPLITS}
    for split, content in contents.items():
        _save(out / _json_path(split), content)
    (out / UNFINISHED).unlink()
    return True


def _summary(out: Path, split: str) -> str:
    """Count what a split of a finished set holds."""
    content = _read(out / _json_path(split))
    images, annotations = content['images'], content['annotations']
    areas = [a['area'] for a in annotations if not a['iscrowd']]
    small, large = sum(a < 32**2 for a in areas), sum(a > 96**2 for a in areas)
    empty = len(images) - len({a['image_id'] for a in annotations})
    return (
        f'{split}: {len(images)} images ({empty} empty), {len(areas)} objects '
        f'({small} small, {len(areas) - small - large} medium, {large} large), '
        f'{len(annotations) - len(areas)} crowd'
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv (Sequence[str], optional): Its arguments. Default: those of the process.
    """
    parser = argparse.ArgumentParser(description='Make a synthetic COCO-format set of shapes.')
    parser.add_argument('out', type=Path, help='folder to write to, new or empty')
    parser.add_argument('--train', type=int, default=400, help='training images (%(default)s)')
    parser.add_argument('--val', type=int, default=100, help='validation images (%(default)s)')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(256, 256), metavar=('WIDTH', 'HEIGHT')
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (%(default)s)')
    parser.add_argument('--hard', action='store_true', help='the hard set of 15 classes')
    parser.add_argument(
        '--classification',
        action='store_true',
        help='one object in each image, in folders by its class',
    )
    args = parser.parse_args(argv)
    try:
        made = make_shapes_dataset(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print('Made:' if made else 'Already there, nothing written:', args.out)
    for split in SPLITS:
        print(_summary(args.out, split))


if __name__ == '__main__':
    main()
