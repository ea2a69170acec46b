"""The one error that a caller of this package may catch."""


class UpdateError(ValueError):
    """An update, a matrix or a file that cannot be used; the message names it, the cause and the mend."""
