"""docs/serving.md says what the code does."""

import pathlib
import re

from kvc_jax.serving.protocol import FIELDS

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_field_stands_in_the_table():
  rows = re.findall(r"^\| `(\w+)` \| (both|completions|chat) \| (.+) \|$", PAGE, re.MULTILINE)
  wanted = [(name, "both" if len(f.endpoints) == 2 else f.endpoints[0], f.about) for name, f in FIELDS.items()]
  assert rows == wanted


def test_every_metric_stands_in_the_table(server):
  found = set(re.findall(r"^# TYPE (kvc_\w+) ", server.get("/metrics"), re.MULTILINE))
  found = {name for name in found if not name.endswith("_created")}
  table = PAGE[PAGE.index("## Metrics") :]
  assert found == set(re.findall(r"`(kvc_\w+)", table[: table.index("## How")]))


def test_the_python_example_runs(engine, capsys):
  from running_server import serving

  (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
  with serving(engine, model="stories260K") as server:
    scope = {"__name__": "example"}
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "serving.md", "exec"), scope)
    scope["client"].close()
  assert "rate_reached" in capsys.readouterr().out
