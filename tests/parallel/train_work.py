"""What the ranks of a training test do."""

from dataclasses import replace
from typing import Any

from nvlm_runtime.parallel import SOLO, Group
from nvlm_runtime.training.recipe import Recipe
from nvlm_runtime.training.trainer import Step, Trainer


def quiet(line: str) -> None:
    pass


def trained(recipe: Recipe, resume: bool = False, group: Group = SOLO, steps: int | None = None) -> list[Step]:
    """The steps of a run, of at most `steps` of them, which then ends as if it had been told to."""
    trainer, found = Trainer(recipe, resume, log=quiet, group=group), []
    while steps is not None and len(found) < steps:
        found.append(trainer.step())
    if steps is None:
        assert trainer.run(found.append) == 0
    else:
        trainer.checkpoint()
        trainer.source.close()
    return found


def curve(steps: list[Step]) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in steps]


def everything(group: Group, recipes: list[Recipe], alone: str) -> dict[str, Any]:
    """Losses and norms of every recipe; of the last also those of a run that is left after three steps and gone on
    with. And what is refused, `alone`, a folder that one process trained in, among it.
    """
    found: dict[str, Any] = {"curves": [curve(trained(recipe, group=group)) for recipe in recipes]}
    stopped = replace(recipes[-1], out=f"{recipes[-1].out}-stopped")
    first = trained(stopped, group=group, steps=3)
    found["resumed"] = curve([*first, *trained(stopped, resume=True, group=group)])
    other = replace(recipes[0], out=f"{recipes[0].out}-other", lr=recipes[0].lr * (1 + group.rank))
    for name, recipe in (("other", other), ("lora", replace(recipes[0], train=(), lora=("decoder",)))):
        try:
            Trainer(recipe, log=quiet, group=group)
        except ValueError as error:
            found[name] = str(error)
    try:
        Trainer(replace(recipes[0], out=alone), resume=True, log=quiet, group=group)
    except ValueError as error:
        found["alone"] = str(error)
    return found
