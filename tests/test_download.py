"""The downloader against a local server that breaks off, answers 416, 429 and 500, and lies about
sizes.
"""

import http.server
import io
import re
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from dataset import download

RANDOM = np.random.default_rng(0)


def png(side=300):
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


class Server:
    """Serves `content` (name → bytes); `moods` (name → list) says how the next answers for a name
    go wrong.
    """

    def __init__(self):
        self.content, self.moods, self.always, self.requests, self.elsewhere = {}, {}, {}, [], ""
        self.sent = 0  # bytes of endless answers
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                name, asked = self.path.strip("/").split("?")[0], self.headers.get("Range")
                server.requests.append((name, asked))
                whole = server.content[name] if name in server.content else b""
                probe = asked == "bytes=0-0"
                moods = server.moods.get(name, [])
                mood = server.always.get(name) or (moods.pop(0) if moods and not probe else "well")
                start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
                end = 1 if probe else len(whole)
                if name not in server.content:
                    return self.answer(404)
                if mood in (429, 500, 503, 403):
                    return self.answer(mood, {"Retry-After": "0"} if mood == 429 else {})
                if mood == "416" or start >= len(whole):
                    return self.answer(
                        416, {"Content-Range": f"bytes */{len(whole) + (mood == '416')}"}
                    )
                if mood == "login":
                    return self.answer(200, {}, b"<!doctype html><title>Please log in</title>")
                if mood == "redirect":
                    return self.answer(302, {"Location": f"/{name}?again"})
                if mood == "endless" and not probe:
                    return self.endless()
                if mood == "elsewhere":
                    return self.answer(302, {"Location": server.elsewhere})
                if mood == "no ranges" or not asked:
                    start, end = 0, len(whole)
                elif mood == "other part":
                    start = start // 2
                headers = {"ETag": '"1"'}
                status = 200 if mood == "no ranges" or not asked else 206
                if status == 206:
                    total = len(whole) + {"says more": 1000, "says less": -1000}.get(mood, 0)
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
                body = whole[start:end]
                if mood == "breaks":
                    return self.answer(status, headers, body[: len(body) // 2], len(body))
                if mood == "says less":
                    return self.answer(status, headers, body, max(1, len(body) - 1000))
                if mood == "says more":
                    return self.answer(status, headers, body, len(body) + 1000)
                if mood == "junk":
                    body += bytes(1000)
                return self.answer(status, headers, body)

            def endless(self):
                """An answer without a length that goes on until the client leaves."""
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                try:
                    for _ in range(1000):
                        self.wfile.write(bytes(1 << 18))
                        server.sent += 1 << 18
                except OSError:
                    pass

            def answer(self, status, headers=(), body=b"", length=None):
                self.send_response(status)
                for key, value in dict(headers).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def files(self):
        return {name: f"http://127.0.0.1:{self.http.server_port}/{name}" for name in self.content}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


def get(server, folder, **options):
    download.fetch("test", folder, files=server.files(), pause=0.001, **options)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".download.lock")


def test_several_files_at_once(server, tmp_path, capsys):
    server.content = {f"{i:03d}.png": png(50 + i) for i in range(12)}
    get(server, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == server.content
    count = len(server.requests)
    get(server, tmp_path)
    assert len(server.requests) == count and "12 of 12 files exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    "moods",
    [
        ["breaks"],
        ["breaks"] * 6,
        [500],
        [503, 500, 500],
        [429, 429],
        ["breaks", "no ranges"],
        ["breaks", "416"],
        ["breaks", "other part"],
        ["login"],
        ["says more"],
        ["says less"],
        ["redirect"],
        ["no ranges"],
        ["breaks", 500, "breaks", 429, "other part", "breaks", "says more"],
    ],
    ids=lambda moods: "-".join(map(str, moods)),
)
def test_the_file_comes_whole_all_the_same(server, tmp_path, moods):
    server.content = {"001.png": png()}
    server.moods = {"001.png": list(moods)}
    get(server, tmp_path)
    assert (tmp_path / "001.png").read_bytes() == server.content["001.png"]
    assert names(tmp_path) == ["001.png"] and not server.moods["001.png"]


def test_more_bytes_than_announced_are_not_kept(server, tmp_path):
    """Where the size is not known beforehand any more, and the format does not show it."""
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(file, "TIFF")
    server.content, server.moods = (
        {"1.svs": file.getvalue()},
        {"1.svs": ["login", "breaks", "junk"]},
    )
    get(server, tmp_path)
    assert (tmp_path / "1.svs").read_bytes() == server.content["1.svs"] and not server.moods[
        "1.svs"
    ]


def test_a_download_stops_at_the_announced_size(server, tmp_path, monkeypatch):
    server.content = {"a.bin": bytes(1000)}
    server.always = {"a.bin": "endless"}
    written = []
    monkeypatch.setattr(download._Megabytes, "__call__", lambda self, n: written.append(n))
    with pytest.raises(UserError, match="more bytes came than the 1,000 that the server had"):
        get(server, tmp_path)
    assert names(tmp_path) == [] and sum(written) == 0
    # Of each try, what the system's buffers took before the client left.
    assert server.sent < download.IDLE_TRIES * (16 << 20)


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    server.content = {"001.png": png()}
    server.moods = {"001.png": ["breaks"]}
    get(server, tmp_path)
    half = len(server.content["001.png"]) // 2
    assert [asked for _, asked in server.requests] == ["bytes=0-0", None, f"bytes={half}-"]


def test_a_stopped_download_is_continued_by_the_next_process(server, tmp_path):
    server.content = {"001.png": png(), "002.png": png()}
    server.always = {"001.png": None}
    (tmp_path / ".001.png.part").write_bytes(server.content["001.png"][:5000])
    (tmp_path / ".002.png.part").write_bytes(
        server.content["002.png"]
    )  # whole, but the name was not given yet
    get(server, tmp_path)
    assert ("001.png", "bytes=5000-") in server.requests
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == server.content


@pytest.mark.parametrize(
    "mood, says",
    [
        (500, "answers 500"),
        (429, "answers 429"),
        (403, "access is refused"),
        ("login", "web page"),
        ("416", "416|size"),
        ("says less", "PNG|bytes came"),
        ("breaks", "connection ended"),
    ],
)
def test_a_server_that_never_delivers_ends_in_one_line_and_spares_the_others(
    server, tmp_path, mood, says
):
    server.content = {"001.png": png(), "002.png": png()}
    server.always = {"001.png": mood}
    with pytest.raises(UserError, match=says) as error:
        get(server, tmp_path)
    assert "the same command continues" in str(error.value)
    assert (tmp_path / "002.png").read_bytes() == server.content["002.png"]
    assert not (tmp_path / "001.png").exists()


def test_a_missing_file_is_named(server, tmp_path):
    server.content = {"001.png": png()}
    files = server.files() | {"009.png": server.files()["001.png"].replace("001", "009")}
    with pytest.raises(UserError, match="009.png: it no longer exists"):
        download.fetch("test", tmp_path, files=files, pause=0.001)
    assert (tmp_path / "001.png").exists()


def test_no_server_at_all(tmp_path):
    with pytest.raises(UserError, match="001.png: could not be fetched"):
        download.fetch(
            "test", tmp_path, files={"001.png": "http://127.0.0.1:9/001.png"}, pause=0.0001
        )


@pytest.mark.parametrize(
    "elsewhere, says",
    [
        ("file:///etc/hostname", "refuses"),
        ("ftp://127.0.0.1:9/001.png", "could not be fetched"),
        ("http://127.0.0.1:9/001.png", "could not be fetched"),
        ("/loop.png", "could not be fetched|refuses"),
    ],
)
def test_a_redirect_to_nowhere_good_ends_in_one_line(server, tmp_path, elsewhere, says):
    server.content, server.elsewhere = {"001.png": png(), "loop.png": png()}, elsewhere
    server.always = {"001.png": "elsewhere", "loop.png": "elsewhere"}
    with pytest.raises(UserError, match=says) as error:
        download.fetch("test", tmp_path, files={"001.png": server.files()["001.png"]}, pause=0.0001)
    assert "\n" not in str(error.value) and names(tmp_path) == []


def test_no_redirect_leaves_encryption():
    request = urllib.request.Request("https://example.org/a.png")
    follow = download._Redirects().redirect_request
    with pytest.raises(urllib.error.URLError, match="without encryption"):
        follow(request, None, 302, "", {}, "http://example.org/a.png")
    assert (
        follow(request, None, 302, "", {}, "https://example.org/b.png").full_url
        == "https://example.org/b.png"
    )


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png", "b/a.png", ".a.png", "..", "b\\a.png"])
def test_a_file_name_with_a_path_is_refused(server, tmp_path, name):
    with pytest.raises(UserError, match="no plain file name"):
        download.fetch("test", tmp_path / "here", files={name: "http://127.0.0.1:9/"})
    assert not list(tmp_path.iterdir()) and not server.requests


def test_too_large_for_the_disk_is_said_before_it_starts(server, tmp_path, monkeypatch):
    server.content = {"001.png": png()}
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})()
    )
    with pytest.raises(UserError, match="are needed"):
        get(server, tmp_path)
    assert names(tmp_path) == [] and len(server.requests) == 1


