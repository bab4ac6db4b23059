"""Answers prompts under kvpress's compression; run by compare_kvpress.py in an environment of its own.

    python scripts/peer_kvpress.py MODEL FOLDER --dtype float32

reads FOLDER/prompts.jsonl (id, token_ids, max_new_tokens, stop_token_ids) and FOLDER/runs.jsonl (run, press, and of
each prompt budget and window), and appends a line for each prompt and run to FOLDER/theirs.jsonl: the greedy tokens,
the prompt's KVs that attention still sees (a number, and the positions as a bit map) and those that are held, and the
bytes that the cache holds at the end. Lines that are there already are not made again. Wants torch, kvpress 0.5.5 and
its transformers (below 5.3).

The whole prompt is prefilled and compressed at once, question included. A press works behind each layer's attention
and changes nothing of the prefill itself, so each prompt is prefilled once, and every press's own hook is called with
what its layers saw. The first prompt of each run is answered a second time as kvpress documents it, `with
press(model)` around the prefill; other tokens or positions than the first time end the program.
"""

import argparse
import base64
import functools
import json
import pathlib
import sys
import time


def press_of(name, budget, window, tokens):
  """kvpress's press that keeps `budget` of so many tokens in each head, on the average; None for none."""
  import kvpress

  # kvpress rounds tokens * (1 - ratio) down; the quarter keeps that from falling to budget - 1.
  ratio = 1 - (budget + 0.25) / tokens
  if name == "none" or budget >= tokens:
    return None
  if name == "adakv":
    return kvpress.AdaKVPress(press_of("snapkv", budget, window, tokens), alpha_safeguard=0.2)
  if name == "snapkv":
    return kvpress.SnapKVPress(ratio, window_size=window, kernel_size=5)
  plain = {
      "tova": kvpress.TOVAPress, "streaming": kvpress.StreamingLLMPress, "keydiff": kvpress.KeyDiffPress,
      "key-norm": kvpress.KnormPress, "expected": kvpress.ExpectedAttentionPress}
  return plain[name](ratio)


class Prefill:
  """One prompt's prefill, uncompressed: its cache, the last token's logits, and what each attention layer saw."""

  def __init__(self, model, token_ids):
    import torch
    from transformers import DynamicCache

    self.model, self.tokens, self._seen = model, len(token_ids), []
    self.cache = DynamicCache()
    for layer in model.model.layers:
      layer.self_attn.rotary_emb = model.model.rotary_emb  # as kvpress does; some presses ask for it
    hooks = [layer.self_attn.register_forward_hook(self._note, with_kwargs=True) for layer in model.model.layers]
    try:
      ids = torch.tensor([token_ids], device=model.device)
      self.logits = model(ids, past_key_values=self.cache, logits_to_keep=1).logits[0, -1]
    finally:
      for hook in hooks:
        hook.remove()

  def _note(self, module, args, kwargs, output):
    self._seen.append((module, kwargs, output))

  @functools.cached_property
  def places(self):
    """For each layer and head the position of each KV, by its bytes."""
    found = [[{row.tobytes(): place for place, row in enumerate(head)} for head in rows_of(layer)]
             for layer in self.cache.layers]
    if any(len(head) != self.tokens for layer in found for head in layer):
      raise SystemExit("two KVs of one head are equal, so that those kept cannot be told apart")
    return found

  def compressed(self, press):
    """A copy of the cache as the press leaves it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, layer in enumerate(self.cache.layers):
      cache.update(layer.keys.clone(), layer.values.clone(), index)
    if press is not None:
      press.post_init_from_model(self.model)
    for module, kwargs, output in self._seen:
      module.masked_key_indices = None
      if press is not None:
        press.forward_hook(module, [], {**kwargs, "past_key_values": cache}, output)
    return cache


def as_documented(prefill, press, token_ids):
  """Cache and last logits of a prefill within kvpress's own context manager."""
  import contextlib

  import torch
  from transformers import DynamicCache

  model, cache = prefill.model, DynamicCache()
  with press(model) if press is not None else contextlib.nullcontext():
    ids = torch.tensor([token_ids], device=model.device)
    return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]


