#!/usr/bin/env python
"""Asks a model the recall tasks' questions twice, through this project and through transformers with torch.

Prints how many greedy answers are the same, token for token, and how many are right. Needs torch; both
sides run in f32, on the CPU or GPU that they find, with nothing compressed.
"""

import argparse
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import tqdm
from bench_common import machine

from kvc_jax.errors import InputError
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import SampleBuilder, score
from kvc_jax.evaluation.recall_episodes import TASKS
from kvc_jax.tokenizer import Tokenizer


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("model", help="Hugging Face folder")
  parser.add_argument("--length", type=int, default=2048, help="of prompt and answer, in tokens")
  parser.add_argument("--samples", type=int, default=4, help="of each task")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args()
  try:
    result = compare(args.model, args.length, args.samples, args.seed)
  except InputError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  print(json.dumps(result))
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(result, file, indent=2)
  return 0 if result["same"] == result["samples"] else 1


def compare(model: str, length: int, count: int, seed: int) -> dict[str, Any]:
  """Answers of both sides to `count` samples of each task."""
  tokenizer = Tokenizer.from_folder(model)
  builder = SampleBuilder(held_out_sentences(), tokenizer)
  samples = [(task, builder.sample(task, length, number, seed=seed)) for task in TASKS for number in range(count)]
  prompts = [tokenizer.encode(sample.prompt) for _, sample in samples]
  limits = [sample.max_new_tokens for _, sample in samples]
  theirs = answers_of_transformers(model, prompts, limits)  # first: torch takes what memory it needs, JAX most of it
  ours = answers_of_kvc(model, prompts, limits)
  rows = []
  for (task, sample), own, other in zip(samples, ours, theirs, strict=True):
    same = own == other
    rows.append({"task": task, "id": sample.id, "same": same, "reference": sample.references[0],
                 "ours": tokenizer.decode(own), "theirs": tokenizer.decode(other),
                 "right": score(task, tokenizer.decode(own), sample.references[0])})
  versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
  return {"machine": machine() | versions, "model": model, "length": length, "seed": seed, "samples": len(rows),
          "same": sum(row["same"] for row in rows), "right": sum(row["right"] for row in rows), "rows": rows}


def answers_of_kvc(model: str, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
  """Greedy tokens through the paged cache, end tokens left out."""
  from kvc_jax import LLM, SamplingParams

  llm = LLM(model, dtype="float32", max_num_seqs=4)
  params = [SamplingParams(temperature=0, max_tokens=limit) for limit in limits]
  return [_before_end(output.token_ids, llm.tokenizer) for output in llm.generate(prompts, params)]


def answers_of_transformers(model: str, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
  """Greedy tokens of transformers' generate."""
  try:
    import torch
  except ImportError:
    raise InputError("torch is missing; install it in an environment of its own") from None
  from transformers import AutoModelForCausalLM

  tokenizer = Tokenizer.from_folder(model)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = False
  network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
  answers = []
  with torch.no_grad():
    for prompt, limit in tqdm.tqdm(list(zip(prompts, limits, strict=True)), unit="prompt", desc="transformers"):
      ids = torch.tensor([prompt], device=device)
      out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
      answers.append(_before_end(out[0, len(prompt):].tolist(), tokenizer))
  del network
  if device == "cuda":
    torch.cuda.empty_cache()
  return answers


def _before_end(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
  return list(itertools.takewhile(lambda i: i not in tokenizer.eos_ids, ids))


if __name__ == "__main__":
  sys.exit(main())
