"""LongBench and LongBench-E as tasks: official prompts, truncation, post-processing and metrics.

Bai et al. 2023, arXiv 2308.14508; what its own pred.py and eval.py do, for models without a wrapper of their own there.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from kvc_jax.errors import InputError, check_count
from kvc_jax.evaluation import longbench_metrics as metrics
from kvc_jax.evaluation.task import Sample
from kvc_jax.tokenizer import Tokenizer

METRICS: Mapping[str, metrics.Metric] = {
    "narrativeqa": metrics.qa_f1,
    "qasper": metrics.qa_f1,
    "multifieldqa_en": metrics.qa_f1,
    "multifieldqa_zh": metrics.qa_f1_zh,
    "hotpotqa": metrics.qa_f1,
    "2wikimqa": metrics.qa_f1,
    "musique": metrics.qa_f1,
    "dureader": metrics.rouge_l_zh,
    "gov_report": metrics.rouge_l,
    "qmsum": metrics.rouge_l,
    "multi_news": metrics.rouge_l,
    "vcsum": metrics.rouge_l_zh,
    "trec": metrics.classification,
    "triviaqa": metrics.qa_f1,
    "samsum": metrics.rouge_l,
    "lsht": metrics.classification,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "passage_retrieval_zh": metrics.retrieval_zh,
    "lcc": metrics.code_similarity,
    "repobench-p": metrics.code_similarity,
}
"""Of each set."""

SETS = tuple(METRICS)
E_SETS = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p")
"""Those that LongBench-E has, with questions spread evenly over three lengths."""

BUCKETS = ("0-4k", "4-8k", "8k+")
"""Of LongBench-E, by a row's `length` in words."""

Template = Literal["auto", "model", "llama2", "none"]
TEMPLATES: tuple[Template, ...] = get_args(Template)

_FEW_SHOT = frozenset({"trec", "triviaqa", "samsum", "lsht"})
_NO_TEMPLATE = _FEW_SHOT | {"lcc", "repobench-p"}
_ASSETS = pathlib.Path(__file__).parents[1] / "assets" / "longbench"
_TEMPLATE_TOKENS = 64
"""Of the context, left for a chat template, and for text that takes more tokens once its middle is cut out."""
_LEAST_INPUT = 64
_FIELDS = ("input", "context", "answers", "length", "all_classes")


def bucket(length: int) -> str:
  """LongBench-E's bucket of a row of so many words."""
  return BUCKETS[(length >= 4000) + (length >= 8000)]


def prompt_of(name: str, row: Mapping[str, Any]) -> str:
  """The official prompt of a row, before it is cut and templated."""
  return _prompts()[name].format(**row)


def most_new_tokens(name: str) -> int:
  """Most tokens of an answer in this set."""
  return _lengths()[name]


def cut_in_the_middle(tokenizer: Tokenizer, prompt: str, most_tokens: int) -> str:
  """The prompt, or, where it has more tokens, the text of its first and of its last most_tokens // 2, put together.

  Special tokens count, and are not in the text that is left.
  """
  ids = tokenizer.encode(prompt)
  if len(ids) <= most_tokens:
    return prompt
  half = most_tokens // 2
  return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def templated(tokenizer: Tokenizer, name: str, prompt: str, template: Template) -> str | list[int]:
  """The prompt as the model is given it.

  Few-shot and code sets go without a template, whatever is asked for: their examples are the format.

  Args:
    tokenizer: of the model.
    name: of the set.
    prompt: the text.
    template: "model" for the chat template of the model's folder, "llama2" for LongBench's own
      [INST]...[/INST], "none", or "auto": the model's, where it has one.
  """
  if template == "auto":
    template = "model" if tokenizer.has_chat_template else "none"
  if name in _NO_TEMPLATE or template == "none":
    return prompt
  if template == "llama2":
    return f"[INST]{prompt}[/INST]"
  return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])


def post_process(name: str, prediction: str) -> str:
  """What of a model's text is scored: of few-shot sets the first line that is not empty."""
  return prediction.lstrip("\n").split("\n")[0] if name in _FEW_SHOT else prediction


def score(name: str, prediction: str, references: Sequence[str], classes: Sequence[str] | None = None) -> float:
  """Score of a model's text in a set, from 0 to 1: that of the reference that fits it best.

  Args:
    name: of the set.
    prediction: the text, not post-processed.
    references: any number.
    classes: all of the set's, for trec and lsht.
  """
  text = post_process(name, prediction)
  return max((METRICS[name](text, reference, classes or ()) for reference in references), default=0.0)


