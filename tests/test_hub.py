import base64
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from depthlm_jax import hub
from depthlm_jax.errors import InputError

ROOT = Path(__file__).parents[1]
HUB_ID, TOKEN = "somebody/tiny-depth", "hf_" + "s3cr3t" * 5
PUSH = """
import sys
from pathlib import Path
from depthlm_jax import hub
from depthlm_jax.errors import InputError
try:
    hub.create(sys.argv[2], sys.argv[3] == "private")
    print(hub.upload(Path(sys.argv[1]), sys.argv[2], "Step 7"))
except InputError as error:
    sys.exit(str(error))
"""


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a push needs: it holds one repository."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None
        self.exists = False
        self.commits: list[str] = []
        self.requests: dict[str, str | None] = {}  # path → authorization
        self.refusal: int | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, values: object, status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, repository = urlsplit(self.path).path, f"/api/models/{HUB_ID}"
        self.server.requests[path] = self.headers.get("Authorization")
        if self.server.refusal:
            self.reply({"error": f"You may not, with {self.headers.get('Authorization')}"}, self.server.refusal)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path == f"{repository}/preupload/main":
            named = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in named]})
        elif path == f"{repository}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines() if line])
        elif path.startswith(f"{repository}/tree/main"):
            self.reply([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files])
        elif path.startswith(repository):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.reply({"id": HUB_ID, "sha": "1" * 40, "siblings": siblings, "private": False, "tags": []})
        else:
            self.reply({"error": path}, 404)

    do_GET = do_POST = do_HEAD = answer

    def create(self, asked: dict) -> None:
        status = 409 if self.server.exists else 200
        self.server.visibility = self.server.visibility or asked.get("visibility", "default")
        self.server.exists = True
        assert f"{asked['organization']}/{asked['name']}" == HUB_ID
        self.reply({"url": f"{self.server.endpoint}/{HUB_ID}", "name": HUB_ID, "id": "1"}, status)

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
            else:
                raise AssertionError(line)
        url = f"{self.server.endpoint}/{HUB_ID}/commit/{'2' * 40}"
        self.reply({"success": True, "commitUrl": url, "commitOid": "2" * 40, "hookOutput": ""})


@pytest.fixture
def server():
    with Hub() as this:
        thread = threading.Thread(target=this.serve_forever)
        thread.start()
        yield this
        this.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    """What an export looks like."""
    rng, place = np.random.default_rng(), tmp_path / "hf"
    place.mkdir()
    for name, size in (("model.safetensors", 70_000), ("tokenizer.json", 3000), ("LICENSE", 10)):
        (place / name).write_bytes(rng.bytes(size))
    (place / "config.json").write_text('{"depthlm": {}}')
    (place / "README.md").write_text("---\nlicense: mit\n---\n\n# δ1\n", encoding="utf-8")
    return place


def push(endpoint: str, folder: Path, private: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Pushes in a process of its own: huggingface_hub reads its environment once."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder.parent / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    command = [sys.executable, "-c", PUSH, str(folder), HUB_ID, private]
    done = subprocess.run(
        command, cwd=ROOT, env=outer | own | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(("private", "visibility"), [("", "default"), ("private", "private")])
def test_what_is_pushed_is_the_folder(server, folder, private, visibility):
    done = push(server.endpoint, folder, private)
    assert done.returncode == 0, done.stderr
    assert server.files == contents(folder)
    assert server.visibility == visibility
    assert server.commits == ["Step 7"]
    about_us = {
        path: token for path, token in server.requests.items() if path.startswith(("/api/models", "/api/repos"))
    }
    assert set(about_us.values()) == {f"Bearer {TOKEN}"}, about_us
    assert done.stdout.splitlines()[-1] == f"{server.endpoint}/{HUB_ID}"


def test_an_earlier_push_is_replaced_and_no_old_weights_stay(server, folder):
    server.exists = True
    server.files = {".gitattributes": b"a", "notes.md": b"mine", "config.json": b"{}",
                    "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old",
                    "model-00002-of-00002.safetensors": b"old"}  # fmt: skip
    done = push(server.endpoint, folder)
    assert done.returncode == 0, done.stderr
    assert server.files == contents(folder) | {".gitattributes": b"a", "notes.md": b"mine"}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_says_what_to_do(server, folder, status):
    server.refusal = status
    done = push(server.endpoint, folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{HUB_ID}: the hub refuses" in done.stderr and str(status) in done.stderr
    assert "a token that may write there" in done.stderr
    assert server.files == {}


def test_a_hub_that_fails_is_not_the_users_fault(server, folder):
    server.refusal = 500
    done = push(server.endpoint, folder)
    assert done.returncode == 1
    assert "the hub failed" in done.stderr and "try again later" in done.stderr


def test_no_network_is_a_named_error(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:  # and free again: nobody listens there
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = push(endpoint, folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the hub cannot be reached\n  found:    ConnectError" in done.stderr
    assert endpoint in done.stderr and "check the network" in done.stderr


def test_without_a_token_nothing_is_asked(server, folder):
    done = push(server.endpoint, folder, HF_TOKEN="")
    assert done.returncode == 1
    assert "found:    no token" in done.stderr
    assert "run `hf auth login`, or set HF_TOKEN" in done.stderr
    assert server.requests == {}


def test_offline_is_respected(server, folder):
    done = push(server.endpoint, folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert server.requests == {}


def test_offline_in_this_process():
    with pytest.raises(InputError, match="the hub may not be asked"):  # as conftest.py sets it
        hub.create(HUB_ID, private=False)


def test_export_pushes_what_it_wrote(server, tmp_path):
    """A conversion: `export` from the command line, through to the hub."""
    import worlds

    source = tmp_path / "source"
    worlds.processor(worlds.HF_CONFIG, source)
    weights(source)
    outer = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    command = [sys.executable, "-m", "depthlm_jax", "export", f"--hf_dir={source}", f"--output={tmp_path}/hf",
               f"--push_to_hub={HUB_ID}", "--private", "--json", "--debug"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=outer | own, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["url"] == f"{server.endpoint}/{HUB_ID}"
    assert server.files == contents(tmp_path / "hf") and "model.safetensors" in server.files
    assert server.visibility == "private"
    assert TOKEN not in done.stdout + done.stderr
    before = dict(server.files)
    done = subprocess.run(
        [*command[:4], f"--hf_dir={source}", f"--output={tmp_path}/other", "--push_to_hub=not/a/name"],
        cwd=ROOT, env=outer | own, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "--push_to_hub: not a name on the hub" in done.stderr
    assert server.files == before and not (tmp_path / "other").exists()


def weights(folder: Path) -> None:
    """Writes random weights beside config.json."""
    import torch
    import transformers

    config = transformers.Qwen2_5_VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.float32)
    model.save_pretrained(folder / "as_saved")
    (folder / "as_saved/model.safetensors").rename(folder / "model.safetensors")
