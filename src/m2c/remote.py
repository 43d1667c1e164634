"""What the Hugging Face hub says about a repository: files, sizes, hashes; and their bytes.

huggingface_hub, an extra, makes the requests: its endpoint, token, proxies and headers count. Each
way to be refused becomes an error of ours. Knows nothing about what is kept on this machine.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from m2c.errors import BadInput, StorageError

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_TIMEOUT_S: Final = 10.0  # as huggingface_hub waits for a byte
_MAX_FILE_NBYTES: Final = 1 << 44
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SHA1 = re.compile(r"[0-9a-f]{40}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """`etag`: the SHA-256 of a large file, of a small one the name git gives it (a SHA-1)."""

    name: str
    nbytes: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """The files at the top of a repository at one commit."""

    commit: str
    files: Mapping[str, HubFile]


class Interrupted(Exception):
    """The bytes stopped coming; asking again may help."""


class Remote:
    def __init__(self, repo: str, revision: str) -> None:
        """Raises BadInput when huggingface_hub is not installed."""
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise BadInput(
                f"fetching {repo} needs the package huggingface_hub",
                'type: pip install "m2cache[hub]"',
            ) from None
        self.repo, self.revision = repo, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.timeout_s = _timeout_s()

    def listing(self) -> Listing:
        """Raises BadInput for a repository there is not, or not for us; StorageError offline."""
        from huggingface_hub import HfApi

        try:
            with self._refusals():
                info = HfApi(endpoint=self.endpoint).model_info(
                    self.repo, revision=self.revision, files_metadata=True, timeout=self.timeout_s
                )
        except Interrupted as error:
            raise StorageError(
                f"cannot reach {self.endpoint}: {error}",
                "check the connection; a model that is on this machine needs none",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._nonsense(str(error)[:100]) from None
        if not _SHA1.fullmatch(str(info.sha)):
            raise self._nonsense("no commit")
        files = (self._file(sibling) for sibling in info.siblings or ())
        return Listing(str(info.sha), {file.name: file for file in files if file})

    @contextmanager
    def read(self, commit: str, file: HubFile, start: int) -> Iterator[Iterator[bytes]]:
        """The bytes of `file` from `start` on. Raises Interrupted, in the block too."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo, file.name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with self._refusals(file.name):
            request = get_session().stream(
                "GET", url, headers=headers, timeout=self.timeout_s, follow_redirects=True
            )
            with request as response:
                if response.status_code >= 400:
                    response.read()
                hf_raise_for_status(response)
                skip = start - _first_byte(response)
                yield _skipping(response.iter_bytes(), skip)

    def _file(self, sibling: Any) -> HubFile | None:
        """None for what is in a folder or has a name that no file of a checkpoint has."""
        name, nbytes = sibling.rfilename, sibling.size
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return None
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        pattern = _SHA256 if sibling.lfs else _SHA1
        if type(nbytes) is not int or not 0 <= nbytes <= _MAX_FILE_NBYTES:
            raise self._nonsense(f"the size of {name}")
        if not isinstance(etag, str) or not pattern.fullmatch(etag):
            raise self._nonsense(f"the hash of {name}")
        return HubFile(name, nbytes, etag)

    def _nonsense(self, what: str) -> BadInput:
        return BadInput(
            f"{self.endpoint} answers nonsense about {self.repo} ({what})",
            "is HF_ENDPOINT a hub?" if self.endpoint != DEFAULT_ENDPOINT else "try again later",
        )

    @contextmanager
    def _refusals(self, file: str = "") -> Iterator[None]:
        """Turns what huggingface_hub raises into our errors, what may pass into Interrupted."""
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except errors.GatedRepoError:
            raise self._gated() from None
        except errors.RevisionNotFoundError:
            raise BadInput(
                f"{self.repo} has no revision {self.revision}",
                f"leave @{self.revision} out to get main",
            ) from None
        except errors.RepositoryNotFoundError as error:
            raise self._not_found(error.response.status_code) from None
        except errors.HfHubHTTPError as error:
            raise self._refused(error.response.status_code, file) from None
        except errors.OfflineModeIsEnabled:
            raise BadInput(
                f"{self.repo} is not on this machine and HF_HUB_OFFLINE is set", "unset it"
            ) from None
        except httpx2.TimeoutException:
            raise Interrupted(f"nothing came for {self.timeout_s:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Interrupted(str(error) or type(error).__name__) from None

    def _gated(self) -> BadInput:
        page = f"{DEFAULT_ENDPOINT}/{self.repo}"
        if has_token():
            hint = f"accept its terms at {page} with the account of your token, then run this again"
        else:
            hint = (
                f"accept its terms at {page}, make a token at {DEFAULT_ENDPOINT}/settings/tokens, "
                "then: export HF_TOKEN=hf_... and run this again"
            )
        return BadInput(f"{self.repo} is gated: its publisher wants your consent first", hint)

    def _not_found(self, status: int) -> BadInput:
        hint = f"look for it: {DEFAULT_ENDPOINT}/models?search={self.repo.partition('/')[2]}"
        if status == 404:
            return BadInput(f"{self.repo}: no such repository on {self.endpoint}", hint)
        # the hub does not say which to strangers
        return BadInput(
            f"{self.repo}: no such repository on {self.endpoint}, or a private one",
            f"{hint}; a private one needs: export HF_TOKEN=hf_...",
        )

    def _refused(self, status: int, file: str) -> Exception:
        what = f"{file} of {self.repo}" if file else self.repo
        if status == 429 or status >= 500:
            return Interrupted(f"the hub answers {status}")
        if status == 416:
            return Interrupted("the hub's file is shorter than it says")
        if status == 401:
            return BadInput(
                f"the hub does not accept your token for {what}",
                f"make one at {DEFAULT_ENDPOINT}/settings/tokens, then: export HF_TOKEN=hf_...",
            )
        if status == 403:
            return BadInput(
                f"the hub does not let you read {what}",
                f"see {DEFAULT_ENDPOINT}/{self.repo}, or export HF_TOKEN=hf_... with read access",
            )
        return BadInput(f"the hub answers {status} for {what}", "try again later")


def has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def _timeout_s() -> float:
    try:
        return max(float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or _TIMEOUT_S), 0.1)
    except ValueError:
        return _TIMEOUT_S


def _first_byte(response: Any) -> int:
    """Where in the file the answer begins: a server may send all of it, whatever was asked."""
    if response.status_code != 206:
        return 0
    found = re.fullmatch(
        r"bytes (\d{1,15})-\d+/(?:\d+|\*)", response.headers.get("Content-Range", "")
    )
    if found is None:
        raise Interrupted("the hub does not say which part of the file it sends")
    return int(found[1])


def _skipping(chunks: Iterator[bytes], nbytes: int) -> Iterator[bytes]:
    if nbytes < 0:
        raise Interrupted("the hub sends another part of the file than was asked for")
    for chunk in chunks:
        if nbytes < len(chunk):
            yield chunk[nbytes:]
        nbytes = max(nbytes - len(chunk), 0)
