"""What TLS takes from the environment: which certificates to trust, where to log session keys."""

import os
import re
import ssl
from pathlib import Path

import httpx

from worker.errors import Misconfigured

# OpenSSL looks for a certificate in a folder under the hash of its subject.
_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")


def tls_context() -> ssl.SSLContext:
    """Make a context as httpx does. Raises Misconfigured for a variable that cannot be obeyed."""
    # As httpx does: the file wins, and what is empty is not set.
    if file := os.environ.get("SSL_CERT_FILE"):
        _require_certificates(file)
    elif folders := os.environ.get("SSL_CERT_DIR"):
        _require_hashed(folders)
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        if "SSLKEYLOGFILE" not in os.environ:
            raise
        path = os.environ["SSLKEYLOGFILE"]
        raise _unusable("SSLKEYLOGFILE", f"{path} cannot be written: {error.strerror}") from error


def _require_certificates(file: str) -> None:
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        trusted.load_verify_locations(cafile=file)
    except ssl.SSLError:  # it is an OSError, too
        raise _unusable("SSL_CERT_FILE", f"{file} holds no certificate in PEM form") from None
    except OSError as error:
        raise _unusable("SSL_CERT_FILE", f"{file} cannot be read: {error.strerror}") from error
    if not trusted.cert_store_stats()["x509"]:
        raise _unusable("SSL_CERT_FILE", f"{file} holds no certificate in PEM form")


def _require_hashed(folders: str) -> None:
    """Refuse folders in which OpenSSL would find nothing; it would not say so itself."""
    try:
        names = [
            file.name
            for folder in folders.split(os.pathsep)
            if folder
            for file in Path(folder).iterdir()
        ]
    except OSError as error:
        reason = f"{error.filename} cannot be read: {error.strerror}"
        raise _unusable("SSL_CERT_DIR", reason) from error
    if not any(map(_HASHED.fullmatch, names)):
        reason = f"{folders} holds no certificate named by its hash (`openssl rehash` names them)"
        raise _unusable("SSL_CERT_DIR", reason)


def _unusable(variable: str, reason: str) -> Misconfigured:
    return Misconfigured(f"the variable {variable}: {reason}; correct it or unset it")
