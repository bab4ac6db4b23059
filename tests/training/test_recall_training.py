"""Training of the small model that retrieves: data, steps, resumption and export, on a model of no use."""

import dataclasses
import gzip
import itertools
import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attend
from flax import nnx
from tokenizers import Tokenizer as Vocabulary

from kvc_jax.checkpoint.store import load_model
from kvc_jax.config import LlamaConfig, RopeConfig
from kvc_jax.errors import InputError
from kvc_jax.evaluation.haystack import SHIPPED_TEXT, held_out_sentences, read_text
from kvc_jax.evaluation.recall_episodes import TASKS, Draw
from kvc_jax.model.llama import Llama
from kvc_jax.tokenizer import Tokenizer
from kvc_jax.training import recall_batches as batches
from kvc_jax.training.language_model import Progress, Trainer, flat_params, init_params
from kvc_jax.training.recall_checkpoint import export_model, load_state
from kvc_jax.training.recall_corpus import Corpus, prepare, without_held_out
from kvc_jax.training.recall_training import TrainingConfig, check_lengths, learning_rate, length_shares, train

TINY = LlamaConfig(
    vocab_size=1200, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope=RopeConfig(theta=10_000.0), tie_embeddings=True, max_position_embeddings=512)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The shipped text's first half to train on, the rest held out."""
  folder = tmp_path_factory.mktemp("data")
  text = read_text(SHIPPED_TEXT)[:300_000]
  prepare(text[:150_000], text[150_000:], folder, vocab_size=TINY.vocab_size)
  return folder


@pytest.fixture(scope="module")
def composer(prepared):
  return batches.load_composer(prepared, "train")


def test_split_is_disjoint_even_where_the_texts_overlap(prepared):
  sentences = held_out_sentences()
  assert not set(without_held_out(sentences, sentences[100:])) & set(sentences[100:])
  vocabulary = Vocabulary.from_file(str(prepared / "tokenizer.json"))
  train_text, held_out = (
      _sentences(Corpus.load(prepared / f"{name}.npz"), vocabulary) for name in ("train", "held_out"))
  assert len(train_text) > 500
  assert not train_text & held_out


def _sentences(corpus, vocabulary):
  offsets = corpus.lengths.offsets
  return {vocabulary.decode(corpus.tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets)}


def test_digits_are_one_token_each_with_their_space_and_come_back_without(prepared):
  vocabulary = Vocabulary.from_file(str(prepared / "tokenizer.json"))
  for text in ("falcon 4839.", "falcon 4 8 3 9."):
    encoded = vocabulary.encode(text)
    assert encoded.tokens[-5:] == ["Ġ4", "Ġ8", "Ġ3", "Ġ9", "."]
    assert vocabulary.decode(encoded.ids) == "falcon 4839."
  assert vocabulary.encode("42").tokens == ["<s>", "Ġ4", "Ġ2"]


def test_the_tokens_of_a_sample_are_those_of_its_text(prepared, composer):
  """What is trained on in parts is what a user's text becomes, but for the cut first sentence."""
  vocabulary = Vocabulary.from_file(str(prepared / "tokenizer.json"))
  for task in TASKS:
    tokens, _ = composer.evaluation_sample(random.Random(1), task, 512)
    text = vocabulary.decode(tokens[40:].tolist())
    assert vocabulary.encode(text, add_special_tokens=False).ids[-400:] == tokens[-400:].tolist()


@pytest.mark.parametrize("length", [128, 256, 1024])
def test_training_samples_have_the_length_and_mark_their_answers(composer, length):
  marked = 0
  for number in range(30):
    tokens, codes = composer.training_sample(random.Random(number), length, 0.0)
    assert tokens.shape == codes.shape == (length,)
    assert tokens[0] == 0
    assert codes[-1] == batches.NOTHING
    marked += int((codes == batches.LOOKUP).sum())
    assert (codes == batches.LOOKUP).any()
  assert marked > 60


