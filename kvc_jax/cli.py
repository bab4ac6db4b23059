"""The `kvc` command: convert, generate, inspect, calibrate, eval, serve, demo."""

import argparse
import dataclasses
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kvc_jax.errors import InputError, check_count
from kvc_jax.eviction.names import ALLOCATIONS, PROFILE, SCORINGS

_DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
  """Ends with one line on a wrong argument."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status: 0, 2 on bad input, 130 when interrupted."""
  args = _parser().parse_args(argv)
  # JAX, which is not imported yet, would take three quarters of a GPU and leave the rest idle.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end the run
  try:
    return args.run(args)
  except InputError as e:
    return _fail(str(e))
  except BrokenPipeError:
    # The reader went away; keep Python from complaining about it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except OSError as e:
    return _fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
  except KeyboardInterrupt:
    print("kvc: interrupted", file=sys.stderr)
    return 130
  except Exception as e:
    if type(e).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(e):
      return _fail("the device is out of memory; lower --num-blocks, --chunk-size, --max-num-seqs or --queries")
    raise


def _fail(message: str) -> int:
  print(f"kvc: error: {' '.join(message.split())}", file=sys.stderr)
  return 2


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="kvc", description="Text generation with a compressed KV cache.")
  parser.add_argument("--version", action="version", version=_version())
  commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
  _add_convert(commands)
  _add_generate(commands)
  _add_inspect(commands)
  _add_calibrate(commands)
  _add_eval(commands)
  _add_serve(commands)
  demo = commands.add_parser("demo", help="tell the shipped model's story at 1x, 2x, 4x and 8x")
  demo.add_argument("--heatmap", type=pathlib.Path, default=pathlib.Path("heatmap.png"), help="PNG to write")
  demo.set_defaults(run=_demo)
  return parser


def _version() -> str:
  import kvc_jax

  return f"kvc_jax {kvc_jax.__version__}"


def _add_convert(commands: Any) -> None:
  convert = commands.add_parser("convert", help="convert a Hugging Face Llama folder to an Orbax checkpoint")
  convert.add_argument("source", metavar="SRC", help="folder with config.json, safetensors and tokenizer")
  convert.add_argument("target", metavar="DST", help="folder to make")
  convert.add_argument("--dtype", choices=_DTYPES, help="of the weights; the source's own by default")
  convert.add_argument("--overwrite", action="store_true", help="replace DST if it is a model's folder")
  convert.set_defaults(run=_convert)


def _add_generate(commands: Any) -> None:
  generate = commands.add_parser("generate", help="generate text")
  _add_run_options(generate)
  generate.add_argument("--n", type=int, default=1, help="samples of each prompt (default: %(default)s)")
  generate.add_argument("--logprobs", type=int, metavar="TOP",
                        help="with --json: log-probabilities of each token and of the TOP most probable ones")
  generate.add_argument("--json", action="store_true", help="print one JSON object per text, as each ends")
  generate.add_argument("--quiet", action="store_true", help="no progress and no receipt on stderr")
  generate.set_defaults(run=_generate)


def _add_inspect(commands: Any) -> None:
  inspect = commands.add_parser("inspect", help="draw which KVs each layer and head keep")
  _add_run_options(inspect)
  inspect.add_argument("--out", "-o", type=pathlib.Path, default=pathlib.Path("heatmap.png"), help="PNG to write")
  inspect.set_defaults(run=_inspect)


def _add_calibrate(commands: Any) -> None:
  calibrate = commands.add_parser("calibrate", help="measure what share of its tokens each head keeps on some prompts")
  _add_model_options(calibrate)
  _add_prompt_options(calibrate)
  _add_compression_options(calibrate)
  calibrate.add_argument("--bins", type=int, default=16,
                         help="equal parts of a prompt that are counted apart (default: %(default)s)")
  calibrate.add_argument("--out", "-o", type=pathlib.Path, default=pathlib.Path("head-profile.safetensors"),
                         help="safetensors file to write (default: %(default)s)")
  calibrate.set_defaults(run=_calibrate)


