"""Which kind of norm stands at which site of a model: rules on site paths, first match wins.

A rule is written ``"PATTERN -> [KIND] [option=value ...]"``. The pattern is a regular expression
that has to match the whole path of a site ("stage2/block1/norm2"). Without a kind, the rule keeps
that of ``norm.kind`` and changes options only:

    "stage3/.* -> none"                    no norm in the last stage
    "stage1/block1/.* -> group groups=4"   group norm in one block
    "stem/.* -> frozen"                    the stem keeps its statistics
    ".*/norm2 -> decay=0.99"               slower running statistics at every second norm
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flax.core import FrozenDict

from bnresearch.conventions import complete
from bnresearch.errors import UserError
from bnresearch.norm import kind_of


class Choice(NamedTuple):
    """A kind and all its options."""

    kind: str
    options: Mapping[str, Any]


def make_choice(kind: str, options: Mapping[str, Any]) -> Choice:
    """A choice that can be hashed (as jax wants it of static arguments), if its options can."""
    return Choice(kind, FrozenDict(options))


class Rule(NamedTuple):
    """Sites whose whole path the pattern matches get the choice; ``text`` is how it was written."""

    text: str
    pattern: re.Pattern[str]
    choice: Choice


def choose(path: str, default: Choice, rules: Sequence[Rule]) -> Choice:
    """The choice for the site at ``path``."""
    rule = first_match(path, rules)
    return default if rule is None else rule.choice


def first_match(path: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if rule.pattern.fullmatch(path)), None)


class Parsed(NamedTuple):
    """A rule as written: its pattern, its kind ("" for that of ``norm.kind``), its options."""

    pattern: re.Pattern[str]
    kind: str
    options: Mapping[str, Any]


def parse(text: str) -> Parsed:
    """A rule taken apart.

    Raises:
      UserError: no ``->``, a broken pattern, an unknown kind, an option without a value.
    """
    pattern, arrow, rest = text.rpartition("->")
    words = rest.split()
    if not arrow or not pattern.strip() or not words:
        raise UserError(
            f"norm.rules: {text!r} is no rule; write PATTERN -> KIND option=value, such as "
            "'stage1/.* -> group groups=4'"
        )
    try:
        compiled = re.compile(pattern.strip())
    except re.error as error:
        raise UserError(
            f"norm.rules: {pattern.strip()!r} in {text!r} is no regular expression ({error})"
        ) from None
    kind = words.pop(0) if "=" not in words[0] else ""
    if kind:
        kind_of(kind, f"norm kind in norm.rules ({text!r})")
    options = dict(_option(word, text) for word in words)
    if len(options) < len(words):
        raise UserError(f"norm.rules: {text!r} gives an option twice; give it once")
    return Parsed(compiled, kind, options)


def written(rule: Rule) -> str:
    """A rule with its kind and all its options, as `parse` reads it: it means the same whatever
    stands elsewhere in a config."""
    options = " ".join(f"{name}={value!r}" for name, value in rule.choice.options.items())
    return f"{rule.pattern.pattern} -> {rule.choice.kind} {options}".rstrip()


def _option(word: str, text: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not name or not equals or not value:
        raise UserError(
            f"norm.rules: {word!r} in {text!r} is no option; write option=value without spaces"
        )
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, {"true": True, "false": False}.get(value, value)


def make_rules(
    texts: Iterable[str], kind: str, options_of: Callable[[str, Mapping[str, Any]], dict[str, Any]]
) -> tuple[Rule, ...]:
    """Rules as a model uses them; ``options_of(kind, given)`` completes the options of a kind."""
    rules = []
    for text in texts:
        parsed = parse(text)
        name = parsed.kind or kind
        try:
            options = options_of(name, parsed.options)
        except UserError as error:
            raise UserError(f"norm.rules: {text!r}: {error}") from None
        rules.append(Rule(text, parsed.pattern, make_choice(name, options)))
    return tuple(rules)


def standard(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a kind from those given, the table and its presets."""
    return complete(kind, kind_of(kind).options, given)


def check_rules(rules: Sequence[Rule], paths: Iterable[str]) -> None:
    """Raises UserError for a rule that none of the site paths falls to."""
    paths = sorted(paths)
    used = {rule.text for path in paths if (rule := first_match(path, rules))}
    for rule in rules:
        if rule.text in used:
            continue
        matched = [path for path in paths if rule.pattern.fullmatch(path)]
        why = (
            f"earlier rules take all sites that it matches ({', '.join(matched[:4])})"
            if matched
            else f"it matches no site; the sites are: {', '.join(paths) or 'none'}"
        )
        raise UserError(f"norm.rules: {rule.text!r} has no effect: {why}")
