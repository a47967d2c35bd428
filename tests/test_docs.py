"""README, docs and docstrings of the experiments: links resolve, and commands, keys and files exist."""

import ast
import pathlib
import re
import shlex

import pytest

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import jobs
from simclr_jax.keys import KEYS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted((ROOT / "configs").glob("*.py"))
RUN_KEYS = ("checkpoint", "distill.teacher")
SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name}

in_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
in_texts = pytest.mark.parametrize("page", [*PAGES, *EXPERIMENTS], ids=lambda page: page.stem)


def text_of(page):
  text = page.read_text()
  return ast.get_docstring(ast.parse(text)) if page.suffix == ".py" else text


def spans_of(page):
  """Returns the code spans of a page."""
  return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", text_of(page)))


def commands_of(page):
  """Returns [job, argument, ...] of each command of a page, in blocks and in code spans; no usage lines."""
  lines = re.findall(r"(?m)^(?:    |  )\S.*$", re.sub(r"\\\n *", "", text_of(page)))
  found = []
  for line in [*lines, *(span for span in spans_of(page) if span.startswith(("simclr-jax", "python -m simclr_jax")))]:
    match = re.search(r"(?:^| )(?:simclr-jax|python -m simclr_jax) (.+)$", line)
    if match and not re.search(r"\bJOB\b|=NAME\b", line):
      found.append(shlex.split(match[1], comments=True))
  if page.name == "README.md":
    table = re.findall(r"(?m)^\| `(\w+)` \|.*\| `(--[^`]+)` \|$", page.read_text())
    assert {job for job, _ in table} == set(jobs.JOBS)
    found += [[job, *shlex.split(arguments)] for job, arguments in table]
  return found


def key_in(span):
  """Returns the config key that a code span such as `config.batch_size` or `loss.margin=0.8` starts with, or ""."""
  name = re.match(r"[\w.]*(?![\w.(/])|", span)[0].rstrip(".")
  if re.match(r"config\.(?!json)", name):
    return name.removeprefix("config.")
  return name if name.partition(".")[0] in SECTIONS and "." in name else ""


def anchors_of(page):
  headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_pages
def test_links_and_images_resolve(page):
  for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if link.startswith("https://"):
      continue
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), link
    assert not anchor or anchor in anchors_of(target), link


@in_pages
def test_files_that_a_page_names_exist(page):
  folders = "simclr_jax|tests|configs|scripts|launch|results|docs|benchmarks"
  named = [span for span in spans_of(page) if re.fullmatch(rf"(?:{folders})/[\w./-]*", span)]
  assert [name for name in named if not (ROOT / name).exists()] == []


@in_texts
def test_config_keys_that_a_page_names_exist(page):
  named = re.findall(r"--config\.([a-z_]\w*(?:\.\w+)*)", text_of(page)) + list(
    filter(None, map(key_in, spans_of(page)))
  )
  assert [name for name in named if name not in KEYS.keys() | SECTIONS] == []


@in_texts
def test_commands_of_a_page_parse_and_their_config_loads(page):
  for job, *arguments in commands_of(page):
    assert job in (*jobs.JOBS, *command.OTHERS), job
    options, overrides = command.parse(job, arguments)
    if not arguments:
      continue  # A mention of the job in a sentence.
    if job in command.OTHERS or job in jobs.WITHOUT_CONFIG:
      assert not overrides or job == "config"
      continue
    assert "config" in options or overrides.keys() & set(RUN_KEYS), (job, arguments)
    # Where a run's own config is used, any experiment has the same keys.
    config_lib.load(options.get("config", "cifar10"), overrides)
    assert options.get("workdir") or job in command.DEFAULT_WORKDIR or "profile_input" in options, arguments


def test_the_pages_have_commands_of_every_job():
  named = {arguments[0] for page in PAGES for arguments in commands_of(page)}
  assert named >= {*jobs.JOBS, "configs", "config"}


@in_pages
def test_python_blocks_parse_and_use_public_names(page):
  for block in re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text()):
    nodes = ast.walk(ast.parse(block))
    used = {
      node.attr
      for node in nodes
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "simclr_jax"
    }
    assert used <= set(simclr_jax.__all__)


@in_pages
def test_flags_after_a_job_are_options_of_it(page):
  # Code spans such as `linear_eval --config...` that leave out the program's name.
  for job, *arguments in (shlex.split(span) for span in spans_of(page) if span.split(" ")[0] in jobs.JOBS):
    command.parse(job, arguments)


def test_every_page_is_within_reach_of_the_readme():
  reached, todo = set(), [ROOT / "README.md"]
  while todo:
    page = todo.pop()
    if page in PAGES and page not in reached:
      reached.add(page)
      todo += [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)\s#]+)", page.read_text())]
  assert set(PAGES) - reached == set()


def test_experiments_are_listed_in_their_page():
  text = (ROOT / "docs" / "experiments.md").read_text()
  assert [name for name in config_lib.bundled() if not re.search(rf"`{name}[`:]", text)] == []
