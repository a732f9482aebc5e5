"""What a model that was asked to choose, or for a short answer, has said: MMMU's published parser, without its dice.

Source: github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py (arXiv 2311.16502, section 4.1). Where nothing in the text
names an option, MMMU draws one at random (seed 42) and so gives one in four of those rows; here no option is chosen and
the row is wrong. Scores are thus lower than MMMU's by about a quarter of the rows that could not be read, which
`parsed: null` in the predictions counts.
"""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENDS = (",", ".", "!", "?", ";", ":", "'")
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """Finds the option that an answer names, the last one it names.

    "(B)" comes before " B " between blanks; only an answer of more than five words may name an option by its text.

    Args:
        answer: the model's text.
        options: texts of the options A, B, ...

    Returns:
        The option's letter; None where the answer names none.
    """
    text = answer
    for mark in _ENDS:
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form in ("({})", " {} "):
        found = [(text.rfind(form.format(letter)), letter) for letter in letters if form.format(letter) in text]
        if found:
            return _last(found)
    if len(text.split()) > 5:
        text = text.lower()
        pairs = zip(letters, (option.lower() for option in options))
        if found := [(text.rfind(option), letter) for letter, option in pairs if option in text]:
            return _last(found)
    return None


def _last(found: Sequence[tuple[int, str]]) -> str:
    """Of two at one place, the first: an option that begins another."""
    return max(found, key=lambda pair: pair[0])[1]


def open_answer_matches(answer: str, golds: Sequence[str]) -> bool:
    """Returns whether what an open answer says contains a gold text, or is a gold number to 2 decimals.

    What it says is the end of each line after the last "is ", "so ", "therefore " and their like ("=" too in the last
    line), the whole where there is none; and every number in those.

    Args:
        answer: the model's text.
        golds: texts or numbers that are right.
    """
    wanted = {value for gold in golds for value in _values(gold)}
    numbers = {value for value in wanted if isinstance(value, float)}
    texts = {value for value in wanted if isinstance(value, str)}
    for part in _parts(answer):
        if isinstance(part, float) and part in numbers:
            return True
        if isinstance(part, str) and any(text in part for text in texts):
            return True
    return False


def _parts(answer: str) -> list[str | float]:
    answer = answer.strip().strip(".").lower()
    lines, ends = answer.split("\n"), []
    for i, line in enumerate(lines, 1):
        leads = _LEADS if i < len(lines) else (*_LEADS, "=")
        tails = [line.split(lead)[-1].strip() for lead in leads if lead in line]
        # an empty tail is passed over, as there, where it counts as none yet
        if tail := _shortest(tails):
            ends.append(tail)
    ends = ends or [answer]
    said = ends + [number for end in ends for pattern in _NUMBERS for number in re.findall(pattern, end)]
    return [value for text in said for value in _values(text)]


def _shortest(tails: Sequence[str]) -> str | None:
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best if best not in ("", ":", ",", ".", "!", "?", ";", "'") else None


def _values(text: str) -> list[str | float]:
    """A number to 2 decimals, or the text in lower case; a single letter only with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