def _add_eval(commands: Any) -> None:
  evaluate = commands.add_parser("eval", help="measure quality, bytes held and speed under compression")
  kinds = evaluate.add_subparsers(required=True, metavar="WHAT", parser_class=_Parser)
  longbench = kinds.add_parser("longbench", help="LongBench and LongBench-E, by their own metrics")
  _add_eval_options(longbench)
  group = longbench.add_argument_group("questions")
  group.add_argument("--data", required=True, help="folder with LongBench's SET.jsonl files")
  group.add_argument("--set", nargs="+", default=[], metavar="NAME", help="sets to ask; all that are there by default")
  group.add_argument("--longbench-e", action="store_true", help="LongBench-E (SET_e.jsonl), with scores by length")
  group.add_argument("--limit", type=int, help="ask only so many questions of each set")
  group.add_argument("--max-input-tokens", type=int,
                     help="longer prompts are cut in the middle; by default what the context has room for")
  group.add_argument("--max-new-tokens", type=int, help="of an answer; by default LongBench's own number for each set")
  group.add_argument("--template", choices=("auto", "model", "llama2", "none"), default="auto",
                     help="around prompts: the model's chat template, LongBench's [INST]...[/INST], or none; never "
                     "around few-shot and code prompts (default: the model's, where it has one)")
  longbench.set_defaults(run=_eval_longbench)
  recall = kinds.add_parser("recall", help="facts to be found again in a text, at any length")
  _add_eval_options(recall)
  group = recall.add_argument_group("questions")
  group.add_argument("--task", nargs="+", default=[], metavar="NAME", help="tasks to ask (default: all)")
  group.add_argument("--length", nargs="+", type=int, default=[1024, 2048, 4096], metavar="TOKENS",
                     help="of prompt and answer together (default: 1024 2048 4096)")
  group.add_argument("--count", type=int, default=50, help="questions of each task and length (default: %(default)s)")
  group.add_argument("--text", metavar="FILE", help="UTF-8 text to hide facts in (default: a novel that is shipped)")
  group.add_argument("--question-seed", type=int, default=0, help="other seeds ask other questions")
  recall.set_defaults(run=_eval_recall)
  perplexity = kinds.add_parser("perplexity", help="perplexity of a text's tokens behind a compressed context")
  _add_eval_options(perplexity)
  group = perplexity.add_argument_group("text")
  group.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, - for standard input")
  group.add_argument("--context-tokens", type=int,
                     help="prefilled and compressed in each window (default: what the targets leave, 4096 at most)")
  group.add_argument("--target-tokens", type=int, default=128, help="predicted in each window (default: %(default)s)")
  group.add_argument("--windows", type=int, default=32, help="most windows (default: %(default)s)")
  perplexity.set_defaults(run=_eval_perplexity)
  score = kinds.add_parser("score", help="score existing predictions by LongBench's metrics")
  score.add_argument("predictions", metavar="DIR",
                     help="folder with SET.jsonl files of pred, answers, all_classes and length")
  score.add_argument("--longbench-e", action="store_true", help="scores by length as well")
  score.add_argument("--json", action="store_true", help="print one JSON object, with the score of every sample")
  score.set_defaults(run=_eval_score)
  report = kinds.add_parser("report", help="table and plots of what kvc eval wrote so far")
  report.add_argument("out", metavar="DIR", type=pathlib.Path, help="--out of a kvc eval command")
  report.set_defaults(run=_eval_report)


