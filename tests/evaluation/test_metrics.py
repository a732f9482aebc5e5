"""The benchmarks' metrics on cases worked by hand from their published definitions, and against public packages."""

import random

import pytest

from nvlm_runtime.evaluation.choices import chosen_letter, open_answer_matches
from nvlm_runtime.evaluation.mathematics import gsm8k_answer, last_boxed, last_number, math_equal, mathvista_answer
from nvlm_runtime.evaluation.metrics import (
    anls,
    edit_distance,
    exact,
    normalise_answer,
    normalise_textvqa,
    ocrbench,
    relaxed_accuracy,
    vqa_accuracy,
)
from nvlm_runtime.evaluation.report import bootstrap, summary, wilson


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("  a\nred\tcar ", "red car"),
        ("Two", "2"),
        ("none", "0"),
        ("ten of an apple", "10 of apple"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("'ow'sat", "'ow's'at"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),
        ("yes!", "yes"),
        ("yes, sir", "yes sir"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("black-and-white", "black and white"),
        ("1,000", "1000"),
        ("1,000/2", "10002"),
        ("$5.50", "$5.50"),
        ("5.", "5"),
        ("a.m.", "am"),
        ("3.5 m.", "3.5 m"),
        ("50%", "50%"),
        ("3:30", "3:30"),
        ("Café", "café"),
        ("", ""),
        ("the", ""),
    ],
)
def test_normalise_answer(text, expected):
    assert normalise_answer(text) == expected


def test_only_the_first_32_periods_go():
    assert normalise_answer("." * 40 + "x") == "." * 8 + "x"


@pytest.mark.parametrize(
    ("text", "vqa", "textvqa"),
    [("dog's", "dog's", "dog 's"), ("what?now", "what now", "whatnow"), ("a,b", "b", "ab"), ("Yes", "yes", "yes")],
)
def test_textvqa_cuts_words_first(text, vqa, textvqa):
    assert normalise_answer(text) == vqa and normalise_textvqa(text) == textvqa


@pytest.mark.parametrize(
    ("matches", "others", "expected"),
    [(10, 0, 1.0), (4, 6, 1.0), (3, 7, 0.9), (2, 8, 0.6), (1, 9, 0.3), (0, 10, 0.0), (1, 0, 0.0), (2, 1, 4 / 9)],
)
def test_vqa_accuracy(matches, others, expected):
    """Ten annotators, each left out once: of 3 matches, 3 times 2/3 and 7 times 1."""
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * others) == pytest.approx(expected)


def test_vqa_accuracy_of_an_empty_answer():
    assert vqa_accuracy("", ["no"] * 10) == 0 and vqa_accuracy("", [""] * 10) == 1
    with pytest.raises(ValueError, match="at least one annotation"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("Total", ["total"], 1.0),
        ("  17.40  ", ["17.40"], 1.0),
        ("a  b\nc", ["a b c"], 1.0),
        ("17.41", ["17.40"], 0.8),
        ("17.40", ["$17.40", "1740"], 1 - 1 / 6),
        ("abcd", ["abef"], 0.0),  # NL of 0.5 is not below the threshold
        ("abcde", ["abcxy"], 0.6),
        ("newyork", ["new york"], 0.875),
        ("", ["total"], 0.0),
        ("", [""], 1.0),
        ("Müller", ["muller"], 1 - 1 / 6),
        ("cat", ["dog", "cat"], 1.0),
    ],
)
def test_anls(answer, golds, expected):
    assert anls(answer, golds) == pytest.approx(expected)


def test_anls_is_that_of_the_public_package():
    from anls import anls_score

    draw = random.Random(0)
    for _ in range(2000):
        words = ["".join(draw.choice("abAB é1  ") for _ in range(draw.randint(0, 8))) for _ in range(4)]
        golds = words[1 : draw.randint(2, 4)]
        assert anls(words[0], golds) == pytest.approx(anls_score(words[0], golds)), (words[0], golds)


def test_anls_without_golds():
    with pytest.raises(ValueError, match="at least one gold"):
        anls("x", [])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(a, b, expected):
    assert edit_distance(a, b) == edit_distance(b, a) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-100", "100", 0),
        ("-99", "-100", 1),
        ("12%", "12.3%", 1),
        ("12", "12%", 0),
        ("0.12", "12%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.01", "0", 0),
        ("1,000", "1000", 0),
        ("1,000", "1,000", 1),
        ("yes", "Yes", 1),
        (" No ", "no", 1),
        ("", "5", 0),
        ("five", "5", 0),
        ("2019", "2010", 1),  # within 5 %, though a year
        ("14 years", "14", 0),
    ],
)
def test_relaxed_accuracy(answer, gold, expected):
    assert relaxed_accuracy(answer, gold) == expected


