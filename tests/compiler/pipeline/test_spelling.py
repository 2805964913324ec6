"""Tests of lissom.compiler.pipeline.spelling."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.pipeline.spelling import format_pass, format_pipeline, options_of, parse_pipeline, type_text
from lissom.errors import PipelineTextError
from lissom.passes import PASSES, RECIPES


@dataclass(frozen=True)
class ManyOptions(Rewrite):
    """Takes an option of every type."""

    count: int = 1
    keep: float = 0.75
    exact: bool = False
    word: str = "plain"
    criterion: Literal["l1", "l2", "taylor"] = "l1"
    bits: Literal[4, 8] = 8
    layers: tuple[int, ...] = ()
    names: tuple[str, ...] = ("a",)
    limit: int | None = None
    title: str | None = "x"
    pairs: tuple[tuple[float, ...], ...] = ()

    def run(self, edit: Editor) -> None:
        pass


@dataclass(frozen=True)
class NeedsOption(Rewrite):
    """Has an option without a default, and a range for it."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; it is over 0 and at most 1")

    def run(self, edit: Editor) -> None:
        pass


TABLE = {item.name(): item for item in (ManyOptions, NeedsOption)}
SHORTHAND = {"both": "many-options{count=3},needs-option{ratio=0.5}"}

NUMBERS = st.floats(allow_nan=False)
MANY = st.builds(
    ManyOptions,
    count=st.integers(),
    keep=NUMBERS,
    exact=st.booleans(),
    word=st.text(),
    criterion=st.sampled_from(["l1", "l2", "taylor"]),
    bits=st.sampled_from([4, 8]),
    layers=st.lists(st.integers(), max_size=3).map(tuple),
    names=st.lists(st.text(), max_size=3).map(tuple),
    limit=st.none() | st.integers(),
    title=st.none() | st.text() | st.sampled_from(["none", "true", "1", "-inf", "1e3"]),
    pairs=st.lists(st.lists(NUMBERS, max_size=2).map(tuple), max_size=2).map(tuple),
)
NEEDS = st.builds(NeedsOption, ratio=st.floats(min_value=0, max_value=1, exclude_min=True))


def refusal(text: str) -> str:
    with pytest.raises(PipelineTextError) as caught:
        parse_pipeline(text, TABLE, SHORTHAND)
    return str(caught.value)


def pointed(text: str, at: str) -> str:
    """The two lines that show the text and point at the first character of `at`."""
    return f"\n  {text}\n  {' ' * text.index(at)}^"


@given(st.lists(MANY | NEEDS, max_size=3))
def test_text_and_passes_are_inverse(passes):
    assert parse_pipeline(format_pipeline(passes), TABLE) == passes


def test_defaults_are_left_out():
    assert format_pass(ManyOptions()) == "many-options"
    assert format_pass(ManyOptions(count=2, exact=True, limit=3)) == "many-options{count=2,exact=true,limit=3}"


def test_an_option_without_a_default_is_always_written():
    assert format_pass(NeedsOption(0.5)) == "needs-option{ratio=0.5}"


def test_words_that_look_like_something_else_are_quoted():
    assert format_pass(ManyOptions(word="12")) == 'many-options{word="12"}'
    assert format_pass(ManyOptions(word="a b")) == 'many-options{word="a b"}'
    assert format_pass(ManyOptions(names=("none", 'say "a"'))) == r'many-options{names=["none","say \"a\""]}'


def test_an_option_that_has_no_spelling_is_refused():
    with pytest.raises(TypeError, match=r"an option is a number, a flag, a word or a tuple of these, not \{\}"):
        format_pass(ManyOptions(word={}))


def test_spaces_and_lines_are_free():
    text = " many-options { count = 2 ,\n layers = [ 1 , 2 ] } , needs-option{ratio=1}\n"
    assert parse_pipeline(text.replace("options {", "options{"), TABLE) == [ManyOptions(2, layers=(1, 2)), NeedsOption(1.0)]


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_nothing_is_no_passes(text):
    assert parse_pipeline(text, TABLE) == []


def test_a_float_may_be_written_as_a_whole_number():
    (found,) = parse_pipeline("needs-option{ratio=1}", TABLE)
    assert isinstance(found.ratio, float)


def test_a_recipe_stands_for_its_passes():
    assert parse_pipeline("needs-option{ratio=1},both", TABLE, SHORTHAND) == [
        NeedsOption(1.0),
        ManyOptions(count=3),
        NeedsOption(0.5),
    ]


def test_every_recipe_of_lissom_spells_passes():
    for text in RECIPES.values():
        assert format_pipeline(parse_pipeline(text, PASSES)) == text


def test_a_mistyped_pass_is_refused_with_the_nearest():
    text = "needs-option{ratio=1},many-option"
    assert refusal(text) == (
        "pipeline text, character 23: there is no pass 'many-option'; did you mean 'many-options'? "
        "`lissom passes` lists them all" + pointed(text, "many")
    )


