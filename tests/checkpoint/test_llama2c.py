"""llama2.c's files become a Hugging Face folder that computes and tokenizes the same."""

import itertools
import struct

import numpy as np
import pytest
from hf_folders import ASSET, truncate
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kvc_jax.checkpoint.llama2c import convert_llama2c
from kvc_jax.checkpoint.store import load_model
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.tokenizer import Tokenizer

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ = 24, 20, 2, 3, 1, 300, 16
BYTES = [f"<0x{byte:02X}>".encode() for byte in range(256)]
# Merges that compete, chain and cross; single characters come last, as sentencepiece puts them.
PIECES = [b" t", b"he", b" a", b"in", b" the", b"ll", b"llo", b"hello", b" hello", b"an", b"ana", b"nan", b"banana",
          b"  ", b"    ", b" hel", "é".encode(), "né".encode(), "🙂".encode(), "🙂🙂".encode(), b".."]
CHARACTERS = [b" ", *(bytes([c]) for c in b"abehilnot."), "é".encode(), "🙂".encode()]


def vocabulary():
  """(piece, score) by id, spelt as llama2.c's export does."""
  pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0), *((byte, 0.0) for byte in BYTES)]
  own = list(dict.fromkeys([*PIECES, *CHARACTERS]))
  pieces += [(piece, -float(i)) for i, piece in enumerate(own)]
  return pieces + [(f"(unused {i})".encode(), -1e3 - i) for i in range(VOCAB - len(pieces))]


def write_tokenizer(path, pieces):
  data = struct.pack("<i", max(len(piece) for piece, _ in pieces))
  path.write_bytes(data + b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces))
  return path


