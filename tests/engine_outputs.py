"""What came of a request, for tests that serve it in different ways."""

from typing import Any

from kvc_jax.engine.request import RequestOutput


def what(output: RequestOutput) -> tuple[Any, ...]:
  """All that must not depend on how a request was served: its tokens, text and end, and its receipt's numbers."""
  receipt = output.receipt
  return (output.token_ids, output.text, output.finish_reason, output.logprobs, receipt.kvs_kept.tolist(),
          receipt.compressions, receipt.freed_blocks, receipt.tokens_seen, receipt.blocks_held)
