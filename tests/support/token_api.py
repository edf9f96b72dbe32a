"""The fake users API with tokens: an ES256 key, its JWKS, sign-in by password, and `/users/me`."""

import json
import time
from collections.abc import Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from worker.sandbox.api import FakeStackApi

LIFETIME_SECONDS = 600


class TokenApi:
    """Answers what is about tokens, and leaves all else to the fake users API."""

    def __init__(self, api: FakeStackApi, base_url: str = "https://api.stack-auth.com") -> None:
        self.api = api
        self.project = api.project
        self.base_url = base_url
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.passwords: dict[str, tuple[str, str]] = {}

    def token(self, user_id: str, key: Any = None, **claims: Any) -> str:
        """Sign a token for a user; `claims` replace those that it would have."""
        project, now = self.project.project_id, int(time.time())
        user = self.project.users().get(user_id, {})
        kind = "anonymous" if user.get("is_anonymous") else "restricted"
        odd = bool(user.get("is_anonymous") or user.get("is_restricted"))
        path = f"projects-{kind}-users" if odd else "projects"
        audience = {"anonymous": ":anon", "restricted": ":restricted"}[kind] if odd else ""
        given = {
            "sub": user_id,
            "iss": f"{self.base_url}/api/v1/{path}/{project}",
            "aud": project + audience,
            "iat": now,
            "exp": now + LIFETIME_SECONDS,
            **claims,
        }
        return jwt.encode(given, key or self.key, "ES256", {"kid": "test"})

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == f"/api/v1/projects/{self.project.project_id}/.well-known/jwks.json":
            return _reply(start_response, 200, self._keys())
        if path == "/api/v1/auth/password/sign-in":
            return self._sign_in(environ, start_response)
        if path == "/api/v1/users/me":
            return self._me(environ, start_response)
        return self.api(environ, start_response)

    def _keys(self) -> dict[str, Any]:
        found = json.loads(ECAlgorithm.to_jwk(self.key.public_key()))
        return {"keys": [{**found, "alg": "ES256", "kid": "test"}]}

    def _sign_in(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        given = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        password, user_id = self.passwords.get(given["email"], ("", ""))
        if not password or password != given["password"]:
            return _reply(start_response, 400, {"code": "EMAIL_PASSWORD_MISMATCH"})
        tokens = {"access_token": self.token(user_id), "refresh_token": "r", "user_id": user_id}
        return _reply(start_response, 200, tokens)

    def _me(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        try:
            claims = jwt.decode(
                environ.get("HTTP_X_STACK_ACCESS_TOKEN", ""),
                self.key.public_key(),
                ["ES256"],
                options={"verify_aud": False},
            )
        except jwt.ExpiredSignatureError:
            return _reply(start_response, 401, {"code": "ACCESS_TOKEN_EXPIRED"})
        except jwt.PyJWTError:
            return _reply(start_response, 401, {"code": "UNPARSABLE_ACCESS_TOKEN"})
        if not claims["aud"].startswith(self.project.project_id):
            return _reply(start_response, 401, {"code": "INVALID_PROJECT_FOR_ACCESS_TOKEN"})
        return _reply(start_response, 200, self.project.users()[claims["sub"]])


def _reply(start_response: StartResponse, status: int, answer: dict[str, Any]) -> list[bytes]:
    body = json.dumps(answer).encode()
    start_response(
        f"{status} -", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    )
    return [body]