@pytest.mark.parametrize(
    ("answer", "golds", "dataset", "expected"),
    [
        ("The total is 17.40.", ["17.40"], "SROIE", 1),
        ("RONALDO", ["ronaldo"], "IIIT5K", 1),
        ("ronaldo", ["Ronaldo"], "svt", 1),
        ("new york", ["newyork"], "svt", 0),
        ("new\nyork", ["new york"], "svt", 1),
        ("new  york", ["new york"], "svt", 0),
        ("x ^ { 2 } + 1", ["x^{2} +1"], "HME100k", 1),
        ("X ^ 2", ["x^2"], "HME100k", 0),
        ("12", ["13", "2"], "FUNSD", 1),
        ("", ["a"], "svt", 0),
        ("店铺：张三", ["张三"], "ESTVQA_cn", 1),
    ],
)
def test_ocrbench(answer, golds, dataset, expected):
    assert ocrbench(answer, golds, dataset) == expected


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [("Yes.", ["yes"], 1), ("Two", ["2"], 1), ("the left", ["Left"], 1), ("no", ["yes"], 0), ("", ["yes"], 0)],
)
def test_exact(answer, golds, expected):
    assert exact(answer, golds) == expected


OPTIONS = ["75 V", "the larger one", "none of them", "a leaf"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("(B) the larger one", "B"),
        ("Answer: B", "B"),
        ("It is (A), no, it is (C)", "C"),
        ("A or B", "B"),
        ("(A) or B", "A"),  # brackets come first
        ("B) the larger one", None),
        ("**B**", None),
        ("b", None),
        ("A leaf", "A"),  # as published: a letter between blanks
        ("a leaf", None),
        ("I believe that it must be a leaf", "D"),
        ("It must be The Larger One, or none of them I think", "C"),
        ("E", None),
        ("", None),
        ("BB", None),
    ],
)
def test_chosen_letter(answer, expected):
    assert chosen_letter(answer, OPTIONS) == expected


