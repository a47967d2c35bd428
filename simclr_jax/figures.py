"""The pictures of a run: view pairs, curves, a map of the features."""

import matplotlib

matplotlib.use("Agg")  # No screen on the machines that train.

import numpy as np
from etils import epath
from matplotlib import pyplot as plt
from sklearn import decomposition, manifold

# The order keeps neighbours apart for colour-blind readers too (Okabe and Ito's set, then greys).
COLORS = (
  *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
  *("#F0E442", "#000000", "#8C564B", "#999999", "#6A3D9A", "#B15928"),
)


PAIRS = 12  # What fits into one row.


def view_pairs(views, path: str, *, pairs: int = PAIRS) -> None:
  """Draws image pairs as the network sees them, one column a pair.

  Args:
    views: f32[N, 2, H, W, 3] in [0, 1] or uint8.
    path: of the PNG.
    pairs: how many at most.
  """
  views = np.asarray(views[:pairs])
  figure, axes = plt.subplots(2, len(views), figsize=(1.1 * len(views), 2.6), squeeze=False)
  for column, pair in enumerate(views):
    for row, image in enumerate(pair):
      axes[row, column].imshow(image, interpolation="nearest", vmin=0, vmax=1)
      axes[row, column].set(xticks=[], yticks=[])
  axes[0, 0].set_ylabel("view 1")
  axes[1, 0].set_ylabel("view 2")
  figure.suptitle("Positive pairs: each column is one image, augmented twice")
  _save(figure, path)


def curves(rows: list[dict[str, float]], panels: dict[str, dict[str, str]], path: str, *, title: str) -> None:
  """Draws metrics over steps, one panel a quantity.

  Args:
    rows: metric rows with `step`.
    panels: panel title -> {metric name: label}.
    path: of the PNG.
    title: above the panels.
  """
  figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4), squeeze=False)
  for axis, (heading, names) in zip(axes[0], panels.items(), strict=True):
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
      points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
      if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=label, color=color, marker="o" if len(points) < 3 else None)
    axis.set(title=heading, xlabel="step")
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
  figure.suptitle(title)
  _save(figure, path)


def embedding_map(features, labels, names, path: str, *, title: str, seed: int = 0) -> None:
  """Draws a t-SNE map of features, coloured by class.

  Args:
    features: f32[N, D].
    labels: i32[N].
    names: class names, by label.
    path: of the PNG.
    title: above the map.
    seed: of t-SNE.
  """
  x = np.asarray(features, np.float32)
  labels = np.asarray(labels)
  # PCA first: distances in a few dozen directions are less noisy, and t-SNE takes seconds instead of minutes.
  x = decomposition.PCA(min(30, *x.shape), random_state=seed).fit_transform(x)
  perplexity = min(30.0, max(2.0, (len(x) - 1) / 4))
  flat = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=seed, max_iter=750).fit_transform(x)
  figure, axis = plt.subplots(figsize=(7.5, 6))
  for label in np.unique(labels):
    inside = labels == label
    name = names[label] if 0 <= label < len(names) else str(label)
    axis.scatter(*flat[inside].T, s=9, color=COLORS[label % len(COLORS)], label=name, alpha=0.8, linewidths=0)
  if len(np.unique(labels)) <= len(COLORS):
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
  axis.set(xticks=[], yticks=[], title=title)
  _save(figure, path)


def _save(figure, path: str) -> None:
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  figure.tight_layout()
  with target.open("wb") as file:
    figure.savefig(file, dpi=130, bbox_inches="tight", format="png")
  plt.close(figure)