def test_an_unknown_pass_like_no_other_is_refused():
    assert refusal("zebra") == (
        "pipeline text, character 1: there is no pass 'zebra'; `lissom passes` lists them all" + pointed("zebra", "zebra")
    )


def test_a_mistyped_recipe_is_refused_with_the_nearest():
    assert "there is no pass 'boht'; did you mean 'both'?" in refusal("boht")


def test_unknown_option_is_refused_with_nearest_and_all():
    text = "many-options{cuont=2}"
    assert refusal(text) == (
        "pipeline text, character 14: many-options has no option 'cuont'; did you mean 'count'? its options: count, keep, "
        "exact, word, criterion, bits, layers, names, limit, title, pairs" + pointed(text, "cuont")
    )


def test_an_option_given_twice_is_refused():
    text = "many-options{count=2,exact=true,count=3}"
    assert refusal(text) == ("pipeline text, character 33: many-options is given 'count' twice" + pointed(text, "count=3"))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("count=0.5", "option 'count' of many-options takes a whole number, not '0.5'"),
        ("keep=much", "option 'keep' of many-options takes a number, not 'much'"),
        ("exact=1", "option 'exact' of many-options takes true or false, not '1'"),
        ("criterion=l3", "option 'criterion' of many-options takes one of l1, l2, taylor, not 'l3'"),
        ("bits=5", "option 'bits' of many-options takes one of 4, 8, not '5'"),
        ("layers=3", "option 'layers' of many-options takes a list [a,b] of which each is a whole number, not '3'"),
        ("layers=[1,x]", "option 'layers' of many-options takes a list [a,b] of which each is a whole number, not ('1', 'x')"),
        ("limit=few", "option 'limit' of many-options takes a whole number or none, not 'few'"),
        ('count="2"', "option 'count' of many-options takes a whole number, not '2'"),
        ("word=[a]", "option 'word' of many-options takes a word, not ('a',)"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(option, reason):
    text = f"many-options{{{option}}}"
    value = option.partition("=")[2]
    at = text.index("=") + 2
    assert refusal(text) == f"pipeline text, character {at}: {reason}" + pointed(text, value)


@pytest.mark.parametrize(
    ("text", "character", "reason"),
    [
        ("needs-option{ratio=1} many-options", 23, "expected ',' before the next pass, found 'm'"),
        ("many-options,", 14, "expected the name of a pass after ','"),
        ("many-options,,", 14, "expected the name of a pass, found ','"),
        ("Many", 1, "expected the name of a pass, found 'M'"),
        ("many-options{", 14, "expected an option of many-options, found the end of the text"),
        ("many-options{count}", 19, "expected '=' after 'count', found '}'"),
        ("many-options{count=}", 20, "expected a value, found '}'"),
        ("many-options{count=1", 21, "expected ',' or '}' after the value of 'count', found the end of the text"),
        ("many-options{count=1 exact=true}", 22, "expected ',' or '}' after the value of 'count', found 'e'"),
        ("many-options{layers=[1 2]}", 24, "expected ',' or ']' in the list, found '2'"),
        ('many-options{word="open}', 19, "expected a value, found '\"'"),
    ],
)
def test_malformed_text_is_refused_at_the_character(text, character, reason):
    assert refusal(text) == f"pipeline text, character {character}: {reason}\n  {text}\n  {' ' * (character - 1)}^"


def test_a_missing_option_is_refused():
    assert refusal("needs-option") == "pipeline text, character 1: needs-option: needs ratio" + pointed("needs-option", "n")


def test_what_pass_itself_refuses_is_said_at_its_name():
    text = "many-options,needs-option{ratio=2}"
    assert refusal(text) == (
        "pipeline text, character 14: needs-option: ratio is 2.0; it is over 0 and at most 1" + pointed(text, "needs")
    )


def test_caret_points_right_in_text_of_several_lines():
    text = "many-options,\nzebra"
    assert refusal(text).splitlines()[1:] == ["  many-options, zebra", "  " + " " * 14 + "^"]


def test_options_are_the_fields_with_their_types():
    assert options_of(NeedsOption) == {"ratio": float}


def test_types_read_in_words():
    found = {name: type_text(hint) for name, hint in options_of(ManyOptions).items()}
    assert found == {
        "count": "a whole number",
        "keep": "a number",
        "exact": "true or false",
        "word": "a word",
        "criterion": "one of l1, l2, taylor",
        "bits": "one of 4, 8",
        "layers": "a list [a,b] of which each is a whole number",
        "names": "a list [a,b] of which each is a word",
        "limit": "a whole number or none",
        "title": "a word or none",
        "pairs": "a list [a,b] of which each is a list [a,b] of which each is a number",
    }
