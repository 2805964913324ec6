"""Amounts per site, as passes take them in their text: `encoder.layer.0=8,encoder.layer.3=0.5,*.11=none`.

A pattern is a module path with `*` and `?`; it matches that module and all modules in it. Where several patterns match a site,
the one that matches the fewest sites decides, and of equals the last: `*=none` gives way to every other pattern. An amount is a
whole number, a fraction, or a word, as each pass says; `none` leaves the site as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.errors import UnsupportedError, nearest

Legal = Sequence[int | str]
UNCHANGED = "none"
_WHOLE = re.compile(r"[0-9]+")
_FRACTION = re.compile(r"[0-9]*\.[0-9]+(e-?[0-9]+)?|[0-9]+(\.|e-[0-9]+)")
_MOST_LISTED = 12
COUNTS = "a whole number of 1 or more, a fraction such as 0.5, or none"
"""The amounts that most passes accept, as text for error messages."""


@dataclass(frozen=True)
class AmountSite:
    """A part of a program to which passes give an amount of its own.

    Attributes:
        kind: what is counted or chosen there: `heads`, `key/value heads`, `neurons`, `experts`, `channels`, `layer`, `linear`,
            `attention` or `convolution`.
        paths: the module paths that name it; several where modules share its weights.
        size: the present amount: heads, neurons, experts or channels; the full rank of a linear layer; the heads of an
            attention; 1 for a layer; the most terms of a convolution.
        takes: the allowed amounts for each pass, by the pass's text; any whole number may be written as a fraction too.
        shares: the paths of other sites of this kind on the same axis, which must get the same amount.

    Examples:
        >>> import torch, lissom
        >>> program = lissom.optimize(torch.nn.Linear(16, 16), torch.randn(2, 16)).program
        >>> [(site.kind, site.size) for site in lissom.sites(program)]
        [('linear', 16)]
    """

    kind: str
    paths: tuple[str, ...]
    size: int
    takes: Mapping[str, Legal]
    shares: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The first of its module paths."""
        return self.paths[0]


@dataclass(frozen=True)
class Amounts:
    """An option `amounts=` of a pass: patterns of module paths, each with an amount.

    Attributes:
        option: the pass and the option for error messages, `prune-heads{amounts=}`.
    """

    option: str
    entries: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str, option: str, fits: Callable[[str], bool], takes: str = COUNTS) -> Amounts:
        """The patterns and amounts of a text.

        Args:
            fits: whether a word is an amount.
            takes: what is, for error messages.

        Raises:
            UnsupportedError: for a part that is not PATTERN=AMOUNT, an amount of another kind, or a pattern given twice.
        """
        entries: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            pattern, equals, amount = (word.strip() for word in part.rpartition("="))
            if not (pattern and equals and amount):
                raise UnsupportedError(f"{option} holds '{part}'; write MODULE=AMOUNT, separated by commas")
            if pattern in entries:
                raise UnsupportedError(f"{option} names '{pattern}' twice, with {entries[pattern]} and {amount}")
            if amount != UNCHANGED and not fits(amount):
                raise UnsupportedError(f"{option} gives '{pattern}' {amount}; an amount is {takes}")
            entries[pattern] = amount
        if text.strip() and not entries:
            raise UnsupportedError(f"{option} holds '{text}'; write MODULE=AMOUNT, separated by commas")
        return cls(option, tuple(entries.items()))

    def __bool__(self) -> bool:
        return bool(self.entries)

    def at(self, sites: Sequence[AmountSite], what: str) -> list[str | None]:
        """The amount of each site as text; None where no pattern matches.

        Args:
            what: the sites in words, `attentions`.

        Raises:
            UnsupportedError: for a pattern that matches no site, and for two amounts at sites that must have the same.
        """
        paths = list(dict.fromkeys(path for site in sites for path in site.paths))
        held = {pattern: [path for path in paths if is_path_protected(path, pattern)] for pattern, _ in self.entries}
        for pattern, matching in held.items():
            if not matching:
                hint = nearest(pattern, paths) or ";"
                raise UnsupportedError(
                    f"{self.option}: '{pattern}' matches none of the {what}{hint} there are {_listed(sites)}"
                )
        chosen: dict[str, str] = {}
        # The most general pattern first, so that more specific ones, and of equals the last, overwrite it.
        for pattern, amount in sorted(self.entries, key=lambda entry: -len(held[entry[0]])):
            chosen |= dict.fromkeys(held[pattern], amount)
        for site in sites:
            self._check_shared(site, chosen)
        return [next((chosen[path] for path in site.paths if path in chosen), None) for site in sites]

    def _check_shared(self, site: AmountSite, chosen: Mapping[str, str]) -> None:
        """Refuse different amounts for modules that share the weights or the axis of a site."""
        together = (*site.paths, *site.shares)
        amounts = {chosen.get(path): path for path in reversed(together) if path in chosen or path in site.shares}
        if len(amounts) > 1:
            listed = " and ".join(f"'{path}' {amount or 'no amount'}" for amount, path in reversed(amounts.items()))
            shared = "axis" if site.shares else "weights"
            raise UnsupportedError(f"{self.option} gives {listed}, and they share their {shared}: give them the same amount")

    def counts(self, sites: Sequence[AmountSite], what: str, *, round_to: int = 1) -> list[int | None]:
        """The whole number of each site, one that it takes; None where no pattern matches.

        A fraction is of the site's size, and gives the nearest allowed multiple of `round_to`, of equals the smaller one.

        Raises:
            UnsupportedError: as `at`, and for a number that a site does not take.
        """
        return [
            None if amount is None else self.count(site, amount, round_to=round_to)
            for site, amount in zip(sites, self.at(sites, what), strict=True)
        ]

    def count(self, site: AmountSite, amount: str, *, round_to: int = 1) -> int:
        """The whole number that an amount is at a site; see `counts`."""
        if amount == UNCHANGED:
            return site.size
        legal = [number for amounts in site.takes.values() for number in amounts if isinstance(number, int)]
        if (fraction := fraction_of(amount)) is not None:
            multiples = [number for number in legal if number % round_to == 0] or legal
            return min(multiples, key=lambda number: (abs(number - fraction * site.size), number))
        if int(amount) not in legal:
            raise UnsupportedError(
                f"{self.option}: '{site.path}' has {_size(site)}, and cannot have {amount}; give {legal_text(legal)}, "
                "or a fraction"
            )
        return int(amount)


