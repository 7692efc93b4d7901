import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

needs_safe_default = pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
    reason='before torch 2.6, torch.load is not in safe mode unless told so',
)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def save(path, content):
    torch.save({'state_dict': OrderedDict(w=torch.ones(2)), 'message_hub': content}, path)
    return path


def test_the_runners_log_is_loaded_whole(tmp_path):
    hub = MessageHub.get_instance('safe_globals')
    for value in (3.0, 1.0):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', 2)
    hub.update_info('types', [np.float32(1), np.int64(2), np.bool_(True), np.zeros(2, np.uint8)])
    path = save(tmp_path / 'epoch_1.pth', hub.state_dict())
    loaded = torch.load(path)['message_hub']
    buffer = loaded['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert [buffer.statistics(s) for s in ('mean', 'max', 'min', 'current')] == [2, 3, 1, 1]
    assert loaded['runtime_info']['iter'] == 2


@needs_safe_default
@pytest.mark.parametrize('function', [os.system, os.mkdir, eval, exec])
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(tmp_path, function):
    victim = tmp_path / 'ran'
    argument = {
        os.system: f'touch {victim}',
        os.mkdir: str(victim),
        eval: f'open({str(victim)!r}, "w")',
        exec: f'open({str(victim)!r}, "w")',
    }[function]
    path = save(tmp_path / 'hostile.pth', Hostile(function, argument))
    with pytest.raises(pickle.UnpicklingError, match=function.__name__):
        torch.load(path)
    assert not victim.exists()


@needs_safe_default
@pytest.mark.parametrize(
    ('obj', 'name'),
    [
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, 'update'),
        (HistoryBuffer, '__class__'),
        (np.ndarray, 'tofile'),
        (np.ndarray, 'mean'),
    ],
)
def test_getattr_gives_out_the_four_statistics_alone(tmp_path, obj, name):
    path = save(tmp_path / 'hostile.pth', Hostile(getattr, obj, name))
    with pytest.raises(pickle.UnpicklingError, match=f'getattr.*{name}'):
        torch.load(path)


@needs_safe_default
def test_a_statistic_replaced_by_a_hostile_function_is_refused(tmp_path):
    victim = tmp_path / 'ran'
    buffer = HistoryBuffer([1.0], [1])
    buffer.__dict__['statistics_methods'] = Hostile(os.mkdir, str(victim))
    path = save(tmp_path / 'hostile.pth', OrderedDict(buffer.__dict__))
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        torch.load(path)
    assert not victim.exists()
