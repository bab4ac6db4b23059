"""Text to tokens and back, in one go and piece by piece."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
from hf_folders import ASSET, TOKENIZER, edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from kvc_jax.errors import InputError
from kvc_jax.tokenizer import IncrementalDecoder, Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}[{{ m.role }}]{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}")
TEXTS = [
    "", "a", " a", "  a  b ", "Hello, world!", "don't stop . now , n't", "a\nb\n\n", "\n", "tab\there", "café naïve",
    "日本語のテキスト", "🙂", "🙂🙂 👨‍👩‍👧", "e\u0301", "Ω≈ç√∫", "mixed 🙂 and 日本\n", "\ufffd",
    "a\ufffdb", "\u2581", "x" * 50]


def write_byte_level(folder, *, bos=True, template=None):
  """A tokenizer like Llama 3's: byte-level merges, and special tokens that only tokenizer.json marks as such."""
  backend = Backend(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
  backend.train_from_iterator(["Hello, world! the cat and the hat 🙂 日本語"] * 4, trainer)
  backend.add_special_tokens(
      [AddedToken(name, special=True, normalized=False) for name in ("<|bos|>", "<|eos|>", "<|eot|>", "<|reserved|>")])
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "clean_up_tokenization_spaces": True}
  if bos:
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))])
    config["bos_token"] = "<|bos|>"
  if template:
    config["chat_template"] = template
  folder.mkdir()
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
  return Tokenizer.from_folder(write_byte_level(tmp_path_factory.mktemp("t") / "byte_level", template=TEMPLATE))


@pytest.fixture(scope="module")
def byte_fallback():
  return Tokenizer.from_folder(ASSET)


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tmp_path):
  """A copy of the packaged tokenizer's files, to be damaged."""
  (tmp_path / "model").mkdir()
  for name in TOKENIZER:
    shutil.copyfile(ASSET / name, tmp_path / "model" / name)
  return tmp_path / "model"


def refusal(folder):
  with pytest.raises(InputError) as error:
    Tokenizer.from_folder(folder)
  assert "\n" not in str(error.value)
  return str(error.value)


# Encoding and decoding.


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "\u2581"])
def test_decode_inverts_encode(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids[0] == tokenizer.bos_id
  assert tokenizer.decode(ids) == text
  assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_an_empty_text_is_bos_alone(tokenizer):
  assert tokenizer.encode("") == [tokenizer.bos_id]
  assert tokenizer.encode("", add_special_tokens=False) == []
  assert tokenizer.decode([]) == ""


def test_an_empty_text_without_a_bos_token_is_refused(tmp_path):
  tokenizer = Tokenizer.from_folder(write_byte_level(tmp_path / "t", bos=False))
  assert tokenizer.bos_id is None
  assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
  with pytest.raises(InputError, match="the text is empty and the tokenizer has no BOS token"):
    tokenizer.encode("")


def test_special_tokens_are_shown_on_request(byte_level):
  ids = byte_level.encode("the cat")
  assert byte_level.decode(ids, skip_special_tokens=False) == "<|bos|>the cat"
  reserved = byte_level.encode("<|reserved|>", add_special_tokens=False)
  assert len(reserved) == 1
  assert byte_level.is_special(reserved[0])
  assert byte_level.decode(reserved) == ""


def test_decodes_as_transformers_does(byte_level, byte_fallback):
  for tokenizer in (byte_level, byte_fallback):
    every = list(range(tokenizer.vocab_size + 2))
    for skip in (True, False):
      for ids in (every, every[::7], *([i] for i in every)):
        expected = tokenizer._backend.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip) == expected
      for _ in range(2):
        assert [tokenizer.decode_one(i, skip) for i in every] == [tokenizer.decode([i], skip) for i in every]


def test_a_decode_of_its_own_is_used(byte_level):
  class Shouting(type(byte_level._backend)):
    def _decode(self, *args, **options):
      return super()._decode(*args, **options).upper()

  backend = copy.copy(byte_level._backend)
  backend.__class__ = Shouting
  assert Tokenizer(backend).decode(byte_level.encode("a dog")).endswith("A DOG")


