"""x."""


def section(r):
    return ""
