"""What the command-line tools share.

A user's mistake (a path, a name, a value) ends a tool with one sentence and exit status 1.
"""

from ..safe_running import config_errors_as_exit
from .arguments import add_collapse, add_config_options, add_force, add_runner_arguments, positive
from .configs import build_runner, load_config, runner_config, shorten_report
from .files import (
    find_images,
    require_file,
    require_new_file,
    require_packages,
    require_writable,
)
from .weights import (
    collapse_static,
    load_detector,
    require_checkpoint,
    require_odconv_layers,
    require_same_start,
    require_start_weights,
    require_weights,
)

__all__ = [
    'add_collapse',
    'add_config_options',
    'add_force',
    'add_runner_arguments',
    'build_runner',
    'collapse_static',
    'config_errors_as_exit',
    'find_images',
    'load_config',
    'load_detector',
    'positive',
    'require_checkpoint',
    'require_file',
    'require_new_file',
    'require_odconv_layers',
    'require_packages',
    'require_same_start',
    'require_start_weights',
    'require_weights',
    'require_writable',
    'runner_config',
    'shorten_report',
]
