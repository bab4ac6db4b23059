"""Options that several `kvc` commands take, and what they make of them. Imports no JAX before it is needed."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kvc_jax.errors import InputError
from kvc_jax.eviction.names import ALLOCATIONS, PROFILE, SCORINGS

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
  """Ends with one line on a wrong argument."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
  """Adds MODEL and `MODEL_OPTIONS`."""
  parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face or converted checkpoint")
  group = parser.add_argument_group("model and cache")
  group.add_argument("--dtype", choices=DTYPES, help="of weights and cache; the checkpoint's own by default")
  group.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto",
                     help="of the cache alone; fp8 halves a bfloat16 one (default: %(default)s)")
  group.add_argument("--max-model-len", type=int, help="most tokens of prompt and output together")
  group.add_argument("--max-num-seqs", type=int, default=8, help="prompts that run at once (default: %(default)s)")
  group.add_argument("--block-size", type=int, default=16, help="KVs in a block (default: %(default)s)")
  group.add_argument("--chunk-size", type=int, default=256, help="tokens of a prefill chunk (default: %(default)s)")
  group.add_argument("--num-blocks", type=int, help="size of the block pool")
  group.add_argument("--kv-cache-memory-bytes", type=int, help="size of the block pool in bytes")


def _range(text: str) -> tuple[int, int]:
  start, _, end = text.partition(":")
  try:
    return int(start), int(end)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is no range; give START:END, such as 0:32") from None


def add_compression_options(
    parser: argparse.ArgumentParser, title: str = "compression", *, several: bool = False) -> None:
  """Adds what `compression_of` reads; with `several`, budgets, allocations and scorings take any number of values."""
  many: dict[str, Any] = {"nargs": "+"} if several else {}
  group = parser.add_argument_group(f"{title} (off without --rate, --max-cache-tokens or --mass)")
  group.add_argument("--rate", type=float, **many, help="keep one KV in RATE outside the window")
  group.add_argument("--max-cache-tokens", type=int, **many, help="keep this many tokens per head, on average")
  group.add_argument("--mass", type=float, **many,
                     help="keep the smallest cache with this share (0 to 1) of the scores' sum: of squared attention "
                     "with --scoring window and full, of attention with --power 1")
  group.add_argument("--window", type=int, help="newest tokens that always stay (default: 32)")
  group.add_argument("--sinks", type=int, help="first tokens that always stay (default: 0)")
  group.add_argument("--keep", action="append", type=_range, metavar="START:END",
                     help="token positions that are never evicted; may be repeated")
  group.add_argument("--allocation", choices=(*ALLOCATIONS, PROFILE), **many,
                     help="heads that share a budget (default: all of a sequence)")
  group.add_argument("--safeguard", type=float,
                     help="share of the budget that every head keeps at least, with allocation all or layer")
  group.add_argument("--head-profile", metavar="FILE", help="of kvc calibrate: gives each head a budget of its own")
  group.add_argument("--head-bias", type=float, metavar="WEIGHT",
                     help="let --head-profile shift the choice among heads instead; 1 is its full weight")
  group.add_argument("--interval", type=int,
                     help="decode steps between compressions; once after the prompt by default")
  group.add_argument("--prefill-interval", type=int,
                     help="prompt tokens between compressions while the prompt is prefilled; by default once it is")
  group.add_argument("--on-demand", action="store_true", default=None,
                     help="compress again whenever memory is short; the text then depends on what else is served")
  group.add_argument("--scoring", choices=SCORINGS, **many, help="what a KV is worth (default: window)")
  group.add_argument("--queries", type=int, help="prompt queries that window, snapkv and critical observe")
  group.add_argument("--power", type=int, help="1 for plain, 2 for squared attention (window, full)")
  group.add_argument("--reduction", choices=("sum", "mean"), help="over the observed queries (window, full, h2o)")
  group.add_argument("--pooling", type=int, help="width of the pool along keys (window, snapkv, critical); 1 is none")
  group.add_argument("--pool", choices=("max", "mean"), help="what --scoring snapkv takes of neighbours (default: max)")
  group.add_argument("--buffer", type=int, help="newest tokens that a query does not count for")
  group.add_argument("--decode-every", type=int, help="observe one decode query in so many (default: 2)")
  group.add_argument("--future", type=int, help="positions to come that --scoring expected averages over")
  group.add_argument("--epsilon", type=float, help="added to the attention before values count (expected, critical)")
  group.add_argument("--first-share", type=float, help="of the budget that --scoring critical gives to attention alone")