def _add_eval_options(parser: argparse.ArgumentParser) -> None:
  """What every evaluation that runs a model takes."""
  _add_model_options(parser)
  _add_compression_options(
      parser, "compression: a run for each combination of one budget, one scoring and one allocation; "
      "a rate of 1 is without", several=True)
  group = parser.add_argument_group("run")
  group.add_argument("--out", type=pathlib.Path, default=pathlib.Path("kvc-eval"),
                     help="folder for results; a run that was broken off goes on there (default: %(default)s)")
  group.add_argument("--label", help="name of these policies in tables and plots, instead of scoring and allocation")
  group.add_argument("--seed", type=int, help="of --scoring random")
  group.add_argument("--warm-up", choices=("own", "none"), default="own",
                     help="compile before the clock runs, or not (default: %(default)s)")
  group.add_argument("--compilation-cache", help="folder where compiled steps are kept for the next start")
  group.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_serve(commands: Any) -> None:
  serve = commands.add_parser("serve", help="serve a model over HTTP, as OpenAI's API does")
  _add_model_options(serve)
  group = serve.add_argument_group("server")
  group.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
  group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
  group.add_argument("--served-model-name", help="name that clients give; the folder's by default")
  group.add_argument("--api-key-file", help="file with the key that clients must bring; "
                     "by default the environment's KVC_API_KEY, or none")
  group.add_argument("--max-waiting", type=int, default=256,
                     help="sequences that may wait while no slot is free; others are refused with 429 "
                     "(default: %(default)s)")
  group.add_argument("--max-body-bytes", type=int, default=4 << 20, help="of a request (default: %(default)s)")
  group.add_argument("--request-timeout", type=float, default=600, help="seconds (default: %(default)s)")
  group.add_argument("--drain-timeout", type=float, default=60,
                     help="seconds for running requests to end at shutdown (default: %(default)s)")
  group.add_argument("--prefix-caching", action="store_true",
                     help="keep the KVs of prompts for later ones that begin alike, as long as nobody needs the blocks")
  group.add_argument("--prefix-interval", type=int, default=256,
                     help="cached prefixes end at multiples of so many tokens (default: %(default)s)")
  group.add_argument("--warm-up", choices=("own", "all", "none"), default="own",
                     help="steps to compile before serving: for this command's own scoring and allocation, for all "
                     "of them, or none (default: %(default)s)")
  group.add_argument("--compilation-cache", help="folder where compiled steps are kept for the next start")
  _add_compression_options(serve, "compression of requests that say nothing of it")
  serve.set_defaults(run=_serve)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
  """What every command that runs a model takes."""
  _add_model_options(parser)
  _add_prompt_options(parser)
  _add_sampling_options(parser)
  _add_compression_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face or converted checkpoint")
  group = parser.add_argument_group("model and cache")
  group.add_argument("--dtype", choices=_DTYPES, help="of weights and cache; the checkpoint's own by default")
  group.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto",
                     help="of the cache alone; fp8 halves a bfloat16 one (default: %(default)s)")
  group.add_argument("--max-model-len", type=int, help="most tokens of prompt and output together")
  group.add_argument("--max-num-seqs", type=int, default=8, help="prompts that run at once (default: %(default)s)")
  group.add_argument("--block-size", type=int, default=16, help="KVs in a block (default: %(default)s)")
  group.add_argument("--chunk-size", type=int, default=256, help="tokens of a prefill chunk (default: %(default)s)")
  group.add_argument("--num-blocks", type=int, help="size of the block pool")
  group.add_argument("--kv-cache-memory-bytes", type=int, help="size of the block pool in bytes")


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("prompts (standard input if none is given)")
  group.add_argument("--prompt", "-p", action="append", default=[], help="text; may be repeated")
  group.add_argument("--file", "-f", action="append", default=[],
                     help="file with one prompt, - for standard input; may be repeated")
  group.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("sampling")
  group.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate (default: %(default)s)")
  group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
  group.add_argument("--top-k", type=int, default=0, help="draw from the K most probable tokens; 0 is all")
  group.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set with this probability")
  group.add_argument("--min-p", type=float, default=0.0, help="least probability, relative to the best token's")
  group.add_argument("--seed", type=int, help="of the draws")
  group.add_argument("--stop", action="append", default=[], help="string that ends the text; may be repeated")
  group.add_argument("--stop-token-id", action="append", type=int, default=[],
                     help="id that ends the text; may be repeated")
  group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")


def _range(text: str) -> tuple[int, int]:
  start, _, end = text.partition(":")
  try:
    return int(start), int(end)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is no range; give START:END, such as 0:32") from None


def _add_compression_options(
    parser: argparse.ArgumentParser, title: str = "compression", *, several: bool = False) -> None:
  """With `several`, budgets, allocations and scorings take any number of values."""
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


_BUDGET_OPTIONS = ("rate", "max_cache_tokens", "mass")
_COMPRESSION_OPTIONS = (
    "window", "sinks", "keep", "allocation", "safeguard", "interval", "prefill_interval", "on_demand")
_PROFILE_OPTIONS = ("head_profile", "head_bias")
_SCORING_OPTIONS = (
    "queries", "power", "reduction", "pooling", "pool", "buffer", "decode_every", "future", "epsilon", "first_share")
_MODEL_OPTIONS = ("dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "block_size", "chunk_size", "num_blocks",
                  "kv_cache_memory_bytes")


