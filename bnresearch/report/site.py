"""The report: studies as one static site, made from their files alone, that opens without network.

    site/index.html          every study: question, verdicts, effects
    site/<study>/index.html  a page per study, with figures/ (PNG, PDF), tables/ (CSV), configs/
    site/assets/             plotly, style and script, once for all pages

A site is built beside its place and moved there whole, so that a reader sees the old one or the new
one. Imports neither jax nor models.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs

from bnresearch import measures, rundir, verdict, words
from bnresearch.claims import measure_from_json
from bnresearch.errors import UserError
from bnresearch.records import StudyResults
from bnresearch.report import page
from bnresearch.report.pictures import curves, effects, inside, measured, paper, screen
from bnresearch.report.pictures.design import Design, file_name
from bnresearch.report.pictures.marks import Picture

MARK = "site.json"  # what a folder has to hold before it is replaced
ASSETS = ("site.css", "site.js")
CURVES = (("train", "loss"), ("validation", "accuracy"), ("validation", "loss"))


class Section(NamedTuple):
    """A heading of a study's page with the pictures below it."""

    anchor: str
    title: str
    pictures: Sequence[Picture]
    tables: Sequence[page.Numbers] = ()


def write(results: Sequence[StudyResults], out: Path | str) -> Path:
    """Writes the site of some studies to the folder ``out`` and returns its front page.

    Args:
      results: at least one study, see `records.load_study`.
      out: made; a site that is there already is replaced.

    Raises:
      UserError: ``out`` holds something else than a site, or cannot be written.
    """
    out = Path(os.path.abspath(os.path.expanduser(out)))
    building = out.with_name(f".{out.name}.new")
    _check(out)
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _site(results, building)
        _replace(out, building)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {out}: {error.strerror or error}; "
            "choose another folder with --out"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out / "index.html"


def _check(out: Path) -> None:
    """Refuses a folder that holds anything but an older site: it would be replaced."""
    if out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir())):
        return
    if os.path.lexists(out):
        raise UserError(
            f"{out} is neither empty nor a report (it has no {MARK}), and would be replaced; "
            "choose another folder with --out"
        )


