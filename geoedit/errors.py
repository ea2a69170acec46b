"""The one error that a caller of geoedit may want to catch."""


class EditError(ValueError):
    """A model, a site, a concept or an edit does not fit; the message says what, why and how to mend it."""