def write_weights(path, *, tied=True, seed=0, **header):
  """A random export; returns its tensors too."""
  rng = np.random.default_rng(seed)
  kv = DIM // HEADS * KV_HEADS
  shapes = {
      "embed": (VOCAB, DIM), "attention_norm": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, kv, DIM),
      "wv": (LAYERS, kv, DIM), "wo": (LAYERS, DIM, DIM), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM),
      "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "norm": (DIM,),
      "freq_real": (SEQ, DIM // HEADS // 2), "freq_imag": (SEQ, DIM // HEADS // 2)}
  if not tied:
    shapes["wcls"] = (VOCAB, DIM)
  arrays = {name: rng.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
  fields = {"dim": DIM, "hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS,
            "vocab": VOCAB if tied else -VOCAB, "seq": SEQ} | header
  path.write_bytes(struct.pack("<7i", *fields.values()) + b"".join(array.tobytes() for array in arrays.values()))
  return path, arrays


@pytest.fixture
def files(tmp_path):
  weights, _ = write_weights(tmp_path / "model.bin")
  return weights, write_tokenizer(tmp_path / "tok.bin", vocabulary())


def refusal(weights, tokenizer, dst, **options):
  with pytest.raises(InputError) as error:
    convert_llama2c(weights, tokenizer, dst, **options)
  assert "\n" not in str(error.value)
  return str(error.value)


# Weights.


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_loads(tmp_path, tied):
  weights, arrays = write_weights(tmp_path / "model.bin", tied=tied)
  folder = convert_llama2c(weights, write_tokenizer(tmp_path / "tok.bin", vocabulary()), tmp_path / "hf")
  assert sorted(path.name for path in folder.iterdir()) == [
      "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
  config = LlamaConfig.from_folder(folder)
  assert (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads) == (24, 20, 2, 3)
  assert (config.num_kv_heads, config.vocab_size, config.max_position_embeddings) == (1, 300, 16)
  assert (config.tie_embeddings, config.rms_norm_eps, config.rope.theta) == (tied, 1e-5, 10_000.0)
  model = load_model(folder)
  np.testing.assert_array_equal(model.embed.embedding[...], arrays["embed"])
  for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
    np.testing.assert_array_equal(getattr(model.layers.mlp, ours).kernel[...], arrays[theirs].swapaxes(1, 2))
  for ours, theirs in (("v_proj", "wv"), ("o_proj", "wo")):
    np.testing.assert_array_equal(getattr(model.layers.attention, ours).kernel[...], arrays[theirs].swapaxes(1, 2))
  np.testing.assert_array_equal(model.layers.input_norm.weight[...], arrays["attention_norm"])
  np.testing.assert_array_equal(model.layers.post_attention_norm.weight[...], arrays["ffn_norm"])
  np.testing.assert_array_equal(model.norm.weight[...], arrays["norm"])
  if not tied:
    np.testing.assert_array_equal(model.lm_head.embedding[...], arrays["wcls"])


def test_query_and_key_rows_are_permuted_for_half_split_rope(tmp_path, files):
  """Worked by hand: rows 0 1 2 3 4 5 6 7 of a head, rotated as (0 1)(2 3)(4 5)(6 7), become 0 2 4 6 1 3 5 7."""
  weights, arrays = write_weights(tmp_path / "model.bin")
  folder = convert_llama2c(weights, files[1], tmp_path / "hf")
  tensors = load_file(folder / "model.safetensors")
  order = [0, 2, 4, 6, 1, 3, 5, 7]
  for layer in range(LAYERS):
    key = tensors[f"model.layers.{layer}.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key, arrays["wk"][layer][order])
    query = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query, arrays["wq"][layer][order + [8 + i for i in order] + [16 + i for i in order]])


def test_files_have_one_mode(files, tmp_path):
  folder = convert_llama2c(*files, tmp_path / "hf")
  assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


# Tokenizer, against llama2.c's own way of encoding.


def llama2c_encode(text, pieces):
  """run.c's `encode`: characters or bytes first, then the best-scoring pair, leftmost first, until none is left."""
  ids = {}
  for token, (piece, _) in enumerate(pieces):
    ids.setdefault(piece, token)
  tokens = [1]
  if text:
    tokens.append(ids[b" "])
  for character in text:
    raw = character.encode()
    tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
  while True:
    best_score, best_at = -1e10, None
    for at in range(len(tokens) - 1):
      merged = ids.get(pieces[tokens[at]][0] + pieces[tokens[at + 1]][0])
      if merged is not None and pieces[merged][1] > best_score:
        best_score, best_at, best = pieces[merged][1], at, merged
    if best_at is None:
      return tokens
    tokens[best_at : best_at + 2] = [best]


def llama2c_decode(tokens, pieces):
  """run.c's `decode` of each token behind the first: a space behind BOS is dropped; byte tokens are bytes."""
  out = b""
  for previous, token in itertools.pairwise(tokens):
    piece = pieces[token][0]
    if previous == 1 and piece.startswith(b" "):
      piece = piece[1:]
    out += bytes([token - 3]) if 3 <= token < 259 else piece
  return out


TEXTS = [
    "", " ", "  ", "     ", "a", "hello", "hello hello", " hello", "the hello", "banana", "ananana", "nananan banan",
    "\n", "\n\n", "a\nb", "\thello\r\n", "hello\n\nhello", "é", "né né", "🙂", "🙂🙂🙂", "a🙂b", "日本語", "x日y",
    "e\u0301", "\u200b", "....", "the  end", "hello    hello", "ALL CAPS", "<0x0A>", "\x7f",
    "\U0001f468\u200d\U0001f469",
]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
  base = tmp_path_factory.mktemp("llama2c")
  weights, _ = write_weights(base / "model.bin")
  tokenizer = write_tokenizer(base / "tok.bin", vocabulary())
  return Tokenizer.from_folder(convert_llama2c(weights, tokenizer, base / "hf"))


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_are_llama2cs(synthetic, text):
  pieces = vocabulary()
  tokens = llama2c_encode(text, pieces)
  assert synthetic.encode(text) == tokens
  assert synthetic.decode(tokens) == text
  assert llama2c_decode(tokens, pieces).decode() == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abehilnot. é🙂x\n語", max_size=30))
def test_encoding_is_llama2cs_on_random_text(synthetic, text):
  tokens = llama2c_encode(text, vocabulary())
  assert synthetic.encode(text) == tokens
  assert synthetic.decode(tokens) == text


def stories_pieces():
  """The packaged tokenizer as llama2.c has it; its file is not in the repository, but its pieces are."""
  backend = Tokenizer.from_folder(ASSET)
  tokens = [backend.token(i).replace("▁", " ").encode() for i in range(512)]
  tokens[:3] = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
  # The scores of that vocabulary fall by one from id to id.
  return backend, [(piece, 0.0 if i < 259 else 259.0 - i) for i, piece in enumerate(tokens)]


def test_the_packaged_tokenizer_encodes_as_llama2c():
  tokenizer, pieces = stories_pieces()
  story = (ASSET / "expected_200_steps.txt").read_text(encoding="utf-8")
  for text in [*TEXTS, story, "Once upon a time, there was a dragon — “naïve” & 3 €…\n\n🐉"]:
    tokens = llama2c_encode(text, pieces)
    assert tokenizer.encode(text) == tokens
    assert tokenizer.decode(tokens) == text


def test_the_packaged_tokenizer_knows_its_special_tokens():
  tokenizer = Tokenizer.from_folder(ASSET)
  assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {1, 2}, 512)
  assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]


# Faults.


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_file(files, tmp_path, which):
  files[which].unlink()
  assert f"{files[which]} cannot be read (No such file or directory)" in refusal(*files, tmp_path / "hf")


def test_weights_shorter_than_their_header(files, tmp_path):
  files[0].write_bytes(b"\x01\x00")
  assert f"{files[0]} is cut off: 2 bytes" in refusal(*files, tmp_path / "hf")


def test_truncated_weights(files, tmp_path):
  size = files[0].stat().st_size
  truncate(files[0], 4)
  words = f"{files[0]} is cut off: it has {size - 4} bytes, its header asks for {size}"
  assert words in refusal(*files, tmp_path / "hf")


def test_weights_with_more_behind_them(files, tmp_path):
  files[0].write_bytes(files[0].read_bytes() + bytes(8))
  assert f"{files[0]} is too long" in refusal(*files, tmp_path / "hf")


@pytest.mark.parametrize("header", [
    {"dim": 0}, {"layers": -1}, {"heads": 5}, {"heads": 24}, {"kv_heads": 2}, {"vocab": 0}, {"seq": 0}])
def test_a_header_that_makes_no_sense(files, tmp_path, header):
  write_weights(files[0], **header)
  assert f"{files[0]} is no llama2.c export of version 0: its header is" in refusal(*files, tmp_path / "hf")


def test_a_text_file_in_place_of_weights(files, tmp_path):
  files[0].write_text("once upon a time there was a text file\n" * 9)
  assert str(files[0]) in refusal(*files, tmp_path / "hf")


def test_an_export_of_another_version(files, tmp_path):
  files[0].write_bytes(struct.pack("<Ii", 0x616B3432, 2) + bytes(248))
  assert "is an export of version 2; export the model with `--version 0`" in refusal(*files, tmp_path / "hf")


@pytest.mark.parametrize("drop", [1, 20])
def test_a_truncated_tokenizer(files, tmp_path, drop):
  truncate(files[1], drop)
  message = refusal(*files, tmp_path / "hf")
  assert f"{files[1]} is cut off" in message or f"{files[1]} ends at token 299" in message


@pytest.mark.parametrize(("count", "words"), [(299, "ends at token 299"), (301, "has more tokens than the 300")])
def test_a_tokenizer_of_another_model(files, tmp_path, count, words):
  write_tokenizer(files[1], [*vocabulary(), (b"more", -9e3)][:count])
  assert words in refusal(*files, tmp_path / "hf")


@pytest.mark.parametrize(("token", "piece", "words"), [
    (280, (b"\xff\xfe", 0.0), r"token 280 (b'\xff\xfe') is not UTF-8"),
    (100, (b"no byte", 0.0), "has no byte tokens at ids 3 to 258"),
    (299, (b"he", -5.0), "has the token 'he' twice"),
    (290, (b"x", float("nan")), "no llama2.c tokenizer (token 290)"),
])
def test_a_tokenizer_with_a_bad_entry(files, tmp_path, token, piece, words):
  pieces = vocabulary()
  pieces[token] = piece
  write_tokenizer(files[1], pieces)
  assert words in refusal(*files, tmp_path / "hf")


def test_an_existing_destination(files, tmp_path):
  folder = convert_llama2c(*files, tmp_path / "hf")
  assert f"{folder} exists" in refusal(*files, folder)
  convert_llama2c(*files, folder, overwrite=True)
