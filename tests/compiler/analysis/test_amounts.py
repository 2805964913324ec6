"""Amounts per site: patterns and precedence, numbers and fractions, errors, and the way back to text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lissom.compiler.analysis.amounts import Amounts, AmountSite, amounts_text, is_count, legal_text, site_names
from lissom.errors import UnsupportedError

SITES = [AmountSite("heads", (f"encoder.layer.{index}.attention",), 12, {"prune-heads": range(1, 13)}) for index in (0, 1, 11)]


def parse(text: str) -> Amounts:
    return Amounts.parse(text, "prune-heads{amounts=}", is_count)


def test_pattern_with_fewest_sites_decides_and_of_equals_last() -> None:
    assert parse("encoder.layer.1=8,*=4").at(SITES, "attentions") == ["4", "8", "4"]
    assert parse("*=4,*.11=2,encoder.layer.*.attention=6").at(SITES, "attentions") == ["6", "6", "2"]
    assert parse("encoder.layer.1=8,*.1=5").at(SITES, "attentions") == [None, "5", None]


def test_numbers_fractions_and_none() -> None:
    assert parse("*.0=8, *.1=0.5, *.11=none,").counts(SITES, "attentions") == [8, 6, 12]
    assert parse("*=1").counts(SITES, "attentions") == [1, 1, 1]
    assert parse("*=1.0").counts(SITES, "attentions") == [12, 12, 12]
    assert parse("*=0.001").counts(SITES, "attentions") == [1, 1, 1]
    assert parse("*=0.4").counts(SITES, "attentions", round_to=4) == [4, 4, 4]
    divisors = [AmountSite("key/value heads", ("a",), 12, {"pool-heads": (1, 2, 3, 4, 6, 12)})]
    assert parse("a=0.7").counts(divisors, "attentions") == [6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoder.layer.0", "holds 'encoder.layer.0'; write MODULE=AMOUNT"),
        ("=3", "holds '=3'; write MODULE=AMOUNT"),
        (",", "holds ','; write MODULE=AMOUNT"),
        ("*.0=2,*.0=3", r"names '\*.0' twice, with 2 and 3"),
        ("*.0=many", r"gives '\*.0' many; an amount is a whole number of 1 or more, a fraction such as 0.5, or none"),
        ("*.0=1.5", r"gives '\*.0' 1.5; an amount is"),
        ("*.0=-1", r"gives '\*.0' -1; an amount is"),
    ],
)
def test_texts_that_are_no_amounts(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=r"prune-heads\{amounts=\} " + message):
        parse(text)


def test_a_pattern_without_a_site_lists_the_sites() -> None:
    listed = r"there are encoder.layer.0.attention \(12 heads\), encoder.layer.1.attention \(12 heads\), "
    with pytest.raises(UnsupportedError, match=rf"'encoder.layer.7' matches none of the attentions.* {listed}"):
        parse("encoder.layer.7=8").counts(SITES, "attentions")
    many = [AmountSite("heads", (f"layers.{index}",), 4, {"prune-heads": range(1, 5)}) for index in range(20)]
    with pytest.raises(UnsupportedError, match=r"layers.11 \(4 heads\), and 8 more, which `lissom show sites` lists"):
        parse("x=2").counts(many, "attentions")
    with pytest.raises(UnsupportedError, match="there are none"):
        parse("x=2").counts([], "attentions")


@pytest.mark.parametrize("amount", ["0", "13"])
def test_a_number_that_a_site_cannot_have(amount: str) -> None:
    with pytest.raises(UnsupportedError, match=f"has 12 heads, and cannot have {amount}; give 1 to 12, or a fraction"):
        parse(f"*={amount}").counts(SITES, "attentions")


def test_sites_that_share_weights_or_axis_get_one_amount() -> None:
    tied = [AmountSite("neurons", ("a.down", "b.down"), 8, {"prune-neurons": range(1, 9)})]
    assert parse("b=3").counts(tied, "feed-forwards") == [3]
    with pytest.raises(UnsupportedError, match=r"gives 'a.down' 4 and 'b.down' 3, and they share their weights"):
        parse("a=4,b=3").counts(tied, "feed-forwards")
    pair = [AmountSite("neurons", (one,), 8, {"prune-neurons": range(1, 9)}, (other,)) for one, other in ("ab", "ba")]
    assert parse("*=3").counts(pair, "feed-forwards") == [3, 3]
    with pytest.raises(UnsupportedError, match=r"gives 'a' 4 and 'b' no amount, and they share their axis"):
        parse("a=4").counts(pair, "feed-forwards")


def test_names_of_sites() -> None:
    assert site_names(["a", "b", "b", "", "c", "c"], ["v.weight", "w.weight", "x", "y.weight", "z", "z"]) == [
        *("a", "w", "x", "y"),
        *("c", "c"),
    ]


def test_allowed_amounts_in_words() -> None:
    assert legal_text(range(1, 13)) == "1 to 12"
    assert legal_text((1, 2, 3, 6)) == "1, 2, 3, 6"
    assert legal_text((0, 1)) == "0, 1"
    assert legal_text(("none", "fp8")) == "none, fp8"


paths = st.lists(st.lists(st.sampled_from(["a", "b", "0", "10", "self"]), min_size=1, max_size=4).map(".".join), unique=True)


@given(paths=paths, draw=st.data())
def test_the_text_of_amounts_gives_them_back(paths: list[str], draw: st.DataObject) -> None:
    sites = [AmountSite("heads", (path,), 12, {"prune-heads": range(1, 13)}) for path in paths]
    chosen = [draw.draw(st.none() | st.integers(1, 12)) for _ in sites]
    found = parse(amounts_text(sites, chosen)).counts(sites, "attentions")
    # A site in a named module is written down as it is.
    assert [amount or 12 for amount in found] == [amount or 12 for amount in chosen]
