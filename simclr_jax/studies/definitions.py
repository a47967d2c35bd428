"""The studies of the v1 paper as data: what varies, the config of each cell, and the published ImageNet accuracies."""

import dataclasses
import fractions
from collections.abc import Callable
from typing import Any

from simclr_jax import errors
from simclr_jax.data import composition

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Axis:
  """A setting that varies along the rows or the columns of a study."""

  name: str  # in figures and messages
  labels: tuple[str, ...] = ("",)  # of its values, or factors that multiply the key `factor_of` of the base config
  number: type | None = None  # of what `--rows` and `--columns` accept; None if only `labels` are allowed
  factor_of: str = ""

  def default(self, base: Overrides) -> tuple[str, ...]:
    """Returns the labels of a study without --rows or --columns; `base` is the flat base config."""
    if not self.factor_of:
      return self.labels
    return tuple(f"{float(base[self.factor_of] * fractions.Fraction(label)):g}" for label in self.labels)

  def chosen(self, text: str, option: str) -> tuple[str, ...]:
    """Returns the labels in the text of the option `rows` or `columns`, each once.

    UserError: a label is not a value of this axis.
    """
    return tuple(dict.fromkeys(self._chosen(part.strip(), option, text) for part in text.split(",")))

  def _chosen(self, part, option, text):
    if part in self.labels and not self.factor_of:
      return part
    if self.number is not None:
      try:
        value = self.number(part)
      except ValueError:
        value = 0
      if 0 < value < float("inf"):
        return f"{value:g}" if self.number is float else str(value)
      near, wanted = "", f"positive {'whole ' if self.number is int else ''}numbers with commas between"
      wanted += "" if self.factor_of else f", such as {','.join(self.labels)}"
    else:
      near = errors.nearest(part, self.labels)
      wanted = f"some of {', '.join(label for label in self.labels if label) or 'nothing: it has one value'}"
    raise errors.UserError(f"--{option}={text}: {part!r} is no {self.name}{near}; give {wanted}.")


@dataclasses.dataclass(frozen=True)
class Study:
  """A grid of runs."""

  title: str  # of the figure
  source: str  # figure or table of the paper
  rows: Axis
  columns: Axis
  overrides: Callable[[str, str, str, Overrides], Overrides]  # (row, column, variant, flat base config) -> by key
  chart: str  # heat_map | bars | lines_over_rows | lines_over_columns
  # Accuracies in %, by (row, column, variant).
  published: dict[tuple[str, str, str], float] = dataclasses.field(default_factory=dict)
  published_is: str = ""  # the published experiment in a few words
  variants: tuple[str, ...] = ("",)  # labels of a third setting; each cell is run with every one
  # (row, column, variant) -> folder name of the cell; cells with the same name share one run.
  folder: Callable[[str, str, str], str] = lambda *labels: "-".join(label for label in labels if label)


def _table(columns, rows, variant=""):
  """Returns {(row, column, variant): value}, given {row: values in the order of `columns`}."""
  pairs = ((row, column, value) for row, values in rows.items() for column, value in zip(columns, values, strict=True))
  return {(row, column, variant): value for row, column, value in pairs}


def _column(rows, column=""):
  return {(row, column, ""): value for row, value in rows.items()}


