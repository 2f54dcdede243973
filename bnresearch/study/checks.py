"""Whether a study can be run as it is written: asked before the first of its runs."""

import itertools
from collections.abc import Mapping
from typing import Any

from bnresearch.claims import Measure, final
from bnresearch.errors import UserError, lookup
from bnresearch.study import claim_checks
from bnresearch.study.axes import Axis
from bnresearch.study.parts import Arm, Cell, Extent, Scale, Study, Tune, at_scale
from bnresearch.study.subjects import Settled, Subject

SCALES = ("smoke", "quick", "full")
# Columns of the tables of a study, and of those worked out from them, which an axis would hide.
RESERVED = (
    *("arm", "seed", "id", "status", "seconds", "message", "step", "value", "censored", "at"),
    *("n", "mean", "count", "std", "low", "high", "diverged", "lost", "chosen", "edge"),
    *("kind", "diverged_share", "diverged_low", "diverged_high", "claim", "effect"),
)


PARTS: Mapping[str, tuple[type, ...]] = {
    "arms": (Arm, Mapping),
    "axes": (Axis,),
    "measures": (Measure,),
    "scales": (Scale,),
}


def check_parts(study: Study) -> None:
    """UserError for parts that are missing, of another type, or do not fit together."""
    for field in ("question", "source", "prediction"):
        if not isinstance(getattr(study, field), str) or not getattr(study, field).strip():
            raise UserError(f"the study has no {field}; write it as a sentence")
    if (study.base is None) == (study.function is None):
        given = "neither" if study.base is None else "both"
        raise UserError(
            "a study has either a base (a config file whose training is studied) or a function "
            f"(that measures without training); this one has {given}"
        )
    for field, kinds in PARTS.items():
        _check_dict(field, getattr(study, field), kinds)
        if not getattr(study, field) and field != "axes":
            raise UserError(f"the study has no {field}; give one or more")
    _check_dict("overrides", study.overrides)
    if not isinstance(study.claims, list | tuple):
        raise UserError(f"claims must be a list, not a {type(study.claims).__name__}")
    for name in study.axes:
        if name in RESERVED:
            raise UserError(
                f"an axis cannot be called {name!r}, like a column of the tables; choose "
                "another name"
            )
    for name, measure in study.measures.items():
        claim_checks.check_measure(name, measure, study.axes, trains=study.base is not None)
    _check_arms(study)
    _check_scales(study)
    _check_tune(study)