def _scoring(args: argparse.Namespace) -> Any:
  from kvc_jax.eviction.rules import RULES

  name = args.scoring or "window"
  given, known = _given(args, _SCORING_OPTIONS), {field.name for field in dataclasses.fields(RULES[name])}
  unfit = [_flag(option) for option in given if option not in known]
  if unfit:
    raise InputError(f"{', '.join(unfit)} does not go with --scoring {name}; leave it out")
  if "seed" in known:
    given["seed"] = getattr(args, "seed", None) or 0
  return RULES[name](**given)


def _flag(name: str) -> str:
  return f"--{name.replace('_', '-')}"


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
  return {name: value for name in names if (value := getattr(args, name)) is not None}


def _compression(args: argparse.Namespace) -> Any:
  import kvc_jax

  options = _given(args, (*_BUDGET_OPTIONS, *_COMPRESSION_OPTIONS))
  if not _given(args, _BUDGET_OPTIONS):
    if idle := [*options, *_given(args, ("scoring", *_SCORING_OPTIONS, *_PROFILE_OPTIONS))]:
      raise InputError(
          f"{_flag(idle[0])} compresses nothing without --rate, --max-cache-tokens or --mass; give one of them")
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


def _sampling(args: argparse.Namespace) -> Any:
  import kvc_jax

  return kvc_jax.SamplingParams(
      temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
      max_tokens=args.max_tokens, stop=tuple(args.stop), stop_token_ids=tuple(args.stop_token_id),
      ignore_eos=args.ignore_eos, n=getattr(args, "n", 1), logprobs=getattr(args, "logprobs", None))


def _prompts(args: argparse.Namespace) -> list[str]:
  prompts = list(args.prompt)
  for name in args.file or ([] if prompts else ["-"]):
    prompts.append(_read(name))
  return prompts


def _read(name: str, needed: str = "a file with a prompt, or - for standard input") -> str:
  if name == "-" and sys.stdin is None:
    raise InputError("standard input is closed; give a prompt with --prompt or --file")
  try:
    data = sys.stdin.buffer.read() if name == "-" else pathlib.Path(name).read_bytes()
    return data.decode("utf-8")
  except FileNotFoundError:
    raise InputError(f"{name} is missing; give {needed}") from None
  except UnicodeDecodeError as e:
    raise InputError(f"{name} is not UTF-8 text ({e.reason} at byte {e.start}); convert it") from None


def _load(args: argparse.Namespace) -> Any:
  import kvc_jax

  return kvc_jax.LLM(args.model, **_given(args, _MODEL_OPTIONS), progress=not getattr(args, "quiet", False))


def _as_prompts(llm: Any, args: argparse.Namespace) -> list[Any]:
  texts = _prompts(args)
  if not args.chat:
    return texts
  return [llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]


def _convert(args: argparse.Namespace) -> int:
  import kvc_jax

  kvc_jax.convert(args.source, args.target, dtype=args.dtype, overwrite=args.overwrite, progress=True)
  print(f"wrote {args.target}")
  return 0


def _generate(args: argparse.Namespace) -> int:
  sampling, compression = _sampling(args), _compression(args)  # checked before the model is loaded
  if args.logprobs is not None and not args.json:
    raise InputError("--logprobs shows nothing without --json; give both")
  llm = _load(args)
  prompts = _as_prompts(llm, args)
  stream = len(prompts) == 1 and args.n == 1 and not args.json

  def show_text(chunk):
    print(chunk.text, end="", flush=True)

  def show_result(output):  # at once: what is done stays, whatever happens to the rest
    if args.json:
      print(json.dumps(_as_json(output)), flush=True)
    else:
      sample = f", sample {output.sample}" if args.n > 1 else ""
      print("" if stream else f"--- prompt {output.index}{sample} ---\n{output.text}", flush=True)
    if not args.quiet and not args.json:
      print(_receipt_line(output), file=sys.stderr)

  progress = not stream and not args.quiet and sys.stderr.isatty()
  llm.generate(
      prompts, sampling, compression, on_text=show_text if stream else None, on_result=show_result, progress=progress)
  return 0


def _as_json(output: Any) -> dict[str, Any]:
  fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
  receipt = fields.pop("receipt")
  held = {f.name: getattr(receipt, f.name) for f in dataclasses.fields(receipt) if f.name != "positions"}
  held["kvs_kept"] = receipt.kvs_kept.tolist()
  if output.logprobs is not None:
    fields["logprobs"] = [dataclasses.asdict(token) for token in output.logprobs]
  derived = ("kvs_seen", "rate_reached", "bytes_uncompressed", "bytes_held")
  return {**fields, "receipt": {**held, **{name: getattr(receipt, name) for name in derived}}}


