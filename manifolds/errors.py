"""The one error that a caller of manifolds may want to catch."""


class ManifoldError(ValueError):
    """A point, a tangent or a setting does not fit; the message says which, why and how to mend it."""


class NoPathError(ManifoldError):
    """No shortest path was found between some points.

    Attributes:
        items: which of the pairs, counted through all dimensions of the batch.
    """

    def __init__(self, message: str, items: list[int]) -> None:
        super().__init__(message)
        self.items = items


class MissingOperationError(ManifoldError, NotImplementedError):
    """The manifold has no such operation; the message names both."""
