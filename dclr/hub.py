"""Weights on the Hugging Face Hub: `hf:org/name`, or `hf:org/name@revision` for a branch, a tag or a commit.

One file of a repository is downloaded, model.safetensors, which `VideoModel.save_pretrained` writes. Nothing from the
hub is unpickled or executed. The files are kept in the cache of the package huggingface_hub, which the extra `hub`
installs. Without network, the copy in the cache is used.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

from dclr.errors import UserError, first_line

PREFIX = "hf:"
FILE_NAME = "model.safetensors"

_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_on_hub(source: str | Path) -> bool:
    """Return whether `source` names a repository on the hub: it begins with "hf:"."""
    return str(source).startswith(PREFIX)


def download(source: str) -> Path:
    """Return the path of a repository's model.safetensors in the cache. It is downloaded if it is new or has changed.

    Args:
        source: "hf:org/name" or "hf:org/name@revision".

    Raises:
        UserError: the name is not of this form, the package huggingface_hub is not installed, there is no such
            repository, revision or file, the owner has not given access, or there is no network and no copy in the
            cache.
    """
    named = _NAME.fullmatch(source)
    if named is None:
        raise UserError(f"{source}: the name of weights on the hub is hf:org/name or hf:org/name@revision")
    if find_spec("huggingface_hub") is None:
        raise UserError(f"{source} needs the package huggingface_hub, which is not installed: pip install 'dclr[hub]'")

    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    repository, revision = named["repository"], named["revision"]
    try:
        # Without network, hf_hub_download alone would try again for 24 s before it fails.
        get_hf_file_metadata(hf_hub_url(repository, FILE_NAME, revision=revision), library_name="dclr")
        return Path(hf_hub_download(repository, FILE_NAME, revision=revision, library_name="dclr"))
    except errors.GatedRepoError:
        raise UserError(f"{source}: its owner must give you access: ask on its page, then run hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{source}: the hub has no such repository, or it is private: check the name, or run hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{source}: the repository has no branch, tag or commit {revision}") from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"{source}: the repository holds no {FILE_NAME}: save_pretrained writes it; for other weights, download "
            "their file and give its path"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{source} is not a name of the hub: {first_line(error)}") from None
    except Exception as error:  # there is no base class of all errors of the network
        reason = first_line(error)
    try:
        cached = hf_hub_download(repository, FILE_NAME, revision=revision, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{source}: no network ({reason}), and no copy in the cache: connect, or give a folder or a file"
        ) from None
    print(f"warning: {source}: no network ({reason}); the copy in the cache is used", file=sys.stderr)
    return Path(cached)