def _receipt_line(output: Any) -> str:
  receipt = output.receipt
  return (
      f"[{output.index}] {output.finish_reason}, {len(output.token_ids)} tokens; "
      f"KVs {receipt.kvs_kept.sum()} of {receipt.kvs_seen}, blocks {receipt.blocks_held} of "
      f"{receipt.blocks_uncompressed}, {receipt.bytes_held:,} of {receipt.bytes_uncompressed:,} bytes "
      f"({receipt.rate_reached:.2f}x reached)")


def _inspect(args: argparse.Namespace) -> int:
  from kvc_jax.heatmap import check_can_draw, save_heatmap

  check_can_draw(args.out)
  sampling, compression = _sampling(args), _compression(args)
  llm = _load(args)
  prompts = _as_prompts(llm, args)
  if len(prompts) != 1:
    raise InputError(f"inspect draws one prompt, but {len(prompts)} were given; give one")
  output = llm.generate(prompts, sampling, compression, return_positions=True)[0]
  save_heatmap(output.receipt, args.out, title=_receipt_line(output))
  print(_receipt_line(output))
  for layer, kept in enumerate(output.receipt.kvs_kept):
    print(f"layer {layer:>3}: {' '.join(f'{n:>6}' for n in kept)}")
  print(f"wrote {args.out}")
  return 0


def _calibrate(args: argparse.Namespace) -> int:
  from kvc_jax.engine.profile import check_competes, measure_profile

  compression = _compression(args)
  if compression is None:
    raise InputError("calibrate measures what a compression keeps; give --rate or --max-cache-tokens")
  check_competes(compression)
  if not args.out.absolute().parent.is_dir() or args.out.is_dir():
    raise InputError(f"cannot write {args.out}; give a file name in a folder that exists")
  llm = _load(args)
  profile = measure_profile(llm, _as_prompts(llm, args), compression, bins=args.bins, progress=sys.stderr.isatty())
  profile.save(args.out)
  for layer, shares in enumerate(profile.shares.mean(axis=2)):
    print(f"layer {layer:>3}: {' '.join(f'{share:6.3f}' for share in shares)}")
  print(f"wrote {args.out}")
  return 0


