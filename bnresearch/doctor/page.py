"""The doctor's page: findings, pictures and the numbers of every site, in one folder."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnresearch import rundir, words
from bnresearch.doctor.examine import Examination, Site
from bnresearch.doctor.report import Report
from bnresearch.errors import UserError
from bnresearch.report.pictures import paper
from bnresearch.report.pictures.marks import (
    Axis,
    Dots,
    Mean,
    Panel,
    Picture,
    Rule,
    Thin,
    axis,
    categories,
    look,
)
from bnresearch.report.site import render, source

MARK = "doctor.json"  # what a folder has to hold before it is replaced
NAMED = 14  # sites that still have their names on an axis
LOSSES = {
    "batch": "training, statistics of the batch",
    "running": "evaluation, running",
    "precise": "evaluation, precise",
}


def write(report: Report, out: Path) -> Path:
    """Writes the page to ``out`` and returns it.

    Raises:
      UserError: ``out`` holds something else than such a page, or cannot be written.
    """
    out = Path(os.path.abspath(os.path.expanduser(out)))
    if os.path.lexists(out) and not (out / MARK).is_file() and not _empty(out):
        raise UserError(
            f"{out} is neither empty nor a doctor's page (it has no {MARK}), and would be "
            "replaced; choose another folder"
        )
    building = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _fill(report, building)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(building, out)
    except OSError as error:
        raise UserError(
            f"cannot write the page to {out}: {error.strerror or error}; choose another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out / "index.html"


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _fill(report: Report, folder: Path) -> None:
    drawn = list(pictures(report.examined))
    for picture in drawn:
        paper.save(picture, folder)
    (folder / "assets").mkdir()
    (folder / "assets" / "site.css").write_text(source("site.css"), encoding="utf-8")
    rundir.write_json(folder / MARK, report.to_json())
    render(
        folder / "index.html",
        "doctor.html",
        report=report,
        about=report.about,
        subject=report.about.get("workdir") or report.about["model"],
        pictures=drawn,
        sites=_rows(report.examined),
        losses=_losses(report.examined),
    )


def _rows(examined: Examination) -> list[list[str]]:
    """The table of sites: path, norm, values, distances, share of the damage."""
    rows = []
    for site in examined.sites.values():
        known = site.running is not None and site.look
        z, log_ratio = site.apart() if known else (None, None)
        blame = examined.blame.get(site.path)
        rows.append(
            [
                site.path,
                site.made.name,
                words.NOTHING if site.made.decay is None else f"{site.made.decay:g}",
                f"{site.values:,.0f}" if site.look else words.NOTHING,
                words.NOTHING if z is None else words.number(z),
                words.NOTHING if log_ratio is None else words.number(float(np.exp(log_ratio))),
                words.NOTHING if blame is None else f"{blame:.0%}",
            ]
        )
    return rows


def _losses(examined: Examination) -> list[tuple[str, str]]:
    return [
        (LOSSES[name], words.number(float(examined.losses[name].mean())))
        for name in LOSSES
        if name in examined.losses
    ]


# ---- Pictures


def pictures(examined: Examination) -> Iterator[Picture]:
    """The distance of running statistics by site, the losses, and the worst site feature by
    feature."""
    keepers = [s for s in examined.keepers if s.running is not None and _finite(s)]
    if examined.losses:
        yield _loss_picture(examined)
    if not keepers:
        return
    yield _by_site(examined, keepers)
    worst = max(keepers, key=lambda site: max(site.apart()))
    yield _features(worst)


def _finite(site: Site) -> bool:
    assert site.running is not None
    mean, var = site.running
    return bool(np.isfinite(mean).all() and np.isfinite(var).all() and (var > 0).all())


def _loss_picture(examined: Examination) -> Picture:
    names = [name for name in LOSSES if name in examined.losses]
    means = np.array([examined.losses[name].mean() for name in names])
    counts = np.array([max(len(examined.losses[name]), 2) for name in names])
    stds = np.array([examined.losses[name].std(ddof=1) for name in names])
    half = 1.96 * stds / np.sqrt(counts)
    at = np.arange(len(names), dtype=float)
    low, high = np.maximum(means - half, 0), means + half
    texts = [f"{LOSSES[name]}: {mean:.3g}" for name, mean in zip(names, means, strict=True)]
    mark = Mean("", look(0), at, means, low, high, texts, "apart")
    y = axis("loss (nats)", [np.zeros(1), high])
    panel = Panel("", categories("", [LOSSES[name] for name in names]), y, (mark,))
    caption = (
        "Means over examples with 95 % intervals; precise statistics are those of the training "
    )
    caption += "batches that were looked at, under the weights as they are."
    return Picture("losses", "Loss by the statistics that normalise", caption, (panel,), columns=1)


def _by_site(examined: Examination, keepers: list[Site]) -> Picture:
    x = _site_axis(keepers)
    at = np.arange(len(keepers), dtype=float)
    apart = np.array([site.apart() for site in keepers])
    columns = [
        ("distance of the means (standard deviations)", apart[:, 0], 0.0),
        ("factor between the variances", np.exp(apart[:, 1]), 1.0),
    ]
    if examined.blame:
        shares = [100 * examined.blame.get(site.path, 0.0) for site in keepers]
        columns.append(("share of the damage (%)", np.array(shares), 0.0))
    panels = []
    for number, (label, values, nothing) in enumerate(columns):
        texts = [f"{site.path}: {value:.3g}" for site, value in zip(keepers, values, strict=True)]
        ends = axis(label, [values, np.array([nothing])])
        marks = (Rule("y", nothing), Dots("", look(number), at, values, texts, "open"))
        panels.append(Panel("", x, ends, marks))
    caption = (
        "How far the running statistics are from the precise ones, site by site in the order of "
        "execution: root mean square over features of the difference of means, and the geometric "
        "mean factor of the variances."
    )
    if examined.blame:
        caption += (
            " Share of the damage: how much of the rise in evaluation loss goes when only this "
            "site is mended, or comes when only this one is left."
        )
    return Picture("statistics", "Running statistics against precise ones", caption, tuple(panels))


def _site_axis(keepers: list[Site]) -> Axis:
    if len(keepers) <= NAMED:
        return categories("", [site.path for site in keepers], width=18)
    return axis("site, in the order of execution", [np.arange(len(keepers))])


def _features(site: Site) -> Picture:
    assert site.running is not None
    panels = []
    pairs: list[tuple[str, Any, Any, str]] = [
        ("mean", site.precise.mean, site.running.mean, "linear"),
        ("variance", site.precise.var, site.running.var, "log"),
    ]
    for number, (name, precise, running, scale) in enumerate(pairs):
        if scale == "log":
            precise, running = np.maximum(precise, 1e-10), np.maximum(running, 1e-10)
        both = [precise, running]
        x, y = (axis(f"{which} {name}", both, scale) for which in ("precise", "running"))
        ends = np.array([min(map(np.min, both)), max(map(np.max, both))])
        texts = [f"feature {index}" for index in range(len(precise))]
        marks = (
            Thin("", look(6), ends, ends, np.zeros(2)),
            Dots("", look(number), np.asarray(precise), np.asarray(running), texts, "open"),
        )
        panels.append(Panel("", x, y, marks))
    caption = "A dot per feature; on the line both are the same."
    return Picture("features", f"The site furthest away: {site.path}", caption, tuple(panels))
