"""Who runs and who waits: first come, first served, by the blocks that each will hold.

Deadlock and starvation are ruled out by three rules. The oldest running sequence never
gives way, so it ends. Whoever gave way waits in front of those that came later. And
after somebody gave way, nobody joins before somebody has ended.
"""

import collections

from kvc_jax.cache.state import CacheConfig
from kvc_jax.engine.footprint import fit_ahead, peak_blocks
from kvc_jax.engine.sequence import Sequence


class Scheduler:
  """Queues of one engine; host side, knows nothing of the device.

  Attributes:
    waiting: in the order in which they will start.
    running: those with a slot, in the order of arrival.
    free_blocks: a lower bound beside what decode steps in flight take; exact when all results have been read.
  """

  def __init__(self, config: CacheConfig, plan_ahead: float = 0.0):
    self.waiting: collections.deque[Sequence] = collections.deque()
    self.running: list[Sequence] = []
    self.free_blocks = config.num_blocks - 1
    self._config, self._plan_ahead = config, plan_ahead
    self._full = False  # somebody gave way, and nobody has ended since

  @property
  def prefilling(self) -> Sequence | None:
    """The sequence whose prompt is not all in the cache yet; there is one at most."""
    return next((s for s in self.running if s.prefilled < len(s.prompt) and not s.finish_reason), None)

  @property
  def blocks_ahead(self) -> int:
    """Most blocks that decode steps take whose results nobody has read yet."""
    size = self._config.block_size
    return sum(-(-s.ahead // size) for s in self.running) * self._config.heads_per_sequence

  def next_to_start(self) -> Sequence | None:
    """The first in the queue, where blocks are free for it; None while another is prefilled.

    Beside its own peak it leaves a block for every head of each running sequence; when planning
    ahead, what those and it need until they have that share of their max_tokens.
    """
    if not self.waiting or (self.running and self._full) or self.prefilling or self.blocks_lacking() > 0:
      return None
    return self.waiting[0] if self.fits_ahead() else None

  def fits_ahead(self) -> bool:
    """Whether the plan has room for the first in the queue; True where nothing is planned."""
    if not self._plan_ahead or not self.running or not self.waiting:
      return True
    return fit_ahead(self._config, [*self.running, self.waiting[0]], self._plan_ahead)

  def blocks_lacking(self) -> int:
    """Blocks that would have to be freed for the first in the queue; 0 where it needs no more, or may not start."""
    if not self.waiting or not self.running or self._full or self.prefilling:
      return 0
    reserve = max(len(self.running) * self._config.heads_per_sequence, self.blocks_ahead)
    return max(self._blocks_to_start(self.waiting[0]) + reserve - self.free_blocks, 0)

  def _blocks_to_start(self, sequence: Sequence) -> int:
    """Most blocks that it takes before its second decode step from now."""
    if sequence.snapshot is not None:
      return sequence.snapshot.blocks(self._config.block_size) + self._config.heads_per_sequence
    return peak_blocks(self._config, sequence)

  def start(self, sequence: Sequence) -> None:
    """Moves the first of the queue to those that run."""
    assert self.waiting.popleft() is sequence
    self.running.append(sequence)
    self.running.sort(key=lambda s: s.order)

  def claim(self, sequence: Sequence, blocks: int) -> None:
    """Notes that a sequence may hold up to `blocks` from now on."""
    more = max(blocks - sequence.held_blocks, 0)
    sequence.held_blocks += more
    self.free_blocks -= more

  def end(self, sequence: Sequence) -> None:
    """Takes a sequence out that ended or was cancelled, wherever it is."""
    if sequence in self.running:
      self._leave(sequence)
      self._full = False
    elif sequence in self.waiting:
      self.waiting.remove(sequence)

  def give_way(self, sequence: Sequence) -> None:
    """Puts a running sequence back into the queue, in front of all that came later."""
    self._leave(sequence)
    at = next((i for i, other in enumerate(self.waiting) if other.order > sequence.order), len(self.waiting))
    self.waiting.insert(at, sequence)
    self._full = True

  def _leave(self, sequence: Sequence) -> None:
    self.running.remove(sequence)
    self.free_blocks += sequence.held_blocks
    sequence.held_blocks = 0