def _eval_longbench(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation import longbench

  extended = args.longbench_e
  names = longbench.check_names(args.set or longbench.sets_in(args.data, extended=extended), extended=extended)
  rows = {name: longbench.read_rows(args.data, name, extended=extended) for name in names}
  for option in ("limit", "max_new_tokens"):
    if (given := getattr(args, option)) is not None:
      check_count(_flag(option), given, at_least=1)
  policies = _policies(args)  # all is checked before the model is loaded
  engine = _load_to_measure(args, policies)
  tasks = []
  for name in names:
    new = min(longbench.most_new_tokens(name), args.max_new_tokens or longbench.most_new_tokens(name))
    tasks.append(longbench.LongBenchTask(
        name, rows[name], extended=extended, most_new_tokens=new, template=args.template, limit=args.limit,
        most_input_tokens=longbench.input_tokens(name, engine.max_model_len, new, args.max_input_tokens)))
  return _run_tasks(args, engine, policies, tasks)


def _eval_recall(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation.recall import recall_tasks

  lengths = sorted(set(args.length))
  tasks = recall_tasks(args.task, text=args.text, lengths=lengths, count=args.count, seed=args.question_seed)
  policies = _policies(args)
  engine = _load_to_measure(args, policies)
  if lengths[-1] > engine.max_model_len:
    raise InputError(f"--length {lengths[-1]} is more than the model's context of {engine.max_model_len} tokens; "
                     "give shorter ones, or --max-model-len where the model can take more")
  return _run_tasks(args, engine, policies, tasks)


def _run_tasks(args: argparse.Namespace, engine: Any, policies: Sequence["_Policy"], tasks: Sequence[Any]) -> int:
  """Every task under every policy, then the report; what is on disk already is not run again."""
  from kvc_jax.evaluation.runner import check_task, run_task

  runs = [(task, args.out / policy.name / f"{task.name}.jsonl", policy.compression, _settings(engine, policy))
          for policy in policies for task in tasks]
  for run in runs:
    check_task(*run)
  _warm_up_to_measure(args, engine)
  for run in runs:
    run_task(engine, *run, progress=_shows_progress(args))
  return _eval_report(args)


def _eval_perplexity(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation.perplexity import check_perplexity, run_perplexity, windows_of

  text = _read(args.text, "a text, or - for standard input")
  policies = _policies(args)
  engine = _load_to_measure(args, policies)
  context = args.context_tokens
  if context is None:
    context = min(engine.max_model_len - args.target_tokens, 4096)
  windows = windows_of(
      engine.tokenizer, text, context_tokens=context, target_tokens=args.target_tokens, most=args.windows)
  runs = [(args.out / policy.name / "perplexity.jsonl", policy.compression, _settings(engine, policy))
          for policy in policies]
  for run in runs:
    check_perplexity(engine, windows, *run)
  _warm_up_to_measure(args, engine)
  for run in runs:
    run_perplexity(engine, windows, *run, progress=_shows_progress(args))
  return _eval_report(args)


@dataclasses.dataclass(frozen=True)
class _Policy:
  """One run of an evaluation."""

  name: str
  series: str
  compression: Any


def _policies(args: argparse.Namespace) -> list[_Policy]:
  """A policy for each combination of a budget, a scoring and an allocation; one without compression for a rate of 1."""
  from kvc_jax.evaluation.summary import UNCOMPRESSED, policy_name

  if args.label is not None and (not args.label.strip(".") or "/" in args.label or args.label == UNCOMPRESSED):
    raise InputError(f"--label {args.label!r} is no name for a folder of its own; give letters and digits")
  if args.seed is not None and "random" not in (args.scoring or []):
    raise InputError("--seed is of --scoring random alone, and nothing else is drawn; give that, or leave --seed out")
  policies: dict[str, _Policy] = {}
  for scoring, allocation, budget in itertools.product(
      args.scoring or [None], args.allocation or [None], _budgets(args)):
    every = {name: budget.get(name) for name in _BUDGET_OPTIONS}
    if budget.get("rate") == 1:
      policy = _Policy(UNCOMPRESSED, UNCOMPRESSED, None)
    else:
      # Beside `profile` the file is that allocation's alone: the others take it only where it biases them.
      others = allocation != PROFILE and PROFILE in (args.allocation or []) and args.head_bias is None
      compression = _compression(argparse.Namespace(**{
          **vars(args), **every, "scoring": scoring, "allocation": allocation,
          "head_profile": None if others else args.head_profile}))
      series = UNCOMPRESSED
      if compression is not None:
        heads = compression.allocation
        heads = heads if isinstance(heads, str) else type(heads).__name__
        series = args.label or f"{scoring or 'window'}-{heads}"
      policy = _Policy(policy_name(series, budget), series, compression)
    if (other := policies.setdefault(policy.name, policy)) != policy:
      raise InputError(f"two policies would be called {other.name}; leave --label out, or run them one by one")
  return sorted(policies.values(), key=lambda policy: policy.compression is not None)


def _budgets(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Each number that is given for a budget is one of its own."""
  given = _given(args, _BUDGET_OPTIONS)
  return [{name: value} for name, values in given.items()
          for value in (values if isinstance(values, list) else [values])] or [{}]


def _load_to_measure(args: argparse.Namespace, policies: Sequence[_Policy]) -> Any:
  from kvc_jax.engine.engine import Engine
  from kvc_jax.evaluation.records import check_can_write

  for policy in policies:
    check_can_write(args.out / policy.name)
  compressions = [policy.compression for policy in policies if policy.compression]
  return Engine(
      args.model, **_given(args, _MODEL_OPTIONS), compilation_cache_dir=args.compilation_cache, progress=not args.quiet,
      rules=tuple(dict.fromkeys(compression.scoring for compression in compressions)),
      allocations=tuple(dict.fromkeys(compression.allocation for compression in compressions)))


def _warm_up_to_measure(args: argparse.Namespace, engine: Any) -> None:
  """Compiles what will run, so that no compile is in the measured times."""
  if args.warm_up != "none":
    engine.warm_up(progress=_shows_progress(args))


def _shows_progress(args: argparse.Namespace) -> bool:
  return not args.quiet and sys.stderr.isatty()


def _settings(engine: Any, policy: _Policy) -> dict[str, Any]:
  """What an evaluation's results depend on, beside its questions and its compression."""
  return {"series": policy.series, "model": engine.fingerprint, "max_model_len": engine.max_model_len,
          "dtype": str(engine.config.query_dtype), "kv_cache_dtype": str(engine.config.dtype),
          "block_size": engine.config.block_size}


def _eval_report(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation import plots, summary

  results = summary.read_results(args.out)
  rows = summary.summarize(results)
  print("\n".join(summary.table(rows)))
  written = summary.write_tables(rows, args.out)
  if plots.can_draw():
    written += plots.save_all(rows, results, args.out)
  else:
    print("kvc: no plots, for matplotlib is missing; run: pip install 'kvc_jax[plot]', then: "
          f"kvc eval report {args.out}", file=sys.stderr)
  print("wrote", ", ".join(map(str, written)))
  return 0


def _eval_score(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation import longbench

  found = longbench.score_folder(args.predictions, extended=args.longbench_e)
  if args.json:
    print(json.dumps({name: {**longbench.means(scores, buckets), "scores": scores}
                      for name, (scores, buckets) in found.items()}))
    return 0
  print(f"{'set':<20} samples  score" + "".join(f"  {name:>6}" for name in longbench.BUCKETS if args.longbench_e))
  for name, (scores, buckets) in found.items():
    means = longbench.means(scores, buckets)
    by_length = "".join(f"  {means.get(bucket, '-'):>6}" for bucket in longbench.BUCKETS if args.longbench_e)
    print(f"{name:<20} {means['samples']:>7} {means['score']:>6.2f}{by_length}")
  if len(found) > 1:
    average = sum(longbench.means(*one)["score"] for one in found.values()) / len(found)
    print(f"{'average':<20} {sum(len(scores) for scores, _ in found.values()):>7} {average:>6.2f}")
  return 0


def _serve(args: argparse.Namespace) -> int:
  if missing := [name for name in ("starlette", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]:
    raise InputError(f"the server needs {', '.join(missing)}; run: pip install 'kvc_jax[serve]'")
  from kvc_jax.engine.engine import Engine
  from kvc_jax.serving.app import AppSettings
  from kvc_jax.serving.server import Address, listen, make_server

  compression = _compression(args)
  settings = AppSettings(
      model=args.served_model_name or pathlib.Path(args.model).resolve().name, api_key=_api_key(args.api_key_file),
      compression=compression, max_body_bytes=args.max_body_bytes, request_timeout=args.request_timeout,
      drain_timeout=args.drain_timeout)
  logging.basicConfig(  # by force: libraries have set up the root logger when they were imported
      level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
  with listen(Address(host=args.host, port=args.port)) as sock:
    if settings.api_key is None and not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
      print(f"kvc: warning: anyone who reaches {args.host} can use this server; give --api-key-file", file=sys.stderr)
    engine = Engine(
        args.model, **_given(args, _MODEL_OPTIONS), max_waiting=args.max_waiting,
        prefix_caching=args.prefix_caching, prefix_interval=args.prefix_interval,
        compilation_cache_dir=args.compilation_cache, progress=True, **_warmed(args.warm_up, compression))
    if args.warm_up != "none":
      engine.warm_up(progress=sys.stderr.isatty())
    server = make_server(engine, settings, lambda url: print(f"serving {settings.model} at {url}", flush=True))
    for ends in (signal.SIGINT, signal.SIGTERM):  # uvicorn acts on them, and raises them once more when it has ended
      signal.signal(ends, lambda *_: None)
    server.run(sockets=[sock])
  return 0


def _warmed(which: str, compression: Any) -> dict[str, Any]:
  """Rules and allocations that an engine's warm-up compiles for."""
  from kvc_jax.serving.protocol import named_rule

  if which == "all":
    own = () if compression is None or isinstance(compression.allocation, str) else (compression.allocation,)
    return {"rules": tuple(named_rule(name, compression) for name in SCORINGS), "allocations": (*ALLOCATIONS, *own)}
  return {} if compression is None else {"rules": (compression.scoring,), "allocations": (compression.allocation,)}


def _api_key(file: str | None) -> str | None:
  key = os.environ.get("KVC_API_KEY", "") if file is None else _read(file, "a file with the API key")
  if file is not None and not key.strip():
    raise InputError(f"{file} is empty; put the API key into it")
  return key.strip() or None


def _demo(args: argparse.Namespace) -> int:
  from kvc_jax.demo import run_demo

  return 0 if run_demo(args.heatmap, print) else 1


if __name__ == "__main__":
  sys.exit(main())
