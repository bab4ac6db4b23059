"""The `kvc` command: convert, generate, inspect, calibrate, eval, serve, demo."""

import argparse
import dataclasses
import importlib.util
import io
import ipaddress
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

from kvc_jax.cli_eval import add_eval
from kvc_jax.cli_options import (
    DTYPES,
    MODEL_OPTIONS,
    Parser,
    add_compression_options,
    add_model_options,
    compression_of,
    given_options,
    read_text,
)
from kvc_jax.errors import InputError, check_count
from kvc_jax.eviction.names import ALLOCATIONS, SCORINGS


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
  parser = Parser(prog="kvc", description="Text generation with a compressed KV cache.")
  parser.add_argument("--version", action="version", version=_version())
  commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
  _add_convert(commands)
  _add_generate(commands)
  _add_inspect(commands)
  _add_calibrate(commands)
  add_eval(commands)
  _add_serve(commands)
  demo = commands.add_parser("demo", help="find a fact in a long text at 1x, 4x, 16x and 64x, with recall-7m")
  demo.add_argument("--length", type=int, help="of text, question and answer, in tokens (default: 4096)")
  demo.add_argument("--number", type=int, help="another text and question for each number (default: 0)")
  demo.add_argument("--story", action="store_true", help="tell the smallest model's story at 1x, 2x, 4x and 8x instead")
  demo.add_argument("--quiet", action="store_true", help="no progress bars")
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
  convert.add_argument("--dtype", choices=DTYPES, help="of the weights; the source's own by default")
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
  add_model_options(calibrate)
  _add_prompt_options(calibrate)
  add_compression_options(calibrate)
  calibrate.add_argument("--bins", type=int, default=16,
                         help="equal parts of a prompt that are counted apart (default: %(default)s)")
  calibrate.add_argument("--out", "-o", type=pathlib.Path, default=pathlib.Path("head-profile.safetensors"),
                         help="safetensors file to write (default: %(default)s)")
  calibrate.set_defaults(run=_calibrate)


def _add_serve(commands: Any) -> None:
  serve = commands.add_parser("serve", help="serve a model over HTTP, as OpenAI's API does")
  add_model_options(serve)
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
  add_compression_options(serve, "compression of requests that say nothing of it")
  serve.set_defaults(run=_serve)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
  """What every command that runs a model takes."""
  add_model_options(parser)
  _add_prompt_options(parser)
  _add_sampling_options(parser)
  add_compression_options(parser)


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


def _sampling(args: argparse.Namespace) -> Any:
  import kvc_jax

  return kvc_jax.SamplingParams(
      temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
      max_tokens=args.max_tokens, stop=tuple(args.stop), stop_token_ids=tuple(args.stop_token_id),
      ignore_eos=args.ignore_eos, n=getattr(args, "n", 1), logprobs=getattr(args, "logprobs", None))


def _prompts(args: argparse.Namespace) -> list[str]:
  prompts = list(args.prompt)
  for name in args.file or ([] if prompts else ["-"]):
    prompts.append(read_text(name))
  return prompts


def _load(args: argparse.Namespace) -> Any:
  import kvc_jax

  return kvc_jax.LLM(args.model, **given_options(args, MODEL_OPTIONS), progress=not getattr(args, "quiet", False))


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
  sampling, compression = _sampling(args), compression_of(args)  # checked before the model is loaded
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
  sampling, compression = _sampling(args), compression_of(args)
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

  compression = compression_of(args)
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


def _serve(args: argparse.Namespace) -> int:
  if missing := [name for name in ("starlette", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]:
    raise InputError(f"the server needs {', '.join(missing)}; run: pip install 'kvc_jax[serve]'")
  from kvc_jax.engine.engine import Engine
  from kvc_jax.serving.app import AppSettings
  from kvc_jax.serving.server import Address, listen, make_server

  compression = compression_of(args)
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
        args.model, **given_options(args, MODEL_OPTIONS), max_waiting=args.max_waiting,
        prefix_caching=args.prefix_caching, prefix_interval=args.prefix_interval,
        compilation_cache_dir=args.compilation_cache, progress=True, **_warmed(args.warm_up, compression))
    if args.warm_up != "none":
      own = [compression] if compression is not None and compression.mass is not None else []
      engine.warm_up(progress=sys.stderr.isatty(), kinds=[*engine.default_kinds(), *own])
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
  key = os.environ.get("KVC_API_KEY", "") if file is None else read_text(file, "a file with the API key")
  if file is not None and not key.strip():
    raise InputError(f"{file} is empty; put the API key into it")
  return key.strip() or None


def _demo(args: argparse.Namespace) -> int:
  from kvc_jax.demo import find_fact, tell_story
  from kvc_jax.evaluation.recall import SHORTEST

  if args.story:
    if args.length is not None or args.number is not None:
      raise InputError("--length and --number are of the search for a fact; leave them out, or --story")
    return 0 if tell_story(args.heatmap, print) else 1
  given = {name: value for name in ("length", "number") if (value := getattr(args, name)) is not None}
  if "length" in given:
    check_count("length", given["length"], at_least=SHORTEST)
  progress = not args.quiet and sys.stderr.isatty()
  return 0 if find_fact(args.heatmap, print, progress=progress, **given) else 1


if __name__ == "__main__":
  sys.exit(main())
