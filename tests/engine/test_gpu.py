"""The main job on a GPU: run with `pytest -m gpu` on a GPU machine."""

import pathlib

import pytest

from kvc_jax import LLM, Compression, SamplingParams

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"


@pytest.mark.gpu
def test_story_on_the_gpu_is_the_reference_text():
  llm = LLM(STORIES, block_size=4, max_num_seqs=1, kv_cache_memory_bytes=1 << 20)
  greedy = SamplingParams(temperature=0, max_tokens=200)
  expected = (STORIES / "expected_200_steps.txt").read_text(encoding="utf-8")
  for compression in (None, Compression(rate=1, interval=8)):
    assert llm.generate("", greedy, compression)[0].text == expected
