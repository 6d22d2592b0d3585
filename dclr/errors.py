"""The exception for wrong input, and names that are safe to print."""


def printable(text: str) -> str:
    """Return the text with escaped control characters and undecodable bytes, which file names may contain."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's name if it has no message."""
    return (str(error) or repr(error)).splitlines()[0]


class UserError(Exception):
    """Wrong input from the user. The message says in one line what is wrong and what would be right.

    train.py and eval.py print the message without a traceback and exit with status 2. Any other exception is a bug and
    keeps its traceback.
    """

    def __str__(self) -> str:
        """Return the message with escaped control characters, which quoted file names and texts may contain."""
        return printable(super().__str__())


class NotConnected(UserError):
    """The processes of a run cannot connect to each other, so rank 0 may not be there to print an error."""