def kept_positions(prefill, cache):
  """Bool [layers, KV heads, tokens]: KVs of the prompt that attention still sees.

  Found by content: keys in the cache are looked up among those of the uncompressed one. KVs that a
  head-adaptive press only masks are in the cache, and are not counted.
  """
  import numpy as np

  layers = []
  for layer, places, after in zip(prefill.model.model.layers, prefill.places, cache.layers, strict=True):
    kept = np.zeros((len(places), prefill.tokens), bool)
    for head, rows in enumerate(rows_of(after)):
      kept[head, [places[head][row.tobytes()] for row in rows]] = True
    if getattr(layer.self_attn, "masked_key_indices", None) is not None:
      _, heads, positions = (index.cpu().numpy() for index in layer.self_attn.masked_key_indices)
      kept[heads, positions] = False
    layers.append(kept)
  return np.stack(layers)


def rows_of(layer):
  """Keys and values of a cache's layer side by side, uint8 [KV heads, tokens, bytes]."""
  import numpy as np
  import torch

  both = torch.cat([layer.keys[0], layer.values[0]], dim=-1).contiguous().cpu()
  return np.ascontiguousarray(both.view(torch.uint8).numpy())


def decode(model, logits, cache, tokens, limit, stops):
  """Greedy tokens behind a prompt of so many, the one that ended them included."""
  import torch

  made = [int(logits.argmax())]
  while len(made) < limit and made[-1] not in stops:
    at = torch.tensor([[tokens + len(made) - 1]], device=model.device)  # the true position, whatever was evicted
    ids = torch.tensor([made[-1:]], device=model.device)
    made.append(int(model(ids, past_key_values=cache, position_ids=at).logits[0, -1].argmax()))
  return made


def answer(prefill, cache, logits, prompt):
  """What theirs.jsonl says of one prompt under one press."""
  import numpy as np

  kept = kept_positions(prefill, cache)
  held = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
  start = time.perf_counter()
  made = decode(prefill.model, logits, cache, prefill.tokens, prompt["max_new_tokens"], prompt["stop_token_ids"])
  return {
      "token_ids": made, "kvs_seen": int(kept.sum()), "kvs_held": held,
      "bytes_held": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
      "decode_seconds": round(time.perf_counter() - start, 4), "shape": list(kept.shape),
      "kept": base64.b64encode(np.packbits(kept)).decode()}


def answers(model, prompt, runs, checked):
  """One line for each run of one prompt; `checked` are names of runs that were compared with the documented way."""
  prefill = Prefill(model, prompt["token_ids"])
  for run in runs:
    budget, window = run["budgets"][prompt["id"]]
    press = press_of(run["press"], budget, window, prefill.tokens)
    try:
      line = answer(prefill, prefill.compressed(press), prefill.logits, prompt)
      if run["run"] not in checked:
        other = answer(prefill, *as_documented(prefill, press, prompt["token_ids"]), prompt)
        if any(line[name] != other[name] for name in ("token_ids", "kept")):
          raise SystemExit(f"{run['run']}, {prompt['id']}: one prefill for all presses gives another answer than "
                           "kvpress's own way; is this kvpress 0.5.5?")
        checked.add(run["run"])
    except (AssertionError, ValueError) as e:  # a press that cannot do this prompt
      line = {"error": f"{type(e).__name__}: {e}"}
    yield {"run": run["run"], "id": prompt["id"], **line}


def read_lines(path):
  """The JSON objects of a file; a last line that was not written to its end is left out."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def load(args):
  """The model, and what it runs on."""
  import kvpress  # noqa: F401 (patches transformers' attention)
  import torch
  import transformers

  torch.set_num_threads(args.threads)
  torch.backends.cuda.matmul.allow_tf32 = False
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
      args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
  return model.to(device).eval(), torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("model", help="Hugging Face folder")
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
  parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU; small models run best with 1")
  args = parser.parse_args()
  import importlib.metadata

  import torch

  path = args.folder / "theirs.jsonl"
  lines = read_lines(path)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
  done, checked = {(line["run"], line["id"]) for line in lines}, set()
  runs, prompts = read_lines(args.folder / "runs.jsonl"), read_lines(args.folder / "prompts.jsonl")
  model, device = load(args)
  versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
  (args.folder / "theirs.machine.json").write_text(
      json.dumps({**versions, "device": device, "dtype": args.dtype}) + "\n", encoding="utf-8")
  with path.open("a", encoding="utf-8") as file, torch.no_grad():
    for number, prompt in enumerate(prompts, 1):
      left = [run for run in runs if (run["run"], prompt["id"]) not in done]
      for line in answers(model, prompt, left, checked) if left else ():
        file.write(json.dumps(line) + "\n")
        file.flush()
      print(f"kvpress: {number} of {len(prompts)} prompts", file=sys.stderr, flush=True)


if __name__ == "__main__":
  main()