def _replace(out: Path, building: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(building, out)
    shutil.rmtree(old, ignore_errors=True)


def _site(results: Sequence[StudyResults], site: Path) -> None:
    slugs = _slugs(results)
    fronts = []
    for result, slug in zip(results, slugs, strict=True):
        cards = page.cards(result)
        about = {"slug": slug, "results": result, "cards": cards}
        about |= {"tally": page.tally(cards), "undecided": page.undecided(result)}
        fronts.append(about)
        _study(site / slug, about)
    assets = site / "assets"
    assets.mkdir()
    (assets / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for name in ASSETS:
        (assets / name).write_text(source(name), encoding="utf-8")
    render(site / "index.html", "front.html", studies=fronts)
    content = {"schema": 1, "studies": dict(zip(slugs, map(_verdicts, results), strict=True))}
    rundir.write_json(site / MARK, content)


def _verdicts(result: StudyResults) -> list[str] | None:
    verdicts = result.definition.get("verdicts")
    return None if verdicts is None else [verdict["verdict"] for verdict in verdicts]


def _slugs(results: Sequence[StudyResults]) -> list[str]:
    """A folder name for each study; studies of the same name are numbered."""
    found: list[str] = []
    for result in results:
        name = file_name(result.definition["name"]) or "study"
        name = f"{name}_study" if name in ("assets", "index") else name
        taken = sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(f"{name}-{taken + 1}" if taken else name)
    return found


# ---- A study's page


def _study(folder: Path, about: Mapping[str, Any]) -> None:
    results: StudyResults = about["results"]
    for name in ("figures", "tables", "configs"):
        (folder / name).mkdir(parents=True)
    chosen = None
    if results.tuning is not None:
        chosen = results.tuning.chosen[["arm", *results.axes]]
    design = Design.of(results.definition, chosen)
    cells = {
        name: verdict.cells(values, results.measures[name])
        for name, values in results.values.items()
    }
    sections = list(_sections(results, design, cells))
    found = [picture for section in sections for picture in section.pictures]
    for picture in found:
        paper.save(picture, folder / "figures")
    runs = page.run_table(results, design)
    _write_data(folder / "data.js", found, runs)
    _copy_configs(results, folder / "configs")
    render(
        folder / "index.html",
        "study.html",
        **about,
        definition=results.definition,
        sections=sections,
        arms=page.arms(results, design),
        counts=page.counts(results),
        about_it=page.paragraphs(results.definition.get("about") or ""),
        origin=page.origin(results),
        tables=_tables(results, cells, folder / "tables"),
    )


def _sections(
    results: StudyResults, design: Design, cells: Mapping[str, pd.DataFrame]
) -> Iterator[Section]:
    """The pictures of a study, those first that its verdicts rest on."""
    definition = results.definition
    verdicts = definition.get("verdicts") or []
    plain = definition["measures"]
    plot = effects.effect_plot(effects.effects(verdicts, plain))
    both = effects.same_rate(design, verdicts, plain)
    shown = [picture for picture in (plot, both) if picture is not None]
    if shown:
        yield Section("effects", "Effects", shown, page.same_rates(results))
    shown = [
        picture
        for name, values in results.values.items()
        for picture in measured.measured(design, name, plain[name], values)
        if values["value"].notna().any()
    ]
    if shown:
        tables = [page.numbers(design, plain[name], cells[name]) for name in cells]
        yield Section("measures", "What was measured", shown, tables)
    if results.tuning is not None:
        yield Section("tuning", "What was chosen", list(_tuning(results, design)))
    shown = list(_curves(results, design))
    if shown:
        yield Section("curves", "Learning curves", shown)
    shown = list(_inside(results, design))
    if shown:
        yield Section("inside", "Inside the layers", shown)


def _tuning(results: StudyResults, design: Design) -> Iterator[Picture]:
    """The measure on validation by which values were chosen, and how many runs diverged."""
    tune = results.definition["tune"]
    frame = measures.values(results.records, measure_from_json(tune["measure"]), results.axes)
    free = [name for name in design.varied(frame) if name != design.tuned]
    if frame["value"].notna().any():
        rings = design.chosen
        yield measured.along(
            design, "tuning", tune["measure"], frame, design.tuned, free, rings=rings
        )
    if (frame["status"] == "diverged").any():
        yield measured.diverged(design, frame, design.tuned, free)


def _curves(results: StudyResults, design: Design) -> Iterator[Picture]:
    for split, metric in _recorded(results):
        frame = _with_done(results, results.curves(split, metric))
        picture = curves.curves(design, frame, split, metric)
        if picture is not None:
            yield picture


def _with_done(results: StudyResults, frame: pd.DataFrame) -> pd.DataFrame:
    """With the column ``done``: whether the run came to its end."""
    status = results.runs[["arm", *results.axes, "seed", "status"]]
    frame = frame.merge(status, how="left")
    return frame.assign(done=frame.pop("status") == "done")


def _inside(results: StudyResults, design: Design) -> Iterator[Picture]:
    """What the probes of the runs found."""
    for name in dict.fromkeys(probe for probe, _ in results.probes):
        frames = {
            quantity: _with_done(results, results.probe(name, quantity))
            for probe, quantity in results.probes
            if probe == name
        }
        yield from inside.inside(design, name, frames)


def _recorded(results: StudyResults) -> list[tuple[str, str]]:
    """The curves worth a picture that the runs have: (split, metric)."""
    there = {key for run in results.records for key in run.files.curves}
    measured = [(m.split, m.metric) for m in results.measures.values() if m.split != "test"]
    return [key for key in dict.fromkeys([*CURVES, *measured]) if key in there]


def _copy_configs(results: StudyResults, folder: Path) -> None:
    """The config of every run, so that the site can be moved without the runs."""
    for run in {run.id: run for run in results.records}.values():
        if run.config:
            text = json.dumps(rundir.finite(run.config), indent=2)
            (folder / f"{run.id}.json").write_text(f"{text}\n", encoding="utf-8")


def _write_data(path: Path, pictures: Sequence[Picture], runs: Mapping[str, Any]) -> None:
    """What site.js draws. A script, since pages opened as files may not fetch JSON."""
    plots = ",\n".join(
        f"{json.dumps(picture.name)}: [{', '.join(_json(p) for p in picture.panels)}]"
        for picture in pictures
    )
    table = json.dumps(rundir.finite(runs), separators=(",", ":"))
    path.write_text(f"const PLOTS = {{{plots}}};\nconst RUNS = {table};\n", encoding="utf-8")


def _json(panel: Any) -> str:
    return screen.interactive(panel).to_json() or ""


def _tables(
    results: StudyResults, cells: Mapping[str, pd.DataFrame], folder: Path
) -> list[tuple[str, str]]:
    """Writes every table as CSV; returns (file, what it is)."""
    found: list[tuple[str, str, pd.DataFrame]] = [
        ("runs", "every run with its settings and final metrics", results.runs)
    ]
    if len(results.verdicts):
        found.append(("verdicts", "every claim with its verdict", results.verdicts))
        found.append(("effects", "the effect that a claim is about, every seed", _effects(results)))
        same = _same_rate(results)
        if len(same):
            found.append(("same_rate", "effects with both sides at the same setting", same))
    for name, values in results.values.items():
        label, file = results.measures[name].label, file_name(name)
        found.append((f"values_{file}", f"{label}: every seed", values))
        found.append((f"means_{file}", f"{label}: estimates with intervals", cells[name]))
    if results.tuning is not None:
        found.append(("tuning", "what was tried and chosen", results.tuning.candidates))
    for split, metric in _recorded(results):
        frame = results.curves(split, metric)
        about = f"{split} {metric} along training"
        found.append((f"curves_{file_name(split, metric)}", about, frame))
    for probe, quantity in results.probes:
        about = f"{quantity} of the probe {probe}, every site and seed"
        file = f"inside_{file_name(probe, quantity)}"
        found.append((file, about, results.probe(probe, quantity)))
    for name, _, frame in found:
        frame.to_csv(folder / f"{name}.csv", index=False)
    return [(f"{name}.csv", about) for name, about, _ in found]


def _effects(results: StudyResults) -> pd.DataFrame:
    rows = [
        {"claim": number, "seed": seed, "effect": value}
        for number, one in enumerate(results.definition["verdicts"], start=1)
        for seed, value in one["points"].items()
    ]
    return pd.DataFrame(rows, columns=["claim", "seed", "effect"])


def _same_rate(results: StudyResults) -> pd.DataFrame:
    rows = [
        {"claim": number, **row}
        for number, one in enumerate(results.definition["verdicts"], start=1)
        for row in one["same_rate"]
    ]
    return pd.DataFrame(rows)


# ---- Templates


def source(name: str) -> str:
    return (Path(__file__).parent.parent / "templates" / name).read_text(encoding="utf-8")


def render(path: Path, template: str, **content: Any) -> None:
    loader = jinja2.PackageLoader("bnresearch", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    for word in (words.number, words.setting, words.duration):
        environment.filters[word.__name__] = word
    path.write_text(environment.get_template(template).render(**content), encoding="utf-8")
