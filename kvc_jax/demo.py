"""The main job on the shipped models: a fact found in a long text, or a story, at several rates, with what was held."""

import pathlib
import re
from collections.abc import Callable, Mapping

from kvc_jax.engine.llm import LLM
from kvc_jax.engine.request import RequestOutput, SamplingParams
from kvc_jax.errors import InputError
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import SampleBuilder, score
from kvc_jax.evaluation.runner import greedy_params
from kvc_jax.evaluation.task import Sample
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.heatmap import check_can_draw, save_heatmap

ASSETS = pathlib.Path(__file__).parent / "assets"
RECALL = ASSETS / "recall-7m"
"""The shipped model that finds facts in long texts."""
STORIES = ASSETS / "stories260K"
"""The shipped model that tells stories."""

FACT_RATES = (1, 4, 16, 64)
STORY_RATES = (1, 2, 4, 8)
STORY_TOKENS = 200
_TASK, _SEED = "multi_key", 0

Say = Callable[[str], None]


def find_fact(heatmap: pathlib.Path, say: Say, *, length: int = 4096, number: int = 0, progress: bool = False) -> bool:
  """Asks for one of eight facts hidden in a novel, at 1x, 4x, 16x and 64x.

  Args:
    heatmap: PNG to write, of the 16x run.
    say: takes each line of the report.
    length: of text, question and answer, in tokens.
    number: which of the many texts and questions that can be made.
    progress: show progress bars on stderr.

  Returns:
    Whether the answer at 1x is right.

  Raises:
    InputError: the shipped model is not there, the PNG cannot be written, or the length is out of range.
  """
  _check_shipped(RECALL)
  check_can_draw(heatmap)
  llm = LLM(RECALL, dtype="float32", max_num_seqs=1, chunk_size=256)
  if length > llm.max_model_len:
    raise InputError(f"length is {length}; the model's context is {llm.max_model_len}, so give at most that")
  builder = SampleBuilder(held_out_sentences(), llm.tokenizer)
  sample = builder.sample(_TASK, length, number, seed=_SEED)
  _introduce(sample, llm, say)
  outputs = {rate: _answer(llm, sample, rate, progress) for rate in FACT_RATES}
  right = {rate: score(_TASK, output.text, sample.references[0]) == 1.0 for rate, output in outputs.items()}
  for line in _table(outputs, {rate: f"{outputs[rate].text.strip()} {'right' if right[rate] else 'WRONG'}"
                               for rate in outputs}):
    say(line)
  save_heatmap(outputs[16].receipt, heatmap, title="recall-7m, 16x")
  say(f"heatmap of kept KVs at 16x: {heatmap}")
  return right[1]


def tell_story(heatmap: pathlib.Path, say: Say) -> bool:
  """Tells the smallest shipped model's story at 1x, 2x, 4x and 8x.

  Args:
    heatmap: PNG to write, of the 8x run.
    say: takes each line of the report.

  Returns:
    Whether the story at 1x is the reference text, character for character.

  Raises:
    InputError: the shipped model is not there, or the PNG cannot be written.
  """
  _check_shipped(STORIES)
  check_can_draw(heatmap)
  # Blocks of 4: a head has few KVs in 200 tokens, and only whole blocks are freed.
  llm = LLM(STORIES, block_size=4, max_num_seqs=1, chunk_size=16)
  outputs = {rate: _story(llm, rate) for rate in STORY_RATES}
  for rate, output in outputs.items():
    say(f"--- {rate}x {'-' * 70}\n{output.text}\n")
  for line in _table(outputs, {}):
    say(line)
  save_heatmap(outputs[STORY_RATES[-1]].receipt, heatmap, title=f"stories260K, {STORY_RATES[-1]}x")
  same = outputs[1].text == (STORIES / "expected_200_steps.txt").read_text(encoding="utf-8")
  say(f"\nstory at 1x equals the reference text: {'yes' if same else 'NO'}")
  say(f"heatmap of kept KVs: {heatmap}")
  return same


def _check_shipped(folder: pathlib.Path) -> None:
  if not folder.is_dir():
    raise InputError(f"{folder} is missing; run the demo from a checkout or an installed wheel")


def _introduce(sample: Sample, llm: LLM, say: Say) -> None:
  text, question = str(sample.prompt).rsplit("\n", 1)
  asked = re.sub(r"^.*?: the", "", question)
  place = text.index(asked)
  told = text[place:text.index(".", place) + 1]
  say(f"a text of {len(llm.tokenizer.encode(text))} tokens:  {text[:60].strip()} ... {text[-60:].strip()}")
  say(f"hidden in it, with seven more of the kind, {100 * place // len(text)}% of the way in:  ...{told}")
  say(f"asked at its end:  {question} ...\n")


def _answer(llm: LLM, sample: Sample, rate: int, progress: bool) -> RequestOutput:
  compression = None if rate == 1 else Compression(rate=rate)
  return llm.generate(
      str(sample.prompt), greedy_params(sample), compression, return_positions=True, progress=progress)[0]


def _story(llm: LLM, rate: int) -> RequestOutput:
  compression = Compression(rate=rate, window=8, interval=8, scoring=FullAttention(buffer=4))
  params = SamplingParams(temperature=0, max_tokens=STORY_TOKENS)
  return llm.generate("", params, compression, return_positions=True)[0]


def _table(outputs: Mapping[int, RequestOutput], answers: Mapping[int, str]) -> list[str]:
  head = ("asked", "reached", "blocks before", "after", "bytes before", "after", "KVs kept")
  lines = ["{:>6} {:>8} {:>14} {:>6} {:>13} {:>9} {:>14}".format(*head) + ("  answer" if answers else "")]
  for rate, output in outputs.items():
    receipt = output.receipt
    kept = f"{receipt.kvs_kept.sum()}/{receipt.kvs_seen}"
    lines.append(
        f"{rate:>5}x {receipt.rate_reached:>7.2f}x {receipt.blocks_uncompressed:>14} {receipt.blocks_held:>6} "
        f"{receipt.bytes_uncompressed:>13} {receipt.bytes_held:>9} {kept:>14}"
        + (f"  {answers[rate]}" if answers else ""))
  return lines
