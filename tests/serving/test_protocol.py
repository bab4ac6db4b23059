"""How the fields of a request become a compression."""

import pytest

from kvc_jax import H2O, Compression, FullAttention, WindowAttention
from kvc_jax.eviction.names import SCORINGS
from kvc_jax.eviction.rules import RULES
from kvc_jax.serving.api_error import ApiError
from kvc_jax.serving.protocol import Defaults, parse_call

OWN = Compression(
    rate=8, window=16, sinks=2, scoring=FullAttention(buffer=3), allocation="head", interval=8, keep=[(0, 4)],
    on_demand=True)


def _compression(fields, own):
  defaults = Defaults(model="m", max_model_len=64, interval=4, compression=own)
  return parse_call("completions", {"model": "m", "prompt": "a", **fields}, defaults).compression


@pytest.mark.parametrize(("fields", "compression"), [
    ({}, None),
    ({"rate": 2}, Compression(rate=2)),
    ({"rate": 2, "scoring": "full"}, Compression(rate=2, scoring=FullAttention())),
    ({"mass": 0.9}, Compression(mass=0.9)),
    ({"rate": 2, "mass": 0.9, "allocation": "pyramid"}, Compression(rate=2, mass=0.9, allocation="pyramid")),
    ({"rate": 2, "safeguard": 0.2, "allocation": "layer"}, Compression(rate=2, safeguard=0.2, allocation="layer")),
    ({"rate": 2, "compress_once": False}, Compression(rate=2, interval=4)),
    ({"rate": 2, "compress_once": True}, Compression(rate=2)),
])
def test_without_a_compression_of_the_server(fields, compression):
  assert _compression(fields, None) == compression


@pytest.mark.parametrize(("fields", "changed"), [
    ({}, {}),
    ({"rate": 2}, {"rate": 2}),
    ({"max_cache_tokens": 40}, {"rate": None, "max_cache_tokens": 40}),
    ({"rate": 2, "max_cache_tokens": -1}, {"rate": 2}),
    ({"rate": 2, "window": 4, "keep": []}, {"rate": 2, "window": 4, "keep": ()}),
    ({"rate": 2, "scoring": "full"}, {"rate": 2}),  # with the server's numbers, which are compiled
    ({"rate": 2, "scoring": "window"}, {"rate": 2, "scoring": WindowAttention()}),
    ({"mass": 0.9}, {"rate": None, "mass": 0.9, "interval": None, "on_demand": False}),
    ({"rate": 2, "scoring": "h2o"}, {"rate": 2, "scoring": H2O()}),
    ({"rate": 2, "compress_once": True}, {"rate": 2, "interval": None}),
    ({"rate": 2, "compress_once": False}, {"rate": 2, "interval": 4}),
])
def test_what_is_left_out_is_the_servers_own(fields, changed):
  own = {name: getattr(OWN, name) for name in OWN.__dataclass_fields__}
  assert _compression(fields, OWN) == Compression(**{**own, **changed})


def test_a_share_of_the_scores_is_taken_once():
  with pytest.raises(ApiError, match="mass is a share of the scores held"):
    _compression({"mass": 0.9, "interval": 4}, OWN)


def test_minus_one_asks_for_none():
  assert _compression({"max_cache_tokens": -1}, OWN) is None


def test_every_name_has_its_rule():
  assert {name: RULES[name] for name in ("window", "full", "random", "snapkv", "h2o", "tova", "streaming", "key-norm",
                                         "keydiff", "expected", "critical")} == RULES
  assert set(SCORINGS) == set(RULES)
  for name, rule in RULES.items():
    assert _compression({"rate": 2, "scoring": name}, None) == Compression(rate=2, scoring=rule())


def test_what_compresses_nothing_is_told_every_budget():
  with pytest.raises(ApiError, match="nothing without rate, max_cache_tokens or mass"):
    _compression({"window": 4}, None)


def test_a_rule_that_only_scores_prompts_is_refused_with_an_interval():
  with pytest.raises(ApiError, match="scores prompts alone"):
    _compression({"rate": 2, "scoring": "expected", "interval": 4}, None)
