"""Values that must stand nowhere, and what would carry them there."""

import json
from base64 import b64encode
from collections.abc import Iterator
from urllib.parse import quote

from tests.support.faulty_server import Behaviour, send

EMAIL = "canary.person@private.example"
NAME = "Canary Personsson"
KEY = "ssk_canary-key-7731"
PASSWORD = "canary-password-7731"
TOKEN = "canary-token-7731"
PROXY = "canary-proxy-7731"
# Parts, too: a value that is cut in two is given away all the same.
_CANARIES = ("canary", "personsson", "private.example", "7731")

URL = f"postgresql://me:{PASSWORD}@"
PAGE = json.dumps({"items": [{"primary_email": EMAIL, "display_name": NAME}]}).encode()
OK = b"HTTP/1.1 200 OK\r\nset-cookie: session=%b\r\n" % TOKEN.encode()
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


def given_away(text: str) -> Iterator[str]:
    """Find each line that gives something away, escaped or not."""
    packed = {b64encode(f"me:{each}".encode()).decode()[4:-4] for each in (PASSWORD, PROXY)}
    for line in text.splitlines():
        plain = line.encode().decode("unicode_escape", "replace")
        if any(each in f"{line} {plain}".lower() for each in _CANARIES) or any(
            each in line for each in packed
        ):
            yield line


ANSWERS: dict[str, Behaviour] = {
    "a header that is none": send(OK + EMAIL.encode() + b"\r\n\r\n"),
    "a length that is none": send(OK + b"content-length: %b\r\n\r\n" % EMAIL.encode()),
    "no HTTP": send(PAGE),
    "a chunk that is none": send(CHUNKED + PAGE),
    "a later chunk that is none": send(
        CHUNKED + b"%x\r\n%b\r\n%b\r\n\r\n" % (len(PAGE), PAGE, EMAIL.encode())
    ),
    "a body that is cut off": send(OK + b"content-length: 5000\r\n\r\n" + PAGE),
    "a body that is no gzip": send(
        OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b" % (len(PAGE), PAGE)
    ),
    "a body that is no page": send(
        OK + b"content-length: %d\r\n\r\n%b" % (len(PAGE) - 20, PAGE[:-20])
    ),
    "a reason": send(b"HTTP/1.1 401 %b\r\ncontent-length: 0\r\n\r\n" % EMAIL.encode()),
    "a code": send(
        b"HTTP/1.1 400 No\r\nx-stack-known-error: %b\r\ncontent-length: 0\r\n\r\n" % EMAIL.encode()
    ),
    "a redirect": send(
        b"HTTP/1.1 302 Found\r\nlocation: /%b?key=%b\r\ncontent-length: 0\r\n\r\n"
        % (TOKEN.encode(), KEY.encode())
    ),
}
"""Answers of the API."""

DATABASES = {
    "another port": f"{URL}127.0.0.1:1/app",
    "a name that nobody knows": f"{URL}none.invalid/app",
    "two hosts": f"{URL}127.0.0.1:1,none.invalid:2/app",
    "key and value": f"host=127.0.0.1 port=1 user=me password='{PASSWORD} x' dbname=app",
    "the password as a parameter": f"postgresql://127.0.0.1:1/app?password={PASSWORD}",
    "an @ in the password": f"{URL}7731@127.0.0.1:1/app",
    "a / in the password": f"postgresql://me:{PASSWORD}/7731@127.0.0.1:1/app",
    "a ? in the password": f"postgresql://me:{PASSWORD}?7731@127.0.0.1:1/app",
    "a # in the password": f"postgresql://me:{PASSWORD}#7731@127.0.0.1:1/app",
    "a : in the password": f"postgresql://me:{PASSWORD}:7731@127.0.0.1:1/app",
    "a % in the password": f"postgresql://me:{PASSWORD}%7731@127.0.0.1:1/app",
    "a space in the password": f"postgresql://me:{PASSWORD} 7731@127.0.0.1:1/app",
    "an encoded password": f"postgresql://me:{quote(PASSWORD + '/@é')}@127.0.0.1:1/app",
    "another scheme": f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:1/app",
    "no certificate": f"{URL}127.0.0.1:1/app?sslmode=verify-full&sslpassword={TOKEN}",
}
"""Values of DATABASE_URL."""

PROXIES = {
    "nobody there": f"http://me:{PROXY}@127.0.0.1:1",
    "another scheme": f"socks5://me:{PROXY}@127.0.0.1:1",
    "no address": f"http://me:{PROXY}@[::1",
    "an @ in the password": f"http://me:{PROXY}@7731@127.0.0.1:1",
}
"""Values of HTTPS_PROXY."""

CONFIGS = {
    "no end of a text": f'[stack]\nsecret_server_key = "{KEY}\n',
    "no text": f"[stack]\nsecret_server_key = {KEY}\n",
    "twice": f'[stack]\nsecret_server_key = "{KEY}"\nsecret_server_key = "{KEY}"\n',
    "a list": f'[stack]\nsecret_server_key = ["{KEY}"]\n',
    "no section": f'stack = "{KEY}"\n',
    "another setting": f'[stack]\npage_size = "{KEY}"\n',
    "a name that is too long": f'[database]\nschema = "{KEY * 9}"\n',
    "a URL with a password": f'[stack]\napi_url = "https://me:{PASSWORD}@127.0.0.1"\n',
}
"""Texts of config.toml."""

TRIGGER = """
create function neon_auth.refuse() returns trigger language plpgsql as $$ begin
    raise exception 'no % %', new.email, new.raw_json using
        errcode = new.raw_json->'server_metadata'->>'errcode',
        detail = format('Key (email)=(%s) already exists.', new.raw_json->>'primary_email'),
        hint = new.raw_json->>'display_name';
end $$;
create trigger refuse before insert or update on neon_auth.users_sync for each row
    when (new.raw_json->'server_metadata'->>'errcode' is not null)
    execute function neon_auth.refuse()
"""
"""Refuses users for the reason that they name, and tells all of them."""

# The worker goes another way for each kind: quarantines, leaves alone, tries again, asks a person.
REASONS = ["42501", "40001", "20000", "55P03", "23505", "P0001", "22P02", "HV000", "XX000", "0A000"]