def is_count(amount: str) -> bool:
    """True for a whole number and for a fraction above 0 and up to 1."""
    return _WHOLE.fullmatch(amount) is not None or fraction_of(amount) is not None


def fraction_of(amount: str) -> float | None:
    """The fraction above 0 and up to 1 that a text with a decimal point gives: `0.5`, `1.0`; None for any other text."""
    fraction = float(amount) if _FRACTION.fullmatch(amount) else 0.0
    return fraction if 0 < fraction <= 1 else None


def amounts_text(sites: Sequence[AmountSite], amounts: Sequence[object]) -> str:
    """The text that gives each site its amount; None leaves a site out. It is the inverse of `Amounts.at`."""
    given = {site.path: str(amount) for site, amount in zip(sites, amounts, strict=True) if amount is not None}
    # A module in a named module would get its amount.
    inside = [site.path for site in sites if any(site.path.startswith(f"{path}.") for path in given)]
    return ",".join(f"{path}={amount}" for path, amount in {**dict.fromkeys(inside, UNCHANGED), **given}.items())


def site_names(paths: Sequence[str], weights: Sequence[str]) -> list[str]:
    """A name for each site: its module path, or the name of its weight where the path is empty or has several weights."""
    weights_at: dict[str, set[str]] = {}
    for path, weight in zip(paths, weights, strict=True):
        weights_at.setdefault(path, set()).add(weight)
    named = zip(paths, weights, strict=True)
    return [path if path and len(weights_at[path]) == 1 else weight.removesuffix(".weight") for path, weight in named]


def legal_text(legal: Legal) -> str:
    """The allowed amounts in words: `1 to 12`, `1, 2, 3, 6`, `none, int8-dynamic`."""
    numbers = [amount for amount in legal if isinstance(amount, int)]
    if len(numbers) == len(legal) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]:,} to {numbers[-1]:,}"
    return ", ".join(map(str, legal))


def _size(site: AmountSite) -> str:
    words = {"linear": "full rank {:,}", "convolution": "up to {:,} terms", "layer": "{:,} layer", "attention": "{:,} heads"}
    return words.get(site.kind, f"{{:,}} {site.kind}").format(site.size)


def _listed(sites: Sequence[AmountSite]) -> str:
    """The sites with their sizes, in words."""
    listed = ", ".join(f"{site.path} ({_size(site)})" for site in sites[:_MOST_LISTED])
    more = len(sites) - _MOST_LISTED
    return (listed or "none") + (f", and {more} more, which `lissom show sites` lists" if more > 0 else "")
