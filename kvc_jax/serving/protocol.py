"""What clients may send: one table of fields, and how they become a call of the engine."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from kvc_jax.engine.request import MOST_SAMPLES, SamplingParams
from kvc_jax.errors import LARGEST_COUNT, InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.names import ALLOCATIONS, PROFILE, SCORINGS
from kvc_jax.eviction.profile import HeadProfile
from kvc_jax.eviction.rules import RULES
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.eviction.score_head_bias import HeadBias
from kvc_jax.sampling import MOST_LOGPROBS
from kvc_jax.serving.api_error import ApiError

Endpoint = Literal["completions", "chat"]

_MOST_STOPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationCall:
  """A request that has been checked.

  Attributes:
    endpoint: where it came in.
    prompts: of completions, text or token ids; empty for chat.
    messages: of chat; empty for completions.
    params: how to sample each prompt.
    compression: None for none.
    stream: send each piece as it comes.
    include_usage: send the usage at the end of a stream.
    echo: put the prompt in front of the text.
    logprobs: most probable tokens to give with each token; None for none.
  """

  endpoint: Endpoint
  prompts: tuple[str | list[int], ...]
  messages: tuple[dict[str, str], ...]
  params: SamplingParams
  compression: Compression | None
  stream: bool
  include_usage: bool
  echo: bool
  logprobs: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
  """What holds where a request does not say.

  Attributes:
    model: name that clients give.
    max_model_len: tokens that a chat's answer may have at most.
    interval: decode steps between compressions with `compress_once` false.
    compression: of requests that say nothing of it; those that name a budget take from it
      what else they leave out.
  """

  model: str
  max_model_len: int
  interval: int
  compression: Compression | None = None


_SHORT = reprlib.Repr(maxlevel=3, maxlist=4, maxdict=4, maxstring=60, maxlong=20, maxother=60)
"""Shows a wrong value, however long or deep it is."""


class _Wrong(Exception):
  """A value is not what its field needs; the text says what is needed."""


def _whole(least: int, most: int) -> Callable[[Any], int]:
  def check(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
      raise _Wrong(f"give a whole number from {least} to {most}")
    return value

  return check


def _real(least: float, most: float) -> Callable[[Any], float]:
  needed = f"from {least:g} to {most:g}" if most < LARGEST_COUNT else f"of at least {least:g}"

  def check(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
      raise _Wrong(f"give a number {needed}")
    return float(value)

  return check


def _flag(value: Any) -> bool:
  if not isinstance(value, bool):
    raise _Wrong("give true or false")
  return value


def _one_of(*names: str) -> Callable[[Any], str]:
  def check(value: Any) -> str:
    if not isinstance(value, str) or value not in names:
      raise _Wrong(f"give one of {', '.join(names)}")
    return value

  return check


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise _Wrong("give a text")
  return value


def _stops(value: Any) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
    raise _Wrong(f"give a text or a list of up to {_MOST_STOPS} texts, none of them empty")
  return tuple(stops)


def _ids(value: Any) -> list[int]:
  if not isinstance(value, list) or not all(_is_id(i) for i in value):
    raise _Wrong(f"give a list of token ids, each from 0 to {LARGEST_COUNT}")
  return value


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _prompts(value: Any) -> tuple[str | list[int], ...]:
  """The four forms of OpenAI's `prompt`."""
  if isinstance(value, str):
    return (value,)
  if isinstance(value, list) and value:
    if all(_is_id(i) for i in value):
      return (value,)
    if all(isinstance(p, str) for p in value):
      return tuple(value)
    if all(isinstance(p, list) and p and all(_is_id(i) for i in p) for p in value):
      return tuple(value)
  raise _Wrong("give a text, a list of texts, a list of token ids or a list of such lists, none of them empty")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
  if not isinstance(value, list) or not value:
    raise _Wrong("give a list of at least one message")
  return tuple(_message(message) for message in value)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(message: Any) -> dict[str, str]:
  if not isinstance(message, dict):
    raise _Wrong("each message is an object with a role and a content")
  role, content = message.get("role"), message.get("content")
  if not isinstance(role, str) or role not in _ROLES:
    raise _Wrong(f"the role of a message is one of {', '.join(_ROLES)}")
  for name, value in message.items():
    if name not in ("role", "content", "name") and value not in (None, [], ""):
      raise _Wrong("a message has a role, a content and a name, nothing else")
  if isinstance(content, list):
    content = _joined(content)
  if not isinstance(content, str):
    raise _Wrong("the content of a message is a text or a list of parts of type text")
  return {"role": _ROLES[role], "content": content}


