"""Lets ``torch.load``'s safe mode read the checkpoints that MMEngine's runner saves.

Since PyTorch 2.6 ``torch.load`` refuses all classes but those known to be harmless. MMEngine
0.10.7 calls it that way on files that hold :class:`mmengine.logging.HistoryBuffer` objects (the
log), and so cannot test or resume from what it saved. Safe mode stays on: exactly the classes of
those objects are registered.
"""

import pickle
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer

from ..compat import add_safe_globals

_STATISTICS = ('mean', 'max', 'min', 'current')
_SCALAR_TYPES = (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)


def register_safe_globals() -> None:
    """Let ``torch.load``'s safe mode read the log in MMEngine's checkpoints.

    Importing this package calls the function. It registers ``HistoryBuffer``, NumPy's arrays,
    scalars and plain number types. In place of ``builtins.getattr`` it registers a function that
    returns the four statistics of ``HistoryBuffer`` and nothing else.
    """
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    safe: list[Any] = [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(scalar_type)) for scalar_type in _SCALAR_TYPES),
        (_statistic_of_history_buffer, 'builtins.getattr'),
    ]
    # NumPy 2 renamed the module; files written under either version are to be read.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        safe += [(reconstruct, f'{module}._reconstruct'), (scalar, f'{module}.scalar')]
    add_safe_globals(safe)


def _statistic_of_history_buffer(obj: object, name: str) -> Any:
    """``getattr`` for pickles, open for ``HistoryBuffer``'s statistics only."""
    if obj is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'the checkpoint asks for getattr({obj!r}, {name!r}), which is not safe to load; '
        f'only the statistics {_STATISTICS} of HistoryBuffer are'
    )
