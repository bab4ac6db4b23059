"""Names of scoring rules and allocations, apart from what they stand for: a command line offers them without JAX."""

from typing import Literal, get_args

SCORINGS = (
    "window", "full", "random", "snapkv", "h2o", "tova", "streaming", "key-norm", "keydiff", "expected", "critical")

AllocationName = Literal["all", "layer", "head", "pyramid"]
ALLOCATIONS: tuple[AllocationName, ...] = get_args(AllocationName)

PROFILE = "profile"
"""Name of the allocation that a file gives: on a command line, and over HTTP that of the server."""
