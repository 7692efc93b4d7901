"""Annealing of the attention's temperature.

Source: the published training recipe anneals T linearly over the first epochs (paper, section 4.1
and appendix; https://openreview.net/forum?id=DmpCfq6Mg39). The schedule linear in 1/T is ours.
"""


def annealed_temperature(
    iteration: int, anneal_iters: int, initial: float, schedule: str = 'linear'
) -> float:
    """The temperature T of one training iteration, falling from ``initial`` to 1.

    'linear' is the published schedule, T = 1 + max(0, (T₀ − 1)·(N − n)/N). Its 1/T, which is
    what scales the logits, rises steeply at the end; 'inverse' moves 1/T by equal steps.

    Args:
        iteration (int): n, counted from 1 for the first iteration.
        anneal_iters (int): N, the number of iterations until T = 1; 0 for no annealing.
        initial (float): T₀, at n = 0.
        schedule (str): 'linear' in T or 'inverse', linear in 1/T.

    Raises:
        ValueError: The schedule is neither of the two.
    """
    if schedule not in ('linear', 'inverse'):
        raise ValueError(f"schedule must be 'linear' or 'inverse', got {schedule!r}")
    if iteration >= anneal_iters:
        return 1.0
    remaining = (anneal_iters - iteration) / anneal_iters
    if schedule == 'linear':
        return 1.0 + (initial - 1.0) * remaining
    return 1.0 / (1.0 + (1.0 / initial - 1.0) * remaining)
