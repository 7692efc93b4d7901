"""The maths of ODConv as pure functions of tensors, without parameters.

``formula.py`` has the paper's equation, ``operator.py`` the operator that layers call,
``dispatch.py`` the table that picks one of its implementations.
"""

from .attention import Attentions, activate, at_least_float32
from .dispatch import STRATEGIES, check_strategy, record_strategies
from .dynamic_conv import dynamic_conv
from .formula import mix_kernel_bank, odconv_formula
from .operator import convolution_dtype, odconv
from .squeeze import squeeze
from .static_weight import DEFAULT_SPREAD, bank_from_static_weight

__all__ = [
    'DEFAULT_SPREAD',
    'STRATEGIES',
    'Attentions',
    'activate',
    'at_least_float32',
    'bank_from_static_weight',
    'check_strategy',
    'convolution_dtype',
    'dynamic_conv',
    'mix_kernel_bank',
    'odconv',
    'odconv_formula',
    'record_strategies',
    'squeeze',
]
