"""The parts of a model, named once: what a recipe trains, what an adapter adapts, what is counted."""

PARTS = ("vision", "projector", "cross", "decoder")
VISION, PROJECTOR = "vision_model.", "mlp1."  # prefixes of parameters' names, in memory and in files


def part_of(name: str) -> str:
    """Returns which of `PARTS` a parameter belongs to.

    Args:
        name: of the parameter in the model, or of its tensor in a checkpoint.
    """
    if name.startswith(VISION):
        return "vision"
    if name.startswith(PROJECTOR):
        return "projector"
    return "cross" if ".cross_attn." in name else "decoder"