def _check_dict(what: str, given: Any, kinds: tuple[type, ...] = ()) -> None:
    """A dict with names as keys, and values of one of these kinds."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UserError(f"{what} must be a dict with names as keys, not {given!r}")
    for name, part in given.items():
        if kinds and not isinstance(part, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(
                f"{name!r} in {what} is a {type(part).__name__}, not {wanted}: {part!r}"
            )


def _check_arms(study: Study) -> None:
    labels = [getattr(arm, "label", "") or name for name, arm in study.arms.items()]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UserError(f"two arms are called {twice[0]!r}; give each a label of its own")
    for name, arm in study.arms.items():
        if not isinstance(arm, Arm):
            continue
        _check_dict(f"the overrides of arm {name!r}", arm.overrides)
        if type(arm.first_seed) is not int or not 0 <= arm.first_seed < LARGEST_SEED:
            raise UserError(
                f"arm {name!r} has first_seed={arm.first_seed!r}; give 0 or more, below 2**30"
            )


def _check_scales(study: Study) -> None:
    missing = [name for name in SCALES if name not in study.scales]
    if missing:
        raise UserError(f"the study has no scale {missing[0]!r}; it needs {', '.join(SCALES)}")
    for name, scale in study.scales.items():
        _check_dict(f"the overrides of scale {name!r}", scale.overrides)
        _check_dict(f"the axes of scale {name!r}", scale.axes, (Axis,))
        if scale.arms is not None and (isinstance(scale.arms, str) or not scale.arms):
            raise UserError(f"scale {name!r} has arms={scale.arms!r}; give a list of their names")


LARGEST_SEED = 2**30  # of an arm's first: its last is still below 2**31


def _check_tune(study: Study) -> None:
    if study.tune is None:
        return
    if not isinstance(study.tune, Tune):
        raise UserError(f"tune is a {type(study.tune).__name__}; write Tune('axis')")
    lookup(study.axes, study.tune.axis, "axis in tune")
    if study.function is not None:
        raise UserError("a study of a function has no validation split to tune on; leave tune out")
    measure = tuning_measure(study)
    if not isinstance(measure, Measure) or measure.split != "validation":
        raise UserError(
            f"tune looks at {getattr(measure, 'split', measure)!r}; it has to choose on validation"
        )
    if not measure.metric or measure.collapses is not None:
        raise UserError(
            "tune needs a measure of one run; add one, as in Tune('axis', final('accuracy', "
            "'validation'))"
        )


def tuning_measure(study: Study) -> Measure:
    """What tunes: the study's own choice, or the first measure's metric at the end of the run."""
    assert study.tune is not None
    if study.tune.measure is not None:
        return study.tune.measure
    first = next(iter(study.measures.values()))
    return final(first.metric, "validation", higher_is_better=first.higher_is_better)


def check_claims(study: Study, scale: str, seeds: int | None) -> None:
    """At the scale "smoke", which concludes nothing, claims speak of the study as it is written."""
    size = at_scale(study, scale, seeds)
    smoke = scale == "smoke"
    arms = study.arms if smoke else size.arms
    axes = study.axes if smoke else size.axes
    tuned = study.tune.axis if study.tune else None
    scene = claim_checks.Scene(arms, axes, study.measures, tuned)
    try:
        for number, claim in enumerate(study.claims, start=1):
            claim_checks.check_claim(claim, number, scene)
    except UserError as error:
        raise error if smoke else UserError(f"at scale {scale}, {error}") from error
    if study.claims and len(size.seeds) < 2 and not smoke:
        raise UserError(
            f"scale {scale} has {len(size.seeds)} seed: the claims of a study need an interval, "
            "and so 2 seeds or more"
        )


def check_overlaps(extent: Extent) -> None:
    """UserError where two would set one key, and one of them silently for nothing."""
    setters = [(f"axis {name!r}", set(axis.keys)) for name, axis in extent.axes.items()]
    setters += [(f"arm {name!r}", set(arm.overrides)) for name, arm in extent.arms.items()]
    for (one, keys), (other, others) in itertools.combinations(setters, 2):
        if keys & others and one.startswith("axis"):
            raise UserError(
                f"{one} and {other} both override {', '.join(sorted(keys & others))}; leave it to "
                "one of them"
            )


def check_arms_differ(extent: Extent, subject: Subject, settled: dict[Cell, Settled]) -> None:
    """Two arms may meet at a point; the same everywhere, with common seeds, they are one."""
    of_arm: dict[str, list[Settled]] = {}
    for (arm, _), configs in settled.items():
        of_arm.setdefault(arm, []).append(configs)
    for one, other in itertools.combinations(of_arm, 2):
        apart = abs(extent.arms[one].first_seed - extent.arms[other].first_seed)
        if of_arm[one] == of_arm[other] and apart < len(extent.seeds):
            raise UserError(
                f"arms {one!r} and {other!r} are the same runs: "
                f"{_why_same(extent, subject, of_arm, (one, other))}; change what they override, "
                f"or, for a null study, set their first_seed {len(extent.seeds)} or more apart"
            )


def _why_same(
    extent: Extent, subject: Subject, of_arm: dict[str, list[Settled]], pair: tuple[str, str]
) -> str:
    reasons = []
    for arm in pair:
        for key, value in extent.arms[arm].overrides.items():
            because = subject.ignored(key, of_arm[arm][0]) or "it is so anyway"
            reasons.append(f"{key}={value!r} of {arm!r} has no effect ({because})")
    if not reasons:
        return "neither overrides anything"
    one, other = (extent.arms[arm].overrides for arm in pair)
    return "their overrides are equal" if one == other else " and ".join(reasons)


def check_axes_matter(extent: Extent, settled: dict[Cell, Settled]) -> None:
    for index, (name, axis) in enumerate(extent.axes.items()):
        groups: dict[Any, list[Settled]] = {}
        for (arm, values), configs in settled.items():
            groups.setdefault((arm, values[:index], values[index + 1 :]), []).append(configs)
        same = all(group.count(group[0]) == len(group) for group in groups.values())
        if same and len(axis.points) > 1:
            raise UserError(
                f"axis {name!r} changes nothing in any arm: all its values of "
                f"{', '.join(axis.keys) or 'no key'} give the same runs; leave it out, or choose "
                "what it belongs to (an option of a choice that is not made has no effect)"
            )


def check_metrics(study: Study, subject: Subject, settled: Mapping[Cell, Settled]) -> None:
    """UserError for a measure of something that the runs do not record."""
    measures = {f"measure {name!r}": measure for name, measure in study.measures.items()}
    if study.tune is not None:
        measures["tune"] = tuning_measure(study)
    for name, measure in measures.items():
        for config in settled.values() if measure.metric else ():
            known = subject.metrics(config, measure.split)
            if known is not None:
                what = f"metric of split {measure.split!r} in {name}"
                lookup(dict.fromkeys(known), measure.metric, what)
