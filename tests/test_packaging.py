"""What is shipped: a wheel that installs beside PyTorch alone, and a repository that names no build machine."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import manifold_mixup

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import math, sys
import torch
import torch.nn.functional as F
from manifold_mixup import ManifoldMixup

for missing in ("numpy", "pytest", "pydantic", "torchvision"):
    try:
        __import__(missing)
    except ImportError:
        continue
    sys.exit(f"{missing} can be imported: this environment is not clean")

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(),
                            torch.nn.Linear(16, 3))
before = [p.detach().clone() for p in model.parameters()]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mixup = ManifoldMixup(model, alpha=2.0, seed=0)
for _ in range(5):
    x, y = mixup(torch.randn(8, 4), torch.randint(3, (8,)))
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item()), loss
    assert mixup.last is not None and 0 < mixup.last.lam < 1 and mixup.last.layer in mixup.layers, mixup.last
assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
print(sys.modules["manifold_mixup"].__file__)
"""

IMPORTED = """
import json, sys
import torch
before = set(sys.modules)
import manifold_mixup
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def python(executable: str | Path, script: str) -> str:
    """Standard output of a script that must succeed, run where no source of ours lies about."""
    done = subprocess.run([executable, "-I", "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this repository."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def needed_by(name: str) -> dict[str, importlib.metadata.Distribution]:
    """A distribution and all that it requires here, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    names = [name]
    while names:
        name = names.pop()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        requirements = map(Requirement, found[name].requires or [])
        names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def tops(distributions: Iterable[importlib.metadata.Distribution]) -> dict[str, Path]:
    """The files and folders that distributions put into site-packages."""
    entries = {}
    for distribution in distributions:
        for file in distribution.files or []:
            if file.parts[0] not in ("..", "__pycache__"):
                entries[file.parts[0]] = Path(str(distribution.locate_file(file.parts[0])))
    return entries


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds our wheel, torch, and what torch requires; nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    only_torch = folder / "torch"
    only_torch.mkdir()
    for name, path in tops(needed_by("torch").values()).items():
        (only_torch / name).symlink_to(path)
    executable = folder / "venv" / "bin" / "python"
    site_packages = Path(python(executable, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (site_packages / "torch.pth").write_text(str(only_torch))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    return executable


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"manifold_mixup-{manifold_mixup.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"manifold_mixup", info}
    assert {"manifold_mixup/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} < names
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    package = ROOT / "src" / "manifold_mixup"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(package.parent).as_posix() for path in files} <= names
    assert {".py", ".toml", ".typed"} <= {path.suffix for path in files}


def test_the_wheel_requires_torch_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    required = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist")]
    assert [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})] == ["torch"]
    assert {"lab", "vision", "dev"} <= {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra")}


def test_it_trains_beside_torch_alone(clean_python):
    assert Path(python(clean_python, TRAIN)).is_relative_to(clean_python.parent.parent)


def test_importing_it_brings_in_nothing_but_torch():
    """In this environment, where all extras are installed and could slip in."""
    new = set(json.loads(python(sys.executable, IMPORTED)))
    allowed = {name.removesuffix(".py") for name in tops(needed_by("torch").values())} | set(sys.stdlib_module_names)
    assert "manifold_mixup" in new
    assert new - allowed == {"manifold_mixup"}


def test_no_file_names_the_build_machine():
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    assert Path(__file__) in files
    forbidden = [b"/".join(parts) for parts in ([b"", b"work", b""], [b"..", b"shared"])]
    named = [file for file in files if file.is_file() and any(name in file.read_bytes() for name in forbidden)]
    assert named == []


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == manifold_mixup.__version__
    assert importlib.metadata.version("manifold-mixup") == manifold_mixup.__version__
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", "Apache-2.0")
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]][:2] == ["Verma", "Lamb"]
    assert (paper["year"], paper["volume"], paper["start"], paper["end"]) == (2019, 97, 6438, 6447)


def test_hooks_call_the_tools_of_the_environment():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {hook["id"]: hook["entry"].split()[0] for hook in local["hooks"]} == {
        "ruff-check": ".venv-dev/bin/ruff",
        "ruff-format": ".venv-dev/bin/ruff",
        "mypy": ".venv-dev/bin/mypy",
    }
