"""From settings to an estimator."""

from eos_search.estimators.base import KeepEstimator, KeepName
from eos_search.estimators.differences import Differences
from eos_search.estimators.equation12 import Equation12
from eos_search.estimators.ghosts import Ghosts


def keep_estimator(name: KeepName, alpha: float = 10.0, width: float = 0.1, every: int = 1) -> KeepEstimator:
    """The estimator of a name.

    Args:
        name: which.
        alpha: boundary sharpness of Eq. 12.
        width: how far ghosts and differences look to each side, as a share of the count.
        every: differences are measured at every so many rows.
    """
    made: dict[KeepName, KeepEstimator] = {
        "eq12": Equation12(alpha),
        "eq12_served": Equation12(alpha, served=True),
        "ghosts": Ghosts(width),
        "differences": Differences(width, every),
    }
    return made[name]
