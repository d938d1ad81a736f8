"""Whom `swaa-local serve` answers: which web pages, under which names, with which keys."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

from swaa_local.serve.api_keys import KeyFileError, handed_over, keys_of_file, keys_of_variable
from tests.support.program import fails
from tests.support.serving import Running, serving, wait_until

pytestmark = pytest.mark.usefixtures("engine")

SMALL = ("-c", 512, "-np", 1)
KEY = "sk-of-the-tests"
BODY = json.dumps({"prompt": "a", "n_predict": 1}).encode()
METHODS = ("GET", "POST", "DELETE", "OPTIONS")


def ask(running: Running, method: str = "POST", path: str = "/completion", **headers: str) -> http.client.HTTPResponse:
    """A request with these headers, in whose names _ stands for -. The answer is read."""
    address = urlsplit(running.url)
    if address.scheme == "unix":
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(address.path)
    elif address.scheme == "https":
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(address.hostname or "", address.port, timeout=60, context=context)
    else:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    body = BODY if method == "POST" else b""
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in (headers | {"Content_Length": str(len(body))}).items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        response = connection.getresponse()
        response.read()
        return response
    finally:
        connection.close()


def status(running: Running, method: str = "POST", path: str = "/completion", **headers: str) -> int:
    return ask(running, method, path, **headers).status


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    """As most people start it."""
    with serving(tiny_model, *SMALL, "--slots") as running:
        yield running


# web pages


@pytest.mark.parametrize("origin", ["https://example.org", "http://127.0.0.1.example.org:8080", "null", "http://[::2]"])
@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_page_is_refused(server: Running, origin: str, method: str) -> None:
    """Before anything is done, also where the browser asks nobody first, as for a POST of plain text."""
    path = "/completion" if method == "POST" else "/v1/models"
    response = ask(server, method, path, Origin=origin, Content_Type="text/plain")
    assert response.status == 403
    assert response.headers["Access-Control-Allow-Origin"] is None
    wait_until(lambda: "--cors-origins" in server.log, "the option is told")


def test_a_refused_page_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, *SMALL, "--slots", "--slot-save-path", tmp_path) as running:
        running.complete("some text", n_predict=1)
        before = running.get("/slots")
        assert status(running, path="/slots/0?action=erase", Origin="https://example.org") == 403
        assert status(running, Origin="https://example.org") == 403
        assert running.get("/slots") == before
        assert status(running, path="/slots/0?action=erase") == 200


def test_its_own_page_and_those_of_this_machine_may_use_it(server: Running) -> None:
    address = urlsplit(server.url)
    for origin in (server.url, "http://localhost:3000", f"http://LOCALHOST:{address.port}", "http://[::1]:5173"):
        response = ask(server, Origin=origin)
        assert response.status == 200, origin
    response = ask(server, "OPTIONS", "/completion", Origin="http://localhost:3000")
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert response.headers["Vary"] == "Origin"


def test_a_page_under_the_name_that_it_asks_for_is_its_own(server: Running) -> None:
    """Whatever the port, and whether it is said or goes without saying."""
    for host, origin in (
        ("192.0.2.7:8080", "http://192.0.2.7:8080"),
        ("192.0.2.7", "http://192.0.2.7"),
        ("192.0.2.7:443", "https://192.0.2.7"),
        ("[2001:db8::7]:8080", "http://[2001:db8::7]:8080"),
    ):
        assert status(server, Host=host, Origin=origin) == 200, origin
    assert status(server, Host="192.0.2.7:8080", Origin="http://192.0.2.7:9090") == 403
    assert status(server, Host="192.0.2.7:8080", Origin="http://192.0.2.8:8080") == 403


def test_a_program_that_is_no_browser_has_no_origin(server: Running) -> None:
    assert status(server) == 200
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert client.completions.create(model="any", prompt="a", max_tokens=1).choices


def test_pages_are_let_in_by_name(tiny_model: Path) -> None:
    listed = "https://chat.example.org, app://*, null"
    with serving(tiny_model, *SMALL, "--cors-origins", listed) as running:
        for origin, expected in (
            ("https://chat.example.org", 200),
            ("https://chat.example.org.evil.example", 403),
            ("http://chat.example.org", 403),
            ("app://anything", 200),
            ("null", 200),
            ("http://localhost:3000", 403),
            (running.url, 200),
        ):
            response = ask(running, Origin=origin)
            assert response.status == expected, origin
            if expected == 200 and origin != running.url:
                assert response.headers["Access-Control-Allow-Origin"] == origin
    with serving(tiny_model, *SMALL, LLAMA_ARG_CORS_ORIGINS="*") as running:
        assert (
            ask(running, Origin="https://example.org").headers["Access-Control-Allow-Origin"] == "https://example.org"
        )


# names


@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_name_is_refused(server: Running, method: str) -> None:
    """A page that gives its own name our address is of the same origin, and the browser lets it do anything."""
    path = "/completion" if method == "POST" else "/v1/models"
    for host in ("example.org", "example.org:8080", "127.0.0.1.example.org", "localhost.example.org", "xlocalhost"):
        assert status(server, method, path, Host=host) == 403, host
        assert status(server, method, path, Host=host, Origin=f"http://{host}") == 403, host
    wait_until(lambda: "--allowed-hosts" in server.log, "the option is told")


def test_addresses_and_this_machine_s_names_are_its_own(server: Running) -> None:
    name = socket.gethostname()
    for host in (
        "localhost",
        "LocalHost:8080",
        "localhost.",
        "a.localhost",
        "127.0.0.1",
        "10.1.2.3:80",
        "[::1]:1",
        name,
    ):
        assert status(server, Host=host) == 200, host


def test_a_second_name_does_not_help(server: Running) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(100).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))


def test_names_are_let_in(tiny_model: Path) -> None:
    """As behind a reverse proxy, whose page is of the same origin under its name."""
    with serving(tiny_model, *SMALL, "--allowed-hosts", "llm.example.org, .internal.example") as running:
        for host, expected in (
            ("llm.example.org", 200),
            ("LLM.example.org:443", 200),
            ("x.llm.example.org", 403),
            ("a.b.internal.example", 200),
            ("localhost", 200),
            ("example.org", 403),
        ):
            assert status(running, Host=host) == expected, host
        assert status(running, Host="llm.example.org", Origin="https://llm.example.org") == 200
        assert status(running, Host="llm.example.org", Origin="https://example.org") == 403
    with serving(tiny_model, *SMALL, "--allowed-hosts", "*") as running:
        assert status(running, Host="example.org") == 200


def test_who_listens_to_everybody_still_has_names_of_his_own(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--host", "0.0.0.0") as running:
        assert status(running, Host="192.0.2.7:8080") == 200
        assert status(running, Host=f"{socket.gethostname()}:8080") == 200
        assert status(running, Host="example.org") == 403
        assert status(running, Origin="https://example.org") == 403


def test_a_unix_socket_is_under_no_name(tiny_model: Path, tmp_path: Path) -> None:
    """No page reaches it, so a proxy may pass on any name; pages behind the proxy are its own or foreign ones."""
    with serving(tiny_model, *SMALL, "--host", tmp_path / "s.sock") as running:
        assert status(running, Host="example.org") == 200
        assert status(running, Host="example.org", Origin="https://example.org") == 200
        assert status(running, Host="example.org", Origin="https://example.com") == 403


def test_ipv6(tiny_model: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(tiny_model, *SMALL, "--host", "::1") as running:
        assert running.url.startswith("http://[::1]:")
        assert status(running, Origin=running.url) == 200
        assert status(running, Origin="https://example.org") == 403


def test_tls(tiny_model: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    with serving(tiny_model, *SMALL, "--ssl-key-file", key, "--ssl-cert-file", certificate) as running:
        assert running.url.startswith("https://127.0.0.1:")
        assert status(running, Origin=running.url) == 200
        assert status(running, Origin="https://example.org") == 403
        assert status(running, Host="example.org") == 403
        # nor does a client that greets and says no more keep it from ending
        address = urlsplit(running.url)
        with socket.create_connection((address.hostname, address.port)) as silent:
            silent.sendall(bytes.fromhex("16030100050100000100"))
            assert running.stop() == 0


# keys


def test_with_a_key_pages_need_the_key_and_nothing_else(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, LLAMA_API_KEY=KEY) as running:
        assert status(running, Origin="https://example.org") == 401
        assert status(running, Origin="https://example.org", Authorization=f"Bearer {KEY}") == 200
        assert status(running, Host="example.org", Authorization=f"Bearer {KEY}") == 200
    with serving(tiny_model, *SMALL, "--cors-origins", "localhost", LLAMA_API_KEY=KEY) as running:
        assert status(running, Origin="https://example.org", Authorization=f"Bearer {KEY}") == 403


def test_a_key_is_sent_as_clients_send_it(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, LLAMA_API_KEY=KEY) as running:
        for value in (f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY}", KEY):
            assert status(running, Authorization=value) == 200, value
        assert status(running, X_Api_Key=KEY) == 200
        for value in (f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer{KEY}", "Bearer", ""):
            assert status(running, Authorization=value) == 401, value


FILES: dict[str, bytes] = {
    "plain": b"one\ntwo\n",
    "of Windows": b"one\r\ntwo\r\n",
    "of Windows' editor": b"\xef\xbb\xbfone\r\ntwo\r\n",
    "with blanks": b"  one \n\ttwo\t\n\n   \n",
    "without an end": b"one\ntwo",
    "with comments": b"# mine\none\n  # another\ntwo\n",
    "with old line ends": b"one\rtwo\r",
}


@pytest.mark.parametrize("name", FILES)
def test_a_key_file_is_read_as_it_is_meant(tmp_path: Path, name: str) -> None:
    (tmp_path / "keys").write_bytes(FILES[name])
    assert keys_of_file(tmp_path / "keys") == ("one", "two")


@pytest.mark.parametrize("name", ["of Windows' editor", "with blanks", "with comments"])
def test_the_server_takes_the_keys_of_a_file(tiny_model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "keys").write_bytes(FILES[name])
    with serving(
        tiny_model, *SMALL, "--api-key-file", tmp_path / "keys", LLAMA_API_KEY='three, "four,five"'
    ) as running:
        assert "1 request at once of up to 512 tokens" in running.log
        for key in ("one", "two", "three", "four,five"):
            assert running.post("/tokenize", {"content": "a"}, key=key)[0] == 200, key
        for key in ("one ", "four", "# mine", "mine", "\ufeffone".encode().decode("latin-1"), ""):
            assert status(running, path="/tokenize", Authorization=f"Bearer x{key}") == 401, key


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ok\nschl\u00fcssel\n".encode(), "the API key in line 2 of"),
        (b"sec\x01ret\n", "the API key in line 1 of"),
        ("secret\n".encode("utf-16"), "is not UTF-8 text"),
        (b"\n# nothing\n \t\n", "holds no API key"),
    ],
)
def test_a_key_that_no_request_can_carry_is_told_and_not_shown(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(KeyFileError, match=said) as error:
        keys_of_file(tmp_path / "keys")
    assert "ssel" not in str(error.value)
    assert "ret" not in str(error.value)


def test_keys_are_read_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("schl\u00fcssel")
    assert "the API key in line 1 of" in fails("serve", tmp_path / "none.gguf", "--api-key-file", tmp_path / "keys")
    assert "an API key in LLAMA_API_KEY" in fails("serve", tmp_path / "none.gguf", LLAMA_API_KEY="schl\u00fcssel")
    assert "LLAMA_API_KEY is set and empty" in fails("serve", tmp_path / "none.gguf", LLAMA_API_KEY=" , ")


@pytest.mark.parametrize(
    ("value", "keys"),
    [("a", ("a",)), ("a,b", ("a", "b")), (" a , b ", ("a", "b")), ("a\r\nb\n", ("a", "b")), ('"a,b"', ("a,b",))],
)
def test_keys_in_the_environment(value: str, keys: tuple[str, ...]) -> None:
    assert keys_of_variable("K", value) == keys


def test_more_keys_than_a_pipe_holds(tiny_model: Path) -> None:
    """They are handed over while the server reads, and a child that reads nothing holds nobody up."""
    keys = [f"key-{i:06}" for i in range(20_000)]
    with handed_over(keys) as fd, open(fd, closefd=False) as pipe:
        assert pipe.read().split() == keys
    with handed_over(keys):
        pass
    with pytest.raises(KeyFileError):
        keys_of_file(tiny_model)


def test_the_key_file_of_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\n")
    with serving(tiny_model, *SMALL, LLAMA_ARG_API_KEY_FILE=str(tmp_path / "keys")) as running:
        assert running.post("/tokenize", {"content": "a"}, key="one")[0] == 200
        assert running.post("/tokenize", {"content": "a"}, key="two")[0] == 401


def test_a_prefix_and_a_key(tiny_model: Path) -> None:
    """What needs no key needs none below a prefix either: the command itself asks there whether the server is ready."""
    with serving(tiny_model, *SMALL, "--api-prefix", "/llm", LLAMA_API_KEY=KEY) as running:
        assert running.url.endswith("/llm")
        assert running.get("/health")[0] == 200
        assert running.post("/tokenize", {"content": "a"})[0] == 401
        assert running.post("/tokenize", {"content": "a"}, key=KEY)[0] == 200


# the command


def test_a_name_with_a_comma(tiny_model_factory: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("mistral 7B, Q4.gguf", 'a "quoted" one, and more.gguf'):
        (tmp_path / name).symlink_to(tiny_model_factory())
        with serving(tmp_path / name, *SMALL) as running:
            assert [model["id"] for model in running.get("/v1/models")[1]["data"]] == [name.removesuffix(".gguf")]


def test_many_clients_at_the_same_moment(tiny_model: Path) -> None:
    """Whoever connects while others connect gets a thread of his own."""
    with serving(tiny_model, *SMALL) as running:
        results: list[int] = []
        threads = [threading.Thread(target=lambda: results.append(running.get("/health")[0])) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert results == [200] * 40
