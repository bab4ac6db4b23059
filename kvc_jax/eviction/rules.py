"""This package's scoring rules by name."""

from kvc_jax.eviction.names import SCORINGS
from kvc_jax.eviction.score_critical import CriticalKV
from kvc_jax.eviction.score_expected import ExpectedAttention
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_h2o import H2O
from kvc_jax.eviction.score_key_norm import KeyNorm
from kvc_jax.eviction.score_keydiff import KeyDiff
from kvc_jax.eviction.score_random import RandomScore
from kvc_jax.eviction.score_snapkv import SnapKV
from kvc_jax.eviction.score_streaming import StreamingLLM
from kvc_jax.eviction.score_tova import TOVA
from kvc_jax.eviction.score_window import WindowAttention

Rule = (
    WindowAttention | FullAttention | RandomScore | SnapKV | H2O | TOVA | StreamingLLM | KeyNorm | KeyDiff
    | ExpectedAttention | CriticalKV)

RULES: dict[str, type[Rule]] = dict(zip(
    SCORINGS,
    (WindowAttention, FullAttention, RandomScore, SnapKV, H2O, TOVA, StreamingLLM, KeyNorm, KeyDiff, ExpectedAttention,
     CriticalKV),
    strict=True))
