from tests.test_tools.test_train_and_test import CONFIG, run_tool


def test_the_costs_of_a_detector_stand_beside_its_plain_twins():
    options = (
        '--cfg-options',
        'model.backbone.base_channels=8',
        'model.neck.in_channels=[8,16,32,64]',
    )
    lines = run_tool(
        'analysis_tools/get_flops.py', CONFIG, '--shape', 64, 64, *options
    ).stdout.splitlines()
    rows = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if len(cells) == 7 and cells[1].endswith(' M'):
            rows[cells[0]] = [float(cell.removesuffix(' M').replace(',', '')) for cell in cells[1:]]
    assert list(rows) == ['backbone', 'neck', 'bbox_head', 'total']
    parameters, madds, mixing, attentions, plain_parameters, plain_madds = rows['backbone']
    # The blocks of a ResNet-18 of 8 channels have 171,648 weights: one kernel of each bank.
    assert mixing == 0.69
    assert abs(madds - mixing - attentions - plain_madds) < 0.03
    assert parameters - plain_parameters > 3 * 0.171
    assert rows['neck'][:2] == rows['neck'][4:]
    total = [sum(rows[name][i] for name in list(rows)[:3]) for i in range(6)]
    assert all(abs(a - b) < 0.03 for a, b in zip(total, rows['total'], strict=True))
