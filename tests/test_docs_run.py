"""README, docs and docstrings of the experiments: every block runs as it stands, in a fresh folder, on tiny data.

A block is an indented paragraph that begins with a command, or a fence of `sh` or `python`. Those of a page run in
order in one folder with relative paths. A block that cannot run here has a comment above: `<!-- not run: REASON -->`.

What is substituted: sizes (SMALLER, of the network, the batch and the run) by overrides behind the command; data sets
that are not here by the built-in shapes; and what earlier pages made, or the reader has (`runs/cifar10`, `my/images`,
`new/photos`), is put into the folder first.
"""

import ast
import contextlib
import dataclasses
import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, TINY, read_by, sizes

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax.data import shapes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
COMMANDS = ("simclr-jax", "python", "python3", "pip", "make", "launch/", "docker", "sh", "tensorboard", "git", "cd")
COMMANDS += ("curl", "export", "pytest", "gcloud", "gsutil", "kubectl", "sbatch", "tfds", "uv", "conda")
MARKER = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)

# Of every run that is given an experiment; the batch has two steps of an epoch of the photographs.
SIZES = [text for text in TINY if not text.startswith(("--config=", "--config.data."))]
SMALLER = [
  *SIZES,
  "--config.model.small_images=true",
  "--config.model.sk_ratio=0",
  "--config.total_steps=2",
  "--config.data.image_size=16",
]
# Data sets that are not here.
SHAPES = [
  "--config.data.source=shapes",
  "--config.data.examples=80",
  "--config.data.resident=true",
  "--config.data.eval_split=test",
]
# Lines of docstrings, which have no comments: what runs them.
ELSEWHERE = {
  "simclr-jax demo --config=demo --workdir=runs/demo": "tests/test_demo.py",
  "simclr-jax study --study=augmentations --config=study_demo --workdir=runs/heatmap": "tests/test_study_job.py",
}
# Commands of the README that install; the tests of the package and of scripts/setup.sh run what they stand for.
INSTALLS = ("pip", "python3 -m venv")


@dataclasses.dataclass
class Block:
  kind: str  # sh or python
  text: str
  reason: str  # Why it is not run, or "".


def blocks_of(page: pathlib.Path) -> list[Block]:
  """Returns the blocks of a page in order."""
  text = page.read_text()
  if page.suffix == ".py":
    text = re.sub(r"(?m)^  ", "    ", ast.get_docstring(ast.parse(text)))
  found, reason = [], ""
  pattern = r"(?ms)<!--.*?-->|^```(\w*)\n(.*?)^```$|(?<=\n\n)    \S[^\n]*\n?(?:    [^\n]*\n?)*"
  for match in re.finditer(pattern, text):
    piece = match[0]
    if marker := MARKER.fullmatch(piece):
      reason = " ".join(marker[1].split())
      continue
    if piece.startswith("<!--"):
      continue
    if piece.startswith("```"):
      kind, body = match[1], match[2]
      assert kind in ("sh", "python", "json", "text", "yaml"), f"{page.name}: a fence of {kind or 'nothing'}"
    else:
      kind, body = "sh", re.sub(r"(?m)^    ", "", piece)
      is_command = body.split()[0] in COMMANDS or body.startswith("launch/") or re.match(r"[A-Z_]+=\S+ ", body)
      kind = kind if is_command else "text"
    if kind in ("sh", "python"):
      found.append(Block(kind, body, reason))
    reason = ""
  return found


