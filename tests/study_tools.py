"""Made-up study folders, written fast: for tests of what reads them. Imports no jax.

    folder = make_study(tmp_path / "s", arms=("batch", "none"), axes={"rate": [0.1, 0.3]}, seeds=10,
                        accuracy=lambda arm, point, seed: 0.9 - 0.1 * (arm == "none"))

writes what a real study leaves behind: study.json and a run folder per arm, point and seed.
"""

import copy
import hashlib
import itertools
import json
import math

from bnresearch import claims
from bnresearch.rundir import finite

STEPS = 500
COUNTS = {"validation": 229, "test": 270}
KEYS = {"rate": "optim.learning_rate", "batch size": "data.batch_size", "depth": "model.depth"}
ABOUT = {
    "commit": "0123abc" * 5 + "01234",
    "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6"},
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "command": ["python", "-m", "bnresearch", "study", "configs/studies/made_up.py"],
}
CONFIG = {
    "schema": 3,
    "data": {"name": "digits", "batch_size": 60, "validation_fraction": 0.15, "split_seed": 0},
    "dtype": "float32",
    "init": {"name": "he"},
    "model": {"name": "mlp", "mlp": {"activation": "relu", "widths": [100, 100, 100]}},
    "norm": {"kind": "batch", "scope": "global", "rules": []},
    "optim": {"name": "sgd", "learning_rate": 0.1, "sgd": {"momentum": 0.9, "nesterov": False}},
    "parallel": {"devices": 1, "mode": "jit"},
    "seed": 0,
    "task": {"name": "classification", "classification": {"label_smoothing": 0.0}},
    "train": {"duration": f"{STEPS}st", "eval_every": "100st", "checkpoint_every": "never"},
}
MEASURES = {"accuracy": claims.final("accuracy")}


def made_up_accuracy(arm, point, seed):
    """Arms 0.05 apart by the hash of their names, better near 0.3 on numeric axes, seeds +-0.01."""
    ahead = int(hashlib.sha256(arm.encode()).hexdigest(), 16) % 3
    numbers = [value for value in point.values() if isinstance(value, int | float)]
    off = sum(math.log10(value / 0.3) ** 2 for value in numbers if value > 0)
    return max(0.1, 0.8 + 0.05 * ahead - 0.02 * off + 0.01 * math.sin(7 * seed + ahead))


