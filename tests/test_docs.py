"""The Python in README and docs runs as it stands."""

import pathlib
import re

import pytest

import kvc_jax
from kvc_jax.eviction.names import ALLOCATIONS, PROFILE
from kvc_jax.eviction.rules import RULES

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    "README.md", "docs/jit-api.md", "docs/policies.md", "docs/write-your-own-policy.md", "docs/evaluation.md"]


def _blocks(page):
  return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PAGES for i in range(len(_blocks(page)))])
def test_example_runs(page, number, monkeypatch):
  monkeypatch.chdir(ROOT)
  code = _blocks(page)[number]
  exec(compile(code, f"{page}, example {number}", "exec"), {"__name__": "example"})


def test_the_table_of_policies_has_every_name():
  page = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| `([a-z0-9-]+)`, `(\w+)` \|", page, re.MULTILINE)
  assert sorted(rows) == sorted((name, rule.__name__) for name, rule in RULES.items())
  assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)) == {*ALLOCATIONS, PROFILE}


def test_links_between_pages_lead_somewhere():
  for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
      assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_public_names_resolve():
  for name in kvc_jax.__all__:
    assert getattr(kvc_jax, name).__name__ == name
  assert set(kvc_jax.__all__) == set(kvc_jax._HOMES)
  with pytest.raises(AttributeError, match="no attribute 'Llm'"):
    _ = kvc_jax.Llm
