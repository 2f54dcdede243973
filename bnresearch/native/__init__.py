"""Convolutions and BatchNorm in C++ where jax runs on CPUs: an extra that changes rounding only.

XLA's convolutions on CPU are several times slower than oneDNN's, and its column sums behind a ReLU
than reading the values. With the extra ``cpu`` installed and a C++ compiler at hand,
`conv_general_dilated` computes by oneDNN what it can, `batch_norm` by loops of our own, and XLA
does the rest. Without them everything runs on XLA, as the key ``parallel.kernels`` says:

==========  ========================================================================
auto        the library where it can be had, else XLA, with one line that says why not
xla         XLA
native      the library, and an error where it cannot be had
==========  ========================================================================

``python -m bnresearch.native`` says what there is and compiles it. See docs/cpu.md.
"""

from collections.abc import Callable
from typing import Any

from bnresearch.errors import UserError, lookup

MODES = {"auto": None, "xla": None, "native": None}


def choose(mode: str) -> str:
    """By what the convolutions of a model are computed on the default device, and its BatchNorm:
    "native" or "xla".
    Compiles the library where that is still to be done.

    Args:
      mode: a key of MODES.

    Raises:
      UserError: an unknown mode; or "native", where it cannot be had.
    """
    from bnresearch.native import build

    if not wanted(mode):
        return "xla"
    loaded = build.load()
    if not isinstance(loaded, build.Missing):
        return "native"
    if mode == "native":
        raise UserError(f"parallel.kernels=native: {loaded}; or take auto")
    return "xla"


def require(mode: str) -> None:
    """Refuse "native" where it cannot be had.

    Raises:
      UserError: as `choose`.
    """
    if mode == "native":
        choose(mode)


def expected(mode: str) -> bool:
    """Whether `choose` will say "native", as far as can be seen without compiling anything."""
    from bnresearch.native import build

    return wanted(mode) and build.there()


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
        if wanted(mode) and supported(*given, **settings):
            require(mode)
            return convolution(x, kernel, window_strides, padding)
        return jax.lax.conv_general_dilated(*given, **settings)

    return convolve


def wanted(mode: str) -> bool:
    """Whether the library is to be used, if there is one: on CPUs.

    Raises:
      UserError: an unknown mode; "native" on another platform.
    """
    import jax

    lookup(MODES, mode, "parallel.kernels")
    platform = jax.default_backend() if mode != "xla" else ""
    if mode == "native" and platform != "cpu":
        raise UserError(
            f"parallel.kernels=native is for CPUs, but jax runs on {platform}; take auto"
        )
    return platform == "cpu"
