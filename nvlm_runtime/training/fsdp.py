"""FSDP2: the ranks of a data-parallel group each keep a share of every weight's rows, its gradient and its moments.

A decoder layer and a vision encoder layer are gathered when they are run and given back behind it, forward and
backward; image keys and values of all gated layers together; the rest (embeddings, projector, norms, head) for the
whole micro-batch. Weights are held in fp32, which the optimizer moves, and gathered in the recipe's precision;
gradients are summed in fp32. Beside tensor parallelism a rank shares out what its tensor-parallel rank holds.
Source: torch.distributed.fsdp.fully_shard; ZeRO (arXiv 1910.02054) stage 3, PyTorch FSDP (arXiv 2304.11277).
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.training.objective import Objective


def shard(model: NVLMModel, data: Group, precision: torch.dtype, device: torch.device | str) -> Objective:
    """Shares a model out over the data-parallel ranks.

    Args:
        model: on the meta device.
        data: the ranks.
        precision: of the gathered weights; gradients are reduced in float32.
        device: where this rank's share goes.

    Returns:
        What trains the model. The memory of this rank's share is allocated and not filled.
    """
    kind = torch.device(device).type
    options = {
        "mesh": DeviceMesh.from_group(data.handle, kind),
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    decoder = model.language_model
    gated = [layer.cross_attn for layer in decoder.layers if layer.cross_attn is not None]
    units: list[nn.Module | list[nn.Module]] = [*model.vision_model.encoder.layers, *decoder.layers]
    if gated:
        units.insert(0, [linear for cross in gated for linear in (cross.k_proj, cross.v_proj)])
    objective = Objective(model, evenly=True)
    for unit in (*units, objective):
        fully_shard(unit, **options)
        first = unit[0] if isinstance(unit, list) else unit  # which holds the state of all
        first.set_gradient_divide_factor(1.0)  # the loss is a share of the step's: gradients are summed
        first.set_force_sum_reduction_for_comms(True)
    return objective.to_empty(device=device)