def test_ids_of_a_padded_embedding_give_no_text(tokenizer):
  ids = tokenizer.encode("cat")
  assert tokenizer.token(tokenizer.vocab_size + 7) is None
  assert tokenizer.decode([*ids, tokenizer.vocab_size + 7]) == "cat"


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["list"]])
def test_what_is_no_text_is_refused(tokenizer, text):
  with pytest.raises(InputError, match=f"a text is needed, not {type(text).__name__}"):
    tokenizer.encode(text)


def test_a_lone_surrogate_is_refused(tokenizer):
  with pytest.raises(InputError, match="not valid Unicode"):
    tokenizer.encode("a\ud800b")


def test_a_negative_id_is_refused(tokenizer):
  with pytest.raises(InputError, match="token id -1 is negative"):
    tokenizer.decode([5, -1])


# Piece by piece.


def stream(tokenizer, ids, **options):
  decoder = IncrementalDecoder(tokenizer, **options)
  return [*map(decoder.add, ids), decoder.flush()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(tokenizer, text, skip):
  ids = tokenizer.encode(text)
  assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_pieces_make_the_text_of_any_tokens(byte_level, byte_fallback, skip, data):
  tokenizer = data.draw(st.sampled_from([byte_level, byte_fallback]))
  # Bytes and special tokens often, and now and then an id of a padded embedding.
  ids = data.draw(st.lists(st.one_of(
      st.integers(0, 12), st.integers(100, 258), st.integers(0, tokenizer.vocab_size + 3),
      st.integers(tokenizer.vocab_size - 5, tokenizer.vocab_size - 1)), max_size=12))
  assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


def test_no_piece_ends_within_a_character(tokenizer):
  pieces = stream(tokenizer, tokenizer.encode("a🙂b日本é"))
  assert "".join(pieces) == "a🙂b日本é"
  assert not any("\ufffd" in piece for piece in pieces)


def test_words_come_at_once(byte_fallback):
  ids = byte_fallback.encode("Once upon a time", add_special_tokens=False)
  pieces = stream(byte_fallback, ids)
  assert all(pieces[:-1])
  assert pieces[-1] == ""


def test_an_incomplete_character_comes_with_the_flush(tokenizer):
  ids = tokenizer.encode("a☃")[:-1]
  pieces = stream(tokenizer, ids)
  assert "".join(pieces[:-1]) == "a"
  assert set(pieces[-1]) == {"\ufffd"}


def test_a_space_behind_a_skipped_token_stays(byte_fallback):
  eos, word = 2, byte_fallback.encode("cat", add_special_tokens=False)
  ids = [*word, eos, *word]
  assert "".join(stream(byte_fallback, ids)) == byte_fallback.decode(ids) == "cat cat"


def test_a_long_run_of_newlines_is_decoded_once(byte_fallback, monkeypatch):
  calls = []
  decode = Tokenizer.decode
  monkeypatch.setattr(Tokenizer, "decode", lambda self, *args: calls.append(1) or decode(self, *args))
  assert "".join(stream(byte_fallback, [13] * 500)) == "\n" * 500
  assert len(calls) < 5


# Ends of sequences.


@pytest.mark.parametrize(("generation", "model", "expected"), [
    (None, None, {2}),
    ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {2, 5, 6}),
    ({"eos_token_id": 5}, None, {2, 5}),
    ({}, {"eos_token_id": 7}, {2, 7}),
    (None, {"eos_token_id": [7, 8]}, {2, 7, 8}),
    (None, {"eos_token_id": None}, {2}),
])
def test_eos_ids_come_from_generation_config_then_config(folder, generation, model, expected):
  if generation is not None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
  if model is not None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | model))
  assert Tokenizer.from_folder(folder).eos_ids == frozenset(expected)


