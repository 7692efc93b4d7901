import itertools

import pytest

from mmdet_odconv.functional import annealed_temperature
from tests.conftest import ROOT, load_cases


@pytest.mark.parametrize('case', load_cases(ROOT / 'tests/data/temperature.json'))
def test_linear_schedule_is_the_published_one(case):
    done = case['epoch'] * case['iters_per_epoch'] + case['iteration']
    total = case['temp_epoch'] * case['iters_per_epoch']
    actual = annealed_temperature(done, total, case['temp_init'])
    assert actual == pytest.approx(case['temperature'], rel=1e-12)


def test_inverse_schedule_takes_equal_steps_of_the_inverse():
    inverses = [1 / annealed_temperature(n, 10, 30.0, 'inverse') for n in range(12)]
    steps = [b - a for a, b in itertools.pairwise(inverses)]
    assert inverses[0] == pytest.approx(1 / 30)
    assert steps[:10] == pytest.approx([(1 - 1 / 30) / 10] * 10)
    assert inverses[10] == inverses[11] == 1


def test_no_annealing_and_unknown_schedule():
    assert annealed_temperature(1, 0, 30.0) == 1.0
    with pytest.raises(ValueError, match="'cosine'"):
        annealed_temperature(1, 10, 30.0, 'cosine')