def lines_of(block: Block) -> list[list[str]]:
  """Returns the commands of a block, each in words, without comments and the spaces of continuations."""
  text = re.sub(r"\\\n *", "", block.text)
  return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def home(tmp_path, monkeypatch, request, pretrained, finetuned, linear):
  """A fresh current folder with what the pages take for granted."""
  images, labels = shapes.draw("test", 40, 16, 0)
  for number, (image, label) in enumerate(zip(images, labels % 2, strict=True)):
    path = tmp_path / "my/images" / ("cat", "dog")[label] / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).resize((20, 20)).save(path)
  for number in range(3):
    path = tmp_path / "new/photos" / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images[number]).save(path)
  np.savez(tmp_path / "cifar10.npz", train_images=images[:32], train_labels=labels[:32] % 10,
           test_images=images[32:], test_labels=labels[32:] % 10)  # fmt: skip
  (tmp_path / "DIR").mkdir()
  (tmp_path / "runs").mkdir()
  made = {"cifar10": pretrained, "imagenet": pretrained, "mine": pretrained, "cifar10-1pct": finetuned}
  for name, run in made.items():
    (tmp_path / "runs" / name).symlink_to(run)
  # Of docstrings: a teacher has a classifier, what is fine-tuned a projection head.
  page = request.node.callspec.params["page"]
  (tmp_path / "RUN").symlink_to(finetuned if "distill" in page.name else pretrained)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def options_for(words: list[str]) -> list[str]:
  """Returns what is put behind a command to make it small."""
  if "study" in words:
    # One cell of the grid.
    return [*SMALLER, *SHAPES, "--rows=crop", "--columns=color"]
  given = [word for word in words if word.startswith("--config=")]
  if not given:
    # The other sizes come with the checkpoint.
    return sizes(words[1])
  queue = ["--config.memory.size=32"] if given[0].endswith("_memory") else []
  own_images = given[0].startswith("--config=folder") or any("data.source=arrays" in word for word in words)
  return read_by(words[1], [*SMALLER, *queue, *([] if own_images else SHAPES)])


def run_command(words: list[str]) -> None:
  """Runs one line of a page."""
  if " ".join(words).startswith(INSTALLS):
    for name in words:
      assert not name.endswith(".txt") or (ROOT / name).exists()
    return
  if words[:3] == ["python", "-m", "simclr_jax"]:
    words = ["simclr-jax", *words[3:]]
  assert words[0] == "simclr-jax", f"no test runs {words}: mark the block, or teach this test to"
  for word in words:
    name = word.removeprefix("--workdir=")
    # A page that makes a run itself makes it anew.
    if word.startswith("--workdir=") and (link := pathlib.Path(name)).is_symlink():
      link.unlink()
  assert command.main([*words[1:], *options_for(words)]) == 0, words


@contextlib.contextmanager
def small_configs():
  """Makes `simclr_jax.load_config` give small runs on the shapes."""
  load = simclr_jax.load_config

  def smaller(name, **overrides):
    more = [*options_for(["simclr-jax", "pretrain", f"--config={name}"])]
    typed = dict(word.removeprefix("--config.").split("=", 1) for word in more)
    return load(name, **{**overrides, **typed})

  simclr_jax.load_config = smaller
  try:
    yield
  finally:
    simclr_jax.load_config = load


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_as_they_stand(page, home):
  names = {"__name__": "page"}
  for block in blocks_of(page):
    if block.reason or block.text.strip() in ELSEWHERE:
      continue
    if block.kind == "sh":
      for words in lines_of(block):
        run_command(words)
    else:
      with small_configs():
        exec(compile(block.text, page.name, "exec"), names)
  # Nothing is written beside what the commands name.
  assert {path.name for path in home.iterdir()} <= {"my", "new", "runs", "DIR", "RUN", "cifar10.npz"}


def test_what_is_not_run_has_a_reason_that_says_why():
  reasons = {(page.name, block.text): block.reason for page in PAGES for block in blocks_of(page)}
  left_out = {key: reason for key, reason in reasons.items() if reason}
  # Most blocks run.
  assert len(left_out) < len(reasons) / 2
  assert all(len(reason.split()) >= 4 for reason in left_out.values()), left_out


def test_every_fence_and_command_is_a_block():
  """No command hides where `blocks_of` does not look."""
  for page in PAGES:
    text = page.read_text()
    text = ast.get_docstring(ast.parse(text)) if page.suffix == ".py" else text
    seen = "\n".join(block.text for block in blocks_of(page))
    for line in re.findall(r"(?m)^ *((?:simclr-jax|python -m simclr_jax|launch/\w+\.sh) .+)$", text):
      if "JOB" not in line and "simclr-jax configs" not in line:
        assert line.strip() in seen, (page.name, line)
