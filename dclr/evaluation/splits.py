"""Mean and standard deviation of figures over the official splits of a data set (--split all)."""

from collections.abc import Mapping
from statistics import mean, stdev


def over_splits(figures: Mapping[int, Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the mean and the standard deviation of each figure that all splits have.

    The standard deviation is that of a sample: the squared deviations are divided by the number of splits minus 1.

    Args:
        figures: number of the split -> name -> value. At least two splits.
    """
    first, *others = figures.values()
    names = [name for name in first if all(name in other for other in others)]
    values = {name: [found[name] for found in figures.values()] for name in names}
    return {name: mean(values[name]) for name in names}, {name: stdev(values[name]) for name in names}


def describe_splits(figures: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Return the lines of a table of shares: a row for each figure, with each split, the mean and the deviation."""
    means, deviations = over_splits(figures)
    wide = max(map(len, means))
    lines = ["".join([f"{'':{wide}}", *(f"{f'split {number}':>10}" for number in figures), f"{'mean':>10}{'sd':>8}"])]
    for name in means:
        shares = "".join(f"{found[name]:10.1%}" for found in figures.values())
        lines.append(f"{name:{wide}}{shares}{means[name]:10.1%}{deviations[name]:8.1%}")
    return [*lines, f"sd: standard deviation over the {len(figures)} splits (n - 1)"]
