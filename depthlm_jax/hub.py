"""A folder → a repository on the Hugging Face hub. No other module reaches for it, and this one only when called."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from depthlm_jax import log
from depthlm_jax.errors import InputError

# Of an earlier push: loaders might prefer them.
REPLACED = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
REFUSED = (401, 402, 403, 404)


def create(hub_id: str, private: bool) -> None:
    """Makes the repository, unless it is there.

    Args:
      hub_id: USER/NAME.
      private: a new repository is; else it is what the hub makes of it for this user, usually public.

    Raises:
      InputError: offline, no token, no network, or the hub refuses.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{hub_id}: the hub may not be asked", found="HF_HUB_OFFLINE is set", expected="it is not",
            fix="unset HF_HUB_OFFLINE, or leave --push_to_hub away",
        )  # fmt: skip
    if not huggingface_hub.get_token():
        raise InputError(
            f"{hub_id}: the hub needs to know who pushes", found="no token", expected="a token that may write",
            fix="run `hf auth login`, or set HF_TOKEN",
        )  # fmt: skip
    with _named_errors(hub_id):
        huggingface_hub.create_repo(hub_id, private=private or None, exist_ok=True)


def upload(folder: Path, hub_id: str, message: str) -> str:
    """Returns the address of the repository, which then holds the folder's files.

    Args:
      folder: all of it is uploaded; a model's weights of an earlier push go if it holds a model, other files stay.
      hub_id: USER/NAME, of a repository that exists.
      message: of the commit.

    Raises:
      InputError: as `create`.
    """
    log.say(f"uploading {folder} to {hub_id}")
    replaced = REPLACED if (folder / "config.json").is_file() else None
    with _named_errors(hub_id):
        huggingface_hub.upload_folder(
            repo_id=hub_id, folder_path=folder, commit_message=message, delete_patterns=replaced
        )
    return f"{constants.ENDPOINT}/{hub_id}"


@contextlib.contextmanager
def _named_errors(hub_id: str) -> Iterator[None]:
    """Raises InputError for what goes wrong at the hub; without the token, whatever a server may send back."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise _error(hub_id, "the hub may not be asked", error, "network", "unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            expected = "a token that may write to a repository of this name"
            fix = "correct --push_to_hub, or run `hf auth login` with a token that may write there"
            raise _error(hub_id, "the hub refuses", error, expected, fix) from None
        raise _error(hub_id, "the hub failed", error, "a commit", "try again later") from None
    # RuntimeError: of the upload of weights; JSONDecodeError: somebody else answers.
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError) as error:
        fix = "check the network and HF_ENDPOINT, then export again: what is there already is not sent twice"
        raise _error(hub_id, "the hub cannot be reached", error, f"an answer of {constants.ENDPOINT}", fix) from None
    except ValueError as error:  # of README.md, whose front matter the hub checks
        raise _error(hub_id, "the hub takes no such files", error, "files it takes", "correct what it says") from None


def _error(hub_id: str, what: str, error: Exception, expected: str, fix: str) -> InputError:
    found = f"{type(error).__name__}: {error}".replace(huggingface_hub.get_token() or "\0", "(token)")
    return InputError(f"{hub_id}: {what}", found=found, expected=expected, fix=fix)
