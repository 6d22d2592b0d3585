"""Tests of weights on the Hugging Face Hub: the real client against a server of this process."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dclr
from dclr import hub
from dclr.commands import evaluate
from dclr.errors import UserError
from dclr.models import ClipFormat, build_backbone
from dclr.models.weights import save_weights


class FakeHub(ThreadingHTTPServer):
    """A server that answers the requests for the files of repositories as the hub does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}  # org/name/resolve/revision/file -> content
        self.refused: dict[str, str] = {}  # org/name -> the hub's code of the error
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repository, _, rest = path.partition("/resolve/")
        revision = rest.partition("/")[0]
        if repository in self.refused:
            return 403, {"X-Error-Code": self.refused[repository]}, b""
        if not any(name.startswith(f"{repository}/resolve/") for name in self.files):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if not any(name.startswith(f"{repository}/resolve/{revision}/") for name in self.files):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}, b""
        content = self.files[path]
        digest = hashlib.sha256(content).hexdigest()  # a new content is a new commit
        return 200, {"X-Repo-Commit": digest[:40], "ETag": f'"{digest}"'}, content


class Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.lstrip("/").partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        status, headers, content = self.server.answer(path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client ask this server, as the environment variable HF_ENDPOINT does."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Start a hub without repositories. The client uses it, with an empty cache and without an account."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = FakeHub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use(server.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    yield server
    server.shutdown()
    server.server_close()


def test_one_file_is_downloaded_once_and_kept(fake_hub):
    fake_hub.files["lab/videos/resolve/main/model.safetensors"] = b"weights"
    fake_hub.files["lab/videos/resolve/main/code.py"] = b"raise SystemExit"
    assert hub.download("hf:lab/videos").read_bytes() == b"weights"
    assert hub.download("hf:lab/videos").read_bytes() == b"weights"
    file = "lab/videos/resolve/main/model.safetensors"
    assert [request for request in fake_hub.requests if request.startswith("GET")] == [f"GET {file}"]
    assert {request.split()[1] for request in fake_hub.requests} == {file}


def test_a_new_version_is_downloaded_and_a_revision_is_another_file(fake_hub):
    main, tag = (f"lab/videos/resolve/{revision}/model.safetensors" for revision in ("main", "v1.0"))
    fake_hub.files = {main: b"second", tag: b"first"}
    assert hub.download("hf:lab/videos").read_bytes() == b"second"
    assert hub.download("hf:lab/videos@v1.0").read_bytes() == b"first"
    fake_hub.files[main] = b"third"
    assert hub.download("hf:lab/videos").read_bytes() == b"third"


def test_without_network_the_cache_is_used_and_a_name_that_is_not_in_it_is_one_line(fake_hub, monkeypatch, capsys):
    fake_hub.files["lab/videos/resolve/main/model.safetensors"] = b"weights"
    hub.download("hf:lab/videos")
    use("http://127.0.0.1:9", monkeypatch)  # nothing listens there
    assert hub.download("hf:lab/videos").read_bytes() == b"weights"
    assert re.fullmatch(
        r"warning: hf:lab/videos: no network \(.*\); the copy in the cache is used\n", capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"^hf:lab/other: no network \(.*\), and no copy in the cache"):
        hub.download("hf:lab/other")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:lab/unknown", "hf:lab/unknown: the hub has no such repository, or it is private"),
        ("hf:lab/videos@v9", "hf:lab/videos@v9: the repository has no branch, tag or commit v9"),
        ("hf:lab/empty", "hf:lab/empty: the repository holds no model.safetensors: save_pretrained writes it"),
        ("hf:lab/gated", "hf:lab/gated: its owner must give you access"),
        ("hf:videos", "hf:videos: the name of weights on the hub is hf:org/name or hf:org/name@revision"),
        ("hf:lab/../videos", "hf:lab/../videos: the name of weights on the hub"),
        ("hf:lab/a--b", "hf:lab/a--b is not a name of the hub: "),
    ],
)
def test_a_wrong_name_is_one_line(fake_hub, source, message):
    fake_hub.files = {"lab/videos/resolve/main/model.safetensors": b"", "lab/empty/resolve/main/README.md": b""}
    fake_hub.refused["lab/gated"] = "GatedRepo"
    with pytest.raises(UserError) as caught:
        hub.download(source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package huggingface_hub.*pip install 'dclr\[hub\]'$"):
        hub.download("hf:lab/videos")


def test_a_name_of_the_hub_is_weights_in_python_and_in_the_shell(fake_hub, tmp_path, monkeypatch, capsys):
    save_weights(tmp_path / "model.safetensors", build_backbone("r2plus1d_10", 4), ClipFormat(length=4, crop=32))
    fake_hub.files["lab/videos/resolve/main/model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    assert dclr.load("hf:lab/videos", device="cpu").clips.length == 4
    monkeypatch.setattr("sys.argv", ["eval.py", "features", "--checkpoint", "hf:lab/none", "--out", "x.npz"])
    assert evaluate.start() == 2
    assert capsys.readouterr().err.startswith("eval.py: error: hf:lab/none: the hub has no such repository")
