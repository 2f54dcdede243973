"""The library of C++ beside this file: found, or compiled once per machine, and loaded.

What compiles it is the machine's own compiler; oneDNN comes as two wheels (the extra ``cpu``) or
with the system, the headers of XLA's FFI with jaxlib. The result lies in the user's cache folder,
whole or not at all, under a name that says all that decides it: another compiler, oneDNN, jaxlib,
processor or source has a file of its own.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

SOURCES = ("parts.h", "convolution.cc", "batch_norm.cc")
HANDLERS = (
    *("convolution_forward", "convolution_data", "convolution_weights"),
    *("norm_moments", "norm_apply", "norm_sums", "norm_spread"),
)

# The wheels, and the first version of oneDNN with the interface that the source is written for.
RUNTIME, HEADERS = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"
OLDEST = (3, 0)

# A compiler that takes longer than this hangs: it takes a few seconds.
PATIENCE = 300


class Missing(Exception):
    """Why there is no library, and what to do about it."""


class OneDNN(NamedTuple):
    """Where its header and its library lie, and its version."""

    include: Path
    library: Path
    version: str


class Compiler(NamedTuple):
    """A C++ compiler, and the first line that it says about itself."""

    path: str
    version: str


def find_onednn() -> OneDNN:
    """That of the wheels, else that of the system.

    Raises:
      Missing: there is none, or only one that is too old.
    """
    header, library = Path("oneapi/dnnl/dnnl.hpp"), Path("libdnnl.so")
    for include in filter(None, [_in_wheel(HEADERS, header), *_on_system("include", header)]):
        version = _version(include / "oneapi/dnnl")
        libraries = [_in_wheel(RUNTIME, library), *_on_system("lib", library)]
        near = [folder for folder in libraries if folder and folder.parent == include.parent]
        found = next(iter(near), None) or _debian(library, include)
        if found is None:
            continue
        if version < OLDEST:
            raise Missing(
                f"oneDNN {_text(version)} in {found} is too old; pip install 'bnresearch[cpu]' "
                "brings one that will do"
            )
        return OneDNN(include, found / library, _text(version))
    raise Missing("oneDNN is not installed; pip install 'bnresearch[cpu]' brings it")


def _in_wheel(package: str, file: Path) -> Path | None:
    """The folder in which an installed wheel has ``file``, without the path of the file itself."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    for entry in files:
        if str(entry).endswith(f"/{file}"):
            path = Path(str(entry.locate())).resolve()
            return path.parents[len(file.parts) - 1]
    return None


def _on_system(kind: str, file: Path) -> list[Path]:
    prefixes = dict.fromkeys((Path(sys.prefix), Path("/usr/local"), Path("/usr")))
    return [prefix / kind for prefix in prefixes if (prefix / kind / file).exists()]


def _debian(library: Path, include: Path) -> Path | None:
    """Debian and Ubuntu keep libraries in a folder per architecture."""
    folders = [include.parent / "lib" / f"{platform.machine()}-linux-gnu", include.parent / "lib64"]
    return next((folder for folder in folders if (folder / library).exists()), None)


def _version(headers: Path) -> tuple[int, ...]:
    """What the header says; from oneDNN 3.6 on the numbers stand in another one."""
    texts = [path.read_text() for path in sorted(headers.glob("dnnl_version*.h"))]
    found = dict(re.findall(r"#define DNNL_VERSION_(MAJOR|MINOR|PATCH) (\d+)", "\n".join(texts)))
    return tuple(int(found.get(part, 0)) for part in ("MAJOR", "MINOR", "PATCH"))


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def find_compiler() -> Compiler:
    """$CXX, else the first of c++, g++ and clang++.

    Raises:
      Missing: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            try:
                said = subprocess.run(
                    [path, "--version"], capture_output=True, text=True, timeout=60
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise Missing(f"{path} --version fails ({error}); set CXX to a compiler") from None
            return Compiler(path, said.stdout.partition("\n")[0])
    raise Missing(f"there is no C++ compiler ({', '.join(names)}); install g++ or clang++")


def flags() -> list[str]:
    """Optimised for this very processor, whose name is part of the file's name."""
    tune = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    return ["-std=c++17", "-O3", tune, "-fPIC", "-shared", "-w"]


def _processor() -> str:
    """All that -march=native looks at: a cache folder may be shared by several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(names)}))


def library() -> Path:
    """The compiled library; where this machine has none yet, it is compiled now.

    Raises:
      Missing: no oneDNN, no compiler, no writable cache folder, or the compiler refuses.
    """
    from bnresearch.data.cache import cache_folder

    onednn, compiler = find_onednn(), find_compiler()
    here = Path(__file__).parent
    parts = [metadata.version("jaxlib"), *onednn, *compiler, *flags(), _processor()]
    parts += [(here / name).read_text() for name in SOURCES]
    name = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]
    path = cache_folder() / "native" / f"{name}.so"
    if not path.is_file():
        print(f"native: compiling with {Path(compiler.path).name}, once", file=sys.stderr)
        try:
            _compile(onednn, compiler, path)
        except OSError as error:
            raise Missing(
                f"{path.parent} cannot be written ({error}); set BNRESEARCH_CACHE"
            ) from None
    return path


def _compile(onednn: OneDNN, compiler: Compiler, path: Path) -> None:
    import jax

    path.parent.mkdir(parents=True, exist_ok=True)
    here, folder = Path(__file__).parent, onednn.library.parent
    sources = [str(here / name) for name in SOURCES if name.endswith(".cc")]
    include = [f"-I{onednn.include}", f"-I{jax.ffi.include_dir()}"]
    link = [f"-L{folder}", "-ldnnl", f"-Wl,-rpath,{folder}", "-ldl"]
    # Several processes may be here at once: each has a file of its own, and the last one stays.
    handle, temporary = tempfile.mkstemp(prefix=".partial-", suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler.path, *flags(), *include, *sources, "-o", temporary, *link]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            reason = (lines or done.stderr.splitlines() or ["no reason given"])[0]
            raise Missing(f"{compiler.path} cannot compile it: {reason}")
        Path(temporary).chmod(0o755)  # mkstemp makes it private, but a cache may be shared
        os.replace(temporary, path)
    except subprocess.TimeoutExpired:
        raise Missing(f"{compiler.path} did not end within {PATIENCE} seconds") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


class Loaded(NamedTuple):
    """The library in this process: its file, and the version of oneDNN that it runs on."""

    path: Path
    onednn: str


@functools.cache
def load() -> Loaded | Missing:
    """Compile if need be, load, and make the handlers known to XLA; once per process. What is
    missing is given back, not raised, so that it is looked for only once."""
    import jax

    try:
        path = library()
        code = ctypes.CDLL(str(path))
    except Missing as missing:
        return missing
    except OSError as error:
        return Missing(f"the compiled library cannot be loaded: {error}")
    for name in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(code, name))
        jax.ffi.register_ffi_target(f"bnresearch_{name}", capsule, platform="cpu")
    code.onednn_version.restype = ctypes.c_char_p
    return Loaded(path, code.onednn_version().decode())


@functools.cache
def there() -> bool:
    """Whether there is all that `library` needs, the cache folder left aside."""
    try:
        find_onednn(), find_compiler()
    except Missing:
        return False
    return True


@functools.cache
def ready() -> bool:
    """Whether there is a library; where not, that is said, once."""
    loaded = load()
    if isinstance(loaded, Missing):
        print(f"native: all runs on XLA, slower on CPU: {loaded}", file=sys.stderr)
    return not isinstance(loaded, Missing)
