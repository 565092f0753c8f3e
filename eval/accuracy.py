"""Exact match of answers with their references, with an interval that is honest at small counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .answers import Answer


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `asked` answers; `low` and `high` bound the true share with 95 % confidence."""

    right: int
    asked: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Right of asked; not a number if nothing was asked."""
        return self.right / self.asked if self.asked else math.nan


def exact_match(answers: Sequence[Answer]) -> Accuracy:
    """Count the answers that equal their reference, outer whitespace apart; what could not be asked counts as wrong."""
    counted = [a for a in answers if a.reference is not None]
    right = sum(a.text is not None and a.text.strip() == (a.reference or "").strip() for a in counted)
    return Accuracy(right, len(counted), *wilson(right, len(counted)))


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Return the score interval of a proportion (E. B. Wilson, JASA 22, 1927); (0, 1) if nothing was asked."""
    if not asked:
        return 0.0, 1.0
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)  # rounding at 0 and 1