def make_study(
    folder,
    arms=("batch", "none"),
    axes=None,
    seeds=3,
    *,
    accuracy=made_up_accuracy,
    status=lambda arm, point, seed: "done",
    curve=None,
    curve_points=5,
    measures=MEASURES,
    claims=(),
    tune=None,
    computed=None,
    function=False,
    verdicts=None,
    **fields,
):
    """Writes a study folder and returns its path.

    Args:
      folder: made; the folder of runs is ``folder / "runs"``.
      arms: names, each with the override norm.kind = name; or {name: overrides}; or
        {name: {"label": ..., "overrides": ..., "first_seed": ...}} as in study.json.
      axes: {name: values}, or {name: {"values", "keys", "log", "label"}} as in study.json.
      accuracy: ``(arm, point, seed) -> raw accuracy`` at the end, on test; validation has the same.
        A pair is (validation, test).
      status: ``(arm, point, seed)`` -> "done", "diverged", "failed", "stopped", "running",
        "missing" (no folder), or a key of DAMAGE.
      curve: ``(arm, point, seed) -> raw validation accuracies``, evenly spaced up to the last step;
        an exponential approach with ``curve_points`` points if None.
      measures: {name: claims.Measure}; claims: of claims.Claim; tune: {"axis":, "measure":}.
      computed: {measure: ``(arm, point, seed) -> number``}, what a study's functions worked out.
      function: a study that trains nothing: result.json alone, with test accuracy.
      verdicts: list of JSON verdicts (see `made_up_verdict`).
      fields: replace fields of study.json: question, title, scale, may_conclude, started, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    arms, axes = _arms(arms), _axes(axes or {})
    runs = []
    written = set()
    for arm, values, seed in itertools.product(
        arms, itertools.product(*(axis["values"] for axis in axes.values())), range(seeds)
    ):
        point = dict(zip(axes, values, strict=True))
        config = _config(arms[arm], axes, point, seed, function)
        run = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        runs.append({"id": run, "arm": arm, "point": point, "seed": seed})
        state = status(arm, point, seed)
        if state != "missing" and run not in written:
            final = accuracy(arm, point, seed)
            validation, test = final if isinstance(final, tuple) else (final, final)
            points = curve(arm, point, seed) if curve else _approach(validation, curve_points)
            _write_run(folder / "runs" / run, config, state, points, test, function)
        written.add(run)
    computed = {
        name: {run["id"]: f(run["arm"], run["point"], run["seed"]) for run in runs}
        for name, f in (computed or {}).items()
    }
    study = {
        "schema": 1,
        "name": "made_up",
        "file": "configs/studies/made_up.py",
        "title": "A study that never ran.",
        "about": "Its numbers are made up.",
        "question": "Does the reader read what was written?",
        "source": "tests/study_tools.py",
        "prediction": "It does.",
        "scale": "quick",
        "may_conclude": True,
        "arms": arms,
        "axes": axes,
        "tune": tune and {"axis": tune["axis"], "measure": _json(tune["measure"])},
        "measures": {name: _json(measure) for name, measure in measures.items()},
        "claims": [_json(claim) for claim in claims],
        "seeds": list(range(seeds)),
        "runs": runs,
        "computed": computed,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:14:05+00:00",
        "seconds": 600.0,
        "verdicts": verdicts,
        **ABOUT,
    }
    _write(folder / "study.json", study | fields)
    return folder


def made_up_verdict(claim, verdict="supported", **fields):
    """A verdict as study.json has it; ``claim`` is a claims.Claim."""
    return {
        "claim": _json(claim),
        "text": claim.text or "batch is above none",
        "verdict": verdict,
        "reason": "the interval lies above 0",
        "estimate": 2.0,
        "low": 1.0,
        "high": 3.0,
        "confidence": 0.95,
        "interval": "t",
        "unit": "points",
        "log": False,
        "n": 10,
        "missing": {},
        "censored": 0,
        "p": 0.002,
        "p_holm": 0.004,
        "p_zero": 0.002,
        "n_needed": None,
        "of": "",
        "pairs": [],
        "at": {},
        "same_rate": [],
        "runs": [],
        "points": {str(seed): 2.0 + 0.1 * (seed - 4.5) for seed in range(10)},
        "boundary": 0.0,
        "null": 0.0,
        **fields,
    }


# ---- Damaged runs: status=lambda ...: "torn result"

DAMAGE = {
    "no config": lambda run: (run / "config.json").unlink(),
    "config not json": lambda run: (run / "config.json").write_text("{"),
    "config a list": lambda run: (run / "config.json").write_text("[]"),
    "other schema": lambda run: _change(run / "config.json", schema=99),
    "other config": lambda run: _change(run / "config.json", seed=12345),
    "torn result": lambda run: (run / "result.json").write_text('{"schema": 1, "sta'),
    "result without step": lambda run: (run / "result.json").write_text('{"status": "done"}'),
    "torn status": lambda run: (run / "status.json").write_text('{"schema": 1, '),
    "a file": lambda run: _replace_by_file(run),
}


def _change(path, **fields):
    _write(path, json.loads(path.read_text()) | fields)


def _replace_by_file(run):
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    run.write_text("no folder")


# ---- Parts


def _json(thing):
    return thing if isinstance(thing, dict) or thing is None else claims.to_json(thing)


def _arms(arms):
    if not isinstance(arms, dict):
        arms = {name: {"norm.kind": name} for name in arms}
    full = {}
    for name, arm in arms.items():
        arm = arm if "overrides" in arm else {"overrides": arm}
        full[name] = {"label": name, "first_seed": 0, **arm}
    return full


def _axes(axes):
    full = {}
    for name, axis in axes.items():
        axis = axis if isinstance(axis, dict) else {"values": list(axis)}
        full[name] = {"keys": [KEYS.get(name, name)], "log": name == "rate", "label": name} | axis
    return full


def _config(arm, axes, point, seed, function):
    settings = dict(arm["overrides"])
    for name, axis in axes.items():
        settings |= dict.fromkeys(axis["keys"], point[name])
    seed += arm["first_seed"]
    if function:
        about = {"schema": 1, "function": "measure", "source": "0" * 64}
        return about | {"arguments": settings, "seed": seed}
    config = copy.deepcopy(CONFIG) | {"seed": seed}
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config


def _approach(end, points):
    return [end - (end - 0.1) * math.exp(-4 * (i + 1) / points) for i in range(points - 1)] + [end]


def _write_run(run, config, state, points, test, function):
    run.mkdir(parents=True)
    (run / "lock").touch()
    damage = DAMAGE.get(state)
    state = "done" if damage else state
    result, message, kept = {"schema": 1, "status": state, "step": STEPS}, None, len(points)
    if state != "done":
        kept //= 2
        result["step"] = STEPS * kept // max(1, len(points))
    if state == "done":
        metrics = {"validation": points[-1], "test": test}
        result["metrics"] = {split: _scores(split, value) for split, value in metrics.items()}
        result["digest"] = hashlib.sha256(repr((points, test)).encode()).hexdigest()
        if function:
            result["metrics"] = {"test": {"accuracy": test}}
    elif state == "diverged":
        message = result["message"] = "the loss is NaN"
    elif state == "failed":
        message = "MemoryError: out of memory"
    _write(run / "config.json", config)
    about = {"message": message, "started": "2026-01-02T03:04:05+00:00", "pid": 7, "host": "here"}
    heartbeat = {"heartbeat": "2026-01-02T03:04:07+00:00"}
    first = {"schema": 1, "status": state, "step": result["step"]}
    _write(run / "status.json", first | about | heartbeat | ABOUT)
    if state in ("done", "diverged"):
        _write(run / "result.json", {**result, "seconds": 2.147})
    if not function:
        _write_metrics(run, points, kept, test, state)
    if damage:
        damage(run)


def _scores(split, accuracy):
    return {"loss": 2.3 * (1 - accuracy), "accuracy": accuracy, "count": COUNTS[split]}


def _write_metrics(run, points, kept, test, state):
    records = []
    for index, value in enumerate(points[:kept], start=1):
        step = STEPS * index // len(points)
        first = {"step": step, "epoch": round(step / 21.6, 4)}
        train = {"loss": 2.2 * (1 - value), "learning_rate": 0.1, "gradient_norm": 1.5}
        records.append({**first, "split": "train", **train, "weight_norm": 31.1})
        records.append({**first, "split": "validation", **_scores("validation", value)})
    if state == "done":
        records.append({**first, "split": "test", **_scores("test", test)})
    lines = (json.dumps(finite(record)) + "\n" for record in records)
    (run / "metrics.jsonl").write_text("".join(lines))


def _write(path, value):
    path.write_text(json.dumps(finite(value), indent=2) + "\n")
