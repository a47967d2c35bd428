"""Figures of a run: view pairs, curves, a t-SNE map, confusions, mistakes; and of a study: heat maps, bars, lines."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # The machines that train have no display.

import numpy as np
from etils import epath
from matplotlib import pyplot as plt
from sklearn import decomposition, manifold

# Okabe and Ito's colours first, which colour-blind readers can tell apart; then others.
COLORS = (
  *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
  *("#F0E442", "#000000", "#8C564B", "#999999", "#6A3D9A", "#B15928"),
)

PAIRS = 12  # Image pairs that fit into one row.
COLUMNS = 3  # Panels of curves per row.
MOST_NUMBERS, MOST_NAMES = 20, 60  # Classes of a confusion matrix that are drawn with numbers, with names.


def varied(labels: np.ndarray, count: int) -> np.ndarray:
  """Returns at most `count` row numbers of labels i32[N]: one of each class in turn, where the rows have several.

  Within a class, and where there are no labels (-1), rows are evenly spaced: neighbours may be of one folder.
  """
  classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
  most = -(-count // max(1, len(classes)))
  spread = lambda rows, most: rows[np.arange(most) * len(rows) // most]
  turns = itertools.zip_longest(*(spread(rows, min(most, len(rows))) for rows in classes))
  return np.array([row for turn in turns for row in turn if row is not None][:count], int)


def view_pairs(views: np.ndarray, path: str) -> None:
  """Draws the first PAIRS image pairs f32[N, 2, H, W, 3] in [0, 1], or uint8, as the network sees them, in columns."""
  views = np.asarray(views[:PAIRS])
  figure, axes = plt.subplots(2, len(views), figsize=(1.1 * len(views), 2.6), squeeze=False)
  for column, pair in enumerate(views):
    for row, image in enumerate(pair):
      axes[row, column].imshow(image, interpolation="nearest", vmin=0, vmax=1)
      axes[row, column].set(xticks=[], yticks=[])
  axes[0, 0].set_ylabel("view 1")
  axes[1, 0].set_ylabel("view 2")
  _save(figure, path, "Positive pairs: each column is one image, augmented twice")


def curves(
  rows: Sequence[Mapping[str, float]],
  panels: Mapping[str, Mapping[str, str]],
  path: str,
  *,
  title: str,
  levels: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
  """Draws metrics over steps, one panel per quantity.

  `rows` are metric rows, each with `step`; `panels` is heading -> {metric name: label}, `levels` is heading -> {label:
  value of a horizontal line}.
  """
  columns = min(len(panels), COLUMNS)
  rows_of_panels = -(-len(panels) // columns)
  size = (4.2 * columns, 4.4 * rows_of_panels)
  figure, axes = plt.subplots(rows_of_panels, columns, figsize=size, squeeze=False)
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  for axis, (heading, names) in zip(axes.flat, panels.items(), strict=False):
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
      points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
      if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=label, color=color, marker="o" if len(points) < 3 else None)
    for label, value in (levels or {}).get(heading, {}).items():
      axis.axhline(value, label=label, color="black", linestyle="--", linewidth=1)
    axis.set(title=heading, xlabel="step")
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
  _save(figure, path, title)


def embedding_map(features: np.ndarray, labels: np.ndarray, names: Sequence[str], path: str, *, title: str) -> None:
  """Draws a t-SNE map of features f32[N, D], coloured by their labels i32[N]; `names` are those of the classes."""
  x = np.asarray(features, np.float32)
  labels = np.asarray(labels)
  # PCA first: distances in 30 dimensions are less noisy, and t-SNE takes seconds instead of minutes.
  x = decomposition.PCA(min(30, *x.shape), random_state=0).fit_transform(x)
  perplexity = min(30.0, max(2.0, (len(x) - 1) / 4))
  flat = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=750).fit_transform(x)
  figure, axis = plt.subplots(figsize=(7.5, 6))
  for label in np.unique(labels):
    inside = labels == label
    name = names[label] if 0 <= label < len(names) else str(label)
    axis.scatter(*flat[inside].T, s=9, color=COLORS[label % len(COLORS)], label=name, alpha=0.8, linewidths=0)
  if len(np.unique(labels)) <= len(COLORS):
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
  axis.set(xticks=[], yticks=[], title=title)
  _save(figure, path)


def heat_maps(
  panels: Mapping[str, Mapping[tuple[str, str], float | None]],
  rows: Sequence[str],
  columns: Sequence[str],
  path: str,
  *,
  title: str,
  unit: str,
  axes: tuple[str, str],
) -> None:
  """Draws tables of percentages as coloured cells with numbers and a column of row averages; missing cells are grey.

  `panels` is heading -> {(row, column): %, or None if missing}; `axes` are the names of rows and columns.
  """
  size = (1.05 * (len(columns) + 2.6) * len(panels), 0.72 * len(rows) + 2.0)
  figure, drawn = plt.subplots(1, len(panels), figsize=size, squeeze=False)
  for axis, (heading, values) in zip(drawn[0], panels.items(), strict=True):
    table = np.array([[values.get((row, column)) for column in columns] for row in rows], float)
    averages = [np.mean(row[~np.isnan(row)]) if not np.isnan(row).all() else np.nan for row in table]
    # An empty column separates the averages.
    shown = np.column_stack([table, np.full(len(rows), np.nan), averages])
    low, high = (np.nanmin(table), np.nanmax(table)) if not np.isnan(table).all() else (0.0, 1.0)
    colors = plt.get_cmap("viridis")
    axis.imshow(shown, cmap=colors, vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    for (y, x), value in np.ndenumerate(shown):
      if not np.isnan(value):
        light = (value - low) / max(high - low, 1e-6) > 0.6
        axis.text(x, y, f"{value:.1f}", ha="center", va="center", color="black" if light else "white", fontsize=10)
      elif x != len(columns):
        axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#d9d9d9", edgecolor="white"))
    axis.set(title=heading, xlabel=axes[1], ylabel=axes[0])
    axis.set_xticks([*range(len(columns)), len(columns) + 1], [*columns, "average"], rotation=35, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
  _save(figure, path, f"{title}: {unit}")


def bars(panels: Mapping[str, Mapping[str, float | None]], path: str, *, title: str, unit: str, axis_name: str) -> None:
  """Draws one bar with its number per setting; a missing setting keeps its place.

  `panels` is heading -> {setting: %, or None if missing}; the first one is in colour, the others (published) are grey.
  """
  most = max(len(values) for values in panels.values())
  figure, axes = plt.subplots(1, len(panels), figsize=((0.95 * most + 1.5) * len(panels), 4.4), squeeze=False)
  for number, (axis, (heading, values)) in enumerate(zip(axes[0], panels.items(), strict=True)):
    heights = np.array(list(values.values()), float)
    drawn = axis.bar(range(len(values)), np.nan_to_num(heights), color="#999999" if number else COLORS[0], width=0.7)
    axis.bar_label(drawn, [f"{value:.1f}" if not np.isnan(value) else "–" for value in heights], padding=2)
    axis.set(title=heading, xlabel=axis_name, ylabel=unit)
    axis.set_xticks(range(len(values)), [name.replace("_", " ") for name in values], rotation=30, ha="right")
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
  _save(figure, path, title)


def lines(
  panels: Mapping[str, Mapping[tuple[str, str], Mapping[str, float | None]]],
  path: str,
  *,
  title: str,
  unit: str,
  axis_name: str,
  legend: str,
) -> None:
  """Draws lines over a logarithmic axis.

  `panels` is heading -> {(line, variant): {x: %, or None if missing}}; the variants of a line have the same colour.
  `axis_name` is that of x, `legend` that of the setting which differs between lines.
  """
  figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.8), squeeze=False)
  for axis, (heading, families) in zip(axes[0], panels.items(), strict=True):
    names, variants = (list(dict.fromkeys(part)) for part in zip(*families, strict=True))
    ticks = {}
    for (name, variant), values in families.items():
      points = sorted((float(x), y) for x, y in values.items() if y is not None)
      ticks |= {float(x): x for x in values}
      x, y = zip(*points or [(np.nan, np.nan)], strict=True)
      style = {"linestyle": ("-", "--", ":")[variants.index(variant) % 3], "marker": "os^"[variants.index(variant) % 3]}
      axis.plot(x, y, color=COLORS[names.index(name) % len(COLORS)], label=f"{name} {variant}".strip(), **style)
    axis.set(title=heading, xlabel=axis_name, ylabel=unit, xscale="log")
    axis.set_xticks(sorted(ticks), [ticks[x] for x in sorted(ticks)])
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(title=legend, frameon=False, fontsize=8, ncols=len(variants))
  _save(figure, path, title)


def confusion(counts: np.ndarray, names: Sequence[str], path: str, *, title: str) -> None:
  """Draws how many images i[K, K] of a class (row) are taken for another (column), coloured by the row's share."""
  classes = len(names)
  # In numbers as far as they can be read, by name as far as the names have room.
  side = float(np.clip(0.5 * classes, 3.5, 14))
  figure, axis = plt.subplots(figsize=(side + 2, side + 1))
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  drawn = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
  if classes <= MOST_NUMBERS:
    for (row, column), count in np.ndenumerate(counts):
      if count:
        color = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
  if classes <= MOST_NAMES:
    axis.set_xticks(range(classes), [short(name) for name in names], rotation=90)
    axis.set_yticks(range(classes), [short(name) for name in names])
    axis.tick_params(length=0, labelsize=9 if classes <= MOST_NUMBERS else 7)
  axis.set(xlabel="predicted class", ylabel="true class")
  figure.colorbar(drawn, label="% of the true class's images", fraction=0.046, pad=0.04)
  _save(figure, path, title)


def captioned(images: Sequence[np.ndarray], captions: Sequence[str], path: str, *, title: str) -> None:
  """Draws images f32[H, W, 3] in [0, 1] or u8 in rows, each with its caption above it."""
  columns = min(len(images), PAIRS // 2)
  rows = -(-len(images) // columns)
  lines = max(caption.count("\n") + 1 for caption in captions)
  size = (2.1 * columns, (1.7 + 0.16 * lines) * rows + 0.4)
  figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.set_visible(False)
  for axis, image, caption in zip(axes.flat, images, captions, strict=False):
    axis.set_visible(True)
    axis.imshow(np.clip(image, 0, 1) if np.issubdtype(image.dtype, np.floating) else image, interpolation="nearest")
    axis.set_title(caption, fontsize=8)
  _save(figure, path, title)


def short(name: str, most: int = 24) -> str:
  """Returns a name, cut in its middle where it is longer than `most` letters: names often differ at their ends."""
  return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"


def _save(figure, path: str, title: str = "") -> None:
  if title:
    figure.suptitle(title)
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  figure.tight_layout()
  with target.open("wb") as file:
    figure.savefig(file, dpi=130, bbox_inches="tight", format="png")
  plt.close(figure)
