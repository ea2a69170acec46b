"""Names of parameters: which are meant, and how those of two models meet."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peft_analysis.errors import UpdateError

Selection = str | Sequence[str] | None


@dataclass(frozen=True)
class Chosen:
    """Which parameters are read.

    Attributes:
        only: a regular expression that a name must contain, or the names themselves; None: all.
        without: the same for names that are left out.
    """

    only: Selection = None
    without: Selection = None

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are meant, in their order."""
        keep, drop = _test(self.only, "only"), _test(self.without, "without")
        return [
            name for name in names if (keep is None or keep(name)) and not (drop is not None and drop(name))
        ]

    def __bool__(self) -> bool:
        return self.only is not None or self.without is not None

    def check(self, names: Iterable[str]) -> None:
        """Raises an `UpdateError` where nothing is left, or a name that was asked for is not there."""
        names = list(names)
        if self.only is not None and not isinstance(self.only, str):
            lost = sorted(set(self.only) - set(names))
            if lost:
                raise UpdateError(f"only= names {listed(lost)}, which is not there; {_some(names)}")
        if names and not self.of(names):
            raise UpdateError(
                f"only={self.only!r}, without={self.without!r} leaves no parameter; {_some(names)}"
            )


def listed(names: Iterable[str], between: str = ", ", most: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def prefix_between(names: Sequence[str], others: Sequence[str]) -> Callable[[str], str]:
    """Turns names into those of another model that has one prefix more or less, such as 'model.'.

    The names are left as they are, unless a prefix taken off or put on makes more of them meet.
    """
    known = set(others)
    best: Callable[[str], str] = _same
    most = sum(name in known for name in names)
    if most == len(names):
        return best
    ours = set(names)
    for prefix in _prefixes(names):
        met = sum(name.removeprefix(prefix) in known for name in names if name.startswith(prefix))
        if met > most:
            best, most = _taking_off(prefix, known), met
    for prefix in _prefixes(others):
        met = sum(other.removeprefix(prefix) in ours for other in others if other.startswith(prefix))
        if met > most:
            best, most = _putting_on(prefix, known), met
    return best


def _prefixes(names: Sequence[str]) -> list[str]:
    """Every beginning that ends with a dot, the commonest first."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 5)))
    return [prefix for prefix, _ in found.most_common(50)]


def _same(name: str) -> str:
    return name


def _taking_off(prefix: str, known: set[str]) -> Callable[[str], str]:
    def turned(name: str) -> str:
        return name if name in known else name.removeprefix(prefix)

    return turned


def _putting_on(prefix: str, known: set[str]) -> Callable[[str], str]:
    def turned(name: str) -> str:
        return name if name in known or prefix + name not in known else prefix + name

    return turned


def _test(selection: Selection, argument: str) -> Callable[[str], bool] | None:
    if selection is None:
        return None
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as broken:
            raise UpdateError(f"{argument}={selection!r} is no regular expression: {broken}") from broken
        return lambda name: pattern.search(name) is not None
    return set(selection).__contains__


def _some(names: Sequence[str]) -> str:
    return f"there are {listed(list(names), most=4)}" if names else "there are none"
