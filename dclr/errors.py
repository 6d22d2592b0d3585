"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user gave is wrong, and the message says in one line what it is and what would be right.

    The entry points print it without a traceback and exit with status 2; everything else is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        """In one line whatever is quoted in it: names of files and texts from them may hold line breaks and commands to the terminal."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
