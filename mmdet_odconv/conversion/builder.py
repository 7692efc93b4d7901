"""Conversion from a config: a builder that returns the converted detector itself."""

import inspect
import logging
from typing import Any

from mmdet.registry import MODELS as DETECTORS
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from .._checks import ArgumentError
from ..layers import use_valid_pooling
from .convert import convert_to_odconv
from .rules import ConversionError


@MODELS.register_module(name='ODConvModel')
def build_odconv_model(
    odconv: dict[str, Any] | None = None,
    detector: str | type | None = None,
    model: dict[str, Any] | None = None,
    data_preprocessor: dict[str, Any] | nn.Module | None = None,
    attention_pool: str = 'all',
    report: str = 'table',
    **fields: Any,
) -> nn.Module:
    """Build a model, replace its plain convolutions with ODConv, and return the model.

    There are two forms for a config that inherits from one of mmdet's. Usually, name the detector
    and leave its fields in their places, where other configs, ``--cfg-options`` and mmdet's own
    functions find them::

        model = dict(type='ODConvModel', detector={{_base_.model.type}}, odconv=dict(kernel_num=4))

    For models that have a field ``detector`` themselves, wrap the whole config::

        model = dict(
            _delete_=True, type='ODConvModel', model={{_base_.model}}, odconv=dict(kernel_num=4)
        )

    A report of the conversion goes to the log.

    Args:
        odconv (dict, optional): Arguments of :func:`~mmdet_odconv.convert_to_odconv`. Default:
            None, which means its defaults.
        detector (str | type, optional): Type of the model. Default: the type in ``model``.
        model (dict, optional): Config of the model. Default: None, if ``fields`` are the whole
            config.
        data_preprocessor (dict | nn.Module, optional): The data preprocessor of the model, if its
            config has none. Default: None.
        attention_pool (str): 'all', or 'valid' for attentions that leave out the padding of the
            batch (:func:`~mmdet_odconv.use_valid_pooling`). If the detector has an OD backbone
            already, also set ``odconv=dict(include=[])``. Default: 'all'.
        report (str): What goes to the log: 'table', which says what was kept and why, or
            'summary', which is one line. Default: 'table'.
        **fields: Fields of the model's config. They replace those of ``model``.

    Returns:
        nn.Module: The converted model. Its class is that of the model, not a wrapper.

    Raises:
        ValueError: Neither ``detector`` nor ``model`` says what to build, ``attention_pool`` is
            neither 'all' nor 'valid', or ``report`` is neither 'table' nor 'summary'.
        ConversionError: A ValueError. Nothing was converted, or the model has a field ``detector``
            itself, like SoftTeacher and the trackers, and needs the second form.
    """
    if attention_pool not in ('all', 'valid'):
        raise ArgumentError(f"attention_pool must be 'all' or 'valid', got {attention_pool!r}")
    if report not in ('table', 'summary'):
        raise ArgumentError(f"report must be 'table' or 'summary', got {report!r}")
    config = {**(model or {}), **fields}
    if detector is not None:
        kind = DETECTORS.get(detector) if isinstance(detector, str) else detector
        if isinstance(kind, dict | nn.Module) or _has_detector_field(kind):
            raise ConversionError(
                f'{getattr(kind, "__name__", "this model")} has a field '
                "'detector' of its own, which detector=... of ODConvModel would hide; "
                "wrap the whole config instead: model=dict(_delete_=True, type='ODConvModel', "
                'model={{_base_.model}}, odconv=...)'
            )
        config['type'] = detector
    if 'type' not in config:
        raise ArgumentError(
            'ODConvModel needs the type of a model as detector, or a config as model'
        )
    if data_preprocessor is not None:
        config.setdefault('data_preprocessor', data_preprocessor)
    # From this registry mmengine finds the models of the default scope, and mmdet's without one.
    built = DETECTORS.build(config)
    done = convert_to_odconv(built, **(odconv or {}))
    if not done.converted and (odconv or {}).get('include', True):
        reasons = ', '.join(f'{number} {reason}' for reason, number in done.reasons().items())
        raise ConversionError(
            f'nothing of {type(built).__name__} was converted, but kept were: {reasons}; if that '
            'is right, set odconv=dict(include=[])'
        )
    if attention_pool == 'valid':
        use_valid_pooling(built)
    text = f'\n{done}' if report == 'table' else f' {done.summary()}'
    print_log(f'ODConv in {type(built).__name__}:{text}', logger='current', level=logging.INFO)
    return built


def _has_detector_field(kind: Any) -> bool:
    """Whether a model of this type takes an argument ``detector``."""
    return kind is not None and 'detector' in inspect.signature(kind).parameters
