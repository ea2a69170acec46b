"""Where a parameter stands in its model, read from its name alone."""

from dataclasses import dataclass

ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Place:
    """A parameter's place.

    Attributes:
        module: the path of the module that owns the parameter.
        stack: what stands before the first number of the name ("model.layers"); empty if there is none.
        block: that first number, or None.
        kind: what follows it: "mlp.down_proj". Numbers that stand before another name become "*", so that the
            experts of a block are one kind. Without a block it is the whole path.
    """

    module: str
    stack: str
    block: int | None
    kind: str


def place(parameter: str) -> Place:
    """Read a place from a parameter's name.

    >>> place("model.layers.3.mlp.down_proj.weight")
    Place(module='model.layers.3.mlp.down_proj', stack='model.layers', block=3, kind='mlp.down_proj')
    >>> place("model.layers.3.mlp.experts.5.up_proj.weight").kind
    'mlp.experts.*.up_proj'
    >>> place("features.7.weight")
    Place(module='features.7', stack='features', block=7, kind='features')
    >>> place("lm_head.weight")
    Place(module='lm_head', stack='', block=None, kind='lm_head')
    """
    parts = parameter.split(".")
    path = parts[:-1] if len(parts) > 1 and parts[-1] in ENDS else parts
    module = ".".join(path)
    first = next((at for at, part in enumerate(path) if part.isdecimal()), None)
    if first is None:
        return Place(module, "", None, module)
    rest = [
        "*" if part.isdecimal() and at < len(path) - 1 else part
        for at, part in enumerate(path[first + 1 :], start=first + 1)
    ]
    stack = ".".join(path[:first])
    return Place(module, stack, int(path[first]), ".".join(rest) or stack or module)
