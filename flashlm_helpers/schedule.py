"""The learning rate as a function of the share of the budget that is spent, whatever the budget is made of."""


def learning_rate(fraction: float, peak: float, warmup: float = 0.02, decay: float = 0.5,
                  floor: float = 0.0) -> float:
    """Warmup, stable, decay: linear up to `peak`, constant, linear down to `peak * floor`.

    fraction: share of the budget (time or steps) spent when the step ends, 0 to 1; warmup and decay: shares
    of the budget. Because it follows the budget and not a step count, the floor is reached exactly when the
    time runs out, on any machine. Source: arXiv:2404.06395 (warmup-stable-decay).
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < warmup:
        return peak * fraction / warmup
    if fraction <= 1 - decay:
        return peak
    return peak * (floor + (1 - floor) * (1 - fraction) / decay)