def test_of_two_options_at_one_place_the_first():
    assert chosen_letter("what one can see here is catfish", ["dog", "cat", "catfish"]) == "B"


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("The answer is 1,234.", ["1234"], True),
        ("3.14159", ["3.14"], True),
        ("x = 5", ["5"], True),
        ("It is 15", ["5"], False),
        ("The result is 1e3", ["1000"], True),
        ("so -3.5", ["-3.5"], True),
        ("The capital is Paris, so Paris", ["paris"], True),
        ("b", ["b"], True),
        ("table", ["b"], False),  # a single letter needs a blank
        ("50%", ["50%"], True),
        ("two", ["2"], False),
        ("", ["5"], False),
        ("five", ["4", "five"], True),
        ("x = 4\ny is 6", ["4"], False),  # "=" leads only in the last line
        ("y is 6\nx = 4", ["6"], True),
    ],
)
def test_open_answer(answer, golds, expected):
    assert open_answer_matches(answer, golds) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is $\\boxed{5}$.", "5"),
        ("\\boxed{1} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{7}", "7"),
        ("\\boxed 3$ and", "3"),
        ("\\boxed{1", None),
        ("\\boxed", None),
        ("\\boxed{}", ""),
        ("5", None),
        ("\\fbox{2} \\boxed{x_{1}}", "x_{1}"),
        ("", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


EQUAL = [
    ("\\dfrac{1}{2}", "\\frac12"),
    ("\\tfrac34", "\\frac{3}{4}"),
    ("1/2", "\\frac{1}{2}"),
    ("0.5", "\\frac{1}{2}"),
    (".5", "\\frac{1}{2}"),
    ("x=5", "5"),
    ("5\\text{ cm}", "5"),
    ("50\\%", "50"),
    ("\\$18", "18"),
    ("90^\\circ", "90"),
    ("\\sqrt3", "\\sqrt{3}"),
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("\\frac1{72}", "\\frac{1}{72}"),
    ("-1/3", "\\frac{-1}{3}"),
    ("10\\!000", "10000"),
]
UNEQUAL = [
    ("0.25", "\\frac{1}{4}"),
    ("2/4", "1/2"),
    ("1,000", "1000"),
    ("length=5", "5"),
    ("01/2", "\\frac{1}{2}"),
    ("x+1", "1+x"),
    ("5.0", "5"),
    ("", "0"),
    (None, "5"),
    ("\\frac{a}", "\\frac"),
    ("5\\text{ m}\\text{ s}", "5"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_math_equal(answer, gold):
    assert math_equal(answer, gold) and math_equal(gold, answer)


@pytest.mark.parametrize(("answer", "gold"), UNEQUAL)
def test_math_unequal(answer, gold):
    assert not math_equal(answer, gold)


def test_malformed_latex_is_equal_to_itself():
    assert math_equal("\\sqrt", "\\sqrt") and math_equal("2\\frac", "2\\frac")


@pytest.mark.parametrize(("answer", "gold"), [pair for pair in EQUAL if "text" not in pair[0] and "!" not in pair[0]])
def test_what_math_calls_equal_math_verify_does_too(answer, gold):
    from math_verify import parse, verify

    ours, theirs = (parse(f"${text}$", parsing_timeout=None) for text in (answer, gold))
    assert verify(theirs, ours, timeout_seconds=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 1,234 in all", "1234"),
        ("$18.", "18"),
        ("18.50 dollars", "18.50"),
        ("10-2", "2"),
        ("= -7", "-7"),
        ("-$5", "-5"),
        (".5", ".5"),
        ("3 of 4", "4"),
        ("12%", "12"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    number = last_number(text)
    assert (number is None) if expected is None else number == type(number)(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 and 6 make 11\n#### 11", 11),
        ("#### 1,011 then 7", 1011),
        ("#### -3", -3),
        ("#### 18.", 18),
        ("\\boxed{42} of 100", 42),
        ("\\boxed{\\$42}", 42),
        ("The answer is 18.00", 18),
        ("It is 5 apples", 5),
        ("no idea", None),
        ("", None),
    ],
)
def test_gsm8k_answer(text, expected):
    assert gsm8k_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "choices", "kind", "precision", "expected"),
    [
        ("7", [], "integer", None, "7"),
        ("7.9", [], "integer", None, "7"),
        ("The answer is 1,234 m.", [], "integer", None, "1234"),
        ("There are 3 + 4, so the answer is 7 of them", [], "integer", None, "7"),
        ("1.449", [], "float", 2, "1.45"),
        ("1.449", [], "float", 1, "1.4"),
        ("2", [], "float", 1, "2.0"),
        ("12.5%", [], "float", 1, "12.5"),
        ("\\boxed{0.21} of 3", [], "float", 2, "0.21"),
        ('The answer is "14".', [], "integer", None, "14"),
        ("[1, 2] then [3, 4]", [], "list", None, "[3, 4]"),
        ("nothing", [], "integer", None, None),
        ("", [], "integer", None, None),
        ("Yes", ["Yes", "No"], "text", None, "Yes"),
        ("B", ["Yes", "No"], "text", None, "No"),
        ("(b) No", ["Yes", "No"], "text", None, "No"),
        ("yess", ["Yes", "No"], "text", None, "Yes"),
        ("", ["Yes", "No"], "text", None, None),
        ("E", ["long one", "D", "other"], "text", None, "D"),
        ("A", ["B", "A"], "text", None, "A"),  # the text of a choice before its letter
    ],
)
def test_mathvista_answer(text, choices, kind, precision, expected):
    assert mathvista_answer(text, choices, kind, precision) == expected


def test_wilson():
    """By hand: 7 of 10 is 0.397 to 0.892; the bounds stay in 0 to 1."""
    assert wilson(7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert wilson(0, 3)[0] == 0 and wilson(3, 3)[1] == 1
    assert wilson(0, 3)[1] == pytest.approx(3.8415 / 6.8415, abs=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_bootstrap():
    """Near the normal interval for many scores, the same every time, of one value that value."""
    scores = [0.0, 0.3, 0.9, 1.0] * 250
    low, high = bootstrap(scores)
    mean, deviation = 0.55, 0.4153
    half = 1.96 * deviation / 1000**0.5
    assert low == pytest.approx(mean - half, abs=3e-3) and high == pytest.approx(mean + half, abs=3e-3)
    assert bootstrap(scores) == (low, high) and bootstrap([0.6, 0.6]) == pytest.approx((0.6, 0.6))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_summary():
    assert summary([1.0, 0.0, 1.0, 1.0], True) == {"rows": 4, "score": 0.75, "interval": list(wilson(3, 4))}
    fractions = summary([0.3, 0.9], False)
    assert fractions["score"] == pytest.approx(0.6) and fractions["interval"] == list(bootstrap([0.3, 0.9]))
