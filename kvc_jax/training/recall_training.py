"""The training loop of `scripts/train_recall.py`: by the clock or by steps, logged, checkpointed, resumable."""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvc_jax.checkpoint.store import load_model
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.evaluation.recall_episodes import TASKS
from kvc_jax.training.language_model import Progress, Trainer, flat_params, init_params
from kvc_jax.training.recall_batches import BatchMakers, Order
from kvc_jax.training.recall_checkpoint import check_same_model, export_model, load_state, save_state

_log = logging.getLogger(__name__)

_EVALUATION_SEED = 1_000_003
_IN_FLIGHT = 3  # steps that the device may be behind
_EASY = 0.6  # share of looked-up tokens that are right, from which on long samples come
_LOG_EVERY = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """Settings of a run.

  Attributes:
    data: folder that `prepare` wrote.
    out: folder to write: `model`, `state`, `stable` (the state before the learning rate fell) and `log.jsonl`.
    steps: train so many steps in all; or, if None,
    stop_at: stop behind this step, as if interrupted (with `steps`).
    seconds: until so many seconds have passed since `started`, final evaluation and export included.
    started: time.monotonic() from which `seconds` count.
    lengths: of samples, ascending; each compiles once.
    tokens_per_step: of all samples of a batch together.
    rate: largest learning rate.
    seed: of the parameters and the data.
    workers: processes that make batches.
    resume: folder with a state to go on from.
    weights: folder of a model, as `train` exports one, whose weights a new run begins with.
    evaluation_samples: of each task and length, at the end.
    keep_seconds: time between checkpoints.
    reserve_seconds: of `seconds`, for the last checkpoint and evaluation.
  """

  data: pathlib.Path
  out: pathlib.Path
  steps: int | None = None
  stop_at: int | None = None
  seconds: float = 0.0
  started: float = 0.0
  lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
  evaluation_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
  tokens_per_step: int = 65_536
  rate: float = 2e-3
  seed: int = 0
  workers: int = 0
  resume: pathlib.Path | None = None
  weights: pathlib.Path | None = None
  evaluation_samples: int = 512
  keep_seconds: float = 120.0
  reserve_seconds: float = 15.0

  def batch(self, length: int) -> int:
    """Samples in a batch."""
    return max(1, self.tokens_per_step // length)


def learning_rate(progress: float, steps_here: int) -> float:
  """Share of the largest rate: 200 steps up, level, and from 65% of the run on down to 2%, along 1 - sqrt.

  After Hägele et al. 2024 (arXiv 2405.18392), whose constant rate with cooldown needs no length in advance.

  Args:
    progress: of the run, 0 to 1.
    steps_here: since the start or the last resumption with fresh moments.
  """
  warm = min(1.0, (steps_here + 1) / 200)
  cooling = max(0.0, min(1.0, (progress - 0.65) / 0.35))
  return warm * max(0.02, 1.0 - cooling**0.5)


def length_shares(lengths: Sequence[int], progress: float, easy: bool) -> list[float]:
  """How many of the batches have each length: short ones until looking up has begun, long ones at the end."""
  count = len(lengths)
  if count < 3:
    return [1.0] * count
  if not easy:
    return [0.7, 0.3, *[0.0] * (count - 2)]
  if progress < 0.6:
    return [0.25, *[0.75 / (count - 1)] * (count - 1)]
  return [0.05, 0.1, *np.linspace(0.8, 1.2, count - 2) * 0.85 / (count - 2)]


class Clock:
  """How far a run is."""

  def __init__(self, config: TrainingConfig, first_step: int):
    self._config, self._first = config, first_step
    self._start = time.monotonic()

  def progress(self, step: int) -> float:
    """From 0 to 1."""
    if self._config.steps is not None:
      return step / self._config.steps
    end = self._config.started + self._config.seconds - self._config.reserve_seconds
    return min(1.0, (time.monotonic() - self._start) / max(1e-6, end - self._start))


def train(config: TrainingConfig, model: LlamaConfig, attention: Any) -> dict[str, Any]:
  """Trains and writes the folder `out`.

  Args:
    config: of the run.
    model: to be trained.
    attention: see `Trainer`.

  Returns:
    The last line of the log: accuracy by task and length.

  Raises:
    InputError: data or the state to resume are missing or do not fit.
  """
  return _Run(config, model, attention).run()


class _Run:
  def __init__(self, config: TrainingConfig, model: LlamaConfig, attention: Any):
    self.config, self.model = config, model
    self.trainer = Trainer(config=model, attention=attention)
    self.step = self.fresh_from = self.tokens = 0
    self.easy = False
    state = Progress.start(init_params(model, config.seed))
    if config.weights is not None:
      weights = flat_params(load_model(config.weights, "float32"))
      check_same_model(weights, state.params, config.weights)
      state = Progress.start(weights)
    if config.resume is not None:
      loaded, notes = load_state(config.resume)
      check_same_model(loaded.params, state.params, config.resume)
      state = loaded
      self.step, self.tokens, self.easy = notes["step"], notes["tokens"], notes["easy"]
      self.fresh_from = notes["fresh_from"] if (config.resume / "moments.safetensors").is_file() else self.step
    self.state: Progress = state
    self.makers = BatchMakers(config.data, "train", config.workers)
    config.out.mkdir(parents=True, exist_ok=True)
    self._log_file = (config.out / "log.jsonl").open("a", encoding="utf-8")
    self.compiled: dict[tuple[str, int], Callable[..., Any]] = {}
    self.evaluation: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}

  def run(self) -> dict[str, Any]:
    try:
      self._compile()
      self._write({"event": "start", "step": self.step, "compile_seconds": round(self._since_start(), 1),
                   "device": jax.devices()[0].device_kind, "jax": jax.__version__, **_plain(self.config)})
      self._loop()
      self._keep()
      final = self._evaluate(self.config.evaluation_samples)
      self._write({"event": "end", **final})
      return final
    finally:
      self.makers.close()
      self._log_file.close()

  def _since_start(self) -> float:
    return time.monotonic() - self.config.started

  def _compile(self) -> None:
    """Every shape before the first step, side by side."""
    config = self.config
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.state)
    rate = jax.ShapeDtypeStruct((), jnp.float32)

    def compiled(kind: str, length: int) -> Callable[..., Any]:
      shape = (config.batch(length), length)
      tokens, codes = jax.ShapeDtypeStruct(shape, jnp.uint16), jax.ShapeDtypeStruct(shape, jnp.uint8)
      if kind == "step":
        return self.trainer.step.lower(state, tokens, codes, rate).compile()
      return self.trainer.all_right.lower(state.params, tokens, codes).compile()

    wanted = [("step", length) for length in reversed(config.lengths)]
    wanted += [("all_right", length) for length in config.evaluation_lengths]
    with concurrent.futures.ThreadPoolExecutor(len(wanted) + 1) as pool:
      evaluation = pool.submit(self._make_evaluation)
      futures = {item: pool.submit(compiled, *item) for item in wanted}
      self.compiled = {item: future.result() for item, future in futures.items()}
      evaluation.result()

  def _loop(self) -> None:
    config, clock = self.config, Clock(self.config, self.step)
    kept, cooled, asked = time.monotonic(), clock.progress(self.step) >= 0.65, self.step
    flying: collections.deque[tuple[int, dict[str, jax.Array], dict[str, Any]]] = collections.deque()
    seen: list[dict[str, float]] = []
    mark = (time.monotonic(), self.tokens)
    lengths: dict[int, int] = {}
    while (progress := clock.progress(self.step)) < 1.0 and self.step != config.stop_at:
      while self.makers.waiting < self.makers.ahead:
        lengths[asked] = self._ask(asked, clock.progress(asked) if config.steps is not None else progress)
        asked += 1
      length = lengths.pop(self.step)
      tokens, codes = self.makers.take()
      rate = config.rate * learning_rate(progress, self.step - self.fresh_from)
      self.state, figures = self.compiled["step", length](self.state, tokens, codes, np.float32(rate))
      flying.append((self.step, figures, {"length": length, "rate": rate, "progress": progress}))
      self.step, self.tokens = self.step + 1, self.tokens + tokens.size
      if len(flying) > _IN_FLIGHT:
        seen.append(self._landed(*flying.popleft()))
      if self.step % _LOG_EVERY == 0 and seen:
        now = time.monotonic()
        self._report(seen, progress, rate, (self.tokens - mark[1]) / (now - mark[0]))
        seen, mark = [], (now, self.tokens)
      if not cooled and clock.progress(self.step) >= 0.65:
        cooled, mark = True, self._pause(lambda: self._save("stable", moments=False), mark)
      if time.monotonic() - kept > config.keep_seconds:
        mark = self._pause(self._check_up, mark)
        kept = time.monotonic()
    while flying:
      self._landed(*flying.popleft())

  def _ask(self, step: int, progress: float) -> int:
    """Orders the batch of a step; returns its length."""
    config = self.config
    # By steps, nothing may depend on what was seen before a resumption.
    easy = progress > 0.12 if config.steps is not None else self.easy or progress > 0.35
    rng = random.Random(f"length {config.seed} {step}")
    length = rng.choices(config.lengths, length_shares(config.lengths, progress, easy))[0]
    self.makers.ask(Order(seed=config.seed, number=step, batch=config.batch(length), length=length,
                          copy_share=0.05 if easy else 0.25))
    return length

  def _landed(self, step: int, figures: dict[str, jax.Array], how: dict[str, Any]) -> dict[str, float]:
    """Waits for a step's figures."""
    values = {name: float(value) for name, value in figures.items()}
    if not np.isfinite(values["loss"]):
      raise FloatingPointError(f"the loss is {values['loss']} at step {step}; resume from the last state")
    return {"step": step, **how, **values}

  def _report(self, seen: list[dict[str, float]], progress: float, rate: float, speed: float) -> None:
    short = self.config.lengths[0]
    hits = [row["lookup_hits"] for row in seen if row["length"] == short]
    if hits and np.mean(hits) > _EASY and not self.easy:
      self.easy = True
      self._write({"event": "long samples from here", "step": self.step, "tokens": self.tokens})
    by_length = {}
    for length in self.config.lengths:
      rows = [row for row in seen if row["length"] == length]
      if rows:
        by_length[str(length)] = {name: round(float(np.mean([row[name] for row in rows])), 4)
                                  for name in ("text_loss", "lookup_loss", "lookup_hits", "answer_hits")}
    self._write({"event": "steps", "step": self.step, "tokens": self.tokens, "progress": round(progress, 4),
                 "seconds": round(self._since_start(), 1), "rate": round(rate, 6), "tokens_per_second": round(speed),
                 "loss": round(float(np.mean([row["loss"] for row in seen])), 4),
                 "gradient": round(float(np.mean([row["gradient"] for row in seen])), 3), "lengths": by_length})

  def _pause(self, work: Callable[[], Any], mark: tuple[float, int]) -> tuple[float, int]:
    """Does the work; its time does not count in the speed."""
    start = time.monotonic()
    work()
    return mark[0] + time.monotonic() - start, mark[1]

  def _check_up(self) -> None:
    self._keep()
    self._write({"event": "check", **self._evaluate(1)})

  def _keep(self) -> None:
    self._save("state", moments=True)
    export_model(self.config.out / "model", self.state.params, self.model, self.config.data / "tokenizer.json")

  def _save(self, name: str, *, moments: bool) -> None:
    notes = {"step": self.step, "tokens": self.tokens, "easy": self.easy, "fresh_from": self.fresh_from,
             "seed": self.config.seed}
    save_state(self.config.out / name, self.state, notes, moments=moments)

  def _evaluate(self, samples: int) -> dict[str, Any]:
    """Share of held-out samples of each task and length whose answer is right, every token of it."""
    right: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for length in self.config.evaluation_lengths:
      batches = -(-samples // self.config.batch(length))
      for task in TASKS:
        found = [
            self.compiled["all_right", length](self.state.params, *batch)
            for batch in self.evaluation[task, length][:batches]]
        rows = np.concatenate([np.asarray(rows) for rows in found])
        right.setdefault(task, {})[str(length)] = round(float(rows.mean()), 4)
        counts[str(length)] = len(rows)
    return {"step": self.step, "tokens": self.tokens, "seconds": round(self._since_start(), 1),
            "samples": counts, "right": right}

  def _make_evaluation(self) -> None:
    """All evaluation batches, made while the steps compile."""
    config = self.config
    makers = BatchMakers(config.data, "held_out", min(4, config.workers))
    try:
      wanted = [(task, length, number) for length in config.evaluation_lengths for task in TASKS
                for number in range(-(-config.evaluation_samples // config.batch(length)))]
      for task, length, number in wanted:
        makers.ask(Order(seed=_EVALUATION_SEED, number=number, batch=config.batch(length), length=length, task=task))
      for task, length, _ in wanted:
        self.evaluation.setdefault((task, length), []).append(makers.take())
    finally:
      makers.close()

  def _write(self, line: dict[str, Any]) -> None:
    self._log_file.write(json.dumps(line) + "\n")
    self._log_file.flush()
    _log.info("%s", json.dumps(line))


def _plain(config: TrainingConfig) -> dict[str, Any]:
  fields = {name: value for name, value in vars(config).items() if name != "started"}
  return {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in fields.items()}


def check_lengths(config: TrainingConfig) -> None:
  """Raises InputError unless lengths ascend and a batch has at least one sample of each."""
  if sorted(set(config.lengths)) != list(config.lengths) or config.lengths[0] < 128:
    raise InputError(f"lengths are {config.lengths}; give ascending numbers of at least 128")
  if config.tokens_per_step < config.lengths[-1]:
    raise InputError(f"a step of {config.tokens_per_step} tokens holds no sample of {config.lengths[-1]}; give more")
