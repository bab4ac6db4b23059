"""The main job on the shipped model: one story at several rates, with what was held."""

import pathlib
from collections.abc import Callable

from kvc_jax.engine.llm import LLM
from kvc_jax.engine.request import RequestOutput, SamplingParams
from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.heatmap import check_can_draw, save_heatmap

RATES = (1, 2, 4, 8)
STORY_TOKENS = 200
_MODEL = pathlib.Path(__file__).parent / "assets" / "stories260K"


def run_demo(heatmap: pathlib.Path, say: Callable[[str], None]) -> bool:
  """Tells the shipped model's story at 1x, 2x, 4x and 8x.

  Args:
    heatmap: PNG to write, of the 8x run.
    say: takes each line of the report.

  Returns:
    Whether the story at 1x is the reference text, character for character.

  Raises:
    InputError: the shipped model is not there, or the PNG cannot be written.
  """
  if not _MODEL.is_dir():
    raise InputError(f"{_MODEL} is missing; run the demo from a checkout or an installed wheel")
  check_can_draw(heatmap)
  # Blocks of 4: a head has few KVs in 200 tokens, and only whole blocks are freed.
  llm = LLM(_MODEL, block_size=4, max_num_seqs=1, chunk_size=16)
  outputs = {rate: _story(llm, rate) for rate in RATES}
  for rate, output in outputs.items():
    say(f"--- {rate}x {'-' * 70}\n{output.text}\n")
  for line in _table(outputs):
    say(line)
  save_heatmap(outputs[RATES[-1]].receipt, heatmap, title=f"stories260K, {RATES[-1]}x")
  same = outputs[1].text == (_MODEL / "expected_200_steps.txt").read_text(encoding="utf-8")
  say(f"\nstory at 1x equals the reference text: {'yes' if same else 'NO'}")
  say(f"heatmap of kept KVs: {heatmap}")
  return same


def _story(llm: LLM, rate: int) -> RequestOutput:
  compression = Compression(rate=rate, window=8, interval=8, scoring=FullAttention(buffer=4))
  params = SamplingParams(temperature=0, max_tokens=STORY_TOKENS)
  return llm.generate("", params, compression, return_positions=True)[0]


def _table(outputs: dict[int, RequestOutput]) -> list[str]:
  head = ("asked", "reached", "blocks before", "after", "bytes before", "after", "KVs kept")
  lines = ["{:>6} {:>8} {:>14} {:>6} {:>13} {:>8} {:>13}".format(*head)]
  for rate, output in outputs.items():
    receipt = output.receipt
    kept = f"{receipt.kvs_kept.sum()}/{receipt.kvs_seen}"
    lines.append(
        f"{rate:>5}x {receipt.rate_reached:>7.2f}x {receipt.blocks_uncompressed:>14} {receipt.blocks_held:>6} "
        f"{receipt.bytes_uncompressed:>13} {receipt.bytes_held:>8} {kept:>13}")
  return lines
