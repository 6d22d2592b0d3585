"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user gave is wrong, and the message says in one line what it is and what would be right.

    The entry points print it without a traceback and exit with status 2; everything else is a bug and keeps its traceback.
    """
