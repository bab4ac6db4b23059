"""Pictures of an output folder: quality against the rate reached, and which heads kept what."""

import importlib.util
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from kvc_jax.evaluation.summary import AVERAGE, UNCOMPRESSED, Results, Row

_STYLES = (("o", "-"), ("s", "--"), ("^", ":"))
"""Marker and line of the first ten series, the next ten, and so on: colours come again."""


def can_draw() -> bool:
  """Whether matplotlib is installed (the extra `plot`)."""
  return importlib.util.find_spec("matplotlib") is not None


def save_all(rows: Sequence[Row], results: Sequence[Results], folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes quality.png and, where something was compressed, kept.png; returns the paths of what it wrote."""
  save_quality(rows, folder / "quality.png")
  return [folder / "quality.png", *save_kept(results, folder / "kept.png")]


def save_quality(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Writes a PNG: for each task, score or perplexity over the rate reached, a line for each series of policies.

  What an uncompressed run reached is a dashed line across.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  whole = [row for row in rows if not row.group]
  tasks = sorted({row.task for row in whole}, key=lambda task: (task != AVERAGE, task))
  columns = min(4, len(tasks))
  lines = -(-len(tasks) // columns)
  figure = Figure(figsize=(4 * columns + 1, 3 * lines + 0.8), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(lines, columns, squeeze=False).ravel()
  series = sorted({row.series for row in whole} - {UNCOMPRESSED})
  handles = {}
  for task, axis in zip(tasks, axes, strict=False):
    of_task = [row for row in whole if row.task == task]
    axis.set(title=task, xlabel="rate reached", xscale="log")
    axis.set_ylabel("score" if of_task[0].perplexity is None else "perplexity")
    for row in of_task:
      if row.series == UNCOMPRESSED:
        handles[UNCOMPRESSED] = axis.axhline(_quality(row), color="gray", linestyle="--", linewidth=1)
    for number, name in enumerate(series):
      points = sorted((row.rate_reached, _quality(row)) for row in of_task if row.series == name)
      if points:
        marker, dashes = _STYLES[number // 10 % len(_STYLES)]
        (handles[name],) = axis.plot(
            *zip(*points, strict=True), marker=marker, linestyle=dashes, markersize=4, color=f"C{number % 10}")
    _even_ticks(axis, [row.rate_reached for row in of_task])
    if of_task[0].perplexity is None:
      axis.set_ylim(0, max(*(1.1 * _quality(row) for row in of_task), 1.0))
  for axis in axes[len(tasks) :]:
    axis.set_visible(False)
  figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
  figure.savefig(path, dpi=100, format="png")


def _quality(row: Row) -> float:
  value = row.score if row.perplexity is None else row.perplexity
  assert value is not None
  return value


def _even_ticks(axis, rates: Sequence[float]) -> None:
  """Ticks at powers of two, as rates are given."""
  last = max(1, math.ceil(math.log2(max(rates))))
  ticks = [2**power for power in range(last + 1)]
  axis.set_xlim(0.93, ticks[-1] * 1.07)
  axis.set_xticks(ticks, [f"{tick}x" for tick in ticks])
  axis.minorticks_off()


def kept_shares(results: Sequence[Results]) -> np.ndarray:
  """Share of the tokens seen that each head held at the end, f64 [L, H], all records of one policy together.

  The last token of an answer never was in the cache, but is counted among those seen.
  """
  records = [record for found in results for record in found.records]
  kept = sum(np.array(record["kvs_kept"], np.float64) for record in records)
  return kept / sum(record["prompt_tokens"] + record["output_tokens"] for record in records)


def save_kept(results: Sequence[Results], path: pathlib.Path, most: int = 12) -> list[pathlib.Path]:
  """Writes a PNG: for each policy the share of KVs that each layer's heads held, over all tasks; the first `most`."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  policies = [name for name in dict.fromkeys(found.policy for found in results) if name != UNCOMPRESSED][:most]
  if not policies:
    return []
  columns = min(4, len(policies))
  lines = -(-len(policies) // columns)
  figure = Figure(figsize=(3.4 * columns + 0.6, 3.4 * lines), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(lines, columns, squeeze=False).ravel()
  for policy, axis in zip(policies, axes, strict=False):
    shares = kept_shares([found for found in results if found.policy == policy])
    image = axis.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    axis.set(title=policy, xlabel="KV head", ylabel="layer")
    axis.set_xticks(range(0, shares.shape[1], max(1, shares.shape[1] // 8)))
    axis.set_yticks(range(0, shares.shape[0], max(1, shares.shape[0] // 16)))
    figure.colorbar(image, ax=axis, format="{x:.0%}")
  for axis in axes[len(policies) :]:
    axis.set_visible(False)
  figure.suptitle("share of KVs kept")
  figure.savefig(path, dpi=100, format="png")
  return [path]
