"""Answers in the forms of OpenAI's API, whole and in pieces."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from kvc_jax.engine.request import CompressionReceipt, FinishReason, RequestOutput, TokenLogprobs
from kvc_jax.serving.protocol import Endpoint
from kvc_jax.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""

_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class AnswerForm(Protocol):
  """How one endpoint words its answers; made anew for each call."""

  def whole(self, texts: Sequence[str], outputs: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
    """The answer of a call that is not streamed."""
    ...

  def opening(self, choice: int) -> dict[str, Any] | None:
    """What a choice's stream begins with."""
    ...

  def piece(self, choice: int, text: str, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
    """Some text of a choice."""
    ...

  def closing(self, choice: int, reason: FinishReason) -> dict[str, Any]:
    """The end of a choice."""
    ...

  def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
    """The end of a stream that was asked for its usage."""
    ...


class _Answer:
  """What every object of a call has in common."""

  def __init__(self, model: str, prefix: str, kind: str):
    self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

  def _object(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {**self._head, "choices": choices, **fields}

  def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
    return self._object([], usage=usage)


class CompletionForm(_Answer):
  """`/v1/completions`."""

  def __init__(self, model: str, tokenizer: Tokenizer):
    super().__init__(model, "cmpl", "text_completion")
    self._tokenizer = tokenizer
    self._offsets: dict[int, int] = {}

  def whole(self, texts, outputs, usage):
    choices = [
        self._choice(i, text, finish_reason(output.finish_reason), output.logprobs)
        for i, (text, output) in enumerate(zip(texts, outputs, strict=True))]
    return self._object(choices, usage=usage)

  def opening(self, choice):
    return None

  def piece(self, choice, text, logprobs):
    return self._object([self._choice(choice, text, None, logprobs)])

  def closing(self, choice, reason):
    return self._object([self._choice(choice, "", finish_reason(reason), None)])

  def _choice(self, index: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprobs] | None):
    return {"index": index, "text": text, "finish_reason": reason,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs)}

  def _logprobs(self, choice: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    tokens = [_token_text(self._tokenizer, entry.token_id) for entry in logprobs]
    offsets = []
    for token in tokens:
      offsets.append(self._offsets.get(choice, 0))
      self._offsets[choice] = offsets[-1] + len(token)
    top = [{_token_text(self._tokenizer, i): _finite(value) for i, value in entry.top} for entry in logprobs]
    return {"tokens": tokens, "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": top, "text_offset": offsets}


class ChatForm(_Answer):
  """`/v1/chat/completions`."""

  def __init__(self, model: str, tokenizer: Tokenizer, *, stream: bool):
    super().__init__(model, "chatcmpl", "chat.completion.chunk" if stream else "chat.completion")
    self._tokenizer = tokenizer

  def whole(self, texts, outputs, usage):
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text},
         "finish_reason": finish_reason(output.finish_reason), "logprobs": self._logprobs(output.logprobs)}
        for i, (text, output) in enumerate(zip(texts, outputs, strict=True))]
    return self._object(choices, usage=usage)

  def opening(self, choice):
    return self._object([self._choice(choice, {"role": "assistant", "content": ""})])

  def piece(self, choice, text, logprobs):
    return self._object([self._choice(choice, {"content": text}, logprobs=logprobs)])

  def closing(self, choice, reason):
    return self._object([self._choice(choice, {}, reason=finish_reason(reason))])

  def _choice(self, index: int, delta: dict[str, Any], *, reason: str | None = None,
              logprobs: Sequence[TokenLogprobs] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": self._logprobs(logprobs)}

  def _logprobs(self, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
    if logprobs is None:
      return None
    content = []
    for entry in logprobs:
      top = [self._token(i, value) for i, value in entry.top]
      content.append({**self._token(entry.token_id, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}

  def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
    text = _token_text(self._tokenizer, token_id)
    broken = "\N{REPLACEMENT CHARACTER}" in text  # part of a character
    return {"token": text, "logprob": _finite(logprob), "bytes": None if broken else list(text.encode())}


def answer_form(endpoint: Endpoint, model: str, tokenizer: Tokenizer, *, stream: bool) -> AnswerForm:
  """The form of an endpoint."""
  if endpoint == "completions":
    return CompletionForm(model, tokenizer)
  return ChatForm(model, tokenizer, stream=stream)


def finish_reason(reason: FinishReason) -> str:
  """OpenAI's word for it: a pool that ran out cuts a text off as a length does."""
  return "length" if reason == "cache_full" else reason


def usage_of(outputs: Sequence[RequestOutput], n: int) -> dict[str, Any]:
  """Tokens of a call, and the receipt of each of its choices."""
  prompt = sum(len(output.prompt_token_ids) for output in outputs[::n])  # samples share their prompt
  completion = sum(len(output.token_ids) for output in outputs)
  return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
          "compression": [_receipt(output.receipt) for output in outputs]}


def _receipt(receipt: CompressionReceipt) -> dict[str, Any]:
  return {
      "rate_asked": receipt.rate_asked, "rate_reached": round(receipt.rate_reached, 4),
      "kvs_seen": receipt.kvs_seen, "kvs_kept": int(receipt.kvs_kept.sum()),
      "kvs_kept_by_layer": receipt.kvs_kept.sum(axis=1).tolist(),
      "blocks_held": receipt.blocks_held, "blocks_uncompressed": receipt.blocks_uncompressed,
      "bytes_held": receipt.bytes_held, "bytes_uncompressed": receipt.bytes_uncompressed,
      "compressions": receipt.compressions, "freed_blocks": receipt.freed_blocks}


def model_list(model: str, created: int) -> dict[str, Any]:
  """The answer of `/v1/models`."""
  return {"object": "list", "data": [model_card(model, created)]}


def model_card(model: str, created: int) -> dict[str, Any]:
  """The answer of `/v1/models/NAME`."""
  return {"id": model, "object": "model", "created": created, "owned_by": "kvc_jax"}


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
  text = tokenizer.decode([token_id], skip_special_tokens=False)
  # Alone, a SentencePiece token loses the space that it begins with.
  spaced = (tokenizer.token(token_id) or "").startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" ")
  return f" {text}" if spaced else text


def _finite(value: float) -> float:
  return value if math.isfinite(value) else _LEAST_LOGPROB
