"""A picture of what a sequence's cache kept: counts per head, and positions."""

import importlib.util
import pathlib

import numpy as np

from kvc_jax.engine.request import CompressionReceipt
from kvc_jax.errors import InputError

_MAX_BINS = 512


def position_shares(receipt: CompressionReceipt) -> np.ndarray:
  """Share of tokens kept, f32 [L * H, bins], over bins of neighbouring positions.

  One bin is one token up to 512 tokens. The receipt must carry positions.
  """
  if receipt.positions is None:
    raise ValueError("the receipt has no positions; generate with return_positions=True")
  rows = receipt.positions.reshape(-1, receipt.positions.shape[-1])
  bins = min(receipt.tokens_seen, _MAX_BINS)
  edges = np.linspace(0, receipt.tokens_seen, bins + 1)
  counts = np.stack([np.histogram(row[row >= 0], edges)[0] for row in rows])
  tokens = np.histogram(np.arange(receipt.tokens_seen), edges)[0]
  return (counts / np.maximum(tokens, 1)).astype(np.float32)


def check_can_draw(path: str | pathlib.Path) -> None:
  """Checks that a PNG can be drawn and written; call it before long work that ends in one.

  Raises:
    InputError: matplotlib is not installed, or there is no such folder.
  """
  if importlib.util.find_spec("matplotlib") is None:
    raise InputError("the heatmap needs matplotlib; run: pip install 'kvc_jax[plot]'")
  path = pathlib.Path(path)
  if not path.absolute().parent.is_dir() or path.is_dir():
    raise InputError(f"cannot write {path}; give a file name in a folder that exists")


def save_heatmap(receipt: CompressionReceipt, path: str | pathlib.Path, *, title: str = "") -> None:
  """Writes a PNG: KVs kept by layer and head on the left, kept positions on the right.

  Raises:
    InputError: matplotlib is not installed, or the file cannot be written.
  """
  check_can_draw(path)
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  layers, heads = receipt.kvs_kept.shape
  figure = Figure(figsize=(14, 2.5 + 0.14 * min(layers * heads, 64)), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, width_ratios=(1, 2.4))
  counts = left.imshow(receipt.kvs_kept, aspect="auto", cmap="viridis", vmin=0)
  left.set(title="KVs kept", xlabel="KV head", ylabel="layer", xticks=range(heads), yticks=_some(layers))
  figure.colorbar(counts, ax=left, label=f"of {receipt.tokens_seen} tokens")
  shares = right.imshow(
      position_shares(receipt), aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest",
      extent=(0, receipt.tokens_seen, layers - 0.5, -0.5))
  right.set(title="positions kept (a band per layer, a row per head)", xlabel="token position", ylabel="layer",
            yticks=_some(layers))
  figure.colorbar(shares, ax=right, label="share kept")
  figure.suptitle(title)
  try:
    figure.savefig(path, dpi=100, format="png")
  except OSError as e:
    raise InputError(f"cannot write {path}: {e.strerror}; give a path that can be written") from None


def _some(count: int) -> range:
  """At most about 16 ticks."""
  return range(0, count, max(1, count // 16))
