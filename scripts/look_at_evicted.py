#!/usr/bin/env python
"""Why a policy falls short: which tokens of the answer's statement its heads still hold when the answer is drawn.

    python scripts/look_at_evicted.py [MODEL] [--policy NAME ...] [--rate 8] [--task single] [--length 2048]
        [--count 20] [--dtype float32] [--out FOLDER]

Asks `--count` recall questions of each policy of eval_policies.py, and finds the value in the prompt (a token for each
digit; `multi_value` asks for four values; of `variables` the names that lead to the value count as values too, of one
token each). A line for each policy: `right`, the percentage of right answers; `digit 1`
to `digit 4`, the percentage of (layer, KV head) pairs that hold that digit's KV at the end, on the mean over questions
and values; `layer L`, the percentage that hold all four among the pairs of that layer that look values up; `least L`,
the same of the value that fewest of them hold, where there are several. Those are the pairs that hold all four digits
of at least 90% of the values under KV-Compress at 32x with a pool of 13, which leaves little room for anything else.
FOLDER gets evicted.json, with these pairs as `lookup_heads`; another rate than 8 or task than `single` is in the name.
"""

import argparse
import pathlib
import re
import sys

import bench_common as common
import eval_policies
import numpy as np
import tqdm

from kvc_jax import LLM, Compression
from kvc_jax.cli import _parser
from kvc_jax.cli_eval import policies_of
from kvc_jax.errors import InputError, check_count
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import SHORTEST, SampleBuilder, score
from kvc_jax.evaluation.runner import greedy_params
from kvc_jax.evaluation.task import Sample
from kvc_jax.tokenizer import Tokenizer

_TASKS = ("single", "multi_key", "multi_value", "variables")
_RATE = 8.0
_LOOKUP, _LOOKUP_RATE, _LOOKUP_SHARE = "kv-compress-pool13", 32.0, 0.9


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  names = [name for name in eval_policies.POLICIES if name not in (eval_policies.FULL, eval_policies.PROFILE)]
  parser.add_argument("model", nargs="?", default=str(pathlib.Path(__file__).parents[1] / "assets" / "recall-7m"))
  parser.add_argument("--policy", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
  parser.add_argument("--rate", type=float, default=_RATE)
  parser.add_argument("--task", choices=_TASKS, default="single")
  parser.add_argument("--length", type=int, default=2048, help="of prompt and answer, in tokens")
  parser.add_argument("--count", type=int, default=20, help="questions")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--out", default=str(common.RESULTS), help="folder for evicted.json")
  args = parser.parse_args()
  try:
    rows, lookup = _look(args)
  except InputError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  common.print_table(rows)
  name = "evicted" if (args.task, args.rate) == (_TASKS[0], _RATE) else f"evicted-{args.task}-{args.rate:g}x"
  common.write_results(
      name, rows, folder=args.out, model=pathlib.Path(args.model).name, rate=args.rate, task=args.task,
      length=args.length, count=args.count, dtype=args.dtype, lookup_heads=np.argwhere(lookup).tolist())
  return 0


def _look(args: argparse.Namespace) -> tuple[list[dict[str, object]], np.ndarray]:
  check_count("--count", args.count, at_least=1)
  check_count("--length", args.length, at_least=SHORTEST)
  tokenizer = Tokenizer.from_folder(args.model)
  builder = SampleBuilder(held_out_sentences(), tokenizer)
  samples = [builder.sample(args.task, args.length, number, seed=0) for number in range(args.count)]
  places = [_places(tokenizer, sample) for sample in samples]
  llm = LLM(args.model, dtype=args.dtype, max_model_len=args.length, max_num_seqs=4, chunk_size=512)
  _, held = _run(llm, args.task, samples, places, _compression(_LOOKUP, _LOOKUP_RATE))
  lookup = held.all(axis=-1).mean(axis=(0, -1)) >= _LOOKUP_SHARE  # [L, H]
  rows: list[dict[str, object]] = []
  for name in tqdm.tqdm(args.policy, unit="policy"):
    right, held = _run(llm, args.task, samples, places, _compression(name, args.rate))
    digits = {f"digit {i + 1}": 100 * float(held[..., i].mean()) for i in range(held.shape[-1])}
    by_layer = {}
    for layer in np.flatnonzero(lookup.any(axis=1)):
      shares = held[:, layer, lookup[layer]].all(axis=-1).mean(axis=1)  # [samples, V]
      by_layer[f"layer {layer}"] = 100 * float(shares.mean())
      if shares.shape[1] > 1:
        by_layer[f"least {layer}"] = 100 * float(shares.min(axis=1).mean())
    rows.append({"policy": name, "right": right, **digits, **by_layer})
  return rows, lookup


def _places(tokenizer: Tokenizer, sample: Sample) -> np.ndarray:
  """Positions of each asked value's digits in the prompt, i32 [V, digits]; of a name its only one, again and again."""
  prompt = tokenizer.encode(str(sample.prompt))
  values = [_place(tokenizer, prompt, value) for value in sample.references[0].split()]
  # Each ends with the name that it leads to, of one token.
  links = [_place(tokenizer, prompt, link)[-1] for link in _links(str(sample.prompt))]
  return np.array(values + [[link] * len(values[0]) for link in links])


def _links(prompt: str) -> list[str]:
  """The statements that lead from the variable that is asked for to the value, but for the last one, which has it."""
  asked = re.search(r"VAR (\w+)(| =| is)$", prompt.rstrip())
  says = {name: (f"VAR {name}{verb} {to}", to) for name, verb, to in re.findall(r"VAR (\w+)(| =| is) (\w+)\.", prompt)}
  found, name = [], asked.group(1) if asked else ""
  while name in says and says[name][1] in says:
    statement, name = says[name]
    found.append(statement)
  return found


def _place(tokenizer: Tokenizer, prompt: list[int], text: str) -> list[int]:
  """Positions of a text's tokens in the prompt."""
  answer = tokenizer.encode(" " + text, add_special_tokens=False)
  found = [at for at in range(len(prompt)) if prompt[at : at + len(answer)] == answer]
  if not found:
    raise InputError("a value's tokens are not in its prompt; take a model whose tokenizer has single digits")
  if len(found) > 1:
    raise InputError("a value stands more than once in its prompt; give another --length or fewer questions")
  return list(range(found[0], found[0] + len(answer)))


def _compression(name: str, rate: float) -> Compression:
  options = _parser().parse_args(
      ["eval", "recall", "MODEL", "--out", "X", "--rate", f"{rate:g}", *eval_policies.POLICIES[name]])
  (policy,) = policies_of(options)
  assert policy.compression is not None
  return policy.compression


def _run(
    llm: LLM, task: str, samples: list[Sample], places: list[np.ndarray], compression: Compression
) -> tuple[float, np.ndarray]:
  """Percentage of right answers, and whether each head holds each digit of V values: bool [samples, L, H, V, 4]."""
  params = [greedy_params(sample) for sample in samples]
  outputs = llm.generate([str(sample.prompt) for sample in samples], params, compression, return_positions=True)
  right, held = [], []
  for output, digits, sample in zip(outputs, places, samples, strict=True):
    right.append(score(task, output.text, sample.references[0]))
    positions = output.receipt.positions
    assert positions is not None
    held.append((positions[..., None, None] == digits).any(axis=2))
  return 100 * float(np.mean(right)), np.stack(held)


if __name__ == "__main__":
  sys.exit(main())
