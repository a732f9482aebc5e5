"""A second tree of modules over the weights of a first one, which can be changed without a change to the first."""

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def view_of(model: Model, classes: Mapping[type[nn.Module], type[nn.Module]] | None = None) -> Model:
    """Copies the modules of a model, and shares every parameter, buffer and other attribute.

    Submodules of the view can be replaced, and its attributes and hooks set: the model does not change. What changes
    weights in place (an optimizer's step, `load_state_dict`) changes them for both.

    Args:
        model: Any module. A module that stands in it twice stands in the view twice.
        classes: Class of a module to the class that its copy gets, for exactly that class. The two have the same
            attributes.

    Returns:
        A module of the model's class, in evaluation or training mode as the model is.
    """
    return cast(Model, _copy(model, classes or {}, {}))


def _copy(
    module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]], made: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in made:
        return made[module]
    kind = classes.get(type(module), type(module))
    made[module] = twin = kind.__new__(kind)
    # the dicts of parameters, submodules and hooks are the twin's own, what is in them is not
    own = (dict, set)
    attributes = {name: copy.copy(value) if isinstance(value, own) else value for name, value in vars(module).items()}
    twin.__dict__.update(attributes)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _copy(child, classes, made)
    return twin
