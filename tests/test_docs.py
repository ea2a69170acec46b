"""What the guide shows runs: every python block of a page, in the order of the page."""

import re
from pathlib import Path

import pytest

import geoedit
import manifolds
import peft_analysis

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
PRELUDE = """
import torch
import geoedit
model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
months = concept = world.concepts["months"]
prompts = months.prompts()
labels = [prompt.value for prompt in prompts]
site = geoedit.Site(block=2, stream="residual_out", token="value")
sites = [site]
states = geoedit.collect(model, tokenizer, prompts, [site])[site]
direction = states[0] - states[-1]
spelled = geoedit.tokens.spellings(tokenizer, months.values)
edit = geoedit.LinearSteer(site=site, direction=direction, scale=1.0, value_ids=spelled)
inputs = tokenizer([prompts[0].text], return_tensors="pt")
"""


def blocks(page: Path) -> list[str]:
    """The python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [path.stem for path in sorted(GUIDE.glob("*.md")) if blocks(path)])
def test_guide_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml = re.search(r"```yaml\n(.*?)```", (GUIDE / "concept-files.md").read_text(), flags=re.DOTALL)
    (tmp_path / "sizes.yaml").write_text(yaml[1])
    namespace: dict[str, object] = {}
    exec(compile(PRELUDE, "prelude", "exec"), namespace)
    for number, block in enumerate(blocks(GUIDE / f"{page}.md"), start=1):
        exec(compile(block, f"{page}.md, block {number}", "exec"), namespace)


@pytest.mark.parametrize("floor", ["manifolds", "peft_analysis", "geoedit"])
def test_architecture_names_every_module(floor):
    text = (GUIDE.parent / "architecture.md").read_text()
    package = GUIDE.parents[1] / floor
    hidden = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    names = [f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir()]
    assert [name for name in names if name.strip("/") not in hidden and f"`{name}`" not in text] == []


@pytest.mark.parametrize("floor", [manifolds, peft_analysis, geoedit])
def test_api_page_lists_every_public_name(floor):
    text = (GUIDE.parent / "api" / f"{floor.__name__}.md").read_text()
    assert [name for name in floor.__all__ if f"`{name}`" not in text] == []
