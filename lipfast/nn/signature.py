"""The arguments of a class whose `__init__` passes `*args` and `**kwargs` on."""

import inspect

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def full_signature(layer: type) -> inspect.Signature:
    """Return all arguments of `layer`, those of the classes that it passes arguments to included.

    For `__signature__`: `torch.nn.utils.skip_init` asks whether there is a `device`.
    """
    found: dict[str, inspect.Parameter] = {}
    for kind in layer.__mro__:
        if "__init__" not in vars(kind):
            continue
        _, *own = inspect.signature(vars(kind)["__init__"]).parameters.values()
        for parameter in own:
            if parameter.kind not in _OPEN:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind in _OPEN for parameter in own):
            break
    return inspect.Signature(sorted(found.values(), key=lambda parameter: parameter.kind))