def test_two_processes_do_not_write_one_folder(server, tmp_path):
    server.content = {"001.png": png()}
    with download._lock(tmp_path), pytest.raises(UserError, match="another process"):
        get(server, tmp_path)


def test_only_some(server, tmp_path):
    server.content = {f"{i:03d}.png": png(20) for i in (1, 2, 11)}
    get(server, tmp_path, only="00*.png")
    assert names(tmp_path) == ["001.png", "002.png"]
    with pytest.raises(UserError, match="no file"):
        get(server, tmp_path, only="x*")


def test_files_are_checked_by_their_format(tmp_path):
    whole = {"a.png": png(), "a.json": b'{"images": []}'}
    tiff = io.BytesIO()
    pages = [
        Image.fromarray(RANDOM.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(3)
    ]
    pages[0].save(tiff, "TIFF", save_all=True, append_images=pages[1:])
    whole["a.tiff"] = tiff.getvalue()
    database = sqlite3.connect(tmp_path / "made.sqlite")
    database.executescript("CREATE TABLE a (b); INSERT INTO a VALUES (zeroblob(9999));")
    database.close()
    whole["a.sqlite"] = (tmp_path / "made.sqlite").read_bytes()
    for name, content in whole.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert download.damage(path, name) is None, name
        for bad in (
            content[:-1000] if len(content) > 2000 else content[:-1],
            b"",
            b"<html>",
            b"II*\0" + b"\xff" * 50,
            b"x" * 500,
        ):
            path.write_bytes(bad)
            assert download.damage(path, name), (name, bad[:20])


def test_the_public_addresses():
    ccmct, midogpp, midog2022 = (
        download.addresses(name) for name in ("ccmct", "midogpp", "midog2022")
    )
    assert len(ccmct) == 33 and len(midogpp) == 505 and len(midog2022) == 407
    assert (
        ccmct["MITOS_WSI_CCMCT_ODAEL.sqlite"] == "https://ndownloader.figshare.com/files/16261571"
    )
    assert midogpp["001.tiff"] == "https://figshare.com/ndownloader/files/40282099"
    assert midog2022["001.png"] == "https://zenodo.org/records/6547151/files/001.png"
    assert len(set(midogpp.values())) == 505
    with pytest.raises(UserError, match="can be fetched"):
        download.addresses("midog2021")


def test_the_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "data.py", "--download", "nothing"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={"MITOSIS_ROOT": str(tmp_path), "PATH": ""},
    )
    assert (
        run.returncode == 2
        and run.stderr.startswith("error: --download nothing")
        and not run.stdout
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- archives


def archive(path, files, **links):
    """A ZIP archive of {name: bytes}; links: {name: target}, as symbolic links."""
    with zipfile.ZipFile(path, "w") as content:
        for name, data in files.items():
            content.writestr(name, data)
        for name, target in links.items():
            info = zipfile.ZipInfo(f"top/{name}.png")
            info.external_attr = 0o120777 << 16
            content.writestr(info, target)
    return path


def test_an_archive_is_fetched_and_unpacked(server, tmp_path):
    """Images and tables, without the top folder, scripts and hidden files; a second time, and after
    an interruption, only what is missing."""
    picture = png(20)
    files = {"top/a/1.png": picture, "top/table.csv": b"x,y\n", "top/b/2.PNG": picture}
    files |= {"top/train.py": b"import os", "top/.git/3.png": picture, "top/a/.4.png": picture}
    source = archive(tmp_path / "source.zip", files)
    server.content["x.zip"] = source.read_bytes()
    server.moods["x.zip"] = ["breaks"]
    out = tmp_path / "out"
    for _ in range(2):
        get(server, out)
        found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
        assert found - {".download.lock"} == {"x.zip", "a/1.png", "table.csv", "b/2.PNG"}
        assert (out / "a/1.png").read_bytes() == picture
        (out / "a/1.png").write_bytes(picture[:40])


@pytest.mark.parametrize(
    "name", ["../1.png", "/etc/1.png", "top/../../1.png", "C:/x/1.png", "a\\..\\1.png", "1.png"]
)
def test_nothing_is_unpacked_outside_of_the_folder(tmp_path, name):
    path = archive(tmp_path / "x.zip", {"top/0.png": b"0", name: b"1"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="outside of the archive's own folder; nothing"):
        download.unpack(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_and_bombs_are_not_unpacked(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="is a link"):
        download.unpack(archive(tmp_path / "x.zip", {}, link="/etc/passwd"), out)
    monkeypatch.setattr(download, "MAX_UNPACKED", 1000)
    with pytest.raises(UserError, match="GB unpacked, .* nothing is unpacked"):
        download.unpack(archive(tmp_path / "y.zip", {"t/1.png": bytes(1001)}), out)
    assert not list(out.iterdir())


def test_damaged_archives_are_noticed(tmp_path):
    path = archive(tmp_path / "x.zip", {f"t/{k}.png": png(30) for k in range(3)})
    whole = path.read_bytes()
    assert download.damage(path, "x.zip") is None
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for bad in (whole[:-1], whole[:middle], flipped, b"PK\3\4" + bytes(50)):
        path.write_bytes(bad)
        assert download.damage(path, "x.zip") == "not a complete ZIP archive"
        with pytest.raises(UserError, match="damaged"):
            download.unpack(path, tmp_path)


def test_the_addresses_of_amibr():
    found = download.addresses("amibr")
    assert sorted(found) == ["AMI-BR.csv", "AMi-Br_Benchmark.zip"]
    for url in found.values():  # a commit, so that the files stay what they are
        assert re.search(r"^https://(raw|codeload)\.github.*/[0-9a-f]{40}", url)
