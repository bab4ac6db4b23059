"""Sequences leave the cache and come back: what is held, outputs to the bit, compiles, memory, files."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import held_keys_and_values, held_kvs, poison
from safetensors import safe_open
from safetensors.numpy import save_file

from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import init_observation, prefill_attention, score_observed
from kvc_jax.cache import snapshot as snapshots
from kvc_jax.cache.alloc import allocate, release
from kvc_jax.cache.quantize import FP8
from kvc_jax.cache.sequence_file import load_sequence, save_sequence
from kvc_jax.cache.snapshot import export_sequence, import_sequence
from kvc_jax.cache.state import CacheConfig, check_invariants, init_cache
from kvc_jax.errors import InputError
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.step import evict

LAYERS, HEADS, GROUP, DIM, SCALE = 2, 3, 2, 4, 0.5
RULE = FullAttention(buffer=2)
PIECE = 16  # small, so that a sequence takes several


def _config(**changes):
  return CacheConfig(**{
      "num_layers": LAYERS, "num_slots": 3, "num_kv_heads": HEADS, "head_dim": DIM, "num_blocks": 120,
      "max_blocks_per_head": 10, "block_size": 4, "dtype": jnp.float32, "num_heads": HEADS * GROUP, **changes})


def _qkv(rng, tokens):
  """The further back a head, the flatter its attention: eviction then leaves different lengths."""
  q, k, v = (rng.normal(size=(LAYERS, tokens, n, DIM)).astype(np.float32) for n in (HEADS * GROUP, HEADS, HEADS))
  return [q * np.linspace(4, 0, HEADS * GROUP, dtype=np.float32)[:, None], k, v]


def _prefill(state, slot, rng, tokens):
  return _prefill_chunk(state, jnp.int32(slot), jnp.int32(tokens), _qkv(rng, 32))


@jax.jit
def _prefill_chunk(state, slot, tokens, qkv):
  state, _ = allocate(state, slot[None], tokens[None], max_count=32)
  observation = init_observation(RULE, LAYERS, HEADS * GROUP, DIM, jnp.float32)
  for layer in range(LAYERS):
    _, state, observation = prefill_attention(
        state, observation, jnp.int32(layer), *(x[layer] for x in qkv), slot=slot, count=tokens,
        scale=SCALE, rule=RULE)
  return score_observed(state, observation, slot, scale=SCALE, rule=RULE)


@jax.jit
def _decode(state, active, qkv):
  state, ok = allocate(state, jnp.arange(3), active.astype(jnp.int32), max_count=1)
  outs = []
  for layer in range(LAYERS):
    out, state = decode_attention(
        state, jnp.int32(layer), *(x[layer] for x in qkv), active=ok & active, scale=SCALE, rule=RULE)
    outs.append(out)
  return jnp.stack(outs), state


_evict_rows = jax.jit(evict, static_argnames="rule")


def _evict(state, slot, budget):
  return _evict_rows(state, *np.array([[slot, budget, 2, 0]], np.int32).T, rule=RULE)[0]


def _filled(rng, config=None, scales=None):
  """Slots 1 and 2 prefilled, slot 1 compressed (ragged heads) and decoded: a query waits."""
  state = poison(init_cache(config or _config(), scales))
  state = _prefill(state, 1, rng, 27)
  state = _prefill(state, 2, rng, 11)
  state = _evict(state, 1, 12)
  _, state = _decode(state, jnp.array([False, True, False]), _qkv(rng, 3))
  return state


def _there_and_back(state, source, target):
  snapshot = export_sequence(state, source, piece=PIECE)
  state = poison(release(state, jnp.array([source])))
  state, ok = import_sequence(state, target, snapshot, piece=PIECE)
  assert ok
  check_invariants(state)
  return poison(state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, FP8])
def test_outputs_are_bit_identical_to_never_having_left(dtype):
  """Decodes, evicts and decodes on in another slot, in other blocks."""
  rng = np.random.default_rng(0)
  scales = np.full((LAYERS, HEADS, 2), 0.02, np.float32) if dtype == FP8 else None
  stays = _filled(rng, _config(dtype=dtype), scales)
  assert len(np.unique(stays.lengths[:, 1])) > 1
  assert np.isfinite(stays.log_sums[:, 1]).all()
  moved = _there_and_back(jax.tree.map(jnp.copy, stays), 1, 0)
  assert held_kvs(moved, 0) == held_kvs(stays, 1)
  for step in range(6):
    q, k, v = _qkv(rng, 1)
    rows = [np.concatenate([x] * 3, axis=1) for x in (q, k, v)]
    out, stays = _decode(stays, jnp.array([False, True, False]), rows)
    there, moved = _decode(moved, jnp.array([True, False, False]), rows)
    np.testing.assert_array_equal(there[:, 0], out[:, 1])
    if step == 3:
      stays, moved = _evict(stays, 1, 8), _evict(moved, 0, 8)
    assert held_kvs(moved, 0) == held_kvs(stays, 1)
  assert held_kvs(moved, 2) == held_kvs(stays, 2)  # the neighbour is left alone


def test_another_block_size_holds_the_same():
  state = _filled(np.random.default_rng(1))
  snapshot = export_sequence(state, 1, piece=PIECE)
  other = poison(init_cache(_config(block_size=2, max_blocks_per_head=20, num_slots=1)))
  other, ok = import_sequence(other, 0, snapshot, piece=PIECE)
  assert ok
  check_invariants(other)
  assert int(other.free_count) == 119 - snapshot.blocks(2)
  assert held_kvs(other, 0) == held_kvs(state, 1)
  for layer, head in np.ndindex(LAYERS, HEADS):
    for here, there in zip(
        held_keys_and_values(other, layer, 0, head), held_keys_and_values(state, layer, 1, head), strict=True):
      np.testing.assert_array_equal(here, there)


def test_a_snapshot_is_compact():
  state = _filled(np.random.default_rng(2))
  snapshot = export_sequence(state, 1, piece=PIECE)
  held = int(state.lengths[:, 1].sum())
  assert len(snapshot.kv) == len(snapshot.scores) == len(snapshot.positions) == held
  assert np.isfinite(snapshot.kv).all()
  assert snapshot.num_tokens == 28


@pytest.mark.parametrize(("change", "slot"), [({"num_blocks": 12}, 0), ({}, 2)], ids=["pool full", "slot taken"])
def test_no_room_leaves_the_cache_as_it_was(change, slot):
  """A pool of 11 blocks is short of one; a slot that is taken keeps its sequence."""
  rng = np.random.default_rng(3)
  snapshot = export_sequence(_filled(rng), 1, piece=PIECE)
  state = poison(init_cache(_config(**change)))
  if slot:
    state = poison(_prefill(state, slot, rng, 11))
  before, free = held_kvs(state, slot), int(state.free_count)
  after, ok = import_sequence(state, slot, snapshot, piece=PIECE)
  assert not ok
  check_invariants(after)
  assert int(after.free_count) == free
  assert held_kvs(after, slot) == before


def test_an_empty_slot_makes_an_empty_snapshot():
  state = init_cache(_config())
  snapshot = export_sequence(state, 0)
  assert (snapshot.num_tokens, len(snapshot.kv)) == (0, 0)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_layers": 3}, "layers and KV heads"),
    ({"head_dim": 8}, "head dimension"),
    ({"dtype": jnp.bfloat16}, "dtype float32, but the cache has bfloat16"),
    ({"num_heads": None}, "query heads"),
    ({"max_blocks_per_head": 1}, "raise max_model_len"),
])
def test_a_cache_of_another_shape_is_an_error(change, message):
  snapshot = export_sequence(_filled(np.random.default_rng(4)), 1, piece=PIECE)
  state = init_cache(_config(**change))
  with pytest.raises(InputError, match=message):
    import_sequence(state, 0, snapshot)
  check_invariants(state)  # not donated


def test_other_fp8_scales_are_an_error():
  snapshot = export_sequence(init_cache(_config(dtype=FP8)), 0)
  with pytest.raises(InputError, match="other FP8 scales"):
    import_sequence(init_cache(_config(dtype=FP8), np.full((LAYERS, HEADS, 2), 2.0)), 0, snapshot)


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_is_not_there(slot):
  state = init_cache(_config())
  with pytest.raises(InputError, match="outside the cache's 3 slots"):
    export_sequence(state, slot)
  with pytest.raises(InputError, match="outside the cache's 3 slots"):
    import_sequence(state, slot, export_sequence(state, 0))


def test_nothing_compiles_anew_with_length_or_slot():
  rng = np.random.default_rng(5)
  functions = (snapshots._slot_arrays, snapshots.read_piece, snapshots.reserve, snapshots.write_piece)
  state = _there_and_back(_filled(rng), 1, 0)
  sizes = [f._cache_size() for f in functions]
  state = _there_and_back(state, 2, 1)
  _there_and_back(_prefill(state, 2, rng, 5), 2, 2)
  assert [f._cache_size() for f in functions] == sizes


def test_the_pool_is_neither_copied_nor_converted():
  """Read off the compiled steps: reading makes no second pool, writing and reserving alias it."""
  config = _config(num_blocks=40_000, head_dim=64, num_slots=8, max_blocks_per_head=64, dtype=jnp.bfloat16)
  state = jax.eval_shape(lambda: init_cache(config))
  number, ok = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_)
  pool = sum(np.prod(x.shape) * x.dtype.itemsize for x in (state.kv, state.scores, state.positions))
  read = snapshots.read_piece.lower(state, number, number, size=64)
  part = read.out_info
  lengths = jax.ShapeDtypeStruct((LAYERS, HEADS), jnp.int32)
  waiting = (jax.ShapeDtypeStruct((LAYERS, HEADS * GROUP, 64), jnp.bfloat16),
             jax.ShapeDtypeStruct((LAYERS, HEADS * GROUP), jnp.float32))
  part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), part)
  for lowered, aliased in (
      (read, 0), (snapshots.write_piece.lower(state, number, ok, number, part), pool),
      (snapshots.reserve.lower(state, number, lengths, number, *waiting), pool)):
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= aliased
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.05 * pool


# --- Files ---------------------------------------------------------------------------------


MODEL = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "sequence.safetensors"
  state = _filled(np.random.default_rng(6))
  save_sequence(path, export_sequence(state, 1), token_ids=list(range(29)), model=MODEL, settings={"rate": 2})
  return path, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, FP8])
def test_a_file_brings_back_all_of_it(dtype, tmp_path):
  state = _filled(np.random.default_rng(7), _config(dtype=dtype))
  before = export_sequence(state, 1)
  save_sequence(tmp_path / "a", before, token_ids=[5] * 29, model=MODEL, settings={"rate": 2})
  loaded = load_sequence(tmp_path / "a", model=MODEL)
  assert (loaded.token_ids, loaded.settings) == ([5] * 29, {"rate": 2})
  for field in dataclasses.fields(before):
    ours, theirs = getattr(before, field.name), getattr(loaded.snapshot, field.name)
    assert type(ours) is type(theirs)
    if isinstance(ours, np.ndarray):
      assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)
  assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_process_reads_it(saved):
  """Only what a new process imports is at hand there."""
  path, state = saved
  program = (
      "import sys; from kvc_jax.cache.sequence_file import load_sequence; "
      "s = load_sequence(sys.argv[1], model=sys.argv[2]); print(s.snapshot.num_tokens, s.snapshot.lengths.sum())")
  done = subprocess.run([sys.executable, "-c", program, path, MODEL], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["28", str(state.lengths[:, 1].sum())]


def _cut(path):
  path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
  data = bytearray(path.read_bytes())
  data[-100] ^= 1
  path.write_bytes(data)


def _rewritten(change):
  """Changes tensors or metadata and makes the checksum right again."""
  from kvc_jax.cache import sequence_file

  def damage(path):
    with safe_open(path, "numpy") as file:
      metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    metadata["sha256"] = sequence_file._checksum(tensors, metadata)
    save_file(tensors, path, metadata=metadata)

  return damage


DAMAGES = {
    "cut off": (_cut, "cut off or damaged"),
    "one bit": (_flip, "checksum"),
    "empty": (lambda p: p.write_bytes(b""), "cut off or damaged"),
    "text": (lambda p: p.write_text("hello, world, this is no tensor"), "cut off or damaged"),
    "missing": (pathlib.Path.unlink, "is missing"),
    "a model's weights": (lambda p: save_file({"a": np.zeros(3)}, p), "no saved sequence"),
    "another model": (_rewritten(lambda t, m: m.update(model="f" * 32)), "another model"),
    "another version": (_rewritten(lambda t, m: m.update(version="2")), "version 2"),
    "settings no JSON": (_rewritten(lambda t, m: m.update(settings="{")), "settings"),
    "no number of tokens": (_rewritten(lambda t, m: m.pop("num_tokens")), "metadata"),
    "lacks scores": (_rewritten(lambda t, m: t.pop("scores")), "scores is missing"),
    "unknown array": (_rewritten(lambda t, m: t.update(more=np.zeros(2))), "more has no place"),
    "other dtype": (_rewritten(lambda t, m: t.update(scores=t["scores"].astype(np.float64))), "scores is float64"),
    "too few KVs": (_rewritten(lambda t, m: t.update(kv=t["kv"][1:].copy())), "different numbers of KVs"),
    "negative length": (_rewritten(lambda t, m: t["lengths"].__setitem__((0, 0), -1)), "more KVs than"),
    "position outside": (_rewritten(lambda t, m: t["positions"].__setitem__(0, 99)), "outside the sequence"),
    "query without its sum": (_rewritten(lambda t, m: t.pop("log_sums")), "log-sum-exp"),
    "wrong axes": (_rewritten(lambda t, m: t.update(lengths=t["lengths"].ravel())), "number of axes"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_one_clear_line(kind, saved, tmp_path):
  damage, message = DAMAGES[kind]
  path = tmp_path / "sequence.safetensors"
  path.write_bytes(saved[0].read_bytes())
  damage(path)
  with pytest.raises(InputError, match=message) as caught:
    load_sequence(path, model=MODEL)
  assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_written(saved, tmp_path):
  snapshot = load_sequence(saved[0], model=MODEL).snapshot
  with pytest.raises(InputError, match="cannot be written"):
    save_sequence(tmp_path / "no" / "a", snapshot, token_ids=list(range(29)), model=MODEL)
  with pytest.raises(InputError, match="3 token ids for a sequence of 28"):
    save_sequence(tmp_path / "a", snapshot, token_ids=[1, 2, 3], model=MODEL)