def _joined(parts: list[Any]) -> str | None:
  """The text of a message in parts; None where a part is no text."""
  joined = ""
  for part in parts:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
      return None
    joined += text
  return joined


def _ranges(value: Any) -> tuple[tuple[int, int], ...]:
  if not isinstance(value, list) or not all(
      isinstance(p, list) and len(p) == 2 and all(_is_id(i) for i in p) for p in value):
    raise _Wrong("give a list of [start, end] token positions")
  return tuple((start, end) for start, end in value)


def _stream_options(value: Any) -> bool:
  """Whether usage is wanted."""
  if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
    raise _Wrong("give an object with include_usage")
  return _flag(value.get("include_usage") or False)


def _only(*neutral: Any) -> Callable[[Any], None]:
  """A field of OpenAI's that is not supported; values that ask for nothing are let through."""

  def check(value: Any) -> None:
    if value not in neutral:
      raise _Wrong("it is not supported; leave it out")

  return check


def _anything(value: Any) -> None:
  """A field that changes nothing about the answer."""


_BOTH: tuple[Endpoint, ...] = ("completions", "chat")


@dataclasses.dataclass(frozen=True)
class Field:
  """One field: what it must hold, where it may stand, and what it is for."""

  check: Callable[[Any], Any]
  about: str
  endpoints: tuple[Endpoint, ...] = _BOTH


FIELDS: dict[str, Field] = {
    "model": Field(_text, "name of the served model; needed"),
    "prompt": Field(_prompts, "text, texts, token ids, or lists of token ids; needed", ("completions",)),
    "messages": Field(_messages, "the conversation; needed. Contents are texts", ("chat",)),
    "max_tokens": Field(_whole(1, LARGEST_COUNT), "most tokens to generate: 16 for completions, the context for chat"),
    "max_completion_tokens": Field(_whole(1, LARGEST_COUNT), "the same, by its newer name", ("chat",)),
    "temperature": Field(_real(0, 100), "0 is greedy; 1 by default"),
    "top_p": Field(_real(1e-9, 1), "smallest set of tokens with this probability; 1 by default"),
    "top_k": Field(_whole(-1, LARGEST_COUNT), "most probable tokens to draw from; all by default"),
    "min_p": Field(_real(0, 1), "least probability, relative to the best token's; 0 by default"),
    "seed": Field(_whole(0, 2**32 - 1), "of the draws"),
    "n": Field(_whole(1, MOST_SAMPLES), "samples of each prompt; 1 by default"),
    "stop": Field(_stops, f"text or up to {_MOST_STOPS} texts that end the answer"),
    "stop_token_ids": Field(_ids, "token ids that end the answer"),
    "ignore_eos": Field(_flag, "go on past end-of-sequence tokens"),
    "skip_special_tokens": Field(_flag, "leave special tokens out of the text; true by default"),
    "stream": Field(_flag, "send each piece of text as it comes"),
    "stream_options": Field(_stream_options, "`include_usage`: usage and receipt behind the last piece"),
    "echo": Field(_flag, "put the prompt in front of the text; not with logprobs", ("completions",)),
    "logprobs": Field(_whole(0, MOST_LOGPROBS), "most probable tokens to give with each token; a flag for chat"),
    "top_logprobs": Field(_whole(0, MOST_LOGPROBS), "the same for chat, beside `logprobs: true`", ("chat",)),
    "rate": Field(_real(1, LARGEST_COUNT), "keep one KV in so many outside the window"),
    "max_cache_tokens": Field(_whole(-1, LARGEST_COUNT), "keep so many tokens per head, on average; -1 is no bound"),
    "window": Field(_whole(1, LARGEST_COUNT), "newest tokens that always stay; 32 by default"),
    "protected_window_size": Field(_whole(1, LARGEST_COUNT), "the reference's name of `window`"),
    "sinks": Field(_whole(0, LARGEST_COUNT), "first tokens that always stay; 0 by default"),
    "keep": Field(_ranges, "[[start, end], ...] token positions that always stay"),
    "scoring": Field(_one_of(*SCORINGS), f"what a KV is worth: {', '.join(SCORINGS)}; window by default"),
    "allocation": Field(_one_of(*ALLOCATIONS, PROFILE), "heads that share a budget: all (default), layer or head; "
                        "pyramid, or the server's own profile, give each head one"),
    "safeguard": Field(_real(0, 1), "share of the budget that every head keeps at least, with all or layer"),
    "mass": Field(_real(0, 1), "keep the smallest cache with this share of the scores' sum: "
                  "of squared attention with window and full"),
    "interval": Field(_whole(1, LARGEST_COUNT), "decode steps between compressions; once by default"),
    "compress_once": Field(_flag, "the reference's field: false is an interval of one block's tokens"),
    "best_of": Field(_only(1), "only 1", ("completions",)),
    "suffix": Field(_only(""), "only empty", ("completions",)),
    "frequency_penalty": Field(_only(0), "only 0"),
    "presence_penalty": Field(_only(0), "only 0"),
    "logit_bias": Field(_only({}), "only empty"),
    "response_format": Field(_only({"type": "text"}), "only text", ("chat",)),
    "tools": Field(_only([]), "only empty", ("chat",)),
    "tool_choice": Field(_only("none"), "only none", ("chat",)),
    "functions": Field(_only([]), "only empty", ("chat",)),
    "function_call": Field(_only("none"), "only none", ("chat",)),
    "modalities": Field(_only(["text"]), "only text", ("chat",)),
    "user": Field(_anything, "ignored"),
    "metadata": Field(_anything, "ignored"),
    "store": Field(_only(False), "only false", ("chat",)),
    "service_tier": Field(_only("auto", "default"), "only auto and default"),
    "parallel_tool_calls": Field(_flag, "ignored, for there are no tools", ("chat",)),
    "safety_identifier": Field(_anything, "ignored"),
    "prompt_cache_key": Field(_anything, "ignored"),
}
"""Every field that is known."""

