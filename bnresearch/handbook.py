"""What the docstrings of all normalisers say, as a list and as a page.

``python -m bnresearch.handbook`` writes docs/norms.md anew.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from bnresearch.kind import Kind, page
from bnresearch.norm import NORMS

PAGE = Path(__file__).parent.parent / "docs" / "norms.md"
FEATURES = 64  # that all default options fit: state is looked at, for its names

SECTIONS = ("Training", "Inference", "Options", "Pitfalls", "Citation", "Returns", "Raises", "Args")
SHOWN = ("Training", "Inference", "Options", "Pitfalls", "Citation")


class Row(NamedTuple):
    """What there is to know about a kind in one line each."""

    name: str
    title: str
    formula: str
    params: tuple[str, ...]
    state: tuple[str, ...]
    batch_dependent: bool


def row(name: str) -> Row:
    kind, about = NORMS[name], page(NORMS[name])
    return Row(
        name,
        f"{about.title} ({about.authors}, {about.year})",
        about.formula.splitlines()[0],
        param_names(kind),
        state_names(kind),
        kind.batch_dependent,
    )


def param_names(kind: Kind) -> tuple[str, ...]:
    """The names of the parameters that a kind has at its default options, in their order."""
    names: list[str] = []
    # Traced, so that nothing is computed; what jax returns itself has lost the order.
    jax.eval_shape(lambda: names.extend(kind.params(FEATURES, kind.options)))
    return tuple(names)


def state_names(kind: Kind) -> tuple[str, ...]:
    """The names of the running statistics that a kind keeps at its default options."""
    if kind.state is None:
        return ()
    make = kind.state
    start = jax.eval_shape(lambda: make(FEATURES, kind.options))
    return tuple(name for name, value in start._asdict().items() if value is not None)


def listing() -> list[tuple[str, str]]:
    """Name and description of every kind, for ``list norms``."""
    lines = []
    for name in NORMS:
        about = row(name)
        over = "uses the batch" if about.batch_dependent else "example by example"
        keeps = f"keeps {', '.join(about.state)}" if about.state else "keeps nothing"
        facts = [about.title, over, keeps, *remarks(NORMS[name])]
        lines += [(name, "; ".join(facts)), ("", f"  {about.formula}")]
    return lines


def remarks(kind: Kind) -> list[str]:
    """What a kind does to its neighbours in a model."""
    found = ["brings its activation"] * kind.activates
    return found + [f"reparametrises weights: {kind.weights}"] * (kind.weights != "none")


def sections(text: str) -> dict[str, str]:
    """The paragraphs of a docstring's text by heading; "" is what stands before the first."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
    found = {"": parts[0].strip()}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        found[heading] = body.strip()
    return found


def markdown(text: str) -> str:
    """Docstring prose as markdown: backticks, and a list where lines are ``name: meaning``."""
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"^ *(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE) if "\n  " in text else text
    return re.sub(r"\n +", "\n  " if text.lstrip().startswith("- `") else "\n", text)


def chapter(name: str) -> str:
    """The section of the page about one kind."""
    kind, about, known = NORMS[name], page(NORMS[name]), row(name)
    found = sections(about.text)
    options = ", ".join(f"`{option}={value}`" for option, value in kind.options.items())
    inputs = [c for c in kind.context if c in ("mask", "domain", "condition", "time", "rng")]
    facts = [
        ("Options and defaults", options or "none"),
        ("Parameters", ", ".join(f"`{p}`" for p in known.params) or "none"),
        ("State", ", ".join(f"`{s}`" for s in known.state) or "none"),
        ("Uses the batch", "yes" if known.batch_dependent else "no"),
    ]
    facts += [("Side inputs", ", ".join(f"`{i}`" for i in inputs))] * bool(inputs)
    facts += [("In a model", remark) for remark in remarks(kind)]
    lines = [f"## `{name}`", "", known.title, "", "```text", about.formula, "```", ""]
    lines += [markdown(found[""]), ""]
    for heading in SHOWN:
        if heading in found:
            body = markdown(found[heading])
            lines += [f"**{heading}.** {body[0].upper()}{body[1:]}", ""]
    return "\n".join(lines + [f"- {what}: {value}" for what, value in facts]) + "\n"


def norms_page() -> str:
    """The whole of docs/norms.md."""
    table = ["| kind | what | uses the batch | keeps |", "|---|---|---|---|"]
    for name in NORMS:
        about = row(name)
        uses, keeps = "yes" if about.batch_dependent else "no", ", ".join(about.state) or "-"
        what = "; ".join([about.title, *remarks(NORMS[name])])
        table.append(f"| [`{name}`](#{name}) | {what} | {uses} | {keeps} |")
    return HEADER + "\n".join(table) + "\n\n" + "\n".join(chapter(name) for name in NORMS)


HEADER = """# Every normaliser

Made from the docstrings by `python -m bnresearch.handbook`; do not edit it by hand.

x is `[batch, ..., features]`; statistics are float32 whatever the dtype of x; `running <- decay *
running + (1 - decay) * batch`. Choose one with `--config.norm.kind=NAME`, its options with
`--config.norm.NAME.option=value`, other kinds at single sites with `--config.norm.rules`
([configuring norms](own_norm.md)). Kinds with the options of `batch` also take
`--config.norm.NAME.preset=torch` ([conventions](conventions.md)).

Synchronised batch norm is `batch`: over what its statistics are taken says `norm.scope`
([many devices](devices.md)). A trained net can be evaluated with other statistics than those that
it keeps: `eval --stats`.

"""


def main() -> None:
    """Write the page anew."""
    if sys.argv[1:]:
        sys.exit(__doc__)
    PAGE.write_text(norms_page())
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
