"""The recall tasks: what is asked is in the prompt, lengths are kept, seeds count, scoring."""

import random
import re

import pytest

from kvc_jax.errors import InputError
from kvc_jax.evaluation import recall_words
from kvc_jax.evaluation.haystack import SentenceLengths, held_out_sentences, is_plain, split_sentences
from kvc_jax.evaluation.recall import RecallTask, SampleBuilder, recall_tasks, score
from kvc_jax.evaluation.recall_episodes import TASKS, Draw, labels
from kvc_jax.tokenizer import Tokenizer


class Words:
  """A tokenizer with a token a word; spaces belong to the word behind them."""

  bos_id = 0
  eos_ids = frozenset({1})

  def encode(self, text, add_special_tokens=True):
    ids = [2 + hash(word) % 1000 for word in re.findall(r" ?[A-Za-z]+| ?\d|\s| ?[^\sA-Za-z\d]+", text)]
    return [self.bos_id, *ids] if add_special_tokens else ids


@pytest.fixture(scope="module")
def sentences():
  return held_out_sentences()


@pytest.fixture(scope="module")
def builder(sentences):
  return SampleBuilder(sentences, Words())


def test_sentences_have_no_digits_and_keep_their_order():
  text = "It was late.  He had\nno idea of “that” at all. In 1859 he left for the sea. Why is it so? Oh. A b c d e."
  assert split_sentences(text) == ['He had no idea of "that" at all.', "Why is it so?", "A b c d e."]
  assert [is_plain(sentence) for sentence in split_sentences(text)] == [False, True, True]


def test_words_are_distinct_so_that_no_key_is_a_label_or_an_item():
  items = [word for category in recall_words.CATEGORIES for word in category]
  everything = [*recall_words.ADJECTIVES, *recall_words.NOUNS, *recall_words.NAMES, *recall_words.LABELS, *items]
  assert len(everything) == len(set(everything))
  assert {len(category) for category in recall_words.CATEGORIES} == {16}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [512, 2048])
def test_prompt_and_answer_fill_the_length(builder, task, length):
  for number in range(5):
    sample = builder.sample(task, length, number, seed=3)
    tokens = len(Words().encode(sample.prompt)) + sample.max_new_tokens - 4
    assert length - 25 < tokens <= length
    assert sample.group == str(length)


@pytest.mark.parametrize("task", ["single", "multi_key", "multi_value", "variables"])
def test_every_number_of_the_answer_is_in_the_prompt_once(builder, task):
  for number in range(20):
    sample = builder.sample(task, 1024, number, seed=0)
    for value in sample.references[0].split():
      assert len(re.findall(rf"\b{value}\b", sample.prompt)) == 1


def test_single_and_multi_key_ask_for_the_key_whose_value_is_right(builder):
  for task, needles in (("single", 1), ("multi_key", 8)):
    for number in range(20):
      sample = builder.sample(task, 1024, number, seed=1)
      asked = re.search(r"\n\w+: the (.+)$", sample.prompt)[1]
      found = re.findall(rf"{re.escape(asked)} (\d{{4}})\.", sample.prompt)
      assert found == [sample.references[0]]
      assert len(re.findall(r"\d{4}", sample.prompt)) == needles


def test_multi_value_answers_are_in_the_order_of_their_numbers(builder):
  sample = builder.sample("multi_value", 1024, 0, seed=0)
  key = re.search(r"\nList: all four of (\w+ \w+)(?: is| =)?$", sample.prompt)[1]
  told = dict(re.findall(rf"(one|two|three|four) {key}(?: is| =)? (\d{{4}})\.", sample.prompt))
  assert sample.references[0].split() == [told[ordinal] for ordinal in recall_words.ORDINALS]


def test_a_variable_is_traced_to_its_value(builder):
  for number in range(20):
    sample = builder.sample("variables", 1024, number, seed=0)
    target = re.search(r"\nTrace: VAR (\w+)", sample.prompt)[1]
    links = dict(re.findall(r" VAR (\w+)(?: is| =)? (\w+)\.", sample.prompt))
    steps = 0
    while not target.isdigit():
      target, steps = links[target], steps + 1
    assert (target, steps) == (sample.references[0], 3)


def test_a_passage_stands_behind_its_name(builder):
  for number in range(20):
    sample = builder.sample("repeat", 1024, number, seed=0)
    name = re.search(r"\nRepeat: (Passage .+)$", sample.prompt)[1]
    assert f" {name} {sample.references[0]}" in sample.prompt


def test_labels_ask_for_a_word_that_was_not_shown(builder):
  for number in range(20):
    sample = builder.sample("labels", 1024, number, seed=0)
    word = re.search(r"\nSort (\w+)", sample.prompt)[1]
    shown = dict(re.findall(r" Sort (\w+)(?: is| =)? (\w+ \w+)\.", sample.prompt))
    (category,) = (kind for kind in recall_words.CATEGORIES if word in kind)
    assert word not in shown
    assert {shown[other] for other in category if other in shown} == {sample.references[0]}
    assert len(shown) == 24


