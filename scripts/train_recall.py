#!/usr/bin/env python
"""Trains recall-7m, a small Llama that finds facts in long texts.

First `prepare` trains the tokenizer and tokenizes the text (about two minutes on a CPU); then `train`
trains by the clock. Needs the extra `train`.
"""

import argparse
import json
import logging
import pathlib
import sys
import time

from kvc_jax.errors import InputError

_STARTED = time.monotonic()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest="command", required=True)
  prepare = commands.add_parser("prepare", help="write tokenizer and tokenized text")
  prepare.add_argument("data", type=pathlib.Path, help="folder to write")
  prepare.add_argument("--corpus", type=pathlib.Path, required=True, help="text to train on, .txt or .txt.gz")
  prepare.add_argument("--held-out", type=pathlib.Path,
                       help="text to evaluate on, never trained on (default: the one that comes with the project)")
  prepare.add_argument("--vocab-size", type=int, default=4096)
  prepare.set_defaults(run=_prepare)
  _train_arguments(commands.add_parser("train", help="train, evaluate and export"))
  args = parser.parse_args()
  try:
    args.run(args)
  except InputError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"{parser.prog}: interrupted; go on with --resume OUT/state", file=sys.stderr)
    return 130
  return 0


def _train_arguments(train: argparse.ArgumentParser) -> None:
  train.add_argument("data", type=pathlib.Path, help="folder that `prepare` wrote")
  train.add_argument("out", type=pathlib.Path, help="folder to write: model, state, stable, log.jsonl")
  until = train.add_mutually_exclusive_group(required=True)
  until.add_argument("--minutes", type=float, help="wall-clock time of the whole command, compilation included")
  until.add_argument("--steps", type=int, help="number of steps instead; then a run repeats exactly")
  train.add_argument("--stop-at", type=int, help="with --steps: stop behind this step, to go on with --resume")
  begin = train.add_mutually_exclusive_group()
  begin.add_argument("--resume", type=pathlib.Path, help="OUT/state or OUT/stable of an earlier run")
  begin.add_argument("--weights", type=pathlib.Path, help="OUT/model of an earlier run, to begin a new one with")
  train.add_argument("--lengths", default="256,512,1024,2048,4096,8192", help="of samples, in tokens")
  train.add_argument("--evaluation-lengths", default="1024,2048,4096,8192")
  train.add_argument("--evaluation-samples", type=int, default=512, help="of each task and length")
  train.add_argument("--tokens-per-step", type=int, default=65_536)
  train.add_argument("--rate", type=float, default=2e-3, help="largest learning rate of Adam")
  train.add_argument("--seed", type=int, default=0)
  train.add_argument("--workers", type=int, default=0, help="processes that make batches")
  train.add_argument("--theta", type=float, default=250_000.0, help="base of RoPE")
  train.add_argument("--attention", choices=("auto", "cudnn", "xla"), default="auto")
  train.add_argument("--shape", default="256,6,8,4,64,768",
                     help="hidden size, layers, query heads, KV heads, head size, MLP size")
  train.set_defaults(run=_train)


def _prepare(args: argparse.Namespace) -> None:
  from kvc_jax.evaluation.haystack import SHIPPED_TEXT, read_text
  from kvc_jax.training.recall_corpus import prepare

  held_out = read_text(args.held_out or SHIPPED_TEXT)
  print(json.dumps(prepare(read_text(args.corpus), held_out, args.data, vocab_size=args.vocab_size)))


def _train(args: argparse.Namespace) -> None:
  # Imported here: the processes that make batches read this file too, and need no JAX.
  import jax
  from tokenizers import Tokenizer

  from kvc_jax.config import LlamaConfig, RopeConfig
  from kvc_jax.training.recall_training import TrainingConfig, check_lengths, train

  logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
  logging.getLogger("kvc_jax").setLevel(logging.INFO)
  try:
    lengths, tested, shape = (
        tuple(int(n) for n in text.split(",")) for text in (args.lengths, args.evaluation_lengths, args.shape))
    hidden, layers, heads, kv_heads, head_dim, inner = shape
  except ValueError:
    raise InputError("--lengths, --evaluation-lengths and --shape are numbers with commas between") from None
  vocabulary = args.data / "tokenizer.json"
  if not vocabulary.is_file():
    raise InputError(f"{vocabulary} is missing; make it with `train_recall.py prepare`")
  model = LlamaConfig(
      vocab_size=Tokenizer.from_file(str(vocabulary)).get_vocab_size(), hidden_size=hidden, intermediate_size=inner,
      num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5,
      rope=RopeConfig(theta=args.theta), tie_embeddings=True, max_position_embeddings=lengths[-1])
  attention = args.attention
  if attention == "auto":
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
  config = TrainingConfig(
      data=args.data, out=args.out, steps=args.steps, stop_at=args.stop_at, seconds=60 * (args.minutes or 0),
      started=_STARTED, lengths=lengths, evaluation_lengths=tested, tokens_per_step=args.tokens_per_step,
      rate=args.rate, seed=args.seed, workers=args.workers, resume=args.resume,
      weights=args.weights, evaluation_samples=args.evaluation_samples)
  check_lengths(config)
  train(config, model, attention)


if __name__ == "__main__":
  sys.exit(main())
