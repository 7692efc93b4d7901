import argparse

import pytest

from mmdet_odconv import cli


def test_an_override_without_a_value_is_refused(capsys):
    parser = argparse.ArgumentParser()
    cli.add_config_options(parser)
    with pytest.raises(SystemExit) as error:
        parser.parse_args(['--cfg-options', 'train_cfg.max_epochs'])
    assert error.value.code == 2
    assert "takes key=value, got 'train_cfg.max_epochs'" in capsys.readouterr().err


@pytest.mark.parametrize('text', ['0', '-3', 'two', '1.5'])
def test_a_count_is_a_whole_number_of_at_least_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f'at least 1, got {text}'):
        cli.positive(text)
