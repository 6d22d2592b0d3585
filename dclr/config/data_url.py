"""The value of --data that is a URL: a packed store on a server."""

import re
from urllib.parse import urlsplit

from dclr.errors import UserError


def is_url(data: str) -> bool:
    """Return whether --data names a store on a server, such as https://HOST/STORE or s3://BUCKET/STORE."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", data) is not None


def check_url(url: str) -> None:
    """Raise UserError unless the URL of --data is that of a folder on a server, without a user name or a password.

    A user name or a password would be shown by config.json and by messages. The message of this error does not show it.
    """
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc
    except ValueError as error:  # brackets that belong to no address
        raise UserError(f"--data is not a URL: {error}") from None
    if secret:
        raise UserError(
            f"--data {parts.scheme}://...@... holds a user name or a password, which config.json would show: "
            "leave them out; credentials come from the environment or from files such as ~/.aws/credentials"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"--data {parts.scheme}://{parts.netloc}{parts.path} is followed by ? or #, but must be the URL of a "
            "folder: leave the rest out"
        )
    if parts.scheme == "file":
        raise UserError("--data is a file:// URL: give the path of the folder")
    if not parts.netloc:
        raise UserError(f"--data {url} names no server or bucket")
