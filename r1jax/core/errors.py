"""The text of an error as one line. Imports no JAX."""


def one_line(error: BaseException, limit: int = 0) -> str:
    """Returns an error's message without line breaks, cut to `limit` characters if that is not 0.

    An error of a file is its name and what is wrong with it; an error without a message is the name of its class.
    """
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text[:limit] if limit else text


def named(error: BaseException, limit: int = 0) -> str:
    """Returns the name of an error's class and its message, as `one_line`; the name alone where there is no message."""
    kind, text = type(error).__name__, one_line(error)
    if text == kind:
        return kind
    return f"{kind}: {text[:limit] if limit else text}"