def score_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
  """Scores of official prediction rows: {"pred", "answers", "all_classes"}. The last row's classes hold for all."""
  classes = rows[-1].get("all_classes") if rows else None
  return [score(name, row["pred"], row["answers"], classes) for row in rows]


class LongBenchTask:
  """One set, as a `Task`.

  Attributes:
    name: of the set, with "_e" for LongBench-E.
    settings: what the samples depend on.
  """

  def __init__(
      self, name: str, rows: Sequence[Mapping[str, Any]], *, extended: bool = False, most_input_tokens: int,
      most_new_tokens: int, template: Template = "auto", limit: int | None = None):
    """Takes a set's rows.

    Args:
      name: one of `SETS`.
      rows: as `read_rows` returns them.
      extended: whether they are LongBench-E's, whose scores are also given by length.
      most_input_tokens: of a prompt before its template; longer ones are cut in the middle.
      most_new_tokens: of an answer.
      template: see `templated`.
      limit: ask only so many rows, the first.
    """
    self.name = f"{name}_e" if extended else name
    self._set, self._rows, self._extended = name, rows if limit is None else rows[:limit], extended
    self._most_input, self._most_new, self._template = most_input_tokens, most_new_tokens, template
    self._classes = rows[-1]["all_classes"] if rows else None
    digest = hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()
    self.settings = {"rows": digest[:16], "max_new_tokens": most_new_tokens, "max_input_tokens": most_input_tokens,
                     "template": template}

  def __len__(self) -> int:
    return len(self._rows)

  def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
    for number, row in enumerate(self._rows):
      text = cut_in_the_middle(tokenizer, prompt_of(self._set, row), self._most_input)
      yield Sample(
          id=str(number), prompt=templated(tokenizer, self._set, text, self._template),
          max_new_tokens=self._most_new, references=tuple(row["answers"]),
          group=bucket(row["length"]) if self._extended else "",
          extra={"all_classes": row["all_classes"], "length": row["length"]})

  def score(self, prediction: str, sample: Sample) -> float:
    return score(self._set, prediction, sample.references, self._classes)


def input_tokens(name: str, context: int, new_tokens: int, given: int | None) -> int:
  """Most tokens of a set's prompt before its template: `given`, or what the context has room for.

  Raises:
    InputError: the context has no room for a prompt beside the answer.
  """
  room = context - new_tokens - (0 if name in _NO_TEMPLATE else _TEMPLATE_TOKENS)
  if given is not None:
    check_count("--max-input-tokens", given, at_least=2)
    if given > context - new_tokens:
      raise InputError(f"--max-input-tokens is {given}, but of a context of {context} tokens an answer of {name} "
                       f"leaves {max(context - new_tokens, 0)}; lower it, or lower --max-new-tokens")
    return given
  if room < _LEAST_INPUT:
    raise InputError(f"an answer of {name} has up to {new_tokens} tokens, and the context is {context}: that leaves "
                     "no room for a prompt; lower --max-new-tokens, or leave the set out with --set")
  return room


def check_names(names: Sequence[str], *, extended: bool) -> tuple[str, ...]:
  """Names of sets, each once.

  Raises:
    InputError: there is no such set, or LongBench-E lacks it, or jieba is needed and missing.
  """
  known = E_SETS if extended else SETS
  for name in names:
    if name not in known:
      raise InputError(f"{'LongBench-E' if extended else 'LongBench'} has no set {name!r}; give {', '.join(known)}")
  chosen = tuple(dict.fromkeys(names))
  for name in chosen:
    if METRICS[name] in (metrics.qa_f1_zh, metrics.rouge_l_zh):
      metrics.check_can_segment(name)
  return chosen


def sets_in(folder: str | pathlib.Path, *, extended: bool) -> tuple[str, ...]:
  """Names of the sets that a folder has.

  Raises:
    InputError: it has none.
  """
  found = tuple(name for name in (E_SETS if extended else SETS) if _file(folder, name, extended))
  if not found:
    raise InputError(f"{folder} has no set of LongBench{'-E' if extended else ''}; give a folder with files such as "
                     f"{_file_name('qasper', extended)}, as LongBench's data.zip unpacks")
  return found


def _file_name(name: str, extended: bool) -> str:
  return f"{name}_e.jsonl" if extended else f"{name}.jsonl"


def _file(folder: str | pathlib.Path, name: str, extended: bool) -> pathlib.Path | None:
  places = (pathlib.Path(folder), pathlib.Path(folder) / "data")
  return next((path for place in places if (path := place / _file_name(name, extended)).is_file()), None)