def test_values_that_begin_alike_differ_and_have_the_digits_asked_for(composer):
  lengths = composer._corpus.lengths
  for digits in (3, 4, 6):
    plain, alike = (Draw(random.Random(1), lengths, digits=digits, alike=share) for share in (0.0, 0.9))
    starts = []
    for draw in (plain, alike):
      values = ["".join(draw.value()).strip() for _ in range(100)]
      assert len(set(values)) == 100
      assert {len(value) for value in values} == {digits}
      starts.append(len({value[:-1] for value in values}))
    assert starts[1] < 0.8 * starts[0]


def test_altered_passages_are_asked_for_as_they_are_told(composer, monkeypatch):
  monkeypatch.setattr(batches, "_KINDS", ("passages",))
  monkeypatch.setattr(batches, "_ALTERED", 1.0)
  known = composer._corpus.tokens.tobytes()
  altered = 0
  for number in range(10):
    tokens, codes = composer.training_sample(random.Random(number), 512, 0.0)
    for start, stop in _answers(codes):
      told = tokens[start:stop].tobytes()
      assert tokens[:start].tobytes().count(told) == 1
      altered += known.count(told) == 0
  assert altered > 5


def test_runs_of_altered_passages_come_again_with_other_tokens_behind(composer, monkeypatch):
  for name, value in (("_KINDS", ("passages",)), ("_ALTERED", 1.0), ("_ALTERED_TOKENS", 0.0), ("_ECHO_TOKENS", (3,))):
    monkeypatch.setattr(batches, name, value)

  def unclear_share():
    """Of the answers' tokens, how many do not follow from the three before: elsewhere others stand behind these."""
    unclear = total = 0
    for number in range(20):
      tokens, codes = composer.training_sample(random.Random(number), 1024, 0.0)
      answers = [tokens[start:stop].tolist() for start, stop in _answers(codes)]
      seen = [(tuple(answer[i:i + 3]), answer[i + 3]) for answer in answers for i in range(len(answer) - 3)]
      behind = {run: {token for other, token in seen if other == run} for run, _ in seen}
      unclear += sum(len(behind[run]) > 1 for run, _ in seen)
      total += len(seen)
    return unclear / total

  monkeypatch.setattr(batches, "_ECHOES", (0,))
  plain = unclear_share()
  monkeypatch.setattr(batches, "_ECHOES", (1,))
  assert plain < 0.03
  assert unclear_share() > 0.06


def _answers(codes):
  """[first, last) places of the answers' tokens; codes stand at the place before."""
  places = np.flatnonzero(codes >= batches.ANSWER)
  for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
    yield run[0] + 1, run[-1] + 2


def test_evaluation_samples_count_the_answer_alone(prepared, composer):
  vocabulary = Vocabulary.from_file(str(prepared / "tokenizer.json"))
  tokens, codes = composer.evaluation_sample(random.Random(0), "multi_key", 512)
  counted = np.flatnonzero(codes)
  assert counted.tolist() == [507, 508, 509, 510]
  answer = vocabulary.decode(tokens[counted + 1].tolist()).strip()
  assert f" {answer}." in vocabulary.decode(tokens[:500].tolist())


def test_batches_of_processes_are_those_made_here_in_order(prepared, composer):
  makers = batches.BatchMakers(prepared, "train", 2)
  orders = [batches.Order(seed=1, number=number, batch=2, length=128, copy_share=0.5) for number in range(6)]
  try:
    for order in orders:
      makers.ask(order)
    for order in orders:
      for made, expected in zip(makers.take(), batches.make_batch(composer, order), strict=True):
        np.testing.assert_array_equal(made, expected)
  finally:
    makers.close()


def test_schedule():
  assert learning_rate(0.0, 0) == pytest.approx(1 / 200)
  assert learning_rate(0.5, 5000) == 1.0
  assert learning_rate(1.0, 5000) == pytest.approx(0.02)
  assert 0.02 < learning_rate(0.9, 5000) < learning_rate(0.7, 5000) < 1
  assert length_shares((1, 2, 3, 4), 0.1, easy=False)[2:] == [0, 0]
  for progress in (0.1, 0.9):
    assert sum(length_shares((1, 2, 3, 4), progress, easy=True)) == pytest.approx(1)


