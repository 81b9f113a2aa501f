"""API keys: made here, kept as salted hashes in one file, compared in constant time.

A key is ``jenga-ID-SECRET``: the id finds its entry, the secret has 256 random bits.  Because nobody can guess such a
secret, one keyed SHA-256 is enough at rest; a slow hash is for passwords.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

logger = logging.getLogger("ray.serve")

_PREFIX = "jenga"
# How old what was read may be before the file is looked at again.
_LOOK_S = 1.0
_HEX = r"^[0-9a-f]+$"
Name = Annotated[str, Field(pattern=r"^[\w.@-]{1,64}$")]


class KeyFileError(Exception):
    """A key file that cannot be used; the message is for its owner and holds nothing secret."""


class Key(BaseModel):
    """One key as the file has it; a limit that is None does not exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    tenant: Name
    id: str = Field(pattern=_HEX)
    salt: str = Field(pattern=_HEX)
    hash: str = Field(pattern=_HEX)
    admin: bool = False
    requests_per_minute: PositiveInt | None = None
    concurrent_requests: PositiveInt | None = None
    created: str

    def holds(self, secret: str) -> bool:
        """Whether `secret` is this key's, in a time that does not tell how nearly."""
        return hmac.compare_digest(_hash(self.salt, secret), self.hash)


def _hash(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()


# Compared with where no entry has the id, so that the answer takes as long.
_NOBODY = Key(name="nobody", tenant="nobody", id="00", salt="00", hash="0" * 64, created="never")


class KeyRing(BaseModel):
    """The keys of one file, and the secret from which the tenants' cache salts are derived."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    salt_secret: str = Field(pattern=_HEX, min_length=64)
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> "KeyRing":
        for what in ("name", "id"):
            if len({getattr(key, what) for key in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have the same {what}")
        return self

    @classmethod
    def new(cls) -> "KeyRing":
        """A ring without keys."""
        return cls(salt_secret=secrets.token_hex(32))

    @classmethod
    def parse(cls, text: str, source: str) -> "KeyRing":
        """The ring that `text` describes.

        Raises KeyFileError naming `source`.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, fault["loc"])) or "top level"
            raise KeyFileError(
                f"{source} is not of `jenga keys` ({where}: {fault['msg']}); `jenga keys add FILE NAME` makes one"
            ) from None

    def add(
        self,
        name: str,
        *,
        tenant: str | None = None,
        admin: bool = False,
        requests_per_minute: int | None = None,
        concurrent_requests: int | None = None,
    ) -> tuple["KeyRing", str]:
        """The ring with another key, and the key itself, which nothing keeps.

        Raises KeyFileError where the name is taken or something does not fit.
        """
        if any(key.name == name for key in self.keys):
            raise KeyFileError(f"there is a key '{name}' already; remove it first, or choose another name")
        taken = {key.id for key in self.keys}
        new_id = next(id_ for id_ in iter(lambda: secrets.token_hex(6), "") if id_ not in taken)
        salt, secret = secrets.token_hex(16), secrets.token_urlsafe(32)
        try:
            key = Key(
                name=name,
                tenant=tenant or name,
                id=new_id,
                salt=salt,
                hash=_hash(salt, secret),
                admin=admin,
                requests_per_minute=requests_per_minute,
                concurrent_requests=concurrent_requests,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise KeyFileError(f"{fault['loc'][0]} {fault['input']!r}: {fault['msg']}") from None
        return self.model_copy(update={"keys": (*self.keys, key)}), f"{_PREFIX}-{new_id}-{secret}"

    def remove(self, name: str) -> "KeyRing":
        """The ring without that key.

        Raises KeyFileError where there is none of that name.
        """
        left = tuple(key for key in self.keys if key.name != name)
        if len(left) == len(self.keys):
            names = ", ".join(key.name for key in self.keys) or "none"
            raise KeyFileError(f"there is no key '{name}' (there: {names})")
        return self.model_copy(update={"keys": left})

    def find(self, presented: str) -> Key | None:
        """The entry of a key that a client presents, None if it is nobody's."""
        prefix, _, rest = presented.partition("-")
        id_, _, secret = rest.partition("-")
        found = next((key for key in self.keys if key.id == id_), _NOBODY) if prefix == _PREFIX else _NOBODY
        return found if found.holds(secret) and found is not _NOBODY else None

    def cache_salt(self, key: Key, own: str | None) -> str:
        """The cache salt of a request: its tenant's, with the client's `own` mixed in.

        Keyed, because a salt that can be guessed would let readers of block hashes guess prompts.
        """
        text = json.dumps([key.tenant, own])
        return hmac.new(bytes.fromhex(self.salt_secret), text.encode(), hashlib.sha256).hexdigest()


def read(path: Path) -> KeyRing:
    """The ring in a file.

    Raises KeyFileError.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise KeyFileError(f"there is no key file {path}; `jenga keys add {path} NAME` makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise KeyFileError(f"the key file {path} cannot be read: {reason}") from None
    return KeyRing.parse(text, f"the key file {path}")


@contextlib.contextmanager
def editing(path: Path) -> Iterator[None]:
    """Keep other writers of this file out; they wait.

    Raises KeyFileError where its folder cannot be opened.
    """
    try:
        folder = os.open(path.absolute().parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"the folder {path.absolute().parent} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write(path: Path, ring: KeyRing) -> None:
    """Put the ring there, whole or not at all; a new file is its owner's alone, an old one keeps mode and owner.

    Raises KeyFileError.
    """
    draft = None
    try:
        before = path.stat() if path.exists() else None
        handle, draft = tempfile.mkstemp(prefix=path.name, dir=path.absolute().parent)
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(ring.model_dump(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            Path(draft).chmod(before.st_mode & 0o777)
            with contextlib.suppress(PermissionError):
                os.chown(draft, before.st_uid, before.st_gid)
        Path(draft).replace(path)
    except OSError as error:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        raise KeyFileError(f"the key file {path} cannot be written: {error.strerror}") from None


class LiveKeys:
    """The keys in force: a file's, read again soon after it changed, or a variable's, as the process was started.

    What cannot be read later leaves the keys in force that were read last, with an error in the log.
    """

    def __init__(self, file: str | None = None, variable: str | None = None) -> None:
        """Exactly one of both is given.  Raises KeyFileError."""
        self._path = Path(file) if file is not None else None
        self._looked = time.monotonic()
        self._seen = self._state()
        if self._path is not None:
            self._ring = read(self._path)
        else:
            text = os.environ.get(variable or "")
            if text is None:
                raise KeyFileError(f"auth.keys_variable: the variable {variable} is not set where the ingress runs")
            self._ring = KeyRing.parse(text, f"auth.keys_variable: the variable {variable}")

    def _state(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    @property
    def ring(self) -> KeyRing:
        """The keys now."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            state = self._state()
            if state != self._seen:
                self._seen = state
                self._read_again()
        return self._ring

    def _read_again(self) -> None:
        assert self._path is not None
        try:
            self._ring = read(self._path)
            logger.info("%s was read again: %d keys", self._path, len(self._ring.keys))
        except KeyFileError as error:
            logger.error("the keys read last stay in force: %s", error)
