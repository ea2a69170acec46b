"""The one error that a caller of geoedit may want to catch."""


class EditError(ValueError):
    """Something about a model, a site, a concept or an edit does not fit; the message says what and how to mend it."""
