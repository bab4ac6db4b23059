"""LongBench's metrics against official scores of real predictions; prompts and truncation on real rows."""

import collections
import difflib
import json
import pathlib

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from kvc_jax import InputError
from kvc_jax.evaluation import longbench as lb
from kvc_jax.evaluation import longbench_metrics as metrics
from kvc_jax.evaluation.lcs import lcs_items, lcs_length
from kvc_jax.tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent / "longbench"
STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
ALL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "longbench"
PREDICTIONS = ("full", "snapkv-c256")
needs_all = pytest.mark.skipif(not ALL.is_dir(), reason="the whole of LongBench's predictions and rows is not there")


def lines(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def shipped(which):
  """Prediction rows by set."""
  found = collections.defaultdict(list)
  for row in lines(HERE / f"{which}.jsonl"):
    found[row["set"]].append(row)
  return found


def shipped_rows():
  return [(row["dataset"].removesuffix("_e"), row) for row in lines(HERE / "rows.jsonl")]


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.from_folder(STORIES)


# ---------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("which", PREDICTIONS)
def test_scores_are_the_official_ones(which):
  sets = shipped(which)
  assert len(sets) == 16
  for name, rows in sets.items():
    assert lb.score_rows(name, rows) == [row["official"] for row in rows], name


@needs_all
@pytest.mark.parametrize("which", PREDICTIONS)
def test_every_score_of_all_predictions_is_the_official_one(which):
  folder = ALL / "predictions" / which
  per_set = json.loads((folder / "result.json").read_text())
  per_sample = json.loads((folder / "list_result.json").read_text())
  assert len(per_set) == len(per_sample) == 16
  for name, official in per_set.items():
    scores = lb.score_rows(name, lines(folder / f"{name}.jsonl"))
    assert scores == per_sample[name], name
    assert round(100 * sum(scores) / len(scores), 2) == official, name


def code_line(prediction):
  candidates = prediction.lstrip("\n").split("\n")
  return next((line for line in candidates if not any(mark in line for mark in ("`", "#", "//"))), "")


def difflib_similarity(prediction, reference, classes=()):
  kept = code_line(prediction)
  return round(100 * difflib.SequenceMatcher(None, kept, reference).ratio()) / 100


def otherwise_rounded_similarity(prediction, reference, classes=()):
  """The same quotient in another order of operations: it differs where a half percent is rounded."""
  kept = code_line(prediction)
  return round(100 * (2 * lcs_length(kept, reference) / (len(kept) + len(reference)))) / 100


def cased_f1(prediction, reference, classes=()):
  return metrics._f1(prediction.split(), reference.split())


def rouge_of_one_sentence(prediction, reference, classes=()):
  return metrics.rouge_l(prediction.replace(".", ""), reference.replace(".", ""))


@pytest.mark.parametrize(("metric", "wrong", "sets"), [
    ("code_similarity", difflib_similarity, ("lcc", "repobench-p")),
    ("code_similarity", otherwise_rounded_similarity, ("lcc", "repobench-p")),
    ("qa_f1", cased_f1, ("qasper", "hotpotqa")),
    ("rouge_l", rouge_of_one_sentence, ("gov_report", "multi_news")),
    ("retrieval", metrics.count, ("passage_retrieval_en",)),
])
def test_another_metric_is_seen(metric, wrong, sets, monkeypatch):
  replaced = {name: wrong if m is getattr(metrics, metric) else m for name, m in lb.METRICS.items()}
  monkeypatch.setattr(lb, "METRICS", replaced)
  for name in sets:
    rows = [row for which in PREDICTIONS for row in shipped(which)[name]]
    assert lb.score_rows(name, rows) != [row["official"] for row in rows], name


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum"])
def test_whole_texts_of_few_shot_sets_score_otherwise(name, monkeypatch):
  monkeypatch.setattr(lb, "post_process", lambda name, text: text)
  rows = [row for which in PREDICTIONS for row in shipped(which)[name]]
  assert lb.score_rows(name, rows) != [row["official"] for row in rows]


def test_post_processing_takes_the_first_line_of_few_shot_sets():
  for name in lb.SETS:
    few_shot = name in ("trec", "triviaqa", "samsum", "lsht")
    assert lb.post_process(name, "\n\n Location \nQuestion: x") == (
        " Location " if few_shot else "\n\n Location \nQuestion: x")


def test_metrics_by_hand():
  assert metrics.qa_f1("The  cat, a dog!", "an cat") == 2 / 3  # cat dog / cat
  assert metrics.qa_f1("the", "a") == 0
  assert metrics.count("8, or 8 of 12", "8") == 2 / 3
  assert metrics.count("eight", "8") == 0
  assert metrics.retrieval("Paragraph 15, not 3.", "Paragraph 15") == 0.5
  assert metrics.retrieval_zh("段落15", "段落15") == 1
  assert metrics.code_similarity("```\n# no\nint x;", "int y;") == 0.83  # 5 of 6 letters
  assert metrics.code_similarity("", "") == 1
  assert metrics.code_similarity("// only", "x") == 0
  assert metrics.classification("Order, rank", "rank", ["Order", "rank", "Date"]) == 0.5
  assert metrics.classification("Other location", "Other location", ["location", "Other location"]) == 1
  # Striking out "a" makes the walk step over "b", which is part of "a b c" too.
  assert metrics.classification("a b c", "a b c", ["a", "b", "c", "a b c"]) == 0.5
  assert metrics.rouge_l("a b. c", "a c d") == pytest.approx(2 / 3)  # {a, c} of 3 and of 3
  assert metrics.rouge_l("", "a") == metrics.rouge_l("...", "a") == metrics.rouge_l("a", "") == 0
  assert lb.score("qasper", "yes", ["no", "yes"]) == 1
  assert lb.score("qasper", "yes", []) == 0
  with pytest.raises(InputError, match="give Paragraph and a number"):
    metrics.retrieval("1", "1")


def test_chinese_metrics_by_hand():
  pytest.importorskip("jieba")
  assert metrics.qa_f1_zh("北京大学", "在北京大学。") == 2 / 3  # one word, and one of two
  assert metrics.qa_f1_zh("，", "。") == 0  # noqa: RUF001
  assert metrics.rouge_l_zh("今天天气", "今天天气") == pytest.approx(1)
  assert 0 < lb.score("vcsum", "会议讨论了预算。", ["会议讨论预算问题。"]) < 1


def test_without_jieba_the_chinese_sets_say_so(monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  for name in ("dureader", "vcsum", "multifieldqa_zh"):
    with pytest.raises(InputError, match=rf"{name} is scored .* pip install 'kvc_jax\[eval\]'"):
      lb.check_names([name], extended=False)
  assert lb.check_names(["lsht", "passage_retrieval_zh", "lsht"], extended=False) == ("lsht", "passage_retrieval_zh")


def lcs_table(a, b):
  """The textbook's."""
  table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
  for i, x in enumerate(a):
    for j, y in enumerate(b):
      table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
  return table


@given(st.text("abc", max_size=20), st.text("abc", max_size=20))
def test_common_subsequences_are_the_textbooks(a, b):
  table = lcs_table(a, b)
  assert lcs_length(a, b) == table[-1][-1]
  i, j, walked = len(a), len(b), []
  while i and j:
    if a[i - 1] == b[j - 1]:
      walked.append(a[i - 1])
      i, j = i - 1, j - 1
    elif table[i - 1][j] > table[i][j - 1]:
      i -= 1
    else:
      j -= 1
  assert lcs_items(a, b) == walked[::-1]


# --------------------------------------------------------------------------------- prompts


def test_all_sets_have_a_prompt_a_length_and_a_metric():
  assert len(lb.SETS) == 21
  assert len(lb.E_SETS) == 13
  assert set(lb.E_SETS) < set(lb.SETS)
  assert set(lb._prompts()) == set(lb._lengths()) == set(lb.SETS)
  assert [lb.most_new_tokens(name) for name in ("gov_report", "lcc", "hotpotqa")] == [512, 64, 32]
  assert [lb.bucket(n) for n in (0, 3999, 4000, 7999, 8000)] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+"]


def check_prompt(name, row):
  """The official text before the context, and behind it."""
  before, after = {
      "hotpotqa": ("Answer the question based on the given passages. Only give me the answer and do not output any "
                   "other words.\n\nThe following are given passages.\n", f"\n\nQuestion: {row['input']}\nAnswer:"),
      "2wikimqa": ("Answer the question based on the given passages. Only give me the answer and do not output any "
                   "other words.\n\nThe following are given passages.\n", f"\n\nQuestion: {row['input']}\nAnswer:"),
      "gov_report": ("You are given a report by a government agency. Write a one-page summary of the report.\n\n"
                     "Report:\n", "\n\nNow, write a one-page summary of the report.\n\nSummary:"),
      "multi_news": ("You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
                     "\n\nNow, write a one-page summary of all the news.\n\nSummary:"),
      "multifieldqa_en": ("Read the following text and answer briefly.\n\n", f"\n\nNow, answer the following question "
                          "based on the above text, only give me the answer and do not output any other words.\n\n"
                          f"Question: {row['input']}\nAnswer:"),
      "passage_count": ("There are some paragraphs below sourced from Wikipedia. ", "\n\nThe final answer is: "),
      "lcc": ("Please complete the code given below. \n", "Next line of code:\n"),
  }[name]
  prompt = lb.prompt_of(name, row)
  assert prompt.startswith(before)
  assert prompt.endswith(after)
  assert prompt.count(row["context"]) == 1


def check_cut(tokenizer, backend, name, row, most):
  """The text of the first and the last tokens, found with the tokenizers library itself."""
  prompt = lb.prompt_of(name, row)
  ids = backend.encode(prompt).ids
  cut = lb.cut_in_the_middle(tokenizer, prompt, most)
  if len(ids) <= most:
    assert cut == prompt
    return
  head = backend.decode(ids[: most // 2], skip_special_tokens=True)
  tail = backend.decode(ids[len(ids) - most // 2 :], skip_special_tokens=True)
  assert cut == head + tail
  # Both ends stay: BOS takes one of the first tokens, and this tokenizer drops a first space.
  assert prompt.startswith(cut[: min(40, len(head) - 1)])
  assert prompt.endswith(cut[-min(40, len(tail) - 1) :])
  assert abs(len(tokenizer.encode(cut)) - most) <= 3


def test_prompts_of_real_rows(tokenizer):
  backend = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
  names = set()
  for name, row in shipped_rows():
    check_prompt(name, row)
    longest = len(backend.encode(lb.prompt_of(name, row)).ids)
    for most in (100, 101, longest - 1, longest, longest + 1):
      check_cut(tokenizer, backend, name, row, most)
    names.add(name)
  assert len(names) == 7


@needs_all
def test_prompts_of_all_rows_at_hand(tokenizer):
  backend = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
  files = sorted((ALL / "samples").glob("*_e.rows.jsonl"))
  count = 0
  for file in files:
    for row in lines(file):
      name = row["dataset"].removesuffix("_e")
      check_prompt(name, row)
      check_cut(tokenizer, backend, name, row, 1000)
      lb._check_row(file.name, row, lb._FIELDS)
      assert lb.bucket(row["length"]) == ("4-8k" if row["length"] >= 4000 else "0-4k")
      # A reference is its own best answer, but for code's comments, which are not scored, and spaces.
      if name != "lcc":
        assert lb.score(name, row["answers"][0], row["answers"], row["all_classes"]) == pytest.approx(1), row["_id"]
      count += 1
  assert len(files) == 7
  assert count == 430


def test_a_template_goes_around_the_prompts_of_most_sets(tokenizer):
  chat = Tokenizer.from_folder(STORIES)
  chat._backend.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
  for name in lb.SETS:
    plain = name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    assert lb.templated(tokenizer, name, "p", "auto") == lb.templated(chat, name, "p", "none") == "p"
    assert lb.templated(tokenizer, name, "p", "llama2") == ("p" if plain else "[INST]p[/INST]")
    for template in ("auto", "model"):
      given = lb.templated(chat, name, "p", template)
      assert given == "p" if plain else chat.decode(given) == "<user>p"
  assert lb.templated(tokenizer, "lcc", "p", "model") == "p"
  with pytest.raises(InputError, match="no chat template"):
    lb.templated(tokenizer, "qasper", "p", "model")


def test_a_task_gives_samples_and_scores_them(tokenizer):
  rows = [row for name, row in shipped_rows() if name == "hotpotqa"]
  task = lb.LongBenchTask("hotpotqa", rows, extended=True, most_input_tokens=200, most_new_tokens=32, limit=1)
  (sample,) = task.samples(tokenizer)
  assert len(task) == 1
  assert task.name == "hotpotqa_e"
  assert sample.group == "0-4k"
  assert sample.prompt == lb.cut_in_the_middle(tokenizer, lb.prompt_of("hotpotqa", rows[0]), 200)
  assert sample.extra == {"all_classes": None, "length": rows[0]["length"]}
  assert task.score(rows[0]["answers"][0], sample) == 1
  other = lb.LongBenchTask("hotpotqa", rows[:1], extended=True, most_input_tokens=200, most_new_tokens=32)
  assert other.settings != task.settings


# ----------------------------------------------------------------------------------- files


GOOD = {"input": "q", "context": "c", "answers": ["a"], "length": 3, "all_classes": None}


@pytest.mark.parametrize("folder", [".", "data"])
@pytest.mark.parametrize("extended", [False, True])
def test_rows_are_found(tmp_path, folder, extended):
  (tmp_path / folder).mkdir(exist_ok=True)
  file = tmp_path / folder / ("lcc_e.jsonl" if extended else "lcc.jsonl")
  file.write_text("\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
  assert lb.read_rows(tmp_path, "lcc", extended=extended) == [GOOD]
  with pytest.raises(InputError, match="has no lcc"):
    lb.read_rows(tmp_path, "lcc", extended=not extended)


@pytest.mark.parametrize(("text", "message"), [
    (b"", "is empty"), (b"{", "line 1, is no JSON;"), (b"[]", "no JSON object"), (b"\xff", "not UTF-8"),
    (json.dumps({**GOOD, "answers": "a"}).encode(), "'answers', not a list of texts"),
    (json.dumps({**GOOD, "answers": [1]}).encode(), "'answers', not a list of texts"),
    (json.dumps({**GOOD, "length": "3"}).encode(), "'length', not a whole number"),
    (json.dumps({"input": "q"}).encode(), "has no 'context'"),
])
def test_damaged_rows_are_named(tmp_path, text, message):
  (tmp_path / "lcc.jsonl").write_bytes(text)
  with pytest.raises(InputError, match=message):
    lb.read_rows(tmp_path, "lcc")


def test_unknown_sets_are_named():
  with pytest.raises(InputError, match="no set 'lccc'; give narrativeqa"):
    lb.check_names(["lccc"], extended=False)
  with pytest.raises(InputError, match="LongBench-E has no set 'musique'"):
    lb.check_names(["musique"], extended=True)
