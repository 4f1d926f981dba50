"""Who may do what: roles of routes, named keys and their limits, what belongs to whom, secrets."""

import json
import pickle
from pathlib import Path

import msgspec
import orjson
import pytest
import yaml
from starlette.testclient import TestClient

from headrace.cli.main import main
from headrace.core.config import Config
from headrace.core.errors import BadRequest, LoadError, RateLimited
from headrace.core.secret import Secret
from headrace.core.tenant import ANYONE, Tenant, caller, is_mine, new_id, own, read_keys, tag_of
from headrace.engine.server import check_exposure
from headrace.frontend.quota import Bucket, Quotas
from headrace.server import access
from headrace.server.access import ROLES, Role, check_roles, role_of
from headrace.server.app import build_app
from tests.support.scripted_manager import ScriptedManager

KEYS = [
    {"name": "alice", "key": "alice-key"},
    {"name": "bob", "key": "bob-key-1", "requests_per_minute": 2},
    {"name": "root", "key": "root-key", "admin": True},
]


def key_file(folder: Path, entries: object = KEYS) -> str:
    path = folder / "keys.yaml"
    path.write_text(yaml.safe_dump(entries))
    path.chmod(0o600)
    return str(path)


def site(**options) -> tuple[TestClient, ScriptedManager]:
    config = Config.from_flat({"served_model_name": "tiny", "model_path": "/m/tiny"} | options)
    manager = ScriptedManager(config)
    app = build_app(manager, config, manager.info)
    return TestClient(app, raise_server_exceptions=False), manager


def by(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {next(k['key'] for k in KEYS if k['name'] == name)}"}


@pytest.fixture
def named(tmp_path):
    options = {"enable_response_store": True, "batch_store": str(tmp_path / "b.db")}
    return site(api_key_file=key_file(tmp_path), **options)


# -- roles ------------------------------------------------------------------------------------


def test_a_route_without_a_role_stops_the_start(monkeypatch):
    monkeypatch.delitem(ROLES, "/flush_cache")
    with pytest.raises(RuntimeError, match="/flush_cache"):
        site()


def test_no_role_is_for_nothing():
    client, _ = site()
    served = set()
    routers = list(client.app.routes)
    while routers:
        route = routers.pop()
        served.add(getattr(route, "path", None))
        routers += getattr(getattr(route, "original_router", None), "routes", [])
    extra = {"/v1/files/{id}", "/v1/files/{id}/content", "/v1/batches/{id}"}
    extra |= {"/v1/batches/{id}/cancel"}
    assert set(ROLES) - served <= extra


def test_a_path_nobody_knows_asks_for_a_key():
    client, _ = site(api_key="k" * 8)
    assert role_of("/nothing") is Role.USER
    assert client.get("/nothing").status_code == 401
    assert client.get("/nothing", headers={"x-api-key": "k" * 8}).status_code == 404
    with pytest.raises(RuntimeError):
        check_roles(["/nothing"])


@pytest.mark.parametrize("path", [path for path, role in ROLES.items() if role is Role.ADMIN])
def test_operators_routes_need_the_admin_key(path):
    client, manager = site(api_key="user-key", admin_api_key="admin-key")
    for method in ("GET", "POST"):
        denied = client.request(method, path, headers={"x-api-key": "user-key"})
        assert denied.status_code == 403, method
        assert denied.json()["error"]["code"] == "forbidden"
        assert client.request(method, path).status_code == 401
    assert manager.seen == []


def test_the_admin_key_opens_everything():
    client, _ = site(api_key="user-key", admin_api_key="admin-key")
    admin = {"authorization": "Bearer admin-key"}
    assert client.post("/flush_cache", headers=admin).status_code == 200
    assert client.post("/generate", json={"text": "a"}, headers=admin).status_code == 200


def test_without_an_admin_key_users_are_operators():
    client, _ = site(api_key="user-key")
    assert client.post("/flush_cache", headers={"x-api-key": "user-key"}).status_code == 200
    open_to_all, _ = site()
    assert open_to_all.post("/flush_cache").status_code == 200


def test_the_admin_port_is_the_only_one_for_operators():
    client, _ = site(admin_port=4711)
    here = TestClient(client.app, base_url="http://testserver:4711")
    assert client.post("/flush_cache").status_code == 404
    assert here.post("/flush_cache").status_code == 200
    assert here.post("/generate", json={"text": "a"}).status_code == 404
    assert client.post("/generate", json={"text": "a"}).status_code == 200
    assert here.get("/health").status_code == client.get("/health").status_code == 200


# -- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([{"name": "a", "key": "12345678"}, {"name": "a", "key": "23456789"}], "appears twice"),
        ([{"name": "a", "key": "12345678"}, {"name": "b", "key": "12345678"}], "another entry"),
        ([{"name": "", "key": "12345678"}], "1 to 64"),
        ([{"name": "a"}], "either key or key_sha256"),
        ([{"name": "a", "key": "short"}], "8 characters"),
        ([{"name": "a", "key_sha256": "zz"}], "64 hexadecimal"),
        ([{"name": "a", "key": "12345678", "weight": 0}], "weight"),
        ([{"name": "a", "key": "12345678", "max_concurrent": -1}], "limits"),
        ([{"name": "a", "key": "12345678", "wieght": 2}], "wieght"),
        ({"name": "a"}, "array"),
    ],
)
def test_wrong_key_files_are_explained(tmp_path, entries, text):
    with pytest.raises(LoadError, match=text) as caught:
        read_keys(key_file(tmp_path, entries))
    assert "12345678" not in str(caught.value)


