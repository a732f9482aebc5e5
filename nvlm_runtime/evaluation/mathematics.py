"""Answers to problems in mathematics: found in a solution, and whether two are the same.

Sources: MATH, github.com/hendrycks/math, modeling/math_equivalence.py (arXiv 2103.03874); GSM8K,
github.com/openai/grade-school-math, grade_school_math/dataset.py (arXiv 2110.14168); MathVista,
github.com/lupantech/MathVista, evaluation/calculate_score.py (arXiv 2310.02255), which asks GPT-4 what the answer is
where a solution is longer than one: here that is read by rule, as said at `mathvista_answer`.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

from nvlm_runtime.evaluation.choices import LETTERS, chosen_letter
from nvlm_runtime.evaluation.metrics import edit_distance

_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_HASHES = re.compile(r"#### (-?[\d.,]+)")
_GONE = ("\n", "\\!"), ("^{\\circ}", "^\\circ", "\\$")  # before and after the fractions are renamed


def last_boxed(text: str) -> str | None:
    r"""Finds what the last \boxed{...}, or without one the last \fbox{...}, holds; for "\boxed 5" up to the next "$".

    Args:
        text: an answer with LaTeX.

    Returns:
        The content; None without a box, or where its brace is never closed.
    """
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return None
    inside = text[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if inside.startswith(" "):
        return inside[1:].split("$")[0].strip()
    depth = 0
    for i, c in enumerate(inside):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return inside[1:i] if i else None
    return None


def math_equal(answer: str | None, gold: str) -> bool:
    r"""Returns whether two LaTeX texts are the same once spelled in one way: MATH's equivalence.

    One way for \dfrac, \tfrac and 1/2, for \frac12 and \sqrt3 without braces, 0.5 and .5; without \left, \right,
    degrees, dollars, percents, blanks, a unit in \text{ ...} after it, or "x =" before. Nothing is computed.

    Args:
        answer: the model's; None is not equal to anything.
        gold: the right one.
    """
    if answer is None:
        return False
    ours, theirs = _spelled(answer), _spelled(gold)
    return answer == gold if ours is None or theirs is None else ours == theirs


def _spelled(text: str) -> str | None:
    """None where it cannot be: a \\frac or \\sqrt of nothing, two units."""
    for gone in _GONE[0]:
        text = text.replace(gone, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\left", "").replace("\\right", "")
    for gone in _GONE[1]:
        text = text.replace(gone, "")
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        return None
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    name, *value = text.split("=")
    if len(value) == 1 and len(name) <= 2:
        text = value[0]
    head, *roots = text.split("\\sqrt")
    if "" in roots:
        return None
    text = head + "".join("\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots)
    text = _braced_fractions(text.replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    if text is not None and re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text):
        return "\\frac{{{}}}{{{}}}".format(*text.split("/"))
    return text


def _braced_fractions(text: str) -> str | None:
    head, *fractions = text.split("\\frac")
    fixed = [head]
    for fraction in fractions:
        if not fraction:
            return None
        if fraction[0] == "{":
            fixed.append(fraction)
        elif len(fraction) < 2:
            return text
        else:
            below = fraction[1] if fraction[1] == "{" else f"{{{fraction[1]}}}"
            fixed.append(f"{{{fraction[0]}}}{below}{fraction[2:]}")
    return "\\frac".join(fixed)


def last_number(text: str) -> Decimal | None:
    """Finds the last number of a text; a "-" between two digits is no sign.

    Args:
        text: an answer.

    Returns:
        The number, without commas and "$"; None without one.
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def gsm8k_answer(text: str) -> Decimal | None:
    """Finds the number after "####", which is the published way; else in the last box; else the last number there is.

    Args:
        text: an answer.

    Returns:
        The number; None without one.
    """
    if match := _HASHES.search(text):
        return last_number(match[1])
    boxed = last_boxed(text)
    return last_number(text if boxed is None else boxed)


def mathvista_answer(text: str, choices: Sequence[str], kind: str, precision: int | None) -> str | None:
    """Finds what the published score compares with the gold answer.

    Of choices: the one that is the whole text, that stands in 'The answer is "...".', whose letter is named
    (`chosen_letter`, "(a)" too), or that is nearest by edit distance, as published. Else the last list or number: of
    the last box, of what follows the last "answer is" or "answer:", or of the text.

    Args:
        text: the model's answer.
        choices: texts of the choices, empty without any.
        kind: "text" with choices; "integer", "float" or "list" without.
        precision: decimals that a "float" is rounded to.

    Returns:
        A choice, or a number or list as text; None for nothing.
    """
    text = text.strip()
    if not text:
        return None
    quoted = re.search(r'The answer is "(.*)"\.', text)
    said = quoted[1].strip() if quoted else text
    if choices:
        return said if said in choices else _choice(said, choices)
    if quoted is None:
        boxed = last_boxed(text)
        said = re.split(r"answer(?: is|:)", text, flags=re.IGNORECASE)[-1] if boxed is None else boxed
    if kind == "list":
        lists = re.findall(r"\[[^\[\]]*\]", said)
        return lists[-1] if lists else None
    number = last_number(said)
    if number is None:
        return None
    return str(int(number)) if kind == "integer" else str(round(float(number), precision))


def _choice(said: str, choices: Sequence[str]) -> str:
    letter = chosen_letter(said, choices)
    if letter is None and (match := re.search(r"\(([a-zA-Z])\)", said)):
        letter = match[1].upper()
    if letter is not None and letter in LETTERS[: len(choices)]:
        return choices[LETTERS.index(letter)]
    return min(choices, key=lambda choice: edit_distance(said, choice))
