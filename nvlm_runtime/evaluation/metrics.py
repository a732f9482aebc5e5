"""How right a free answer is: VQA accuracy, ANLS, relaxed accuracy, OCRBench's rule. Texts to a score from 0 to 1.

Sources: VQA accuracy, the published vqaEval.py (github.com/GT-Vision-Lab/VQA) and, for TextVQA, EvalAI's processor as
MMF holds it (mmf/utils/m4c_evaluators.py); ANLS, Biten et al. 2019 (arXiv 1907.00490) and the DocVQA challenge's words;
relaxed accuracy, ChartQA (arXiv 2203.10244) section 5.1, with numbers read as pix2struct/metrics.py reads them;
OCRBench, MultimodalOCR's OCRBench/example.py.
"""

import re
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED = 0.05

_ARTICLES = ("a", "an", "the")
_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32  # the published script hands re.UNICODE, which is 32, to the argument that counts
# A word that lacks one of these forms' apostrophes gets it back.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {form[:i] + form[i + 1 :]: form for form in _CONTRACTED for i, c in enumerate(form) if c == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # so in the published table


def normalise_answer(text: str) -> str:
    """Writes an answer as VQA accuracy compares it.

    Punctuation is removed where a blank stands beside it somewhere, or where the text holds a comma between digits;
    else it becomes a blank. Periods are removed unless a digit follows. Then lower case, number words to ten as digits,
    no articles, and apostrophes back into contractions.

    Args:
        text: an answer.

    Returns:
        The normalised answer.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        gone = has_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if gone else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_textvqa(text: str) -> str:
    """Applies `normalise_answer` after what TextVQA's processor does first.

    Args:
        text: an answer.

    Returns:
        The normalised answer: no commas, no question marks, "'s" on its own.
    """
    return normalise_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(answer: str, annotations: Sequence[str]) -> float:
    """Computes min(1, matches / 3) among the other annotators, the mean over the annotator left out.

    The published script leaves annotations as they are where all agree; EvalAI normalises them always, as is done here.

    Args:
        answer: the model's, normalised.
        annotations: one per annotator, normalised.

    Returns:
        The accuracy, 0 to 1.

    Raises:
        ValueError: there are no annotations.
    """
    if not annotations:
        raise ValueError("VQA accuracy needs at least one annotation")
    matches = sum(answer == annotation for annotation in annotations)
    scores = [min(1.0, (matches - (annotation == answer)) / 3) for annotation in annotations]
    return sum(scores) / len(scores)


def edit_distance(a: str, b: str) -> int:
    """Computes Levenshtein's distance: the fewest insertions, deletions and replacements that make `b` of `a`.

    Args:
        a: a text.
        b: a text.

    Returns:
        The number of edits of a character.
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(answer: str, golds: Sequence[str]) -> float:
    """Computes 1 - NL of the nearest gold answer, 0 where NL is not below 0.5.

    NL is the edit distance over the longer length. Case does not count; blanks do, a run of them as one.

    Args:
        answer: the model's.
        golds: the right ones.

    Returns:
        The similarity, 0 to 1.

    Raises:
        ValueError: there are no gold answers.
    """
    if not golds:
        raise ValueError("ANLS needs at least one gold answer")
    return max(_similarity(" ".join(answer.lower().split()), " ".join(gold.lower().split())) for gold in golds)


def _similarity(a: str, b: str) -> float:
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, gold: str) -> float:
    """Compares a number within 5 % of the gold number, or, unless both are numbers, texts without regard to case.

    "12%" is 0.12. A gold number 0 is compared as text, and so is a number with commas: both are pix2struct's ways.

    Args:
        answer: the model's.
        gold: the right one.

    Returns:
        1.0 or 0.0.
    """
    answer, gold = answer.strip(), gold.strip()
    x, target = _number(answer), _number(gold)
    if x is not None and target:
        return float(abs(x - target) / abs(target) <= RELAXED)
    return float(answer.lower() == gold.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocrbench(answer: str, golds: Sequence[str], dataset: str) -> float:
    """Finds a gold text in the answer: without blanks and with its case in HME100k, in lower case elsewhere.

    Args:
        answer: the model's.
        golds: the right ones.
        dataset: the part of OCRBench that the question is from.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: there are no gold texts.
    """
    if not golds:
        raise ValueError("OCRBench needs at least one gold text")
    clean = _formula if dataset == "HME100k" else _line
    return float(any(clean(gold) in clean(answer) for gold in golds))


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def exact(answer: str, golds: Sequence[str]) -> float:
    """Compares the answer with the gold answers, all as `normalise_answer` returns them.

    Args:
        answer: the model's.
        golds: the right ones.

    Returns:
        1.0 or 0.0.
    """
    return float(normalise_answer(answer) in {normalise_answer(gold) for gold in golds})
