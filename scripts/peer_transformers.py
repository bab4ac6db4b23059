"""Times transformers' continuous batching on random prompts; run by bench_throughput.py in a process of its own.

Reads one JSON object from standard input (length, output, prompts, pool_bytes, config) and prints
one with tokens_per_second and seconds. Needs torch with CUDA. Weights are random, in bfloat16, and
its cache takes as many bytes as the pool it is compared with.
"""

import json
import sys
import time

_PAGE = 256
"""Tokens of one layer in a page: transformers' default."""


def main() -> None:
  job = json.load(sys.stdin)
  import torch
  from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  config = LlamaConfig(**job["config"], max_position_embeddings=131_072)
  config._attn_implementation = "sdpa"  # it takes flash attention by itself where that is installed
  with torch.device("cuda"):
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
  block_bytes = _PAGE * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
  batching = ContinuousBatchingConfig(
      page_size=_PAGE, num_blocks=max(2, int(job["pool_bytes"]) // block_bytes), allow_block_sharing=False)
  generator = torch.Generator().manual_seed(0)
  prompts = torch.randint(0, config.vocab_size, (job["prompts"], job["length"]), generator=generator).tolist()
  generation = GenerationConfig(
      max_new_tokens=job["output"], do_sample=False, eos_token_id=-1, pad_token_id=0, num_return_sequences=1)
  torch.cuda.synchronize()
  model.generate_batch(prompts[:2], generation_config=generation, continuous_batching_config=batching)  # compiles
  start = time.perf_counter()
  results = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
  torch.cuda.synchronize()
  seconds = time.perf_counter() - start
  tokens = sum(job["length"] + len(result.generated_tokens) for result in results.values())
  print(json.dumps({"tokens_per_second": tokens / seconds, "seconds": seconds}), flush=True)


if __name__ == "__main__":
  main()
