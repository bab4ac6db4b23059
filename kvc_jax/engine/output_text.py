"""Turns token ids into text as they come, and finds stop strings."""

from kvc_jax.tokenizer import IncrementalDecoder


class OutputText:
  """Text of one request.

  What could still turn out to be the start of a stop string is held back, so a
  caller who streams never sees part of one.

  Attributes:
    text: all text given out so far.
    stopped: a stop string was found; nothing comes behind it.
  """

  def __init__(self, decoder: IncrementalDecoder, stop_strings: tuple[str, ...]):
    self.text = ""
    self.stopped = False
    self._decoder = decoder
    self._stop_strings = stop_strings
    self._held = ""

  def add(self, token_id: int) -> str:
    """Takes a token and returns the text that can be given out now."""
    return self._accept(self._decoder.add(token_id))

  def finish(self) -> str:
    """Returns what was held back; call it once, at the end."""
    piece = self._accept(self._decoder.flush())
    if not self.stopped:
      piece += self._held
      self.text += self._held
    self._held = ""
    return piece

  def _accept(self, piece: str) -> str:
    if self.stopped:
      return ""
    self._held += piece
    found = [at for s in self._stop_strings if (at := self._held.find(s)) >= 0]
    # Bytes that wait for the rest of a character may already end a stop string ("\n" in Llama 2).
    if not found:
      ahead = self._held + self._decoder.peek()
      found = [at for s in self._stop_strings if (at := ahead.find(s)) >= 0]
      self._held = ahead if found else self._held
    if found:
      self.stopped = True
      ready, self._held = self._held[: min(found)], ""
    else:
      keep = _possible_start(self._held, self._stop_strings)
      ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
    self.text += ready
    return ready


def _possible_start(text: str, stop_strings: tuple[str, ...]) -> int:
  """Length of the longest end of `text` that begins a stop string."""
  longest = 0
  for stop in stop_strings:
    for size in range(min(len(stop) - 1, len(text)), longest, -1):
      if stop.startswith(text[-size:]):
        longest = size
        break
  return longest
