"""Times transformers' continuous batching on random prompts; run by bench_throughput.py in a process of its own.

Reads one JSON object from standard input (length, output, prompts, pool_bytes, config) and prints
one with tokens_per_second, seconds and what was used. Needs torch with CUDA. Weights are random, in
bfloat16, and its cache takes as many bytes as the pool it is compared with, in pages of 64 tokens, so that no
more of them is lost to rounding than of ours. All else is transformers' default: flash attention where it is
installed, else torch's SDPA with a mask. A first, short call is not timed.
"""

import dataclasses
import importlib.util
import json
import sys
import time

_PAGE = 64
_FLASH_PAGE = 256
"""Tokens of one layer in a page; flash attention's block tables want the larger one."""


def main() -> None:
  job = json.load(sys.stdin)
  import torch
  import transformers
  from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  config = LlamaConfig(**job["config"], max_position_embeddings=131_072)
  config._attn_implementation = "sdpa"  # it takes flash attention by itself where that is installed
  with torch.device("cuda"):
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
  flash = any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface"))
  page = _FLASH_PAGE if flash else _PAGE
  block_bytes = page * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
  blocks = max(2, int(job["pool_bytes"]) // block_bytes)
  names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
  batching = ContinuousBatchingConfig(
      num_blocks=blocks, allow_block_sharing=False, **{"page_size" if "page_size" in names else "block_size": page},
      **({"auto_switch_to_flash": flash} if "auto_switch_to_flash" in names else {}))  # else it may ask the network
  generator = torch.Generator().manual_seed(0)
  prompts = torch.randint(0, config.vocab_size, (job["prompts"], job["length"]), generator=generator).tolist()
  shared = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "num_return_sequences": 1}
  generation = GenerationConfig(max_new_tokens=job["output"], **shared)
  torch.cuda.synchronize()
  short = GenerationConfig(max_new_tokens=4, **shared)
  model.generate_batch(prompts[:2], generation_config=short, continuous_batching_config=batching)
  start = time.perf_counter()
  results = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
  torch.cuda.synchronize()
  seconds = time.perf_counter() - start
  made = [len(result.generated_tokens) for result in results.values()]
  if made != [job["output"]] * job["prompts"]:
    sys.exit(f"asked for {job['prompts']} outputs of {job['output']} tokens and got {sorted(made)}")
  tokens = job["prompts"] * (job["length"] + job["output"])
  print(json.dumps({
      "tokens_per_second": tokens / seconds, "seconds": seconds, "prompts_run": job["prompts"],
      "attention": f"{config._attn_implementation}, flash attention {'installed' if flash else 'not installed'}",
      "pool_blocks": blocks, "page": page, "transformers": transformers.__version__, "torch": torch.__version__,
  }), flush=True)


if __name__ == "__main__":
  main()