@pytest.mark.parametrize("name", ["api_key_file", "ssl_certfile"])
def test_missing_files_are_told_before_anything_starts(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(LoadError, match=f"{flag} /no/file: "):
        check_exposure(Config.from_flat({name: "/no/file"}).serve)


def test_a_key_may_be_kept_as_its_digest(tmp_path):
    digest = "2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90"  # sha256("alice")
    client, _ = site(api_key_file=key_file(tmp_path, [{"name": "a", "key_sha256": digest}]))
    assert client.get("/v1/models", headers={"x-api-key": "alice"}).status_code == 200
    assert client.get("/v1/models", headers={"x-api-key": digest}).status_code == 401


def test_secrets_come_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_API_KEY", "from-the-environment")
    found = {}
    monkeypatch.setattr(
        "headrace.engine.server.launch_server", lambda config: found.setdefault("c", config) and 0
    )
    main(["serve", "--log-level", "error"])
    assert found["c"].serve.api_key == Secret("from-the-environment")
    main(["serve", "--api-key", "flag"])
    assert "from-the" not in repr(found) + capsys.readouterr().out


def test_secrets_have_no_written_form():
    secret = Secret("sesame")
    config = Config.from_flat({"api_key": "sesame", "admin_api_key": "sesame"})
    for text in (repr(secret), str(secret), f"{secret}", repr(config), str(config.public())):
        assert "sesame" not in text
    for write in (orjson.dumps, json.dumps, msgspec.json.encode, msgspec.msgpack.encode):
        with pytest.raises(TypeError):
            write(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert config.revealed()["api_key"] == "sesame"


# -- what belongs to whom ---------------------------------------------------------------------


def test_tenants_do_not_share_prefixes(named):
    client, manager = named
    for name in ("alice", "bob", "alice"):
        body = {"text": "same words", "extra_key": "x"}
        assert client.post("/generate", json=body, headers=by(name)).status_code == 200
    spaces = [request.namespace for request in manager.seen]
    assert spaces[0] == spaces[2] != spaces[1]
    assert [request.tenant for request in manager.seen] == ["alice", "bob", "alice"]
    # No salt that a client writes leads into the cache of another.
    forged = {"text": "same words", "cache_salt": spaces[1].partition("\0")[0], "extra_key": "x"}
    assert client.post("/generate", json=forged, headers=by("alice")).status_code == 200
    assert manager.seen[-1].namespace not in spaces


def test_files_and_batches_are_their_owners(named):
    client, _ = named
    upload = {"files": {"file": ("in.jsonl", b"{}\n")}, "data": {"purpose": "batch"}}
    file = client.post("/v1/files", headers=by("alice"), **upload).json()["id"]
    assert [f["id"] for f in client.get("/v1/files", headers=by("alice")).json()["data"]] == [file]
    assert client.get("/v1/files", headers=by("bob")).json()["data"] == []
    ask = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
    for method, path, body in (
        ("GET", f"/v1/files/{file}", None),
        ("GET", f"/v1/files/{file}/content", None),
        ("DELETE", f"/v1/files/{file}", None),
        ("POST", "/v1/batches", ask),
    ):
        assert client.request(method, path, headers=by("bob"), json=body).status_code == 404, path
    batch = client.post("/v1/batches", headers=by("alice"), json=ask).json()["id"]
    assert client.get(f"/v1/batches/{batch}", headers=by("alice")).status_code == 200
    assert client.get(f"/v1/batches/{batch}", headers=by("bob")).status_code == 404
    assert client.post(f"/v1/batches/{batch}/cancel", headers=by("bob")).status_code == 404
    assert client.get("/v1/batches", headers=by("bob")).json()["data"] == []


def test_responses_are_their_owners(named):
    client, _ = named
    body = {"model": "tiny", "input": "hi", "store": True}
    made = client.post("/v1/responses", json=body, headers=by("alice")).json()["id"]
    assert client.get(f"/v1/responses/{made}", headers=by("alice")).status_code == 200
    for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        answer = client.request(method, f"/v1/responses/{made}{path}", headers=by("root"))
        assert answer.status_code == 404, path
    follow = body | {"previous_response_id": made}
    assert client.post("/v1/responses", json=follow, headers=by("bob")).status_code == 404


def test_a_tenant_ends_only_its_own_requests(named):
    client, manager = named
    for name, whose in (("alice", "alice"), ("root", "")):
        client.post("/abort_request", json={"abort_all": True}, headers=by(name))
        assert (manager.aborted[-1].all, manager.aborted[-1].tenant) == (True, whose)


def test_ids_tell_whose_they_are():
    alice, bob = Tenant("alice"), Tenant("bob")
    token = caller.set(alice)
    try:
        mine, session = new_id("file-"), own("s")
        assert is_mine(mine) and tag_of(mine) == alice.tag != bob.tag
        caller.set(bob)
        assert not is_mine(mine) and own("s") != session
        caller.set(ANYONE)
        assert not is_mine(mine) and own("s") == "s" and is_mine(new_id("file-"))
    finally:
        caller.reset(token)


# -- limits -----------------------------------------------------------------------------------


def test_requests_per_minute(named):
    client, manager = named
    body = {"text": "a"}
    statuses = [client.post("/generate", json=body, headers=by("bob")) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert statuses[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(statuses[-1].headers["retry-after"]) <= 30
    assert client.post("/generate", json=body, headers=by("alice")).status_code == 200
    assert len(manager.seen) == 3


def test_buckets_refill():
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    bucket.take(90)
    assert bucket.wait(1) == pytest.approx(31, abs=0.01)
    now[0] = 31.1
    assert bucket.wait(1) == 0.0
    now[0] = 1e6
    bucket.take(60)
    assert bucket.wait(1) > 0  # it never holds more than a minute's worth
    assert Bucket(0, lambda: 0.0).wait(10**9) == 0.0


def test_concurrent_requests_and_tokens():
    now = [0.0]
    quotas = Quotas(lambda: now[0])
    tenant = Tenant("t", max_concurrent=2, tokens_per_minute=100)
    with (
        quotas.admit(tenant, 2),
        pytest.raises(RateLimited, match="2 requests at once"),
        quotas.admit(tenant, 1),
    ):
        pass
    with quotas.admit(tenant, 1) as usage:
        usage.tokens.take(150)
    with pytest.raises(RateLimited, match="tokens per minute") as caught, quotas.admit(tenant, 1):
        pass
    assert caught.value.retry_after == pytest.approx(30.6, abs=0.01)
    now[0] = 31.0
    with quotas.admit(tenant, 1), quotas.admit(ANYONE, 10**6):
        pass


# -- web pages of others ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "origin", "allowed"),
    [
        ("local", "http://localhost:3000", True),
        ("local", "https://127.0.0.1", True),
        ("local", "http://evil.example", False),
        ("local", "http://localhost.evil.example", False),
        ("local", "null", False),
        ("*", "http://evil.example", True),
        ("https://a.example, https://b.example", "https://b.example", True),
        ("https://a.example", "https://c.example", False),
    ],
)
def test_only_allowed_pages_may_call(option, origin, allowed):
    client, _ = site(allow_origins=option)
    ask = {"origin": origin, "access-control-request-method": "POST"}
    answer = client.options("/v1/chat/completions", headers=ask)
    assert (answer.status_code == 200) is allowed
    assert ("access-control-allow-origin" in answer.headers) is allowed


def test_origins_are_checked():
    with pytest.raises(BadRequest, match="'evil'"):
        access.allowed_origins("https://a.example, evil")


def test_the_key_file_of_the_guide(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    example = guide.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "keys.yaml").write_text(example)
    entries = read_keys(str(tmp_path / "keys.yaml"))
    assert [entry.name for entry in entries] == ["search", "batch-jobs", "ops"]
    assert entries[1].tenant().tokens_per_minute == 200_000