def read_rows(folder: str | pathlib.Path, name: str, *, extended: bool = False) -> list[dict[str, Any]]:
  """Rows of a set from NAME.jsonl (LongBench-E: NAME_e.jsonl) in the folder, or in its folder `data`.

  Raises:
    InputError: there is no such file, or a line is no row of LongBench.
  """
  path = _file(folder, name, extended)
  if path is None:
    raise InputError(f"{folder} has no {_file_name(name, extended)}; give the folder of LongBench's data, as its "
                     "data.zip unpacks")
  rows = read_json_lines(path, _FIELDS, name=name)
  if not rows:
    raise InputError(f"{path} is empty; copy it again from its source")
  return rows


def means(scores: Sequence[float], buckets: Sequence[str]) -> dict[str, Any]:
  """Number of samples and, rounded as the official scorer rounds, the mean score and that of each bucket, times 100."""
  found: dict[str, Any] = {"samples": len(scores), "score": _percent(scores)}
  for name in BUCKETS:
    if within := [score for score, of in zip(scores, buckets, strict=True) if of == name]:
      found[name] = _percent(within)
  return found


def _percent(scores: Sequence[float]) -> float:
  return round(100 * sum(scores) / len(scores), 2)


def score_folder(folder: str | pathlib.Path, *, extended: bool = False) -> dict[str, tuple[list[float], list[str]]]:
  """Scores predictions in LongBench's format: NAME.jsonl (or NAME_e.jsonl) with pred, answers, all_classes, length.

  Args:
    folder: with the files, such as one policy's of `kvc eval longbench`.
    extended: whether buckets are wanted, for which each row has a length.

  Returns:
    By set: the score of each sample, and its bucket ("" unless wanted).

  Raises:
    InputError: there are none, or a file is damaged or is no set's.
  """
  scores: dict[str, tuple[list[float], list[str]]] = {}
  for path in sorted(pathlib.Path(folder).glob("*.jsonl")):
    name = path.stem.removesuffix("_e")
    check_names([name], extended=extended)
    rows = read_json_lines(path, ("pred", "answers", "all_classes", *(["length"] if extended else [])), name=name)
    if not rows:
      raise InputError(f"{path} is empty; remove it, or predict its set first")
    if name in scores:
      raise InputError(f"{folder} has {name} twice, as {name}.jsonl and as {name}_e.jsonl; keep one of them there")
    scores[name] = score_rows(name, rows), [bucket(row["length"]) if extended else "" for row in rows]
  if not scores:
    raise InputError(f"{folder} has no .jsonl files; give a folder of predictions such as LongBench's pred/MODEL")
  return scores


def read_json_lines(path: pathlib.Path, fields: Sequence[str], *, name: str) -> list[dict[str, Any]]:
  """Objects of a .jsonl file, each with the fields; a file's `answers` are lists of texts, its `length` a number.

  Raises:
    InputError: a line is something else, or its answers cannot be scored as those of the set `name`.
  """
  rows = []
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except UnicodeDecodeError as e:
    raise InputError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); copy it again") from None
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError:
      raise InputError(f"{path}, line {number}, is no JSON; copy the file again from its source") from None
    _check_row(f"{path}, line {number},", row, fields)
    _check_answers(f"{path}, line {number},", row["answers"], name)
    rows.append(row)
  return rows


_SHAPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "pred": (str, "a text"), "input": (str, "a text"), "context": (str, "a text"), "answers": (list, "a list of texts"),
    "length": (int, "a whole number"), "all_classes": ((list, type(None)), "a list of texts or null")}


def _check_row(where: str, row: Any, fields: Sequence[str]) -> None:
  if not isinstance(row, dict):
    raise InputError(f"{where} is no JSON object; give rows as LongBench has them")
  for field in fields:
    if field not in row:
      raise InputError(f"{where} has no {field!r}; give rows as LongBench has them")
    shape, words = _SHAPES[field]
    value = row[field]
    if not isinstance(value, shape) or (isinstance(value, list) and not all(isinstance(v, str) for v in value)):
      raise InputError(f"{where} has {json.dumps(value)[:40]} as {field!r}, not {words}; "
                       "give rows as LongBench has them")


def _check_answers(where: str, answers: Sequence[str], name: str) -> None:
  if METRICS[name] in (metrics.retrieval, metrics.retrieval_zh):
    for answer in answers:
      try:
        METRICS[name]("", answer, ())
      except InputError as e:
        raise InputError(f"{where} cannot be scored: {e}") from None


@functools.cache
def _prompts() -> dict[str, str]:
  return json.loads((_ASSETS / "dataset2prompt.json").read_text(encoding="utf-8"))


@functools.cache
def _lengths() -> dict[str, int]:
  return json.loads((_ASSETS / "dataset2maxlen.json").read_text(encoding="utf-8"))
