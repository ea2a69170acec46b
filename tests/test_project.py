"""The project as a whole: what is declared, pinned, packed and promised is so."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ["manifolds", "peft_analysis", "geoedit", "experiments"]
OURS = {*PACKAGES, "tests"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PROBE = """
from jaxtyping import Float
from torch import Tensor

def add(left: Float[Tensor, "batch width"], right: Float[Tensor, "batch width"]) -> Tensor:
    return left + right
"""


def tracked_files() -> list[Path]:
    """Files that git knows; skips where the tests run from an unpacked archive."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def requirements() -> dict[str, Requirement]:
    """Every direct dependency: of the packages, of the extras and of the build."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


@pytest.mark.parametrize("package", PACKAGES)
def test_import_hook_checks_shapes(package, tmp_path, monkeypatch):
    (tmp_path / "shape_probe.py").write_text(PROBE)
    home = importlib.import_module(package)
    monkeypatch.setattr(home, "__path__", [*home.__path__, str(tmp_path)])
    probe = importlib.import_module(f"{package}.shape_probe")
    monkeypatch.delitem(sys.modules, f"{package}.shape_probe")
    assert probe.add(torch.ones(2, 3), torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="width"):
        probe.add(torch.ones(2, 3), torch.ones(2, 1))


def test_fixture_models_run(tiny_model, tiny_tokenizer, device):
    prompts = ["monday comes before tuesday .", "the capital"]
    batch = tiny_tokenizer(prompts, padding=True, return_tensors="pt").to(device)
    assert batch.attention_mask.sum(1).tolist() == [5, 2]
    logits = tiny_model.to(device)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.shape == (2, 5, len(tiny_tokenizer)) and torch.isfinite(logits).all()


def test_constraints_pin_every_direct_dependency():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {}
    for line in filter(None, lines):
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
        pins[canonicalize_name(name)] = version
    wanted = requirements()
    assert set(pins) == set(wanted)
    assert [name for name in wanted if not wanted[name].specifier.contains(pins[name])] == []
    assert pins["torch"] == "2.13.0"


def imported_distributions(*folders: str) -> dict[str, list[str]]:
    """Distributions that the python files in some folders import, each with the files that do."""
    owners = metadata.packages_distributions()
    found: dict[str, list[str]] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS:
                # what is not installed here is taken to belong to a distribution of its own name
                owner = canonicalize_name(owners.get(top, [top])[0])
                found.setdefault(owner, []).append(str(path.relative_to(ROOT)))
    return found


def declared(*extras: str) -> set[str]:
    """The dependencies of the packages, and those of some extras."""
    project = PROJECT["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_packages_import_what_is_declared_and_nothing_is_declared_in_vain():
    imported = imported_distributions(*PACKAGES)
    optional = declared("real", "bench")
    assert {name: files for name, files in imported.items() if name not in declared() | optional} == {}
    assert declared() - set(imported) == set(), "in pyproject.toml's dependencies, but nothing imports it"


def test_tests_import_what_the_extra_test_installs():
    imported = imported_distributions("tests")
    assert {name: files for name, files in imported.items() if name not in declared("test", "docs")} == {}


def test_no_machine_paths_in_tracked_files():
    pattern = re.compile(rb"(?<![\w./~-])/(work|root|home|Users|tmp|opt)/[A-Za-z_][\w.-]*")
    found = {
        str(path.relative_to(ROOT)): match.group().decode()
        for path in tracked_files()
        if path.suffix not in {".safetensors", ".png"} and (match := pattern.search(path.read_bytes()))
    }
    assert found == {}


def test_packaged_weights_are_small():
    weights = [path for package in PACKAGES for path in (ROOT / package).rglob("*.safetensors")]
    assert {
        str(path.relative_to(ROOT)): size for path in weights if (size := path.stat().st_size) > 4e6
    } == {}


def test_no_source_file_is_too_long_to_read():
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: count for name, count in lengths.items() if count > 500} == {}


def test_wheel_holds_data_files(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = {str(path.relative_to(ROOT)) for path in tracked_files()}
    expected = {name for name in tracked if name.split("/")[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert expected - packed == set()
    strangers = {name for name in packed if name.split("/")[0] not in PACKAGES and ".dist-info/" not in name}
    assert strangers == set()


def test_readme_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks, "README.md shows no python example"
    for block in blocks:
        assert len(block.splitlines()) <= 20
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