BUDGET_OPTIONS = ("rate", "max_cache_tokens", "mass")
_COMPRESSION_OPTIONS = (
    "window", "sinks", "keep", "allocation", "safeguard", "interval", "prefill_interval", "on_demand")
_PROFILE_OPTIONS = ("head_profile", "head_bias")
_SCORING_OPTIONS = (
    "queries", "power", "reduction", "pooling", "pool", "buffer", "decode_every", "future", "epsilon", "first_share")
MODEL_OPTIONS = ("dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "block_size", "chunk_size", "num_blocks",
                 "kv_cache_memory_bytes")


def _scoring(args: argparse.Namespace) -> Any:
  from kvc_jax.eviction.rules import RULES

  name = args.scoring or "window"
  given, known = given_options(args, _SCORING_OPTIONS), {field.name for field in dataclasses.fields(RULES[name])}
  unfit = [flag(option) for option in given if option not in known]
  if unfit:
    raise InputError(f"{', '.join(unfit)} does not go with --scoring {name}; leave it out")
  if "seed" in known:
    given["seed"] = getattr(args, "seed", None) or 0
  return RULES[name](**given)


def flag(name: str) -> str:
  """How an option is given on the command line."""
  return f"--{name.replace('_', '-')}"


def given_options(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
  """Those of the options that were given, with their values."""
  return {name: value for name in names if (value := getattr(args, name)) is not None}


def compression_of(args: argparse.Namespace) -> Any:
  """The `Compression` that was asked for, None without a budget.

  Raises:
    InputError: options do not go together, a number is out of range, or a head profile cannot be read.
  """
  import kvc_jax

  options = given_options(args, (*BUDGET_OPTIONS, *_COMPRESSION_OPTIONS))
  if not given_options(args, BUDGET_OPTIONS):
    if idle := [*options, *given_options(args, ("scoring", *_SCORING_OPTIONS, *_PROFILE_OPTIONS))]:
      raise InputError(
          f"{flag(idle[0])} compresses nothing without --rate, --max-cache-tokens or --mass; give one of them")
    return None
  scoring = _scoring(args)
  if args.head_profile is None:
    if args.allocation == PROFILE or args.head_bias is not None:
      raise InputError("a head profile is needed for this; give --head-profile FILE, which kvc calibrate makes")
    return kvc_jax.Compression(**options, scoring=scoring)
  profile = kvc_jax.HeadProfile.load(args.head_profile)
  if args.head_bias is None:
    if options.setdefault("allocation", PROFILE) != PROFILE:
      raise InputError(f"--head-profile goes with --allocation {PROFILE}, or with --head-bias; give one of them")
    return kvc_jax.Compression(**{**options, "allocation": profile}, scoring=scoring)
  if args.allocation == PROFILE:
    raise InputError(f"--allocation {PROFILE} leaves no choice among heads to --head-bias; leave one of them out")
  return kvc_jax.Compression(
      **options, scoring=kvc_jax.HeadBias(rule=scoring, profile=profile, weight=args.head_bias))


def read_text(name: str, needed: str = "a file with a prompt, or - for standard input") -> str:
  """A file's text, or that of standard input for "-".

  Raises:
    InputError: it is missing, which asks for what is `needed`, or is not UTF-8.
  """
  if name == "-" and sys.stdin is None:
    raise InputError("standard input is closed; give a prompt with --prompt or --file")
  try:
    data = sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes()
    return data.decode("utf-8")
  except FileNotFoundError:
    raise InputError(f"{name} is missing; give {needed}") from None
  except UnicodeDecodeError as e:
    raise InputError(f"{name} is not UTF-8 text ({e.reason} at byte {e.start}); convert it") from None
