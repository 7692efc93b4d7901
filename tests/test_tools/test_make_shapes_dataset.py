"""Tests of the tool that makes a synthetic COCO-format data set."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from numpy.typing import NDArray
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes_dataset.py'
WIDTH, HEIGHT = 128, 96
COUNTS = {'train': 30, 'val': 25}


def _load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('make_shapes_dataset', TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load_tool()


def _make(out: Path, train: int = 4, val: int = 2, seed: int = 0) -> bool:
    made: bool = tool.make_shapes_dataset(out, train, val, size=(WIDTH, HEIGHT), seed=seed)
    return made


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of writing of every file in a folder."""
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
    }


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in _files(folder).items()}


def _annotation_file(out: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (out / 'annotations' / f'instances_{split}.json').read_text(encoding='utf-8')
    )
    return content


def _image(path: Path) -> NDArray[Any]:
    image = cv2.imread(str(path))
    assert image is not None
    return image


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('shapes') / 'new' / 'set'
    assert _make(out, **COUNTS)
    return out


@pytest.fixture(params=['train', 'val'])
def split(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def coco(dataset: Path, split: str) -> COCO:
    return COCO(str(dataset / 'annotations' / f'instances_{split}.json'))


def test_holds_exactly_the_documented_files(dataset: Path) -> None:
    images = {f'{split}/{i:06d}.jpg' for split, n in COUNTS.items() for i in range(n)}
    annotations = {'annotations/instances_train.json', 'annotations/instances_val.json'}
    assert set(_files(dataset)) == images | annotations


def test_images_match_their_records(dataset: Path, split: str, coco: COCO) -> None:
    assert len(coco.imgs) == COUNTS[split]
    for record in coco.imgs.values():
        image = _image(dataset / split / record['file_name'])
        assert image.shape == (record['height'], record['width'], 3) == (HEIGHT, WIDTH, 3)


def test_categories_and_ids(coco: COCO) -> None:
    names = [(c['id'], c['name']) for c in coco.dataset['categories']]
    assert names == list(enumerate(['circle', 'square', 'triangle', 'star', 'cross'], 1))
    ids = [a['id'] for a in coco.dataset['annotations']]
    assert ids == list(range(1, len(ids) + 1))
    assert {a['category_id'] for a in coco.anns.values()} == {1, 2, 3, 4, 5}


def test_boxes_are_inside_the_image_and_tight_around_the_masks(coco: COCO) -> None:
    for annotation in coco.anns.values():
        x, y, width, height = annotation['bbox']
        assert 0 <= x <= x + width <= WIDTH
        assert 0 <= y <= y + height <= HEIGHT
        rows, columns = np.nonzero(coco.annToMask(annotation))
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([x, y, x + width, y + height], extent, atol=1.5)


def test_areas_are_those_of_the_masks(coco: COCO) -> None:
    for annotation in coco.anns.values():
        assert annotation['area'] >= 16
        assert coco.annToMask(annotation).sum() == pytest.approx(annotation['area'], rel=0.02)


def test_masks_of_an_image_do_not_overlap(coco: COCO) -> None:
    for annotations in coco.imgToAnns.values():
        assert sum(coco.annToMask(a).astype(int) for a in annotations).max() == 1


def test_objects_differ_from_what_surrounds_them(dataset: Path, split: str, coco: COCO) -> None:
    contrasts = []
    for image_id, annotations in coco.imgToAnns.items():
        image = _image(dataset / split / coco.imgs[image_id]['file_name']).astype(float)
        background = sum(coco.annToMask(a) for a in annotations) == 0
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            ring = (cv2.dilate(mask, np.ones((9, 9), np.uint8)) > 0) & background
            if ring.any():
                inside, outside = image[mask > 0].mean(axis=0), image[ring].mean(axis=0)
                contrasts.append(np.linalg.norm(inside - outside))
    assert len(contrasts) > 50
    assert min(contrasts) > 25
    assert np.median(contrasts) > 80


def test_object_counts_and_sizes(coco: COCO) -> None:
    counts = [len(annotations) for annotations in coco.imgToAnns.values()]
    assert min(counts) >= 2
    assert max(counts) <= 11  # ten objects and a crowd
    areas = np.array([a['area'] for a in coco.anns.values() if not a['iscrowd']])
    assert 1 / 3 <= (areas < 32**2).mean() < 1


def test_large_images_have_large_objects(tmp_path: Path) -> None:
    tool.make_shapes_dataset(tmp_path, train=16, val=0, size=(320, 288))
    annotations = _annotation_file(tmp_path, 'train')['annotations']
    areas = np.array([a['area'] for a in annotations if not a['iscrowd']])
    assert (areas > 96**2).any()
    assert (areas < 32**2).mean() >= 1 / 3


def test_has_a_crowd_region(coco: COCO) -> None:
    crowds = [a for a in coco.anns.values() if a['iscrowd'] == 1]
    assert crowds
    for crowd in crowds:
        assert isinstance(crowd['segmentation']['counts'], list)
        mask = coco.annToMask(crowd)
        assert cv2.connectedComponents(mask)[0] > 4  # the background and several shapes
        assert mask.sum() == crowd['area']


def test_has_an_empty_image(coco: COCO) -> None:
    assert set(coco.imgs) - set(coco.imgToAnns)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    _make(tmp_path / 'a', seed=3)
    _make(tmp_path / 'b', seed=3)
    assert _contents(tmp_path / 'a') == _contents(tmp_path / 'b')


def test_seeds_and_splits_give_different_images(tmp_path: Path) -> None:
    _make(tmp_path / 'a', seed=3)
    _make(tmp_path / 'b', seed=4)
    a, b = _contents(tmp_path / 'a'), _contents(tmp_path / 'b')
    images = [c for files in (a, b) for name, c in files.items() if name.endswith('.jpg')]
    assert len(images) == len(set(images)) == 12


def test_more_images_keep_the_earlier_ones(dataset: Path, tmp_path: Path) -> None:
    _make(tmp_path, train=14, val=3)
    few, many = _contents(tmp_path), _contents(dataset)
    images = [name for name in few if name.endswith('.jpg')]
    assert [few[name] for name in images] == [many[name] for name in images]
    for split in ('train', 'val'):
        for key in ('images', 'annotations'):
            earlier = _annotation_file(tmp_path, split)[key]
            assert earlier == _annotation_file(dataset, split)[key][: len(earlier)]


def test_same_arguments_again_write_nothing(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(dataset)
    size = [str(WIDTH), str(HEIGHT)]
    tool.main([str(dataset), '--train', '30', '--val', '25', '--size', *size])
    assert 'Already there' in capsys.readouterr().out
    assert _files(dataset) == before


@pytest.mark.parametrize(
    'foreign', ['notes.txt', 'train/000000.jpg', 'annotations/instances_train.json', 'a/b/c']
)
def test_foreign_folder_is_refused_and_left_alone(
    tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / foreign).write_text('{"precious": 1}')
    before = _files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path), '--train', '2', '--val', '1', '--size', '64', '64'])
    assert stop.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert _files(tmp_path) == before


