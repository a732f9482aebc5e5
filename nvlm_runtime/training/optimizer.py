"""AdamW or Muon on what learns, in fp32 whatever the model is in, and the learning rate of a step.

Parameters in bfloat16 have fp32 masters, which gradients are added to and which the model's own are rounded from; in
fp32 a parameter is its own master. A rank moves what it holds, of parameters that FSDP shares out its rows. Weight
decay leaves vectors alone (norms, biases, gates) unless asked otherwise.

Muon moves matrices between hidden states, by the nearest orthogonal matrix to their momentum; embedding, head and
vectors stay AdamW's. It needs whole matrices, so one process.
Source: torch.optim.Muon (Keller Jordan 2024), its update's size as in Moonlight (arXiv 2502.16982).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_runtime.parallel.shard import held_rows
from nvlm_runtime.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Computes the learning rate of a step: linear up over `warmup` steps, a cosine down to `lr_min` at the last.

    Args:
        recipe: gives lr, lr_min, warmup and steps.
        step: number of steps made before, from 0.

    Returns:
        The rate.
    """
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Returns whether Muon may train a parameter: a matrix that is neither embedding nor head.

    Args:
        name: of the parameter.
        parameter: the parameter.
    """
    return parameter.dim() == 2 and not any(part in name for part in ("embed_tokens.", "lm_head."))


class Optimizer:
    """parameters: what learns, by name. square_norm: of gradients by name, those of other ranks included; None where
    there are none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        recipe: Recipe,
        square_norm: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ):
        self.recipe, self.parameters, self.square_norm = recipe, dict(parameters), square_norm
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float().requires_grad_()
                parameter.register_post_accumulate_grad_hook(self._collect(self.masters[name]))
        self.kinds = {
            n: "muon" if recipe.muon_lr and is_hidden_matrix(n, p) else "adamw" for n, p in self.masters.items()
        }
        self.peaks = {"adamw": recipe.lr, "muon": recipe.muon_lr}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for kind in sorted(set(self.kinds.values())):
            masters = {name: p for name, p in self.masters.items() if self.kinds[name] == kind}
            decayed = {name: recipe.decay_norms_and_gates or p.dim() > 1 for name, p in masters.items()}
            groups = [
                {"params": [p for name, p in masters.items() if decayed[name] == decays], "weight_decay": decay}
                for decays, decay in ((True, recipe.weight_decay), (False, 0.0))
            ]
            groups = [group for group in groups if group["params"]]
            if kind == "muon":
                self.optimizers[kind] = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
            else:
                self.optimizers[kind] = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), foreach=True)

    @staticmethod
    def _collect(master: Tensor) -> Any:
        def hook(parameter: nn.Parameter) -> None:
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

        return hook

    def step(self, number: int) -> tuple[float, float]:
        """Clips the gradients, updates the weights, and drops the gradients.

        Args:
            number: number of steps made before, from 0.

        Returns:
            The learning rate, and the gradients' norm before clipping.

        Raises:
            ValueError: the norm is not finite; no weight has changed then.
        """
        norm = self._clip()
        if not math.isfinite(norm):
            raise ValueError(
                f"step {number + 1}: the gradients' norm is {norm}: a smaller lr, or data that is not broken"
            )
        rate = learning_rate(self.recipe, number)
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[kind] * rate / self.recipe.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
        return rate, norm

    def _clip(self) -> float:
        masters, clip = list(self.masters.values()), self.recipe.clip
        if self.square_norm is None:
            return nn.utils.clip_grad_norm_(masters, clip).item()
        grads = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        norm = self.square_norm(grads).sqrt().item()
        if clip < norm < math.inf:
            for grad in grads.values():
                held_rows(grad)[0].mul_(clip / norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """By name, masters and what moves each: the tensors themselves, as this rank holds them."""
        masters = {name: master.detach() for name, master in self.masters.items()}
        return {"masters": masters, "moments": {name: self._moments(name) for name in masters}}

    def _moments(self, name: str) -> dict[str, Tensor]:
        """What the optimizer keeps of a master, made as its first step would where there was none."""
        kind, master = self.kinds[name], self.masters[name]
        state = self.optimizers[kind].state
        if not state[master]:
            names = ("momentum_buffer",) if kind == "muon" else ("exp_avg", "exp_avg_sq")
            state[master] = {name: torch.zeros_like(master, requires_grad=False) for name in names}
            if kind == "adamw":
                state[master]["step"] = torch.tensor(0.0)
        return state[master]

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores masters, moments and weights.

        Args:
            state: as `state_dict` returns it.

        Raises:
            ValueError: the state is of other parameters.
        """
        if set(state["masters"]) != set(self.masters):
            raise ValueError("the checkpoint is of other parameters than the recipe trains")
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
            for kind, tensor in self._moments(name).items():
                tensor.copy_(state["moments"][name][kind])
