"""Convolutions by oneDNN where jax runs on CPUs: an extra that changes rounding and nothing else.

XLA's convolutions on CPU are several times slower than oneDNN's. With the extra ``cpu`` installed
and a C++ compiler at hand, `conv_general_dilated` computes by oneDNN what it can, and leaves the
rest to jax.lax. Without them everything runs on XLA, as the key ``parallel.convolutions`` says:

==========  ====================================================================
auto        oneDNN where it can be had, else XLA, with one line that says why not
xla         XLA
onednn      oneDNN, and an error where it cannot be had
==========  ====================================================================

``python -m bnresearch.native`` says what there is and compiles it. See docs/cpu.md.
"""

from collections.abc import Callable
from typing import Any

from bnresearch.errors import UserError, lookup

MODES = {"auto": None, "xla": None, "onednn": None}


def choose(mode: str) -> str:
    """By what the convolutions of a model are computed on the default device: "onednn" or "xla".
    Compiles the library where that is still to be done.

    Args:
      mode: a key of MODES.

    Raises:
      UserError: an unknown mode; or "onednn", where it cannot be had.
    """
    from bnresearch.native import build

    if not _wanted(mode):
        return "xla"
    loaded = build.load()
    if not isinstance(loaded, build.Missing):
        return "onednn"
    if mode == "onednn":
        raise UserError(f"parallel.convolutions=onednn: {loaded}; or take auto")
    return "xla"


def expected(mode: str) -> bool:
    """Whether `choose` will say "onednn", as far as can be seen without compiling anything."""
    from bnresearch.native import build

    if not _wanted(mode):
        return False
    try:
        build.find_onednn(), build.find_compiler()
    except build.Missing:
        return False
    return True


def conv_general_dilated(mode: str = "auto") -> Callable[..., Any]:
    """A function with the arguments and results of ``jax.lax.conv_general_dilated``.

    What oneDNN does not do (`convolution.supported`) goes to jax.lax, and so does everything where
    `choose` says "xla". With "auto" that is decided where the function is compiled, not where it is
    traced: a model that is refused has then compiled no library.

    Raises:
      UserError: as `choose`, when the function is called.
    """
    import jax

    def convolve(
        x: Any, kernel: Any, window_strides: Any, padding: Any, *args: Any, **settings: Any
    ) -> Any:
        from bnresearch.native.convolution import convolution, supported

        given = (x, kernel, window_strides, padding, *args)
        if _wanted(mode) and supported(*given, **settings):
            if mode == "onednn":
                choose(mode)
            return convolution(x, kernel, window_strides, padding)
        return jax.lax.conv_general_dilated(*given, **settings)

    return convolve


def _wanted(mode: str) -> bool:
    import jax

    lookup(MODES, mode, "parallel.convolutions")
    platform = jax.default_backend() if mode != "xla" else ""
    if mode == "onednn" and platform != "cpu":
        raise UserError(
            f"parallel.convolutions=onednn is for CPUs, but jax runs on {platform}; take auto"
        )
    return platform == "cpu"
