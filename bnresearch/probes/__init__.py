"""What can be measured inside the layers during a run: the table PROBES.

A probe is a pure function ``probe(inside) -> {site: {quantity: number}}``: given a run at one step
(`inside.Inside`) it says, per site (the path of a norm; "" for the whole net), what it found. What
it computes is compiled apart from the train step, once for all runs that differ in numbers only.

To add one: a function in a file of this package, and one line in the table.
"""

from collections.abc import Callable, Mapping
from typing import Any

from bnresearch.probes.backward import gradients
from bnresearch.probes.curvature import hessian
from bnresearch.probes.dropout import dropout_shift
from bnresearch.probes.rate import effective_rate
from bnresearch.probes.running import fluctuation, staleness, statistics
from bnresearch.probes.shape import activations
from bnresearch.probes.surface import covariate_shift, landscape

Found = Mapping[str, Mapping[str, float]]

PROBES: dict[str, Callable[[Any], Found]] = {
    "statistics": statistics,
    "staleness": staleness,
    "fluctuation": fluctuation,
    "activations": activations,
    "gradients": gradients,
    "covariate_shift": covariate_shift,
    "landscape": landscape,
    "effective_rate": effective_rate,
    "hessian": hessian,
    "dropout_shift": dropout_shift,
}
