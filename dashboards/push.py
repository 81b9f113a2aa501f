"""Dashboards into a running Grafana, through its HTTP API.

The client is grafana-client, the maintained continuation of grafana-api.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from grafana_client import GrafanaApi  # type: ignore[import-untyped]
from grafana_client.client import (  # type: ignore[import-untyped]
    GrafanaClientError,
    GrafanaException,
    GrafanaUnauthorizedError,
    TokenAuth,
)

from dashboards.build import FOLDER_TITLE, FOLDER_UID, SCHEMA_GRAFANA, datasource

Result = TypeVar("Result")
_TIMEOUT_S = 30.0


class PushError(Exception):
    """Grafana cannot be reached or refuses; the message is for the user."""


@dataclass(frozen=True)
class Pushed:
    """What became of one object: created, updated or unchanged."""

    what: str
    outcome: str


class Grafana:
    """A Grafana, with its faults told in the user's terms.

    Raises:
        PushError: by every method.
    """

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PushError(f"--url {url}: not a URL such as http://grafana.example:3000")
        self._url = url
        # A path without its slash at the end would be glued to the API's.
        whole = parts._replace(path=parts.path.rstrip("/") + "/" if parts.path.strip("/") else "", query="").geturl()
        self._api = GrafanaApi.from_url(whole, credential=TokenAuth(token), timeout=_TIMEOUT_S)

    def check_version(self) -> str:
        """Grafana's version; refuses one that is older than the dashboards' schema."""
        health = self._ask(self._api.health.check)
        version = str(health.get("version", "")) if isinstance(health, dict) else ""
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if not numbers:
            raise PushError(f"--url {self._url}: what answers there is not Grafana (no version in /api/health)")
        if (int(numbers[1]), int(numbers[2])) < SCHEMA_GRAFANA:
            oldest = ".".join(map(str, SCHEMA_GRAFANA))
            raise PushError(f"--url {self._url}: Grafana {version} is too old, these dashboards need {oldest} or newer")
        return version

    def push_folder(self) -> Pushed:
        """The folder of the dashboards."""
        if self._find(lambda: self._api.folder.get_folder(FOLDER_UID)) is None:
            self._ask(lambda: self._api.folder.create_folder(FOLDER_TITLE, FOLDER_UID))
            return Pushed(f"folder {FOLDER_TITLE}", "created")
        return Pushed(f"folder {FOLDER_TITLE}", "unchanged")

    def push_datasource(self, prometheus: str) -> Pushed:
        """The data source, at this address of Prometheus as Grafana sees it."""
        wanted = datasource(prometheus)
        what = f"data source {wanted['name']}"
        found = self._find(lambda: self._api.datasource.get_datasource_by_uid(wanted["uid"]))
        if found is None:
            self._ask(lambda: self._api.datasource.create_datasource(wanted))
            return Pushed(what, "created")
        if all(found.get(key) == value for key, value in wanted.items()):
            return Pushed(what, "unchanged")
        self._ask(lambda: self._api.datasource.update_datasource_by_uid(wanted["uid"], {**found, **wanted}))
        return Pushed(what, "updated")

    def push_dashboard(self, text: str) -> Pushed:
        """One dashboard; a changed one of the same uid is overwritten."""
        page = json.loads(text)
        what = f"dashboard {page['title']}"
        found = self._find(lambda: self._api.dashboard.get_dashboard(page["uid"]))
        if found is not None:
            in_place = found.get("meta", {}).get("folderUid") == FOLDER_UID
            if in_place and _content(found.get("dashboard", {})) == _content(page):
                return Pushed(what, "unchanged")
        update = {"dashboard": page, "folderUid": FOLDER_UID, "overwrite": True, "message": "jenga dashboards push"}
        self._ask(lambda: self._api.dashboard.update_dashboard(update))
        return Pushed(what, "created" if found is None else "updated")

    def _find(self, call: Callable[[], Result]) -> Result | None:
        try:
            return self._ask(call, missing_is_fine=True)
        except _MissingError:
            return None

    def _ask(self, call: Callable[[], Result], *, missing_is_fine: bool = False) -> Result:
        where = f"--url {self._url}"
        try:
            return call()
        except GrafanaUnauthorizedError:
            raise PushError(
                f"{where}: Grafana does not know the token: make one for a service account with the role Editor or "
                "Admin, and give it in GRAFANA_TOKEN"
            ) from None
        except GrafanaClientError as error:
            if error.status_code == 404 and missing_is_fine and isinstance(error.response, dict):
                raise _MissingError from None
            if error.status_code == 403:
                raise PushError(
                    f"{where}: the token may not do this ({error.message}): folders and dashboards need the role "
                    "Editor, the data source Admin (or --no-datasource)"
                ) from None
            if error.status_code == 404:
                raise PushError(f"{where}: no Grafana API there; a Grafana below a path needs it in the URL") from None
            raise PushError(f"{where}: Grafana refuses: {error.message}") from None
        except GrafanaException as error:
            raise PushError(f"{where}: Grafana fails: {error.message}") from None
        except requests.exceptions.JSONDecodeError:
            raise PushError(f"{where}: what answers there is not Grafana (no JSON)") from None
        except requests.exceptions.ConnectionError as error:
            raise PushError(f"{where}: nothing answers there ({_innermost(error)})") from None
        except requests.exceptions.RequestException as error:
            reason = type(error).__name__
            raise PushError(f"{where}: Grafana cannot be reached ({reason}): {error}") from None


def _innermost(error: BaseException) -> str:
    """What the system said of a connection, without the layers above it."""
    while True:
        below = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)
        if not isinstance(below, BaseException):
            break
        error = below
    return str(getattr(error, "strerror", None) or error).rsplit("] ", 1)[-1]


class _MissingError(Exception):
    """Grafana does not have what was asked for."""


def _content(page: Mapping[str, Any]) -> dict[str, Any]:
    """A dashboard without what Grafana itself adds."""
    return {key: value for key, value in page.items() if key not in ("id", "version")}
