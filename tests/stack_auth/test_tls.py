"""What becomes of variables about TLS that cannot be obeyed."""

import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from worker.errors import Misconfigured
from worker.stack_auth.transport import Network

HTTPS = httpx.URL("https://stack.example.com")
HTTP = httpx.URL("http://127.0.0.1:8102")
VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")

SetVariable = Callable[[str, object], None]


@pytest.fixture
def set_variable(monkeypatch: pytest.MonkeyPatch) -> SetVariable:
    """Return a function that sets one of the variables; the others are not set."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return lambda name, value: monkeypatch.setenv(name, str(value))


@pytest.fixture
def pem() -> str:
    """Return any certificate that httpx trusts."""
    return ssl.DER_cert_to_PEM_cert(httpx.create_ssl_context().get_ca_certs(binary_form=True)[0])


def refusal(proxy: httpx.Proxy | None = None, url: httpx.URL = HTTPS) -> str:
    with pytest.raises(Misconfigured) as caught:
        Network(url, proxy)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\0\xff", b"-----BEGIN X509 CRL"])
def test_file_without_certificate_is_refused(
    set_variable: SetVariable, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "authority.pem"
    file.write_bytes(content)
    set_variable("SSL_CERT_FILE", file)
    expected = f"the variable SSL_CERT_FILE: {file} holds no certificate in PEM form"
    assert refusal().startswith(expected)


def test_missing_file_and_folder_in_its_place_are_refused(
    set_variable: SetVariable, tmp_path: Path
) -> None:
    set_variable("SSL_CERT_FILE", tmp_path / "none")
    assert "none cannot be read: No such file" in refusal()
    set_variable("SSL_CERT_FILE", tmp_path)
    assert refusal().startswith("the variable SSL_CERT_FILE: ")


def test_folder_without_certificates_is_refused(
    set_variable: SetVariable, tmp_path: Path, pem: str
) -> None:
    set_variable("SSL_CERT_DIR", tmp_path / "none")
    assert "SSL_CERT_DIR: " in refusal()
    (tmp_path / "authority.pem").write_text(pem)
    set_variable("SSL_CERT_DIR", tmp_path)
    assert "SSL_CERT_DIR: " in refusal()
    assert "openssl rehash" in refusal()


def test_key_log_that_cannot_be_written_is_refused(
    set_variable: SetVariable, tmp_path: Path
) -> None:
    set_variable("SSLKEYLOGFILE", tmp_path / "none" / "keys")
    assert refusal().startswith("the variable SSLKEYLOGFILE: ")
    assert "cannot be written: No such file or directory" in refusal()


def test_variables_that_can_be_obeyed_are(
    set_variable: SetVariable, tmp_path: Path, pem: str
) -> None:
    Network(HTTPS, None).close()
    (tmp_path / "0123abcd.0").write_text(pem)
    set_variable("SSL_CERT_DIR", f"{tmp_path}:")
    Network(HTTPS, None).close()
    set_variable("SSL_CERT_FILE", tmp_path / "0123abcd.0")
    set_variable("SSLKEYLOGFILE", tmp_path / "keys")
    Network(HTTPS, None).close()


@pytest.mark.parametrize("variable", VARIABLES)
def test_nothing_of_it_matters_without_tls(
    set_variable: SetVariable, tmp_path: Path, variable: str
) -> None:
    set_variable(variable, tmp_path / "none" / "none")
    Network(HTTP, None).close()
    Network(HTTP, httpx.Proxy("http://proxy.example.com")).close()
    assert variable in refusal(httpx.Proxy("https://proxy.example.com"), HTTP)