def _sample_by_sample(params, tokens):
  """Logits of the model that the engine runs, with the tests' own dense attention."""
  return np.stack([np.asarray(_row_logits(params, row)) for row in tokens])


def test_training_forward_is_the_models(prepared):
  trainer = Trainer(config=TINY, attention="xla", compute_dtype=jnp.float32)
  params = init_params(TINY, 0)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 24)))
  expected = _sample_by_sample(params, tokens)
  logits = np.asarray(trainer.logits(params, tokens)).reshape(expected.shape)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  swapped = params["layers.attention.k_proj.kernel"]
  swapped = jnp.roll(swapped, TINY.head_dim, axis=-1)  # KV heads in the wrong order
  wrong = np.asarray(trainer.logits({**params, "layers.attention.k_proj.kernel": swapped}, tokens))
  assert np.abs(wrong.reshape(expected.shape) - expected).max() > 1e-2


def test_gradient_of_the_embedding_is_that_of_a_plain_lookup():
  trainer = Trainer(config=TINY, attention="xla", compute_dtype=jnp.float32)
  params = init_params(TINY, 0)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 24)))  # many repeats
  codes = jnp.full((2, 24), batches.TEXT, jnp.uint8).at[:, -1].set(batches.NOTHING)
  ours = jax.jit(jax.grad(lambda p: trainer.loss(p, tokens, codes)[0]))(params)["embed.embedding"]

  def plain(table):
    values = {**params, "embed.embedding": table}
    losses = [-jax.nn.log_softmax(_row_logits(values, row))[jnp.arange(23), row[1:]] for row in tokens]
    return jnp.mean(jnp.stack(losses))

  expected = jax.jit(jax.grad(plain))(params["embed.embedding"])
  np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=1e-3, atol=1e-6)


def _row_logits(values, row):
  model = nnx.eval_shape(lambda: Llama(TINY, dtype=jnp.float32, rngs=nnx.Rngs(1)))
  graph, state = nnx.split(model)
  filled = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
  model = nnx.merge(graph, nnx.from_flat_state(filled))
  hidden, _ = model(row, jnp.arange(len(row), dtype=jnp.int32), dense_attend)
  return model.logits(hidden)


def test_adam_steps_as_written_out():
  grads = {"w": jnp.array([3.0, -4.0])}  # of norm 5, cut to 1
  state, norm = Progress.start({"w": jnp.array([1.0, 1.0])}).step(grads, jnp.float32(0.1), clip=1.0)
  assert float(norm) == pytest.approx(5)
  np.testing.assert_allclose(state.params["w"], [0.9, 1.1], rtol=1e-6)
  state, _ = state.step({"w": jnp.array([0.0, 0.2])}, jnp.float32(0.1), clip=1.0)
  mean = [0.9 * 0.06, 0.9 * -0.08 + 0.1 * 0.2]
  square = [0.95 * 0.05 * 0.36, 0.95 * 0.05 * 0.64 + 0.05 * 0.04]
  moved = [m / (1 - 0.81) / np.sqrt(s / (1 - 0.9025)) for m, s in zip(mean, square, strict=True)]
  np.testing.assert_allclose(state.params["w"], [0.9 - 0.1 * moved[0], 1.1 - 0.1 * moved[1]], rtol=1e-5)


def _config(prepared, out, **changes):
  config = TrainingConfig(
      data=prepared, out=out, steps=12, lengths=(128, 256), evaluation_lengths=(512,), tokens_per_step=512,
      rate=5e-3, evaluation_samples=2)
  return dataclasses.replace(config, **changes)


def test_train_resume_and_export(prepared, tmp_path):
  straight = train(_config(prepared, tmp_path / "straight"), TINY, "xla")
  train(_config(prepared, tmp_path / "broken", stop_at=5), TINY, "xla")
  resumed = train(_config(prepared, tmp_path / "resumed", resume=tmp_path / "broken" / "state"), TINY, "xla")
  assert straight["step"] == resumed["step"] == 12
  for name in ("params-0.safetensors", "params-1.safetensors", "moments.safetensors"):
    assert (tmp_path / "straight/state" / name).read_bytes() == (tmp_path / "resumed/state" / name).read_bytes()
  assert (tmp_path / "straight/state/params-0.safetensors").read_bytes() != (
      tmp_path / "broken/state/params-0.safetensors").read_bytes()

  _check_export(tmp_path / "straight")
  events = [json.loads(line)["event"] for line in (tmp_path / "straight/log.jsonl").read_text().splitlines()]
  assert events == ["start", "end"]
  assert straight["right"].keys() == TASKS.keys()