def test_labels_of_a_sample_differ():
  draw = Draw(random.Random(0), SentenceLengths([10] * 40, [True] * 40))
  episode = labels(draw, 6, asked=3)
  assert len(episode.statements) == 24
  assert len(episode.questions) == 18
  answers = {question.answer for question in episode.questions}
  assert len({word for answer in answers for word in answer}) == 12


def test_places_are_spread_over_the_text(builder):
  depths = []
  for number in range(60):
    sample = builder.sample("single", 2048, number, seed=0)
    depths.append(sample.prompt.index(sample.references[0]) / len(sample.prompt))
  assert min(depths) < 0.15
  assert max(depths) > 0.85
  assert 0.35 < sum(depths) / len(depths) < 0.65


def test_samples_repeat_and_differ_by_seed_and_number(builder):
  first = builder.sample("multi_key", 1024, 0, seed=0)
  assert builder.sample("multi_key", 1024, 0, seed=0) == first
  assert builder.sample("multi_key", 1024, 1, seed=0).prompt != first.prompt
  assert builder.sample("multi_key", 1024, 0, seed=1).prompt != first.prompt


def test_task_makes_all_samples_with_distinct_ids(sentences):
  task = RecallTask("single", sentences, lengths=(512, 600), count=3, seed=5)
  samples = list(task.samples(Words()))
  assert len(task) == len(samples) == len({sample.id for sample in samples}) == 6
  assert [sample.group for sample in samples] == ["512"] * 3 + ["600"] * 3
  assert task.score(f" {samples[0].references[0]}\nmore", samples[0]) == 1.0
  assert task.settings["seed"] == 5


def test_a_text_is_tokenized_once_for_all_tasks(tmp_path):
  class Counting(Words):
    whole = 0

    def encode(self, text, add_special_tokens=True):
      self.whole += text == " The very first sentence of it all."
      return super().encode(text, add_special_tokens)

  path = tmp_path / "text.txt"
  path.write_text("The very first sentence of it all. " + "One day he went to the sea and back. " * 200)
  tokenizer, again = Counting(), Counting()
  tasks = recall_tasks(["single", "variables"], text=path, lengths=(512,), count=2)
  first = [list(task.samples(tokenizer)) for task in tasks]
  assert [list(task.samples(tokenizer)) for task in tasks] == first
  assert tokenizer.whole == 1
  assert [list(task.samples(again)) for task in tasks] == first
  assert again.whole == 1


@pytest.mark.parametrize(("task", "prediction", "reference", "right"), [
    ("single", " 4839.\nQuestion", "4839", 1.0),
    ("single", " 4 8 3 9", "4839", 1.0),
    ("single", " It is 4839", "4839", 1.0),
    ("single", " 4838, no, 4839", "4839", 0.0),
    ("single", " 483", "4839", 0.0),
    ("single", " 48391", "4839", 0.0),
    ("single", " It is number 12: 4839", "4839", 1.0),
    ("multi_value", " one 1111, amber key two 2222", "1111 2222", 1.0),
    ("multi_value", " one 2222, amber key two 1111", "1111 2222", 0.0),
    ("multi_value", " one 1111", "1111 2222", 0.0),
    ("variables", " KAX. VAR KAX 0042", "0042", 1.0),
    ("labels", " Alpha.\n", "alpha", 1.0),
    ("labels", " alphabet", "alpha", 0.0),
    ("labels", "", "alpha", 0.0),
    ("repeat", " It was so.\nRepeat", "It was so.", 1.0),
    ("repeat", " It was not so.", "It was so.", 0.0),
    ("repeat", " It was", "It was so.", 0.0),
])
def test_score(task, prediction, reference, right):
  assert score(task, prediction, reference) == right


def test_a_real_tokenizer_and_the_default_tasks(tmp_path):
  tokenizer = Tokenizer.from_folder("assets/stories260K")
  tasks = recall_tasks(["single", "labels"], lengths=(2000,), count=1)
  for task in tasks:
    (sample,) = task.samples(tokenizer)
    assert 1900 < len(tokenizer.encode(sample.prompt)) < 2000


@pytest.mark.parametrize(("arguments", "words"), [
    ({"names": ["needle"]}, "no recall task 'needle'"),
    ({"lengths": (100,)}, "length is 100"),
    ({"count": 0}, "count is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"text": "missing.txt"}, "missing.txt cannot be read"),
])
def test_bad_arguments(arguments, words):
  with pytest.raises(InputError, match=words):
    recall_tasks(**arguments)


def test_too_short_a_text(tmp_path):
  path = tmp_path / "short.txt"
  path.write_text("One two three four five. " * 5)
  (task, *_) = recall_tasks(text=path)
  with pytest.raises(InputError, match="give more text"):
    next(task.samples(Words()))


def test_too_great_a_length(sentences):
  with pytest.raises(InputError, match="give a longer text or a shorter length"):
    SampleBuilder(sentences[:300], Words()).sample("single", 500_000, 0, seed=0)
