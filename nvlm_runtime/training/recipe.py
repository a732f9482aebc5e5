"""What a training run does, as TOML: the paper's two stages for each variant come with the package, a file may be any.

`train` names the parts that learn; the rest does not change by a bit. Sources: NVLM paper tables 10 and 11, Megatron-LM
examples/multimodal/nvlm.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from nvlm_runtime.model.parts import PARTS

PRECISIONS = ("float32", "bfloat16")
BUNDLED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Blend:
    """A dataset of the blend. file: JSON lines. images: the folder its pictures are in, the file's own where empty.
    weight: its share of the documents against the others'. text_only: counts towards `Recipe.text_share`.
    """

    task: str
    file: str
    images: str = ""
    weight: float = 1.0
    text_only: bool = False


@dataclass(frozen=True)
class Recipe:
    """model: a checkpoint folder or bundled name. out: the folder of the run, of its checkpoints and of what it gives.

    lora: parts that learn by adapters beside their weights, or linears of them, as `lora.add_lora` takes them.
    rows: of a micro-batch, each of `seq_len` tokens; accumulate: micro-batches a step. max_tiles: of a picture, the
    model's own where None. shuffled_tiles: the share of NVLM-X's documents whose tiles stand in another order among the
    image keys, every tag still seeing its own (`shuffle`). text_share: of the documents that are of text_only datasets,
    whatever their weights; None leaves the weights as they are. lr falls from its peak to lr_min on a cosine, after
    `warmup` steps. muon_lr: the peak at which Muon moves matrices between hidden states, on the same curve; AdamW moves
    all where None.
    decay_norms_and_gates: whether weight decay pulls on norms, biases and gates too. precision: bfloat16 keeps fp32
    masters of what learns. recompute: activations of decoder layers, and the projector's up to its GELU where it has no
    adapters, are made again on the way back. loss_rows: learnt tokens whose logits exist at a time. checkpoint_every,
    log_every: steps. keep: checkpoints that stay.
    """

    model: str
    out: str
    data: tuple[Blend, ...]
    variant: str
    train: tuple[str, ...]
    steps: int
    lr: float
    lr_min: float
    warmup: int
    muon_lr: float | None = None
    lora: tuple[str, ...] = ()
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    decay_norms_and_gates: bool = False
    clip: float = 1.0
    rows: int = 1
    accumulate: int = 1
    seq_len: int = 1024
    packed: bool = True
    max_tiles: int | None = None
    shuffled_tiles: float = 0.0
    style: str = "hf"
    text_share: float | None = None
    skip_bad: bool = False
    precision: str = "float32"
    recompute: bool = False
    loss_rows: int = 512
    seed: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = False
    plot: bool = True

    def __post_init__(self):
        least = dict.fromkeys(("steps", "rows", "accumulate", "loss_rows", "checkpoint_every", "keep", "log_every"), 1)
        for name, low in (least | {"warmup": 0, "seq_len": 2}).items():
            if getattr(self, name) < low:
                raise ValueError(f"recipe: {name} must be at least {low}, got {getattr(self, name)}")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"recipe: max_tiles must be at least 1, got {self.max_tiles}")
        if not 0 <= self.shuffled_tiles <= 1:
            raise ValueError(f"recipe: shuffled_tiles must be from 0 to 1, got {self.shuffled_tiles}")
        if not 0 <= self.lr_min <= self.lr or not self.lr > 0:
            raise ValueError(f"recipe: 0 <= lr_min <= lr and lr > 0 are expected, got {self.lr_min} and {self.lr}")
        if self.muon_lr is not None and not self.muon_lr > 0:
            raise ValueError(f"recipe: muon_lr must be above 0, got {self.muon_lr}")
        if self.muon_lr is not None and self.lora:
            raise ValueError("recipe: adapters (lora) learn by AdamW: leave muon_lr out")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"recipe: betas must be from 0 to below 1, got {self.beta1} and {self.beta2}")
        if self.clip <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"recipe: clip must be above 0 and weight_decay not below, got {self.clip}, {self.weight_decay}"
            )
        if self.warmup >= self.steps:
            raise ValueError(f"recipe: warmup ({self.warmup} steps) must end before the {self.steps} steps do")
        if unknown := set(self.train) - set(PARTS):
            raise ValueError(f"recipe: train may name {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        if not self.train and not self.lora:
            raise ValueError("recipe: train and lora name no part: nothing would learn")
        if both := set(self.train) & {target.split(".")[0] for target in self.lora}:
            raise ValueError(f"recipe: {', '.join(sorted(both))} cannot learn both whole and by adapters")
        if self.variant not in ("d", "x", "h"):
            raise ValueError(f"recipe: variant must be d, x or h, got {self.variant!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"recipe: precision must be {' or '.join(PRECISIONS)}, got {self.precision!r}")
        if self.style not in ("hf", "megatron"):
            raise ValueError(f"recipe: style must be hf or megatron, got {self.style!r}")
        if not self.data:
            raise ValueError("recipe: data names no dataset")
        if any(not blend.weight > 0 for blend in self.data):
            raise ValueError("recipe: the weight of every dataset must be above 0")
        text = {blend.text_only for blend in self.data}
        if self.text_share is not None and (not 0 < self.text_share < 1 or text != {True, False}):
            raise ValueError(
                "recipe: text_share is between 0 and 1, of datasets of which some are text_only and some not"
            )

    @property
    def weights(self) -> list[float]:
        """Of the datasets, text_share taken into account."""
        found = [blend.weight for blend in self.data]
        if self.text_share is None:
            return found
        sums = {kind: sum(b.weight for b in self.data if b.text_only == kind) for kind in (True, False)}
        share = {True: self.text_share, False: 1 - self.text_share}
        return [share[b.text_only] * b.weight / sums[b.text_only] for b in self.data]


def trained_parts(variant: str, stage: str) -> tuple[str, ...]:
    """Returns the parts that learn in a stage of the paper, by the bundled recipe.

    Args:
        variant: "d", "x" or "h".
        stage: "pretrain" or "sft".

    Raises:
        ValueError: another stage.
    """
    path = BUNDLED / f"{stage}-{variant}.toml"
    if not path.is_file():
        raise ValueError(f"the stage must be pretrain or sft, got {stage!r}")
    return tuple(tomllib.loads(path.read_text())["train"])


def bundled_recipes() -> list[str]:
    """Lists the names of the recipes in the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file or a bundled one.

    Args:
        name: a TOML file, or one of `bundled_recipes`.
        changes: `key=value` texts that replace values of the file.

    Returns:
        The recipe.

    Raises:
        ValueError: names what is wrong or missing.
    """
    path = Path(name) if Path(name).is_file() else BUNDLED / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"{name!r} is no recipe: expected a TOML file or one of {', '.join(bundled_recipes())}")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    hints = get_type_hints(Recipe)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {change!r}")
        values[key.strip()] = _value(key.strip(), text.strip(), hints.get(key.strip()))
    return _recipe(values)


def _value(key: str, text: str, kind: Any) -> Any:
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError as error:
        if kind is str:
            return text  # a path or a name need no quotes
        raise ValueError(f"--set {key}: {text!r} is no TOML value: {error}") from error
    return text if kind is str and not isinstance(value, str) else value


def _recipe(values: Mapping[str, Any]) -> Recipe:
    hints = get_type_hints(Recipe)
    if unknown := set(values) - set(hints):
        raise ValueError(f"recipe: unknown {', '.join(sorted(unknown))}; known are {', '.join(hints)}")
    given = {name: _checked(f"recipe: {name}", value, hints[name]) for name, value in values.items()}
    return _build(Recipe, given, "recipe")


def _build(kind: type, given: Mapping[str, Any], what: str) -> Any:
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{what} lacks {', '.join(missing)}: give them in the file or with --set")
    return kind(**given)


def _checked(what: str, value: Any, kind: Any) -> Any:
    """The value as its field has it. ValueError for another type; a whole number is a float where one is wanted."""
    if get_origin(kind) is UnionType:
        kinds = [k for k in get_args(kind) if k is not NoneType]
        return None if value is None else _checked(what, value, kinds[0])
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise ValueError(f"{what} must be a list, got {value!r:.60}")
        return tuple(_checked(f"{what}[{i}]", item, inner) for i, item in enumerate(value))
    if kind is Blend:
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} must be a table with task and file, got {value!r:.60}")
        hints = get_type_hints(Blend)
        if unknown := set(value) - set(hints):
            raise ValueError(f"{what}: unknown {', '.join(sorted(unknown))}; known are {', '.join(hints)}")
        return _build(
            Blend, {name: _checked(f"{what}.{name}", item, hints[name]) for name, item in value.items()}, what
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{what} must be {kind.__name__}, got {value!r:.60}")
    return value
