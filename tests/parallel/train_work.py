"""What the ranks of a training test do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nvlm_runtime.parallel.group import Group, Mesh
from nvlm_runtime.parallel.ranks import mesh_of
from nvlm_runtime.parallel.shard import held_rows
from nvlm_runtime.training.recipe import Recipe
from nvlm_runtime.training.trainer import Step, Trainer


def quiet(line: str) -> None:
    pass


def trained(recipe: Recipe, resume: bool = False, mesh: Mesh | None = None, steps: int | None = None) -> list[Step]:
    """The steps of a run, of at most `steps` of them, which then ends as if it had been told to."""
    trainer, found = Trainer(recipe, resume, log=quiet, mesh=mesh), []
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


def everything(world: Group, recipes: list[Recipe], alone: str, data: int) -> dict[str, Any]:
    """Losses and norms of every recipe; of the last also those of a run that is left after three steps and gone on
    with. And what is refused, `alone`, a folder that one process trained in, among it.
    """
    mesh = mesh_of(world, data)
    found: dict[str, Any] = {"curves": [curve(trained(recipe, mesh=mesh)) for recipe in recipes]}
    stopped = replace(recipes[-1], out=f"{recipes[-1].out}-stopped")
    first = trained(stopped, mesh=mesh, steps=3)
    found["resumed"] = curve([*first, *trained(stopped, resume=True, mesh=mesh)])
    trained(replace(recipes[-1], out=f"{recipes[-1].out}-left"), mesh=mesh, steps=3)
    if world.rank == 0:
        (file,) = Path(stopped.out, "checkpoints").glob(f"step-*{stopped.steps}/__1_0.distcp")
        file.write_bytes(file.read_bytes()[:1000])
    world.wait()
    found["damaged"] = gone_on_with(world, stopped, data)
    other = replace(recipes[0], out=f"{recipes[0].out}-other", lr=recipes[0].lr * (1 + world.rank))
    lora = replace(recipes[0], train=(), lora=("decoder",))
    for name, recipe in (("other", other), ("lora", lora), ("uneven", replace(recipes[0], accumulate=3))):
        try:
            trainer = Trainer(recipe, log=quiet, mesh=mesh)
        except ValueError as error:
            found[name] = str(error)
        else:
            trainer.source.close()
    try:
        Trainer(replace(recipes[0], out=alone), resume=True, log=quiet, mesh=mesh)
    except ValueError as error:
        found["alone"] = str(error)
    trainer = Trainer(replace(recipes[0], out=f"{recipes[0].out}-held"), log=quiet, mesh=mesh)
    trainer.source.close()
    found["held"] = {name: (held_rows(p)[0].numel(), p.numel(), len(p)) for name, p in trainer.model.named_parameters()}
    return found


def gone_on_with(world: Group, recipe: Recipe, data: int) -> list[tuple[float, float]] | str:
    """The rest of a run that other ranks left, or why not."""
    try:
        return curve(trained(recipe, resume=True, mesh=mesh_of(world, data)))
    except ValueError as error:
        return str(error)