def test_an_eos_id_that_is_no_number(folder):
  (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
  assert f"{folder / 'generation_config.json'}: eos_token_id is 'two'" in refusal(folder)


# Chats.


def test_a_chat_becomes_tokens(byte_level):
  ids = byte_level.apply_chat_template(
      [{"role": "system", "content": "the cat"}, {"role": "user", "content": "hat?"}])
  assert all(isinstance(i, int) for i in ids)
  assert byte_level.decode(ids, skip_special_tokens=False) == (
      "<|bos|>[system]the cat<|eot|>[user]hat?<|eot|>[assistant]")


def test_a_template_in_a_file_of_its_own(folder):
  (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
  tokenizer = Tokenizer.from_folder(folder)
  assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "cat"}])) == "cat"


def test_a_model_without_a_template(byte_fallback):
  with pytest.raises(InputError, match="has no chat template; give a plain prompt"):
    byte_fallback.apply_chat_template([{"role": "user", "content": "cat"}])


def test_a_template_that_refuses_the_messages(byte_level):
  with pytest.raises(InputError, match=r"the chat template refuses the messages .*unknown role wizard"):
    byte_level.apply_chat_template([{"role": "wizard", "content": "cat"}])


def test_a_template_that_is_not_jinja(tmp_path):
  tokenizer = Tokenizer.from_folder(write_byte_level(tmp_path / "t", template="{% for %}"))
  with pytest.raises(InputError, match="the chat template refuses the messages"):
    tokenizer.apply_chat_template([{"role": "user", "content": "cat"}])


@pytest.mark.parametrize("messages", [
    [], ["cat"], [{"role": "user"}], [{"content": "cat"}], [{"role": "user", "content": 3}]])
def test_messages_of_the_wrong_form(byte_level, messages):
  with pytest.raises(InputError, match=r"give at least one message|each needs a 'role' and a 'content' text"):
    byte_level.apply_chat_template(messages)


# Faults of the folder.


def test_a_missing_folder(tmp_path):
  assert f"{tmp_path / 'absent'} is missing" in refusal(tmp_path / "absent")


def test_a_file_in_place_of_a_folder(folder):
  assert f"{folder / 'tokenizer.json'} is a file" in refusal(folder / "tokenizer.json")


def test_a_folder_without_a_vocabulary(folder):
  (folder / "tokenizer.json").unlink()
  assert f"{folder} lacks tokenizer.json; copy it from the model's source" in refusal(folder)


def test_a_folder_without_a_tokenizer_config(folder):
  (folder / "tokenizer_config.json").unlink()
  assert f"{folder} lacks tokenizer_config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_file_that_is_no_json_object(folder, name, text):
  (folder / name).write_text(text, errors="surrogateescape")
  assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("changes", [
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}}, {"model": None}, {"decoder": {"type": "?"}}])
def test_a_tokenizer_file_with_damaged_contents(folder, changes):
  edit_json(folder / "tokenizer.json", **changes)
  assert f"{folder / 'tokenizer.json'} cannot be used" in refusal(folder)


def test_a_folder_with_a_sentencepiece_vocabulary_only(folder):
  (folder / "tokenizer.json").rename(folder / "tokenizer.model")
  assert f"{folder} lacks tokenizer.json; make it from tokenizer.model with transformers" in refusal(folder)


def test_code_in_the_folder_is_not_run(folder):
  edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
  (folder / "evil.py").write_text("raise SystemExit('ran')")
  assert f"{folder / 'tokenizer.json'} cannot be used" in refusal(folder)


# Imports.


def test_transformers_is_imported_late_and_silently():
  code = (
      "import sys, kvc_jax.tokenizer\n"
      "assert 'transformers' not in sys.modules\n"
      f"print(kvc_jax.tokenizer.Tokenizer.from_folder({str(ASSET)!r}).encode(''))\n"
      "assert 'torch' not in sys.modules\n")
  run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert (run.stdout, run.stderr) == ("[1]\n", "")
