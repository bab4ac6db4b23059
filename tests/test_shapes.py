"""The shapes that public signatures state are those that really come in and go out."""

import subprocess
import sys

PROGRAM = """
from jaxtyping import install_import_hook
modules = ["kernels", "cache.alloc", "cache.write", "attention", "eviction.select", "eviction.compact", "eviction.step",
           "model", "sampling"]
with install_import_hook([f"kvc_jax.{m}" for m in modules], "beartype.beartype"):
  import kvc_jax
  import kvc_jax.engine.llm
llm = kvc_jax.LLM("kvc_jax/assets/stories260K", max_num_seqs=2, block_size=4, chunk_size=16)
params = kvc_jax.SamplingParams(temperature=1.0, top_p=0.9, max_tokens=4)
for rule in (kvc_jax.WindowAttention(queries=4), kvc_jax.FullAttention()):
  llm.generate(["Once upon a time", ""], params, kvc_jax.Compression(rate=2, window=2, interval=2, scoring=rule))
from beartype.roar import BeartypeException
try:
  kvc_jax.release(llm.engine.batch.state, llm.engine.batch.state.kv)
except Exception as e:
  print("refused", type(e).__name__)
"""


def test_signatures_hold_at_run_time(request):
  done = subprocess.run(
      [sys.executable, "-c", PROGRAM], cwd=request.config.rootpath, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "refused TypeCheckError" in done.stdout