def _check_export(out):
  model = load_model(out / "model")
  state, _ = load_state(out / "state")
  assert dataclasses.replace(model.config, eos_token_ids=()) == TINY
  for name, value in flat_params(model).items():
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(value), np.asarray(state.params[name].astype(jnp.bfloat16)))
  tokenizer = Tokenizer.from_folder(out / "model")
  assert tokenizer.bos_id == 0
  assert tokenizer.eos_ids == {1}
  assert tokenizer.decode(tokenizer.encode("The code of amber falcon 4839.")) == "The code of amber falcon 4839."


def test_loss_falls_and_a_state_without_moments_goes_on(prepared, tmp_path):
  trainer = Trainer(config=TINY, attention="xla", compute_dtype=jnp.float32)
  state = Progress.start(init_params(TINY, 0))
  order = batches.Order(seed=0, number=0, batch=4, length=128, copy_share=1.0)
  tokens, codes = batches.make_batch(batches.load_composer(prepared, "train"), order)
  losses = []
  for _ in range(30):
    state, figures = trainer.step(state, tokens, codes, np.float32(1e-2))
    losses.append(float(figures["loss"]))
  assert losses[-1] < 0.6 * losses[0]
  train(_config(prepared, tmp_path / "run", steps=4), TINY, "xla")
  for file in (tmp_path / "run/state").glob("moments*"):
    file.unlink()
  assert train(_config(prepared, tmp_path / "on", steps=6, resume=tmp_path / "run/state"), TINY, "xla")["step"] == 6


def test_a_run_begins_with_the_weights_of_a_model(prepared, tmp_path):
  export_model(tmp_path / "model", init_params(TINY, 7), TINY, prepared / "tokenizer.json")
  train(_config(prepared, tmp_path / "run", weights=tmp_path / "model", stop_at=0), TINY, "xla")
  weights = flat_params(load_model(tmp_path / "model", "float32"))
  state, notes = load_state(tmp_path / "run/state")
  assert notes["step"] == 0
  for name, value in weights.items():
    np.testing.assert_array_equal(state.params[name], value)


def test_bad_input(prepared, tmp_path):
  other = dataclasses.replace(TINY, intermediate_size=2 * TINY.intermediate_size)
  export_model(tmp_path / "other", init_params(other, 0), other, prepared / "tokenizer.json")
  with pytest.raises(InputError, match="another shape"):
    train(_config(prepared, tmp_path / "c", weights=tmp_path / "other"), TINY, "xla")
  with pytest.raises(InputError, match="nothing"):
    train(_config(prepared, tmp_path / "d", weights=tmp_path / "nothing"), TINY, "xla")
  with pytest.raises(InputError, match="holds no state"):
    train(_config(prepared, tmp_path / "a", resume=tmp_path / "nothing"), TINY, "xla")
  with pytest.raises(InputError, match="prepare"):
    train(_config(tmp_path, tmp_path / "b"), TINY, "xla")
  with pytest.raises(InputError, match="ascending"):
    check_lengths(_config(prepared, tmp_path, lengths=(256, 128)))
  with pytest.raises(InputError, match="holds no sample"):
    check_lengths(_config(prepared, tmp_path, tokens_per_step=200))
  with pytest.raises(InputError, match="at least 32"):
    prepare("Too short a text. " * 4, "The same. ", tmp_path / "c", vocab_size=600)


def test_corpus_may_be_gzipped(tmp_path):
  path = tmp_path / "text.txt.gz"
  path.write_bytes(gzip.compress(b"It was so, and it was not."))
  assert read_text(pathlib.Path(path)) == "It was so, and it was not."
