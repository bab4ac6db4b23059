"""Oracles: the algorithm in plain NumPy, dense, block-free and float64 inside.

Written from the rules alone, never from the code under test. Each docstring quotes
its rule. Loops are over the axes as named, obvious before quick.

Axes: L layers, H KV heads, G query heads per KV head, T tokens (Tq queries, Tk
keys), D head dimension, P KV slots in a block. Query head h*G + g uses KV head h.
"""

import math
from collections.abc import Sequence

import numpy as np

Held = list[tuple[int, float]]  # (position, score) of each KV that one head holds


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def _head_of_query_head(query_heads: int, kv_heads: int) -> list[int]:
  """Rule: query head h*G + g uses KV head h. Returns h for each query head."""
  assert query_heads % kv_heads == 0, (query_heads, kv_heads)
  group = query_heads // kv_heads
  return [query_head // group for query_head in range(query_heads)]


def _sum_over_group(per_query_head: np.ndarray, kv_heads: int) -> np.ndarray:
  """Rule: sum over the G query heads of the group. [H*G, ...] -> [H, ...]."""
  out = np.zeros((kv_heads, *per_query_head.shape[1:]))
  for query_head, head in enumerate(_head_of_query_head(len(per_query_head), kv_heads)):
    out[head] += per_query_head[query_head]
  return out


# --- Attention -------------------------------------------------------------------------------


def probabilities(q, k, q_pos, k_pos, scale) -> np.ndarray:
  """Attention probabilities [H*G, Tq, Tk] of q [Tq, H*G, D] over k [Tk, H, D].

  Rule: causal softmax of scale * q.k; a key is visible to a query if and only if
  k_pos <= q_pos; query head h*G + g uses KV head h. A query that sees no key has
  probabilities 0.
  """
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  q_pos, k_pos = np.asarray(q_pos), np.asarray(k_pos)
  num_queries, query_heads, _ = q.shape
  num_keys, kv_heads, _ = k.shape
  out = np.zeros((query_heads, num_queries, num_keys))
  for query_head, head in enumerate(_head_of_query_head(query_heads, kv_heads)):
    for i in range(num_queries):
      seen = k_pos <= q_pos[i]
      if seen.any():
        out[query_head, i, seen] = _softmax(scale * (k[seen, head] @ q[i, query_head]))
  return out


def attention(q, k, v, q_pos, k_pos, scale) -> np.ndarray:
  """Attention output [Tq, H*G, D] of q [Tq, H*G, D] over k, v [Tk, H, D].

  Rule: the mean of the values, weighted by `probabilities`.
  """
  v = np.asarray(v, np.float64)
  num_queries, query_heads, _ = np.shape(q)
  _, kv_heads, head_dim = v.shape
  weights = probabilities(q, k, q_pos, k_pos, scale)
  out = np.zeros((num_queries, query_heads, head_dim))
  for query_head, head in enumerate(_head_of_query_head(query_heads, kv_heads)):
    out[:, query_head] = weights[query_head] @ v[:, head]
  return out


def attention_ragged(q, ks: Sequence, vs: Sequence, scale) -> np.ndarray:
  """Output [H*G, D] of one decode query q [H*G, D] over KVs that differ per head.

  Rule: head h attends every one of its kept KVs, ks[h] and vs[h] of [n_h, D]; a head
  with no KVs gives zeros.
  """
  q = np.asarray(q, np.float64)
  out = np.zeros_like(q)
  for query_head, head in enumerate(_head_of_query_head(len(q), len(ks))):
    keys, values = np.asarray(ks[head], np.float64), np.asarray(vs[head], np.float64)
    if len(keys):
      out[query_head] = _softmax(scale * (keys @ q[query_head])) @ values
  return out


# --- Scores ----------------------------------------------------------------------------------


def _max_pool(row: np.ndarray, kernel: int) -> np.ndarray:
  """Rule: max-pool along keys, odd kernel, stride 1, same padding (the padding never wins)."""
  assert kernel % 2 == 1, kernel
  half = kernel // 2
  return np.array([row[max(0, i - half):i + half + 1].max() for i in range(len(row))])


def window_scores(q, k, *, queries, power, pooling, scale) -> np.ndarray:
  """KVC-w scores [H, T] of a prompt's KVs; q [T, H*G, D], k [T, H, D].

  Rule: softmax of the last min(queries, T) queries over all keys (causal); to the
  power; sum over those queries for each query head; max-pool along keys (kernel
  `pooling`, stride 1, same padding; 1 = none); sum over the G query heads.
  """
  num_tokens, query_heads, _ = np.shape(q)
  kv_heads = np.shape(k)[1]
  positions = np.arange(num_tokens)
  last = positions[num_tokens - min(queries, num_tokens):]
  raised = probabilities(np.asarray(q)[last], k, last, positions, scale) ** power
  summed = raised.sum(axis=1)  # [H*G, T]
  pooled = np.stack([_max_pool(summed[query_head], pooling) for query_head in range(query_heads)])
  return _sum_over_group(pooled, kv_heads)


def full_scores(q, k, *, power, buffer, scale) -> np.ndarray:
  """KVC-full scores [H, T] of a prompt's KVs; q [T, H*G, D], k [T, H, D].

  Rule: all queries, no pooling; a query counts for a key only when
  key_pos <= query_pos - buffer. (The softmax itself is over all causal keys.)
  """
  num_tokens, kv_heads = np.shape(k)[:2]
  positions = np.arange(num_tokens)
  raised = probabilities(q, k, positions, positions, scale) ** power
  for query_pos in positions:
    for key_pos in positions:
      if not key_pos <= query_pos - buffer:
        raised[:, query_pos, key_pos] = 0
  return _sum_over_group(raised.sum(axis=1), kv_heads)


def decode_scores(
    q, query_pos, ks: Sequence, key_positions: Sequence, *, power, buffer, scale,
) -> list[np.ndarray]:
  """What one decode query q [H*G, D] adds to the scores: a list over H of [n_h].

  Rule: score += sum over G of p^power for every KV attended, no pooling, and the same
  buffer rule: the query counts for a key only when key_pos <= query_pos - buffer.
  ks is a list over H of [n_h, D], key_positions a list over H of [n_h]; every one of
  them is attended.
  """
  q = np.asarray(q, np.float64)
  out = [np.zeros(len(keys)) for keys in ks]
  for query_head, head in enumerate(_head_of_query_head(len(q), len(ks))):
    keys, positions = np.asarray(ks[head], np.float64), np.asarray(key_positions[head])
    if not len(keys):
      continue
    assert (positions <= query_pos).all(), "a decode query attends no later key"
    counts = positions <= query_pos - buffer
    out[head] += counts * _softmax(scale * (keys @ q[query_head])) ** power
  return out


def mean_normalised(scores, key_positions, num_tokens, first_query, buffer) -> np.ndarray:
  """Scores [..., T] as means over queries; key_positions broadcasts against scores.

  Rule: divide each score by max(1, number of observed queries that count for its key).
  Observed queries have positions first_query <= q < num_tokens; one counts if and only
  if key_pos <= q - buffer and key_pos <= q.
  """
  scores = np.asarray(scores, np.float64)
  key_positions = np.broadcast_to(key_positions, scores.shape)
  out = np.zeros_like(scores)
  for index, key_pos in np.ndenumerate(key_positions):
    count = sum(key_pos <= q - buffer and key_pos <= q for q in range(first_query, num_tokens))
    out[index] = scores[index] / max(1, count)
  return out


def snapkv_scores(q, k, *, queries, pooling, pool, scale) -> np.ndarray:
  """SnapKV scores [H, T] of a prompt's KVs; q [T, H*G, D], k [T, H, D].

  Rule: mean attention of the last `queries` queries on each key before them; pool along those
  keys alone ("max", or "mean" with zeros beyond the ends and always divided by the width);
  sum over the G query heads. A key of the window itself: mean over those of the queries that see it.
  """
  num_tokens, query_heads, _ = np.shape(q)
  first = num_tokens - queries
  weights = probabilities(np.asarray(q)[first:], k, np.arange(first, num_tokens), np.arange(num_tokens), scale)
  out = np.zeros((query_heads, num_tokens))
  half = pooling // 2
  for head in range(query_heads):
    mean = weights[head, :, :first].mean(axis=0)
    for i in range(first):
      near = mean[max(0, i - half):i + half + 1]
      out[head, i] = near.max() if pool == "max" else near.sum() / pooling
    for i in range(first, num_tokens):
      out[head, i] = weights[head, i - first:, i].mean()
  return _sum_over_group(out, np.shape(k)[1])


def tova_scores(q, ks: Sequence, key_positions: Sequence, scale) -> list[np.ndarray]:
  """TOVA scores, a list over H of [n_h], by one query q [H*G, D] over KVs that may differ per head.

  Rule: the newest token's attention to a token, averaged over all query heads of the layer; a
  head that does not hold the token pays it none.
  """
  q = np.asarray(q, np.float64)
  total: dict[int, float] = {}
  for query_head, head in enumerate(_head_of_query_head(len(q), len(ks))):
    weights = _softmax(scale * (np.asarray(ks[head], np.float64) @ q[query_head]))
    for position, weight in zip(key_positions[head], weights, strict=True):
      total[int(position)] = total.get(int(position), 0) + weight / len(q)
  return [np.array([total[int(position)] for position in positions]) for positions in key_positions]


def keydiff_scores(k) -> np.ndarray:
  """KeyDiff scores [n] of one head's keys [n, D].

  Rule: minus the cosine between a key and the mean of the keys, each of which is scaled to length 1.
  """
  k = np.asarray(k, np.float64)
  mean = np.mean([key / np.linalg.norm(key) for key in k], axis=0)
  return np.array([-(key @ mean) / (np.linalg.norm(key) * np.linalg.norm(mean)) for key in k])


def rotation(position, frequencies) -> np.ndarray:
  """RoPE as a matrix [D, D]: pair (i, i + D/2) is turned by position * frequencies[i]."""
  half = len(frequencies)
  out = np.zeros((2 * half, 2 * half))
  for i, frequency in enumerate(frequencies):
    cos, sin = math.cos(position * frequency), math.sin(position * frequency)
    out[i, i], out[i, i + half], out[i + half, i], out[i + half, i + half] = cos, -sin, sin, cos
  return out


def expected_scores(plain_q, k, v, frequencies, *, future, sinks, covariance, value_norm, epsilon) -> np.ndarray:
  """Expected Attention scores [H, T]; plain_q [T, H*G, D] before RoPE, k [T, H, D] after it, v [T, H, D].

  Rule: mean m and covariance S of the queries from position `sinks` on; R the mean of RoPE's
  matrices at positions T .. T + future - 1; m' = R m, S' = R S R^T; weight of a key
  exp(k.m' / sqrt(D) + k.S'k / (2 D)), normalised over the keys from `sinks` on; mean over
  the group; (that + epsilon) times the value's L2 norm. Sinks get 0 here.
  """
  plain_q, k, v = (np.asarray(x, np.float64) for x in (plain_q, k, v))
  num_tokens, query_heads, dim = plain_q.shape
  kv_heads = k.shape[1]
  turn = np.mean([rotation(num_tokens + i, frequencies) for i in range(future)], axis=0)
  out = np.zeros((kv_heads, num_tokens))
  for query_head, head in enumerate(_head_of_query_head(query_heads, kv_heads)):
    rows = plain_q[sinks:, query_head]
    mean = turn @ rows.mean(axis=0)
    spread = turn @ np.cov(rows.T, bias=True) @ turn.T
    logits = np.array([
        key @ mean / math.sqrt(dim) + (key @ spread @ key / (2 * dim) if covariance else 0) for key in k[sinks:, head]])
    out[head, sinks:] += _softmax(logits) / (query_heads // kv_heads)
  if value_norm:
    out = (out + epsilon) * np.linalg.norm(v, axis=-1).T
  out[:, :sinks] = 0
  return out


def critical_weights(v, output) -> np.ndarray:
  """[H, T] L1 norms of values v [T, H, D] behind output [H*G, D, E], averaged over the group."""
  v, output = np.asarray(v, np.float64), np.asarray(output, np.float64)
  norms = np.stack([
      np.abs(v[:, head] @ output[query_head]).sum(axis=-1)
      for query_head, head in enumerate(_head_of_query_head(len(output), v.shape[1]))])
  return _sum_over_group(norms, v.shape[1]) / (len(output) // v.shape[1])


def critical_choice(attention, weights, *, budget, first_share, epsilon, protected) -> set[int]:
  """CriticalKV's choice for one head: the `budget` positions that stay.

  Rule: protected positions stay; then the best by attention alone, until floor(first_share * budget)
  stay; then the best by (attention + epsilon) * weight, until `budget` do.
  """
  stays = set(protected)
  for score, most in ((attention, int(first_share * budget)), ((attention + epsilon) * weights, budget)):
    for position in sorted(range(len(attention)), key=lambda p: (-score[p], -p)):
      if len(stays) < most:
        stays.add(position)
  return stays


# --- Budget and eviction ---------------------------------------------------------------------


def allowed_tokens(num_tokens, *, rate=None, max_cache_tokens=None, window) -> int:
  """C, the cache tokens that a sequence of num_tokens may keep.

  Rule: by size, C = max_cache_tokens. By rate r, of the KVs outside the protected
  window keep 1/r: C = min(window, n) + ceil((n - min(window, n)) / r), from the
  sequence's true length n. Exactly one of the two is given.
  """
  if (rate is None) == (max_cache_tokens is None):
    raise ValueError("give exactly one of rate and max_cache_tokens")
  if max_cache_tokens is not None:
    return max_cache_tokens
  inside = min(window, num_tokens)
  return inside + math.ceil((num_tokens - inside) / rate)


def allowed_blocks(allowed, *, block_size, num_heads) -> int:
  """Blocks that may stay in a group of num_heads (layer, head) pairs.

  Rule: ceil(C / P) per head, times the heads in the group; `allowed` is C.
  """
  return math.ceil(allowed / block_size) * num_heads


def _groups(num_layers: int, kv_heads: int, allocation: str) -> list[list[tuple[int, int]]]:
  """Rule: "all" is one group; "layer" a group per layer; "head" a group per head."""
  pairs = [(layer, head) for layer in range(num_layers) for head in range(kv_heads)]
  if allocation == "all":
    return [pairs]
  if allocation == "layer":
    return [[pair for pair in pairs if pair[0] == layer] for layer in range(num_layers)]
  if allocation == "head":
    return [[pair] for pair in pairs]
  raise ValueError(f"unknown allocation {allocation!r}")


def _evictable(held: Held, *, num_tokens: int, window: int, sinks: int, keep: Sequence[tuple[int, int]]) -> Held:
  """The KVs that are not protected, in the order in which they would go.

  Rule: protected are position >= num_tokens - window, position < sinks and start <=
  position < end for each range to keep. Lowest score first; between equal scores the
  lower position is evicted first.
  """
  kept = {position for start, end in keep for position in range(start, end)}
  free = [(p, s) for p, s in held if not (p >= num_tokens - window or p < sinks or p in kept)]
  return sorted(free, key=lambda kv: (kv[1], kv[0]))


def _evictions_needed(length: int, freed: int, block_size: int) -> int:
  """KVs that must go from a head of `length` KVs so that `freed` blocks fall empty.

  Rule: the first block costs the last block's occupancy h = (n - 1) % P + 1, each
  further block P more.
  """
  if freed == 0:
    return 0
  return (length - 1) % block_size + 1 + (freed - 1) * block_size


def _block_costs(held: Held, evictable: Held, block_size: int) -> list[float]:
  """Cost of freeing block j = 0, 1, ... of a head, for as many as can be freed.

  Rule: block j can be freed only if the head has at least h + j*P evictable KVs, and
  its cost is the (h - 1 + j*P)-th smallest (0-based) evictable score.
  """
  costs = []
  for block in range(math.ceil(len(held) / block_size)):
    needed = _evictions_needed(len(held), block + 1, block_size)
    if needed > len(evictable):
      break
    costs.append(evictable[needed - 1][1])
  return costs


def _choose_blocks(costs: list[list[float]], excess: int) -> list[int]:
  """Blocks to free per head of a group, given the costs of each head's blocks.

  Rule: free the `excess` cheapest blocks by greedy: lowest cost, then head order, then
  j. If fewer are freeable, free all those.
  """
  freed = [0] * len(costs)
  for _ in range(excess):
    offers = [(costs[i][freed[i]], i) for i in range(len(costs)) if freed[i] < len(costs[i])]
    if not offers:
      break
    freed[min(offers)[1]] += 1
  return freed


def evict(
    heads: Sequence[Sequence[Held]], *, num_tokens, window, sinks, block_size, allowed, allocation, keep=(), least=0,
    mass=None, head_blocks=None,
) -> tuple[list[list[Held]], list[list[int]]]:
  """One compression of one sequence.

  Rule: in each group E = max(0, blocks held - blocks allowed); free the E cheapest
  blocks by greedy (cost, then head order row-major (layer, head), then j); if fewer are
  freeable, free all those. Then each head with b freed blocks evicts its h + (b - 1)*P
  lowest-scored evictable KVs (between equal scores the lower position first).

  Args:
    heads: [L][H] lists of (position, score) of the KVs held, in any order.
    num_tokens: the sequence's true length, from which the window is counted.
    window: the newest positions protected.
    sinks: the first positions protected.
    block_size: P.
    allowed: C tokens; ceil(C / P) blocks per head may stay.
    allocation: "all", "layer" or "head": over what the blocks are pooled.
    keep: (start, end) of positions that are protected as well.
    least: tokens that every head keeps at least: no head goes below ceil(least / P) blocks.
    mass: with it E grows, one block at a time, as long as the scores evicted from the group sum to no more
      than (1 - mass) of those it held.
    head_blocks: [L][H] blocks that each head may keep, in place of `allowed`; for allocation "head".

  Returns:
    kept [L][H], lists of (position, score) by position; freed blocks [L][H].
  """
  num_layers, kv_heads = len(heads), len(heads[0])
  evictable = [[_evictable(held, num_tokens=num_tokens, window=window, sinks=sinks, keep=keep) for held in layer]
               for layer in heads]
  freed = [[0] * kv_heads for _ in range(num_layers)]
  for group in _groups(num_layers, kv_heads, allocation):
    held_blocks = sum(math.ceil(len(heads[i][h]) / block_size) for i, h in group)
    may_stay = allowed_blocks(allowed, block_size=block_size, num_heads=len(group))
    if head_blocks is not None:
      ((i, h),) = group
      may_stay = head_blocks[i][h]
    excess = max(0, held_blocks - may_stay)
    costs = [
        _block_costs(heads[i][h], evictable[i][h], block_size)[
            :max(0, math.ceil(len(heads[i][h]) / block_size) - math.ceil(least / block_size))]
        for i, h in group]
    if mass is not None:
      excess = max(excess, _blocks_by_mass(group, heads, evictable, costs, mass, block_size))
    for (i, h), blocks in zip(group, _choose_blocks(costs, excess), strict=True):
      freed[i][h] = blocks
  kept = [[[] for _ in range(kv_heads)] for _ in range(num_layers)]
  for i in range(num_layers):
    for h in range(kv_heads):
      needed = _evictions_needed(len(heads[i][h]), freed[i][h], block_size)
      gone = {position for position, _ in evictable[i][h][:needed]}
      kept[i][h] = sorted(kv for kv in heads[i][h] if kv[0] not in gone)
  return kept, freed


def _blocks_by_mass(group, heads, evictable, costs, mass, block_size) -> int:
  """Most blocks whose evictions sum to no more than (1 - mass) of the scores that the group holds."""
  allowed = (1 - mass) * sum(score for i, h in group for _, score in heads[i][h])
  most = 0
  for blocks in range(1, sum(map(len, costs)) + 1):
    gone = 0.0
    for (i, h), freed in zip(group, _choose_blocks(costs, blocks), strict=True):
      needed = _evictions_needed(len(heads[i][h]), freed, block_size)
      gone += sum(score for _, score in evictable[i][h][:needed])
    if gone <= allowed:
      most = blocks
  return most


def pyramid(mean, most, layers, beta=20) -> list[float]:
  """PyramidKV's budgets beyond what is protected, one per layer, before rounding.

  Rule: they fall evenly from 2 mean - mean / beta in the first layer to mean / beta in the
  last; if the first is more than `most`, it is `most`, and the last 2 mean - most.
  """
  last = mean / beta
  first = 2 * mean - last
  if first > most:
    first, last = most, 2 * mean - most
  if layers == 1:
    return [mean]
  return [first - layer * (first - last) / (layers - 1) for layer in range(layers)]


def weighted_blocks(mean, most, weights) -> np.ndarray:
  """Whole blocks [L, H] in proportion to weights [L, H], `mean` on the average and none above `most`.

  Rule: give all in proportion; heads that would get more than `most` get that, and the rest is
  given to the others again, until none does. Rounded where the running sum, head after head, passes a half.
  """
  flat = np.asarray(weights, np.float64).ravel()
  shares, full = np.zeros(flat.size), np.zeros(flat.size, bool)
  while not full.all():
    left = mean * flat.size - full.sum() * most
    shares = np.where(full, most, left * flat / flat[~full].sum())
    if not (shares[~full] > most).any():
      break
    full |= shares > most
  marks = np.floor(np.cumsum([0, *np.minimum(shares, most)]) + 0.5 + 1e-5)
  marks[-1] = min(mean, most) * flat.size
  return np.diff(marks).astype(int).reshape(np.shape(weights))


# --- The cache -------------------------------------------------------------------------------


class CacheModel:
  """What the cache holds, without blocks: a model for stateful property tests.

  Invariants: every head of a sequence holds distinct positions, each below its
  sequence's num_tokens; blocks_in_use = sum of ceil(length / P) <= total_blocks; no
  head has more than max_blocks blocks.

  Attributes:
    positions: slot -> [L][H] sorted lists of positions held; only slots in use.
    num_tokens: slot -> tokens seen so far, whatever was evicted.
  """

  def __init__(self, *, num_layers, kv_heads, block_size, total_blocks, max_blocks):
    """An empty cache of total_blocks blocks (those that can be used: no null block)."""
    self.num_layers, self.kv_heads = num_layers, kv_heads
    self.block_size, self.total_blocks, self.max_blocks = block_size, total_blocks, max_blocks
    self.positions: dict[int, list[list[list[int]]]] = {}
    self.num_tokens: dict[int, int] = {}

  def lengths(self, slot: int) -> list[list[int]]:
    """KVs held [L][H]; zeros for a slot not in use."""
    if slot not in self.positions:
      return [[0] * self.kv_heads for _ in range(self.num_layers)]
    return [[len(held) for held in layer] for layer in self.positions[slot]]

  def blocks(self, slot: int) -> int:
    """Blocks in use by one sequence: the sum over its heads of ceil(length / P)."""
    return sum(self._blocks_of(n) for layer in self.lengths(slot) for n in layer)

  @property
  def blocks_in_use(self) -> int:
    return sum(self.blocks(slot) for slot in self.positions)

  @property
  def blocks_free(self) -> int:
    return self.total_blocks - self.blocks_in_use

  def allocate(self, slot: int, count: int) -> bool:
    """Adds the next `count` tokens to every head of `slot`, a new sequence if it is unused.

    Rule: it fits when the blocks needed are <= the blocks free and no head goes over
    max_blocks. Returns whether it fitted; when not, nothing changes.
    """
    lengths = [n for layer in self.lengths(slot) for n in layer]
    needed = sum(self._blocks_of(n + count) - self._blocks_of(n) for n in lengths)
    longest = max(self._blocks_of(n + count) for n in lengths)
    if needed > self.blocks_free or longest > self.max_blocks:
      return False
    empty = [[[] for _ in range(self.kv_heads)] for _ in range(self.num_layers)]
    held = self.positions.setdefault(slot, empty)
    first = self.num_tokens.get(slot, 0)
    for layer in held:
      for positions in layer:
        positions.extend(range(first, first + count))
    self.num_tokens[slot] = first + count
    return True

  def evict(self, slot: int, kept: Sequence[Sequence[Sequence[int]]]) -> int:
    """Keeps only `kept`, [L][H] lists of positions. Returns the number of blocks freed.

    Raises:
      ValueError: a kept position is not held, or is named twice.
    """
    before = self.blocks(slot)
    for held_layer, kept_layer in zip(self.positions[slot], kept, strict=True):
      for held, positions in zip(held_layer, kept_layer, strict=True):
        if not set(positions) <= set(held) or len(set(positions)) != len(positions):
          raise ValueError(f"kept positions {sorted(positions)} are not a subset of those held, {held}")
    self.positions[slot] = [[sorted(positions) for positions in layer] for layer in kept]
    return before - self.blocks(slot)

  def release(self, slot: int) -> int:
    """Ends a sequence. Returns the number of blocks freed; 0 for a slot not in use."""
    freed = self.blocks(slot)
    self.positions.pop(slot, None)
    self.num_tokens.pop(slot, None)
    return freed

  def check_invariants(self) -> None:
    """Asserts what the class docstring states."""
    assert self.positions.keys() == self.num_tokens.keys()
    assert 0 <= self.blocks_in_use <= self.total_blocks
    for slot, layers in self.positions.items():
      for held in (positions for layer in layers for positions in layer):
        assert held == sorted(set(held))
        assert all(0 <= p < self.num_tokens[slot] for p in held)
        assert self._blocks_of(len(held)) <= self.max_blocks

  def _blocks_of(self, length: int) -> int:
    return math.ceil(length / self.block_size)


class SharedCacheModel(CacheModel):
  """`CacheModel` where blocks may have several holders: slots, and what was held of them.

  Rules: a block is in use as long as somebody holds it. `adopt` takes the same blocks,
  but a new one for each head whose last block is partly filled. `unshare` takes new ones
  for all blocks that others hold too.

  Attributes:
    blocks_of: holder -> [L][H] lists of block names; slots are holders by their number.
    held: name -> (num_tokens, [L][H] positions) of what was held.
  """

  def __init__(self, **sizes):
    super().__init__(**sizes)
    self.blocks_of, self.held = {}, {}
    self._names = 0

  @property
  def blocks_in_use(self) -> int:
    return len(set().union(*(self._all(holder) for holder in self.blocks_of)))

  def allocate(self, slot: int, count: int) -> bool:
    ok = super().allocate(slot, count)
    if ok:
      self._fit(slot)
    return ok

  def evict(self, slot: int, kept: Sequence[Sequence[Sequence[int]]]) -> int:
    freed = super().evict(slot, kept)
    self._fit(slot)
    return freed

  def release(self, slot: int) -> int:
    before = self.blocks_in_use
    super().release(slot)
    self.blocks_of.pop(slot, None)
    return before - self.blocks_in_use

  def hold(self, name: str, slot: int) -> None:
    self.held[name] = self.num_tokens[slot], _copied(self.positions[slot])
    self.blocks_of[name] = _copied(self.blocks_of[slot])

  def drop(self, name: str) -> None:
    del self.held[name], self.blocks_of[name]

  def adopt(self, name: str, slot: int) -> bool:
    """Returns whether it fitted; `slot` is not in use."""
    num_tokens, positions = self.held[name]
    partial = sum(len(head) % self.block_size > 0 for layer in positions for head in layer)
    if partial > self.blocks_free:
      return False
    self.num_tokens[slot], self.positions[slot] = num_tokens, _copied(positions)
    names = self.blocks_of[slot] = _copied(self.blocks_of[name])
    for layer, layer_names in zip(positions, names, strict=True):
      for head, head_names in zip(layer, layer_names, strict=True):
        if len(head) % self.block_size:
          head_names[-1] = self._new()
    return True

  def unshare(self, slot: int) -> bool:
    """Returns whether it fitted."""
    others = set().union(*(self._all(holder) for holder in self.blocks_of if holder != slot))
    shared = self._all(slot) & others
    if len(shared) > self.blocks_free:
      return False
    for layer in self.blocks_of.get(slot, ()):
      for names in layer:
        names[:] = [self._new() if name in shared else name for name in names]
    return True

  def _all(self, holder) -> set[int]:
    return {name for layer in self.blocks_of.get(holder, ()) for names in layer for name in names}

  def _fit(self, slot: int) -> None:
    """As many blocks as each head's KVs need: new ones behind, or the last ones gone."""
    empty = [[[] for _ in range(self.kv_heads)] for _ in range(self.num_layers)]
    for layer, layer_names in zip(self.positions[slot], self.blocks_of.setdefault(slot, empty), strict=True):
      for head, names in zip(layer, layer_names, strict=True):
        needed = self._blocks_of(len(head))
        del names[needed:]
        names.extend(self._new() for _ in range(needed - len(names)))

  def _new(self) -> int:
    self._names += 1
    return self._names


def _copied(lists):
  return [[list(head) for head in layer] for layer in lists]