# Section 3.1.
AUGMENTATIONS = Study(
  title="Composition of augmentations",
  source="v1 figure 5",
  rows=Axis("first operation", composition.OPERATIONS),
  columns=Axis("second operation", composition.OPERATIONS),
  overrides=lambda first, second, *_: {"augment.compose": first if first == second else f"{first},{second}"},
  chart="heat_map",
  published=_table(
    composition.OPERATIONS,
    {
      "crop": (33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2),
      "cutout": (32.2, 25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
      "color": (55.8, 35.5, 18.8, 21.0, 11.4, 16.5, 20.8),
      "sobel": (46.2, 40.6, 20.9, 4.0, 9.3, 6.2, 4.2),
      "noise": (38.8, 25.8, 7.5, 7.6, 9.8, 9.8, 9.6),
      "blur": (35.1, 25.2, 16.6, 5.8, 9.7, 2.6, 6.7),
      "rotate": (30.0, 22.5, 20.7, 4.3, 9.7, 6.5, 2.6),
    },
  ),
  published_is="ImageNet, ResNet-50",
)

COLOR_STRENGTH = Study(
  title="Strength of the colour distortion",
  source="v1 table 1",
  rows=Axis("colour strength", ("0.125", "0.25", "0.5", "1", "1+blur"), float),
  columns=Axis("value"),
  overrides=lambda strength, *_: {
    "augment.color_strength": float(strength.removesuffix("+blur")),
    "augment.blur_probability": 0.5 if strength.endswith("+blur") else 0.0,
  },
  chart="bars",
  published=_column({"0.125": 59.6, "0.25": 61.0, "0.5": 62.6, "1": 63.2, "1+blur": 64.5}),
  published_is="ImageNet, ResNet-50, 100 epochs",
)

# Batch size -> accuracies after these epochs, with the linear and with the square-root scaling.
EPOCHS = ("100", "200", "400", "800")
LINEAR = {
  "256": (57.5, 61.9, 64.7, 66.6),
  "512": (60.7, 64.0, 66.2, 67.8),
  "1024": (62.8, 65.3, 67.2, 68.5),
  "2048": (64.0, 66.1, 68.1, 68.9),
  "4096": (64.6, 66.5, 68.2, 68.9),
  "8192": (64.8, 66.6, 67.8, 69.0),
}
SQUARE_ROOT = {
  "256": (62.8, 64.3, 65.7, 66.5),
  "512": (63.8, 65.6, 66.7, 67.4),
  "1024": (64.3, 66.1, 67.2, 68.3),
  "2048": (64.7, 66.8, 67.9, 68.8),
  "4096": (64.5, 66.8, 68.0, 69.1),
  "8192": (64.8, 67.0, 68.3, 69.1),
}


def _batch_epochs(batch, epochs, scaling, base):
  # At the base config's batch size both scalings give the same rate, as the paper's 0.3 and 0.075 do at 4096.
  ratio = base["batch_size"] ** 0.5 / 256
  rate = base["optimizer.base_learning_rate"]
  if scaling != base["optimizer.scaling"]:
    rate *= ratio if scaling == "sqrt" else 1 / ratio
  length = {"batch_size": int(batch), "total_epochs": float(epochs), "total_steps": 0}
  return length | {"optimizer.scaling": scaling, "optimizer.base_learning_rate": rate}


BATCH_EPOCHS = Study(
  title="Batch size, epochs and the scaling of the learning rate",
  source="v1 figure 9 and table B.1",
  rows=Axis("batch size", ("1/4", "1/2", "1", "2"), int, factor_of="batch_size"),
  columns=Axis("epochs", ("1/2", "1", "2"), float, factor_of="total_epochs"),
  overrides=_batch_epochs,
  chart="lines_over_rows",
  published=_table(EPOCHS, LINEAR, "linear") | _table(EPOCHS, SQUARE_ROOT, "sqrt"),
  published_is="ImageNet, ResNet-50",
  variants=("linear", "sqrt"),
)

TEMPERATURE = Study(
  title="Temperature and normalisation of the embeddings",
  source="v1 table 5",
  rows=Axis("temperature", ("0.05", "0.1", "0.5", "1", "10", "100"), float),
  columns=Axis("embeddings", ("normalized", "plain")),
  overrides=lambda temperature, embeddings, *_: {
    "loss.temperature": float(temperature),
    "loss.normalize": embeddings == "normalized",
  },
  chart="lines_over_rows",
  published=_column({"0.05": 59.7, "0.1": 64.4, "0.5": 60.7, "1": 58.0}, "normalized")
  | _column({"10": 57.2, "100": 57.0}, "plain"),
  published_is="ImageNet, ResNet-50, 100 epochs",
)


def _head(kind, dimension, variant, base):
  layers = {"none": 0, "linear": 1, "nonlinear": max(2, base["head.layers"])}[kind]
  return {"head.layers": layers} | ({"head.out_dim": int(dimension)} if layers else {})


HEAD = Study(
  title="Projection head",
  source="v1 figure 8",
  rows=Axis("projection head", ("none", "linear", "nonlinear")),
  columns=Axis("output dimension", ("32", "64", "128", "256"), int),
  overrides=_head,
  chart="lines_over_columns",
  folder=lambda kind, dimension, variant: kind if kind == "none" else f"{kind}-{dimension}",
)

LOSS = Study(
  title="Loss",
  source="v1 table 4; DCL is not in the paper",
  rows=Axis("loss", ("nt_xent", "nt_logistic", "nt_logistic_semi_hard", "margin", "margin_semi_hard", "dcl")),
  columns=Axis("value"),
  overrides=lambda kind, column, variant, base: {"loss.kind": kind},
  chart="bars",
  published=_column(
    {"nt_xent": 63.9, "nt_logistic": 51.6, "nt_logistic_semi_hard": 57.9, "margin": 50.9, "margin_semi_hard": 57.5}
  ),
  published_is="ImageNet, ResNet-50, 100 epochs",
)

ENCODER = Study(
  title="Depth and width of the encoder",
  source="v1 figure 7; published numbers from table 6",
  rows=Axis("depth", ("18", "34", "50", "101", "152"), int),
  columns=Axis("width", ("1", "2", "4"), float),
  overrides=lambda depth, width, variant, base: {"model.depth": int(depth), "model.width": float(width)},
  chart="lines_over_columns",
  published=_table(("1", "2", "4"), {"50": (69.3, 74.2, 76.5)}),
  published_is="ImageNet, 1000 epochs",
)

STUDIES = {
  "augmentations": AUGMENTATIONS,
  "color_strength": COLOR_STRENGTH,
  "batch_epochs": BATCH_EPOCHS,
  "temperature": TEMPERATURE,
  "head": HEAD,
  "loss": LOSS,
  "encoder": ENCODER,
}
