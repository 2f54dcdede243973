"""The house: who may import whom, what reports may load, and papers that tell the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bnresearch"

# Imports go one way. Layers, lowest first: a module may import its own layer and those below it.
# Modules not listed here (errors, config, data, ...) are free.
LAYERS = (
    {"sets", "averages", "conventions", "reparam"},
    {"kind", "kinds"},
    {"norm"},
    {"sites", "handbook"},
    {"watch"},
    {"layers", "batchnorm"},
    {"models"},
    {"state", "optim", "average", "step", "parallel", "accumulate"},
    {"net"},
    {"fit", "pooled"},
    # What looks inside: a model is handed to it, from a run or from anybody.
    {"experiment", "diverge", "precise", "recalibration", "run_statistics", "adapt", "probes"},
    {"stats", "evaluate"},
    {"train", "together"},
    # A question: what is asked, what it means for configs, and what speaks against it.
    {"claims", "words"},
    {"study"},
    # Its runs.
    {"sweep"},
    # What reads them.
    {"runs"},
    {"measures"},
    {"verdict"},
    {"records"},
    {"report"},
    # From the one to the other.
    {"lab", "doctor"},
    {"__main__"},
)

# They read files and numbers: what is far from the runs must work without what made them.
READERS = ("claims", "runs", "measures", "records", "verdict", "words", "report")

# What a module must not import, beside what its layer says; the reason stands behind.
FORBIDDEN = {
    # Mathematics without framework.
    **dict.fromkeys(("sets", "averages", "kind", "kinds", "norm", "reparam"), ("flax",)),
    "models": ("bnresearch.norm", "bnresearch.kinds", "bnresearch.layers"),  # handed a constructor
    **dict.fromkeys(READERS, ("jax", "flax", "bnresearch.models", "bnresearch.config")),
    "sweep": ("jax", "flax"),  # workers choose their cores first
    "rundir": ("jax", "flax"),
    "processes": ("jax", "flax"),
    "supervise": ("jax", "flax"),
    "provenance": ("jax", "flax"),
    "metrics": ("jax", "flax"),
    "jsonl": ("jax", "flax"),
    "errors": ("bnresearch",),
}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """bnresearch/models/resnet.py -> models; bnresearch/norm.py -> norm."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """The dotted names that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            # `from bnresearch import norm` names bnresearch.norm as much as an import of it does.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def begins(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def test_imports_are_read_in_all_their_forms(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import a.b\nfrom c import d\n\ndef f():\n    from e.f import g\n")
    assert imports(path) == {"a.b", "c.d", "e.f.g"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    module = module_of(path)
    level = next((i for i, layer in enumerate(LAYERS) if module in layer), len(LAYERS))
    above = set().union(*LAYERS[level + 1 :])
    forbidden = [f"bnresearch.{name}" for name in above] + list(FORBIDDEN.get(module, ()))
    bad = [name for name in imports(path) if any(begins(name, prefix) for prefix in forbidden)]
    assert not bad, f"{module} must not import {bad}"


def test_what_reads_run_folders_loads_neither_jax_nor_models():
    """Neither does what hands out runs: a worker takes its core before jax looks for devices."""
    light = (*READERS, "rundir", "jsonl", "metrics", "sweep", "sweep.worker")
    heavy = ("jax", "flax", "optax", "orbax", "bnresearch.models")
    code = f"""
import importlib, sys
for name in {light}:
    importlib.import_module("bnresearch." + name)
    found = [module for module in {heavy} if module in sys.modules]
    assert not found, f"{{name}} loads {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_tables_name_modules_that_are_there():
    named = set().union(*LAYERS, FORBIDDEN)
    assert named <= {module_of(path) for path in sources()}


def documents():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_documents_point_at_what_is_there(path):
    text = path.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    files = re.findall(r"(?<![\w/.-])((?:scripts|configs|docs|tests|benchmarks)/[\w/]+\.\w+)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing, f"{path.name} names {missing}"


def test_constraints_pin_every_requirement():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["compare"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(
        re.match(r"[\w.-]+==[\w.]+(; python_version [<>=]+ \"3.12\")?$", pin) for pin in pins
    )

    def key(requirement):
        return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")

    assert {key(name) for name in wanted} <= {key(pin) for pin in pins}


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11000


@pytest.mark.parametrize(
    "name",
    [
        *("scripts/setup.sh", "scripts/test.sh", "scripts/quickstart.sh"),
        *("scripts/slurm_train.sbatch", ".ci/run", ".ci/install_slurm.sh"),
    ],
)
def test_scripts_are_sound_bash(name):
    done = subprocess.run(["bash", "-n", ROOT / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_setup_refuses_an_old_python_in_words(tmp_path):
    old = tmp_path / "python-of-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts/quickstart.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "No Python >= 3.11 found" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_setup_is_sourced_with_an_argument(path):
    """Without one, a sourced script takes the arguments of its caller: an extra named '--help'."""
    for line in path.read_text().splitlines():
        if line.startswith("source"):
            assert re.search(r'setup\.sh" ("test|"")', line), line