@pytest.mark.parametrize('other', [{'train': 3}, {'train': 5}, {'val': 1}, {'seed': 1}])
def test_set_made_with_other_arguments_is_refused(tmp_path: Path, other: dict[str, int]) -> None:
    _make(tmp_path)
    before = _files(tmp_path)
    with pytest.raises(FileExistsError, match='same arguments'):
        _make(tmp_path, **other)
    assert _files(tmp_path) == before


def test_set_with_a_lost_image_is_refused(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / 'train' / '000002.jpg').unlink()
    before = _files(tmp_path)
    with pytest.raises(FileExistsError, match=r'without train/000002\.jpg'):
        _make(tmp_path)
    assert _files(tmp_path) == before


def _interrupt(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tool until the second split begins."""
    make_split = tool._make_split

    def stop_at_val(out: Path, arguments: dict[str, int], split: str) -> dict[str, Any]:
        if split == 'val':
            raise KeyboardInterrupt
        content: dict[str, Any] = make_split(out, arguments, split)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(tool, '_make_split', stop_at_val)
        with pytest.raises(KeyboardInterrupt):
            _make(out)


def test_interrupted_run_has_no_annotations_and_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path / 'a', monkeypatch)
    assert 'train/000003.jpg' in _files(tmp_path / 'a')
    assert not list((tmp_path / 'a' / 'annotations').iterdir())
    assert _make(tmp_path / 'a')
    assert _make(tmp_path / 'b')
    assert _contents(tmp_path / 'a') == _contents(tmp_path / 'b')


def test_interrupted_run_is_not_finished_with_other_arguments_or_over_foreign_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    before = _files(tmp_path)
    with pytest.raises(FileExistsError):
        _make(tmp_path, seed=1)
    assert _files(tmp_path) == before
    (tmp_path / 'train' / 'mine.jpg').write_bytes(b'precious')
    with pytest.raises(FileExistsError, match=r'mine\.jpg'):
        _make(tmp_path)


@pytest.mark.parametrize(
    ('arguments', 'value'),
    [
        (['--train', '-3'], '-3'),
        (['--val', '-4'], '-4'),
        (['--val', '1000001'], '1000001'),
        (['--train', 'many'], "'many'"),
        (['--size', '63', '96'], '63'),
        (['--size', '96', '9999'], '9999'),
        (['--seed', '-5'], '-5'),
        (['--train', '0', '--val', '0'], 'both 0'),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, arguments: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path / 'set'), *arguments])
    assert stop.value.code == 2
    assert value in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'set').exists()


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'set').write_text('precious')
    with pytest.raises(NotADirectoryError, match='expected a folder'):
        _make(tmp_path / 'set')
    assert (tmp_path / 'set').read_text() == 'precious'


def test_command_line_counts_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main([str(tmp_path), '--train', '8', '--val', '1', '--size', '96', '96', '--seed', '2'])
    printed = capsys.readouterr().out
    objects = len(_annotation_file(tmp_path, 'train')['annotations'])
    assert f'train: 8 images (1 empty), {objects} objects' in printed
    assert 'val: 1 images (0 empty)' in printed


@pytest.fixture(scope='module')
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('shapes') / 'hard'
    tool.main([str(out), '--hard', '--train', '40', '--val', '2', '--size', '128', '128'])
    return out


def _hard_coco(hard: Path) -> COCO:
    return COCO(str(hard / 'annotations' / 'instances_train.json'))


def test_hard_set_has_valid_annotations_of_mostly_small_objects(hard: Path) -> None:
    coco = _hard_coco(hard)
    for annotation in coco.anns.values():
        x, y, width, height = annotation['bbox']
        mask = coco.annToMask(annotation)
        assert mask.shape == (128, 128)
        assert mask.sum() == pytest.approx(annotation['area'], rel=0.02)
        rows, columns = np.nonzero(mask)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([x, y, x + width, y + height], extent, atol=1.5)
    for annotations in coco.imgToAnns.values():
        assert sum(coco.annToMask(a).astype(int) for a in annotations).max() == 1
    assert np.mean([a['area'] < 32**2 for a in coco.anns.values()]) > 2 / 3


def test_hard_classes_are_those_of_the_config_and_all_occur(hard: Path) -> None:
    classes = [c['name'] for c in _hard_coco(hard).dataset['categories']]
    config = Config.fromfile(
        TOOL.parents[1] / 'configs' / '_base_' / 'datasets' / 'shapes_hard_detection.py'
    )
    assert list(config.train_dataloader.dataset.metainfo.classes) == classes
    assert {a['category_id'] for a in _hard_coco(hard).anns.values()} == set(range(1, 16))


def test_hard_classes_differ_by_texture(hard: Path) -> None:
    coco = _hard_coco(hard)
    names = {c['id']: c['name'].split()[0] for c in coco.dataset['categories']}
    variation: dict[str, list[float]] = {'plain': [], 'striped': [], 'checked': []}
    for image_id, annotations in coco.imgToAnns.items():
        image = _image(hard / 'train' / coco.imgs[image_id]['file_name']).mean(axis=2)
        image = cv2.GaussianBlur(image, (0, 0), 1)  # takes the sensor noise away
        for annotation in annotations:
            inside = cv2.erode(coco.annToMask(annotation), np.ones((5, 5), np.uint8)) > 0
            if inside.sum() > 60:
                variation[names[annotation['category_id']]].append(image[inside].std())
    plain, *textured = (np.median(variation[name]) for name in variation)
    assert min(textured) > 2 * plain


def test_hard_images_come_from_the_seed_alone(hard: Path, tmp_path: Path) -> None:
    tool.make_shapes_dataset(tmp_path, train=3, val=2, size=(128, 128), hard=True)
    for name in ('train/000002.jpg', 'val/000001.jpg'):
        assert (tmp_path / name).read_bytes() == (hard / name).read_bytes()


def test_hard_and_easy_set_do_not_share_a_folder(hard: Path) -> None:
    with pytest.raises(FileExistsError, match='same arguments'):
        tool.make_shapes_dataset(hard, train=40, val=2, size=(128, 128))


def test_classification_set_has_one_object_of_the_folder_s_class_in_each_image(
    tmp_path: Path,
) -> None:
    out = tmp_path / 'set'
    arguments = [str(out), '--classification', '--train', '30', '--val', '15', '--size', '64', '64']
    tool.main(arguments)
    coco = COCO(str(out / 'annotations' / 'instances_train.json'))
    names = {c['id']: c['name'] for c in coco.dataset['categories']}
    counts = dict.fromkeys(names.values(), 0)
    for image in coco.imgs.values():
        (annotation,) = coco.imgToAnns[image['id']]
        name = names[annotation['category_id']]
        assert image['file_name'].startswith(name.replace(' ', '_') + '/')
        assert _image(out / 'train' / image['file_name']).shape == (64, 64, 3)
        counts[name] += 1
    assert set(counts.values()) == {2}
    assert not tool.make_shapes_dataset(out, 30, 15, (64, 64), classification=True)
    next((out / 'train' / 'plain_star').iterdir()).unlink()
    with pytest.raises(FileExistsError, match='without train/plain_star'):
        tool.make_shapes_dataset(out, 30, 15, (64, 64), classification=True)


def test_a_set_is_for_detection_or_for_classification(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='hard and classification'):
        tool.make_shapes_dataset(tmp_path / 'set', hard=True, classification=True)
