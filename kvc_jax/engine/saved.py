"""What a file keeps of a request beside its cache, so that another engine can go on with it."""

import dataclasses
from typing import Any

from kvc_jax.cache.sequence_file import SavedSequence
from kvc_jax.engine.request import SamplingParams, TokenLogprobs
from kvc_jax.engine.sequence import Sequence
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.rules import RULES
from kvc_jax.eviction.score import ScoringRule

_RULES: dict[str, Any] = {rule.__name__: rule for rule in RULES.values()}
_PROGRESS = ("steps", "compressions", "freed_blocks", "compressed_at")


def settings_of(sequence: Sequence) -> dict[str, Any]:
  """All that JSON has to keep of a sequence that decodes.

  Raises:
    InputError: it scores by a rule that is none of this package's.
  """
  return {
      "prompt_tokens": len(sequence.prompt),
      "tokens_given": sequence.tokens_given,
      "params": dataclasses.asdict(dataclasses.replace(sequence.params, n=1)),
      "compression": None if sequence.compression is None else _compression_settings(sequence.compression),
      "logprobs": [dataclasses.asdict(entry) for entry in sequence.logprobs],
      "positions": sequence.positions,
      "prefill_interval": sequence.prefill_interval,
      "progress": {name: getattr(sequence, name) for name in _PROGRESS},
  }


def _compression_settings(compression: Compression) -> dict[str, Any]:
  if not isinstance(compression.allocation, str):
    raise InputError("a request with a head profile cannot be saved; only allocations by name can")
  fields: dict[str, Any] = {f.name: getattr(compression, f.name) for f in dataclasses.fields(compression)}
  return {**fields, "scoring": _rule_settings(compression.scoring)}


def _rule_settings(rule: ScoringRule) -> dict[str, Any]:
  name = type(rule).__name__
  if _RULES.get(name) is not type(rule):
    raise InputError(f"a request that scores by {name} cannot be saved; only {', '.join(_RULES)} can")
  return {"rule": name, **{f.name: getattr(rule, f.name) for f in dataclasses.fields(_RULES[name])}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedRequest:
  """The settings of a file, as objects again.

  Attributes:
    prompt: token ids.
    token_ids: ids generated.
    tokens_given: how many of them updates had brought.
    params: how to sample; the seed is set.
    compression: None for none.
    logprobs: one for each of token_ids, where asked for.
    positions: whether the receipt is to name the positions held.
    prefill_interval: prompt tokens from one compression to the next, while it was prefilled.
    progress: counts of `Sequence` by name.
  """

  prompt: list[int]
  token_ids: list[int]
  tokens_given: int
  params: SamplingParams
  compression: Compression | None
  logprobs: list[TokenLogprobs]
  positions: bool
  prefill_interval: int | None
  progress: dict[str, int]


def request_of(saved: SavedSequence) -> SavedRequest:
  """Reads what `settings_of` kept.

  Raises:
    InputError: the file has no such settings: an engine has not written it.
  """
  try:
    settings = saved.settings
    prompt_tokens, progress = settings["prompt_tokens"], {name: int(settings["progress"][name]) for name in _PROGRESS}
    prompt, token_ids = saved.token_ids[:prompt_tokens], saved.token_ids[prompt_tokens:]
    if not (prompt and token_ids and saved.snapshot.num_tokens == len(prompt) + progress["steps"]
            and 0 <= progress["steps"] < len(token_ids) and 0 <= settings["tokens_given"] <= len(token_ids)):
      raise ValueError("its counts do not match")
    interval = settings["prefill_interval"]
    return SavedRequest(
        prefill_interval=None if interval is None else int(interval), prompt=prompt,
        token_ids=token_ids, tokens_given=settings["tokens_given"],
        params=SamplingParams(**settings["params"]), compression=_compression(settings["compression"]),
        logprobs=[_logprobs(entry) for entry in settings["logprobs"]], positions=settings["positions"],
        progress=progress)
  except (LookupError, TypeError, ValueError, AttributeError) as e:
    raise InputError(f"the saved sequence was not written by an engine ({e}); use a file of Engine.save") from None


def _compression(settings: dict[str, Any] | None) -> Compression | None:
  if settings is None:
    return None
  rule = dict(settings["scoring"])
  return Compression(**{**settings, "scoring": _RULES[rule.pop("rule")](**rule)})


def _logprobs(entry: dict[str, Any]) -> TokenLogprobs:
  return TokenLogprobs(
      token_id=entry["token_id"], logprob=entry["logprob"], top=tuple((i, value) for i, value in entry["top"]))
