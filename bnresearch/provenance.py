"""What runs where: the commit, the versions and the devices that status.json records.

Imports neither jax nor flax; the device is known where the program itself has imported jax.
"""

import functools
import hashlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "bnresearch")
SOURCES = (".py", ".cc", ".h")  # what is imported, or compiled for CPUs
PACKAGE = Path(__file__).resolve().parent


@functools.cache
def versions() -> dict[str, str | None]:
    """Of python and of the packages that decide the numbers; None for one that is missing."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device() -> dict[str, Any] | None:
    """Kind and count of the devices, if this process uses jax at all."""
    if "jax" not in sys.modules:
        return None
    devices = sys.modules["jax"].devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


@functools.cache
def commit() -> str | None:
    """The git commit of this source ("...-dirty" if changed), else the package version.

    Only where git tracks this very file: an installed copy may lie in somebody else's repository.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None:
        found = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        if found:
            return found
    version = _version("bnresearch")
    return f"version {version}" if version else None


def program() -> dict[str, Any]:
    """What has to be the same in all processes of a run, beside its config: versions, commit, the
    platform, and a digest of each source file, by which two changed checkouts differ."""
    platform = sys.modules["jax"].default_backend() if "jax" in sys.modules else None
    about = {"versions": versions(), "commit": commit(), "source": sources()}
    return about | {"platform": platform}


def sources(folder: Path = PACKAGE) -> dict[str, str]:
    """File of the package -> a digest of it; hidden ones, such as an editor's, are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix in SOURCES and not hidden and path.is_file():
            found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
