"""`LLM`: prompts in, text and compression receipts out."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequences
from typing import Any

import numpy as np
import tqdm

from kvc_jax.engine.engine import Engine
from kvc_jax.engine.request import RequestOutput, SamplingParams, StreamChunk, Update
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression

Prompt = str | list[int]
OnText = Callable[[StreamChunk], None]
OnResult = Callable[[RequestOutput], None]


class LLM:
  """A Llama with a compressible cache, for offline generation: a loop over `Engine.step`.

  Attributes:
    engine: what does the work.
    config: shape of the cache.
    tokenizer: of the model folder.
    max_model_len: most tokens of prompt and output together.
  """

  def __init__(self, model: str | pathlib.Path, **options: Any):
    """Loads a model and allocates the pool.

    Args:
      model: folder of a Hugging Face or converted checkpoint.
      **options: of `Engine`: dtype, kv_cache_dtype, max_model_len, max_num_seqs,
        block_size, chunk_size, num_blocks, kv_cache_memory_bytes, seed, progress and more.

    Raises:
      InputError: a missing or broken model folder, or sizes that do not fit.
    """
    self.engine = Engine(model, **options)
    self.config, self.tokenizer = self.engine.config, self.engine.tokenizer
    self.max_model_len = self.engine.max_model_len
    self._busy = False

  def generate(
      self,
      prompts: Prompt | Sequences[Prompt],
      sampling_params: SamplingParams | Sequences[SamplingParams] | None = None,
      compression: Compression | None = None,
      *,
      on_text: OnText | None = None,
      on_result: OnResult | None = None,
      return_positions: bool = False,
      progress: bool = False,
  ) -> list[RequestOutput]:
    """Generates text for each prompt.

    Prompts run together, as many as slots and blocks allow; the others wait. Where
    the pool runs out, the newest waits until another has ended; its text stays.

    Args:
      prompts: text or token ids; one or many, of any lengths.
      sampling_params: one for all, or one for each prompt.
      compression: None holds every KV.
      on_text: called with each piece of text as it comes.
      on_result: called with each prompt's result as it ends, so that none is lost
        where a later one fails or the user breaks off.
      return_positions: put the positions of the KVs held at the end into the receipts.
      progress: show a progress bar on stderr.

    Returns:
      One result per prompt, in the order of the prompts; n results in a row where a
      prompt has n samples.

    Raises:
      InputError: before anything runs, where a prompt is empty, too long, out of
        the vocabulary, or, even when it is compressed, too large for the whole pool.
      RuntimeError: called from a callback of a call that has not ended.
    """
    if self._busy:
      raise RuntimeError("generate is running; a callback cannot call it again")
    if self.engine.has_work:
      raise RuntimeError("the engine serves requests that were added to it; let them end, or cancel them, first")
    requests = self._requests(prompts, sampling_params, compression)
    self._busy = True
    try:
      ids = [self.engine.add(*request, return_positions=return_positions) for request in requests]
      with tqdm.tqdm(total=len(ids), disable=not progress, unit="prompt", desc="generating") as bar:
        return self._run(ids, on_text, on_result, bar)
    except BaseException:
      # A step that was broken off may have donated the cache and not given it back.
      self.engine.reset()
      raise
    finally:
      self._busy = False

  def _run(self, ids: list[int], on_text: OnText | None, on_result: OnResult | None, bar: Any) -> list[RequestOutput]:
    index_of = {request_id: index for index, request_id in enumerate(ids)}
    outputs: list[RequestOutput] = []
    while self.engine.has_work:
      for update in self.engine.step():
        index = index_of[update.request_id]
        if on_text:
          on_text(_chunk(index, update))
        if update.output:
          outputs.append(dataclasses.replace(update.output, index=index))
          bar.update()
          if on_result:
            on_result(outputs[-1])
    return sorted(outputs, key=lambda output: (output.index, output.sample))

  def chat(
      self,
      messages: Sequences[dict[str, Any]],
      sampling_params: SamplingParams | None = None,
      compression: Compression | None = None,
      **options: Any,
  ) -> RequestOutput:
    """Generates the answer to a conversation, through the model's chat template.

    Args:
      messages: [{"role": ..., "content": ...}, ...].
      sampling_params: as for `generate`.
      compression: as for `generate`.
      **options: further arguments of `generate`.

    Raises:
      InputError: the model folder has no chat template.
    """
    prompt = self.tokenizer.apply_chat_template(list(messages))
    return self.generate([prompt], sampling_params, compression, **options)[0]

  @property
  def free_blocks(self) -> int:
    """Blocks of the pool that are free now."""
    return self.engine.batch.free_blocks

  def _requests(
      self, prompts, sampling_params, compression
  ) -> list[tuple[list[int], SamplingParams, Compression | None]]:
    """Everything is checked here, before anything runs."""
    prompts = _as_list(prompts)
    params = SamplingParams() if sampling_params is None else sampling_params
    every = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
    if not all(isinstance(p, SamplingParams) for p in every):
      raise InputError("sampling_params must be SamplingParams, or a list of them")
    if compression is not None and not isinstance(compression, Compression):
      raise InputError(f"compression is {compression!r}; give a Compression, such as Compression(rate=8), or None")
    if len(every) != len(prompts):
      raise InputError(f"{len(prompts)} prompts but {len(every)} SamplingParams; give one, or one for each prompt")
    ids = [self.engine.encode(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(ids):
      self.engine.check_fits(f"prompt {i}", len(prompt), compression)
    return [(prompt, p, compression) for prompt, p in zip(ids, every, strict=True)]


def _as_list(prompts: Prompt | Sequences[Prompt]) -> list[Prompt]:
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
    raise InputError(f"prompts is {prompts!r}; give a text, a list of token ids, or a list of these")
  every: list[Any] = list(prompts)
  one = bool(every) and isinstance(every[0], (int, np.integer))  # one prompt, as ids
  return [every] if one else every


def _chunk(index: int, update: Update) -> StreamChunk:
  return StreamChunk(
      index=index, sample=update.sample, text=update.text, token_ids=update.token_ids,
      finish_reason=update.finish_reason)