_CHAT_LOGPROBS = Field(_flag, "", ("chat",))

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
             "skip_special_tokens")
_BUDGETS = ("rate", "max_cache_tokens", "mass")
_ONCE: dict[str, Any] = {"interval": None, "prefill_interval": None, "on_demand": False}
"""A share of the scores is taken once, whatever the server does by default."""
_COMPRESSION = ("window", "protected_window_size", "sinks", "keep", "scoring", "allocation", "safeguard", "interval",
                "compress_once")


def parse_call(endpoint: Endpoint, body: Any, defaults: Defaults) -> GenerationCall:
  """Checks a request's JSON.

  Args:
    endpoint: where it came in.
    body: what the JSON held.
    defaults: of this server.

  Raises:
    ApiError: 400 that names the field, or 404 for another model.
  """
  if not isinstance(body, dict):
    raise ApiError(400, "the body is no JSON object; send one with a model and a prompt or messages")
  given = {name: _checked(endpoint, name, value) for name, value in body.items() if value is not None}
  for name in ("model", "prompt" if endpoint == "completions" else "messages"):
    if name not in given:
      raise ApiError(400, f"{name} is missing; every request needs it", param=name)
  if given["model"] != defaults.model:
    raise ApiError(404, f"the model {given['model'][:200]!r} is not served; ask for {defaults.model!r}",
                   param="model", code="model_not_found")
  stream, n, logprobs = given.get("stream", False), given.get("n", 1), _logprobs(endpoint, given)
  if "stream_options" in given and not stream:
    raise ApiError(400, "stream_options goes with stream: true alone; leave it out", param="stream_options")
  if given.get("echo") and logprobs is not None:
    raise ApiError(400, "echo does not go with logprobs; leave one of them out", param="echo")
  prompts = given.get("prompt", ())
  if len(prompts) * n > MOST_SAMPLES:
    raise ApiError(400, f"{len(prompts)} prompts of {n} samples are too many; ask for {MOST_SAMPLES} choices at most",
                   param="n" if n > 1 else "prompt")
  return GenerationCall(
      endpoint=endpoint, prompts=prompts, messages=given.get("messages", ()), stream=stream,
      include_usage=given.get("stream_options", False), echo=given.get("echo", False), logprobs=logprobs,
      params=_params(endpoint, given, n, logprobs, defaults), compression=_compression(given, defaults))


