"""Certificate and key of the REST interface: checked before Ray gets them, trusted by our own clients."""

import ssl
from pathlib import Path

from deployments.config import ConfigError

CERTIFICATE, KEY = "http_options.ssl_certfile", "http_options.ssl_keyfile"


def check(certificate: str, key: str) -> None:
    """Raise ConfigError, naming setting, file and remedy, unless both files can be served with."""
    for setting, name, label in ((CERTIFICATE, certificate, "CERTIFICATE"), (KEY, key, "PRIVATE KEY")):
        try:
            text = Path(name).read_text(errors="replace")
        except FileNotFoundError:
            raise ConfigError(f"{setting}: there is no file {name}") from None
        except OSError as error:
            raise ConfigError(f"{setting}: {name} cannot be read: {error.strerror}") from None
        if f"{label}-----" not in text:
            raise ConfigError(f"{setting}: {name} is no PEM file with a {label.lower()}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    asked = False

    def no_password() -> str:
        nonlocal asked
        asked = True
        return ""

    try:
        # Without a function OpenSSL would ask on the terminal.
        context.load_cert_chain(certificate, key, password=no_password)
    except (ssl.SSLError, ValueError, OSError) as error:
        if asked:
            raise ConfigError(
                f"{KEY}: {key} is encrypted; write it without a passphrase (openssl pkey -in FILE -out FILE) and "
                "let only the service read it"
            ) from None
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{KEY}: {key} is not the key of the certificate {certificate}") from None
        raise ConfigError(f"{CERTIFICATE}, {KEY}: OpenSSL does not take {certificate} with {key}: {error}") from None


def client_context(certificate: str | None) -> ssl.SSLContext | bool:
    """How a client on this machine verifies the server: by that very certificate, whatever names it has.

    `certificate` is a file; None is an unencrypted server, for which ``httpx`` wants a plain True.
    """
    if certificate is None:
        return True
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    # Otherwise only a self-signed certificate would be an anchor.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
