"""Names of scoring rules and allocations, apart from what they stand for: a command line offers them without JAX."""

from typing import Literal, get_args

SCORINGS = (
    "window", "full", "random", "snapkv", "h2o", "tova", "streaming", "key-norm", "keydiff", "expected", "critical")

Allocation = Literal["all", "layer", "head"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