def _checked(endpoint: Endpoint, name: str, value: Any) -> Any:
  field = _CHAT_LOGPROBS if (endpoint, name) == ("chat", "logprobs") else FIELDS.get(name)
  if field is None or endpoint not in field.endpoints:
    raise ApiError(400, f"{name[:100]!r} is no field of this endpoint; leave it out", param=name[:100])
  try:
    return field.check(value)
  except _Wrong as e:
    raise ApiError(400, f"{name} is {_SHORT.repr(value)}: {e}", param=name) from None


def _logprobs(endpoint: Endpoint, given: Mapping[str, Any]) -> int | None:
  if endpoint == "completions":
    return given.get("logprobs")
  if "top_logprobs" in given and not given.get("logprobs"):
    raise ApiError(400, "top_logprobs goes with logprobs: true alone; leave it out or ask for logprobs",
                   param="top_logprobs")
  return given.get("top_logprobs", 0) if given.get("logprobs") else None


def _params(
    endpoint: Endpoint, given: Mapping[str, Any], n: int, logprobs: int | None, defaults: Defaults
) -> SamplingParams:
  lengths = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
  if len(set(lengths)) > 1:
    raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_completion_tokens")
  most = lengths[0] if lengths else 16 if endpoint == "completions" else defaults.max_model_len
  options = {name: given[name] for name in _SAMPLING if name in given}
  try:
    return SamplingParams(max_tokens=most, n=n, logprobs=logprobs, **options)
  except InputError as e:
    raise ApiError(400, str(e).removeprefix("SamplingParams: ")) from None


def _compression(given: Mapping[str, Any], defaults: Defaults) -> Compression | None:
  options = {name: given[name] for name in (*_BUDGETS, *_COMPRESSION) if name in given}
  if options.pop("max_cache_tokens", -1) != -1:
    if given["max_cache_tokens"] == 0:
      raise ApiError(400, "max_cache_tokens is 0: give at least 1, or -1 for no bound", param="max_cache_tokens")
    options["max_cache_tokens"] = given["max_cache_tokens"]
  if not any(name in options for name in _BUDGETS):
    if "max_cache_tokens" in given:  # -1: the reference's clients send its other fields beside it
      return None
    if options:
      name = next(iter(options))
      raise ApiError(
          400, f"{name} compresses nothing without rate, max_cache_tokens or mass; give one of them", param=name)
    return defaults.compression
  _take_reference_names(options, defaults)
  if options.get("allocation") == PROFILE:
    options["allocation"] = _own_profile(defaults.compression)
  if "scoring" in options:
    options["scoring"] = named_rule(options["scoring"], defaults.compression)
  try:
    if defaults.compression is None:
      return Compression(**options)
    left_out = dict.fromkeys(_BUDGETS) | (_ONCE if options.get("mass") is not None else {})
    return dataclasses.replace(defaults.compression, **{**left_out, **options})
  except InputError as e:
    raise ApiError(400, str(e).removeprefix("Compression: ")) from None


def named_rule(name: str, own: Compression | None) -> ScoringRule:
  """The rule that a request names: the server's own numbers or the default ones, as others would compile anew."""
  rule = RULES[name]
  scoring = None if own is None else own.scoring
  inner = scoring.rule if isinstance(scoring, HeadBias) else scoring
  return scoring if scoring is not None and type(inner) is rule else rule()


def _own_profile(own: Compression | None) -> HeadProfile:
  if own is None or not isinstance(own.allocation, HeadProfile):
    raise ApiError(400, f"this server has no head profile; give one of {', '.join(ALLOCATIONS)}", param="allocation")
  return own.allocation


def _take_reference_names(options: dict[str, Any], defaults: Defaults) -> None:
  window = options.pop("protected_window_size", None)
  if window is not None and options.setdefault("window", window) != window:
    raise ApiError(400, "window and protected_window_size differ; give one of them", param="protected_window_size")
  once = options.pop("compress_once", None)
  if once and "interval" in options:
    raise ApiError(400, "compress_once and interval contradict each other; give one of them", param="compress_once")
  if once:
    options["interval"] = None
  elif once is False:
    options.setdefault("interval", defaults.interval)
