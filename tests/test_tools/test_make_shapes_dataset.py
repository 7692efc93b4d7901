"""The tool that makes a synthetic COCO-format data set."""

import importlib.util

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from pycocotools.coco import COCO

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location('shapes', ROOT / 'tools/study/make_shapes_dataset.py')
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

WIDTH, HEIGHT = 128, 96


def make(out, train=4, val=2, size=(WIDTH, HEIGHT), **options):
    return tool.make_shapes_dataset(out, train, val, size=size, **options)


def contents(folder):
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def annotations(out, split='train'):
    return COCO(str(out / f'annotations/instances_{split}.json'))


@pytest.fixture(scope='module', params=['easy', 'hard'])
def dataset(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / 'new/set'
    assert make(out, train=40, val=3, hard=request.param == 'hard')
    return out


def test_the_files_are_those_of_the_config(dataset):
    images = {f'train/{i:06d}.jpg' for i in range(40)} | {f'val/{i:06d}.jpg' for i in range(3)}
    files = {'annotations/instances_train.json', 'annotations/instances_val.json'}
    assert set(contents(dataset)) == images | files
    name = 'shapes_hard_detection' if 'hard' in str(dataset) else 'shapes_detection'
    config = Config.fromfile(ROOT / f'configs/_base_/datasets/{name}.py')
    coco = annotations(dataset)
    assert [c['name'] for c in coco.dataset['categories']] == [
        *config.train_dataloader.dataset.metainfo.classes
    ]
    assert {a['category_id'] for a in coco.anns.values()} == set(coco.cats)
    for record in coco.imgs.values():
        image = cv2.imread(str(dataset / 'train' / record['file_name']))
        assert image.shape == (record['height'], record['width'], 3) == (HEIGHT, WIDTH, 3)


def test_boxes_and_areas_are_those_of_masks_that_do_not_overlap(dataset):
    coco = annotations(dataset)
    for of_image in coco.imgToAnns.values():
        masks = [coco.annToMask(annotation) for annotation in of_image]
        assert sum(mask.astype(int) for mask in masks).max() == 1
        for annotation, mask in zip(of_image, masks, strict=True):
            x, y, width, height = annotation['bbox']
            rows, columns = np.nonzero(mask)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose([x, y, x + width, y + height], extent, atol=1.5)
            assert mask.sum() == pytest.approx(annotation['area'], rel=0.02)


def test_objects_differ_from_what_surrounds_them_and_many_are_small(dataset):
    coco, contrasts = annotations(dataset), []
    for image_id, of_image in coco.imgToAnns.items():
        image = cv2.imread(str(dataset / 'train' / coco.imgs[image_id]['file_name'])).astype(float)
        background = sum(coco.annToMask(a) for a in of_image) == 0
        for annotation in of_image:
            mask = coco.annToMask(annotation)
            ring = (cv2.dilate(mask, np.ones((9, 9), np.uint8)) > 0) & background
            if ring.any():
                inside, outside = image[mask > 0].mean(axis=0), image[ring].mean(axis=0)
                contrasts.append(np.linalg.norm(inside - outside))
    assert len(contrasts) > 50
    assert np.median(contrasts) > (25 if 'hard' in str(dataset) else 80)
    areas = np.array([a['area'] for a in coco.anns.values() if not a['iscrowd']])
    assert 1 / 3 <= (areas < 32**2).mean() < 1


def test_the_easy_set_has_an_empty_image_and_a_crowd(tmp_path):
    make(tmp_path, train=25)
    coco = annotations(tmp_path)
    assert set(coco.imgs) - set(coco.imgToAnns)
    (crowd,) = [a for a in coco.anns.values() if a['iscrowd']]
    assert cv2.connectedComponents(coco.annToMask(crowd))[0] > 4  # the background and shapes


def test_each_image_comes_from_the_seed_and_its_number_alone(dataset, tmp_path):
    hard = 'hard' in str(dataset)
    make(tmp_path / 'few', hard=hard)
    make(tmp_path / 'other', hard=hard, seed=1)
    few, other, many = (contents(f) for f in (tmp_path / 'few', tmp_path / 'other', dataset))
    images = [name for name in few if name.endswith('.jpg')]
    assert [few[name] for name in images] == [many[name] for name in images]
    assert len({few[name] for name in images} | {other[name] for name in images}) == 12


def test_an_interrupted_run_is_finished_and_a_finished_one_left_alone(tmp_path, monkeypatch):
    def interrupt(out, arguments, split):
        if split == 'val':
            raise KeyboardInterrupt
        return make_split(out, arguments, split)

    make_split = tool._make_split
    with monkeypatch.context() as patch:
        patch.setattr(tool, '_make_split', interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / 'a')
    assert not list((tmp_path / 'a/annotations').iterdir())
    with pytest.raises(FileExistsError):
        make(tmp_path / 'a', seed=1)
    assert make(tmp_path / 'a')
    assert make(tmp_path / 'b')
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert not make(tmp_path / 'a')


@pytest.mark.parametrize('foreign', ['notes.txt', 'train/000000.jpg', 'a/b/c'])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, foreign, capsys):
    (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / foreign).write_text('precious')
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), '--train', '2', '--val', '1', '--size', '64', '64'])
    assert str(tmp_path) in capsys.readouterr().err
    assert contents(tmp_path) == {foreign: b'precious'}


def test_a_classifiers_set_has_one_object_of_the_folders_class_in_each_image(tmp_path):
    args = ['--classification', '--train', '30', '--val', '15', '--size', '64', '64']
    tool.main([str(tmp_path), *args])
    coco = annotations(tmp_path)
    for image in coco.imgs.values():
        (annotation,) = coco.imgToAnns[image['id']]
        folder = coco.cats[annotation['category_id']]['name'].replace(' ', '_')
        assert image['file_name'].startswith(f'{folder}/')
    with pytest.raises(ValueError, match='hard and classification'):
        make(tmp_path, hard=True, classification=True)
