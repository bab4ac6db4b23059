"""Caches made by hand for tests, with everything unused poisoned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.cache.state import NULL_BLOCK, CacheState

BAD_POSITION = 2**30


def live_slots(state: CacheState, held=()) -> np.ndarray:
  """True [N, P] for KV slots that hold a KV of some sequence, or of some `Held`."""
  tables = np.concatenate([np.asarray(state.tables), *(np.asarray(h.tables)[:, None] for h in held)], axis=1)
  lengths = np.concatenate([np.asarray(state.lengths), *(np.asarray(h.lengths)[:, None] for h in held)], axis=1)
  index = np.arange(tables.shape[-1] * state.block_size).reshape(tables.shape[-1], -1)
  held = index < lengths[..., None, None]  # [L, S, H, M, P]
  live = np.zeros((state.num_blocks, state.block_size), bool)
  np.logical_or.at(live, tables, held)
  return live


def poison(state: CacheState, held=()) -> CacheState:
  """Puts NaN and nonsense positions into every KV slot that holds nothing, for a sequence or a `Held`."""
  unused = ~live_slots(state, held)
  kv, scores, positions = (np.array(x) for x in (state.kv, state.scores, state.positions))
  kv.swapaxes(1, 2)[unused] = scores[unused] = np.nan
  positions[unused] = BAD_POSITION
  kv, scores, positions = (jnp.asarray(x) for x in (kv, scores, positions))
  return dataclasses.replace(state, kv=kv, scores=scores, positions=positions)


def tag(slot: int, layer: int, head: int, position: int) -> float:
  """A number that names one KV exactly in f32."""
  return float(((slot * 8 + layer) * 8 + head) * 4096 + position + 1)


def build_cache(rng, sequences, *, slots, block_size, max_blocks, num_blocks, head_dim=2) -> CacheState:
  """A poisoned cache that holds `sequences`: slot -> (num_tokens, [L][H] lists of (position, score)).

  Keys are `tag`, values -`tag`; block ids are handed out at random.
  """
  first = next(iter(sequences.values()))[1]
  layers, heads = len(first), len(first[0])
  ids = list(rng.permutation(np.arange(1, num_blocks)))
  tables = np.full((layers, slots, heads, max_blocks), NULL_BLOCK, np.int32)
  lengths, num_tokens = np.zeros((layers, slots, heads), np.int32), np.zeros(slots, np.int32)
  kv = np.full((num_blocks, 2, block_size, head_dim), np.nan, np.float32)
  scores = np.full((num_blocks, block_size), np.nan, np.float32)
  positions = np.full((num_blocks, block_size), BAD_POSITION, np.int32)
  for slot, (seen, held) in sequences.items():
    num_tokens[slot] = seen
    for layer, head in np.ndindex(layers, heads):
      kvs = held[layer][head]
      lengths[layer, slot, head] = len(kvs)
      for i, (position, score) in enumerate(kvs):
        if i % block_size == 0:
          tables[layer, slot, head, i // block_size] = ids.pop()
        at = tables[layer, slot, head, i // block_size], i % block_size
        scores[at], positions[at] = score, position
        kv[at[0], 0, at[1]], kv[at[0], 1, at[1]] = tag(slot, layer, head, position), -tag(slot, layer, head, position)
  free = np.zeros(num_blocks, np.int32)
  free[: len(ids)] = ids
  arrays = (kv, scores, positions, tables, lengths, num_tokens, free, np.int32(len(ids)))
  return CacheState(*jax.tree.map(jnp.asarray, arrays))


def held_kvs(state: CacheState, slot: int) -> list[list[list[tuple[int, float]]]]:
  """[L][H] lists of (position, score) that the cache holds for a slot, by position."""
  tables, lengths = np.asarray(state.tables[:, slot]), np.asarray(state.lengths[:, slot])
  scores, positions = np.asarray(state.scores), np.asarray(state.positions)
  out = []
  for layer in range(len(tables)):
    out.append([])
    for head in range(tables.shape[1]):
      n, ids = lengths[layer, head], tables[layer, head]
      out[-1].append(sorted(zip(positions[ids].ravel()[:n].tolist(), scores[ids].ravel()[:n].tolist(), strict=True)))
  return out


def held_keys_and_values(
    state: CacheState, layer: int, slot: int, head: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Positions [n], keys [n, D] and values [n, D] that one head holds, by position."""
  ids, n = np.asarray(state.tables[layer, slot, head]), int(state.lengths[layer, slot, head])
  positions = np.asarray(state.positions)[ids].ravel()[:n]
  kv = np.asarray(state.kv)[ids].swapaxes(0, 1).reshape(2, -1, state.kv.shape[-1])[:, :n]
  order = np.argsort(positions)
  return positions[order], kv[0][order], kv[1][order]
