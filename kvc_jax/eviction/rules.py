"""This package's scoring rules by name."""

from kvc_jax.eviction.names import SCORINGS
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_random import RandomScore
from kvc_jax.eviction.score_window import WindowAttention

Rule = WindowAttention | FullAttention | RandomScore

RULES: dict[str, type[Rule]] = dict(zip(SCORINGS, (WindowAttention, FullAttention, RandomScore), strict=True))
