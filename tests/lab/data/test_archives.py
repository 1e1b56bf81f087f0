import contextlib
import errno
import gzip
import hashlib
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest
import requests

from lab.data.server import md5, serving, tar_gz, zipped
from manifold_mixup.lab.data import archives
from manifold_mixup.lab.data.archives import PublishedFile, download, locked, read_verified, unpack, verify
from manifold_mixup.lab.errors import CorruptedFile, StorageError

CONTENT = bytes(range(256)) * 1200  # 300 KiB
NAME = "set.tar.gz"


def published(*urls, content=CONTENT, **changes):
    return replace(PublishedFile(NAME, md5(content), urls), **changes)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def files_no_longer_than(size):
    """The kernel refuses to let any file grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- downloads


def test_a_download_gets_its_name_when_it_is_complete_and_tells_how_far_it_is(tmp_path, capfd):
    seen = []
    with serving({NAME: CONTENT}) as server:
        path = download(published(server.url(NAME)), tmp_path / "new", lambda *told: seen.append(told))
    assert path == tmp_path / "new" / NAME
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [NAME]
    assert seen[-1] == (NAME, len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_there_is_not_fetched_again(tmp_path):
    with serving({NAME: CONTENT}) as server:
        file = published(server.url(NAME))
        download(file, tmp_path)
        download(file, tmp_path)
        assert server.requests == [(NAME, None)]


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "CHUNK", 1000)

    def stop(what, done, total):
        if done >= 100_000:
            raise KeyboardInterrupt

    with serving({NAME: CONTENT}) as server:
        file = published(server.url(NAME))
        with pytest.raises(KeyboardInterrupt):
            download(file, tmp_path, stop)
        assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.part"]
        kept = (tmp_path / f"{NAME}.part").stat().st_size
        assert 99_000 <= kept <= 100_000
        seen = []
        path = download(file, tmp_path, lambda *told: seen.append(told))
        assert server.requests == [(NAME, None), (NAME, f"bytes={kept}-")]
    assert path.read_bytes() == CONTENT
    assert seen[0] == (NAME, kept + 1000, len(CONTENT))


def test_a_server_that_breaks_off_is_asked_again_from_there(tmp_path):
    with serving({NAME: CONTENT}) as server:
        server.break_after = 100_000
        path = download(published(server.url(NAME)), tmp_path)
        assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert path.read_bytes() == CONTENT


def test_a_server_that_always_breaks_off_leaves_the_part_to_the_next_place(tmp_path):
    with serving({NAME: CONTENT}) as first, serving({NAME: CONTENT}) as second:
        first.break_after = 10
        path = download(published(first.url(NAME), second.url(NAME)), tmp_path)
        assert len(first.requests) == 1 + archives.RETRIES
        assert second.requests == [(NAME, f"bytes={10 * (1 + archives.RETRIES)}-")]
    assert path.read_bytes() == CONTENT


def test_a_server_that_cannot_resume_sends_the_whole_again(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:5000])
    with serving({NAME: CONTENT}) as server:
        server.ranges = False
        path = download(published(server.url(NAME)), tmp_path)
        assert server.requests == [(NAME, "bytes=5000-")]
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_already_everything_is_only_checked(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    with serving({NAME: CONTENT}) as server:
        path = download(published(server.url(NAME)), tmp_path)
        assert server.requests == [(NAME, f"bytes={len(CONTENT)}-")]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"something else", CONTENT + b"more"], ids=["of something else", "too long"])
def test_a_part_that_does_not_fit_is_dropped(tmp_path, part):
    (tmp_path / f"{NAME}.part").write_bytes(part)
    with serving({NAME: CONTENT}) as server:
        path = download(published(server.url(NAME)), tmp_path)
        assert server.requests == [(NAME, f"bytes={len(part)}-"), (NAME, None)]
    assert path.read_bytes() == CONTENT


def test_the_bytes_are_kept_as_they_are_where_a_server_calls_them_gzipped(tmp_path):
    packed = gzip.compress(CONTENT)
    with serving({NAME: packed}) as server:
        server.headers["Content-Encoding"] = "x-gzip"
        path = download(published(server.url(NAME), content=packed), tmp_path)
    assert path.read_bytes() == packed


def test_a_short_answer_is_noticed_where_the_library_below_does_not(tmp_path, monkeypatch):
    class Short:
        status_code, headers, raw = 200, {"Content-Length": "300"}, None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def raise_for_status(self):
            return None

        def stream(self, size, decode_content):
            return iter([b"abc", b"def"])

    answer = Short()
    answer.raw = answer
    monkeypatch.setattr(requests, "get", lambda url, **options: answer)
    with pytest.raises(StorageError, match="broke off after 6 of 300 bytes"):
        download(published("http://127.0.0.1/x"), tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == b"abcdef"


def test_places_are_tried_in_turn(tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}/{NAME}"
    with serving({}) as without, serving({NAME: b"wrong"}) as wrong, serving({NAME: CONTENT}) as right:
        path = download(published(nobody, *(s.url(NAME) for s in (without, wrong, right))), tmp_path)
        assert [len(s.requests) for s in (without, wrong, right)] == [1, 1, 1]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_what_is_not_the_published_file_is_deleted(tmp_path, kind):
    wrong = {"md5": "0" * 32} if kind == "md5" else {"sha256": "0" * 64}
    found = md5(CONTENT) if kind == "md5" else hashlib.sha256(CONTENT).hexdigest()
    message = f"{NAME}.*{'0' * 32}.*{found}.*--data-dir"
    with serving({NAME: CONTENT}) as server, pytest.raises(CorruptedFile, match=message):
        download(published(server.url(NAME), **wrong), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_says_where_to_get_the_file_and_where_to_put_it(tmp_path):
    url = f"http://127.0.0.1:{free_port()}/{NAME}"
    with pytest.raises(StorageError) as caught:
        download(published(url), tmp_path, hint="it was looked for in /data")
    for part in (NAME, url, "refused", "it was looked for in /data", "--data-dir"):
        assert part in str(caught.value)


def test_a_refusal_is_told(tmp_path):
    with serving({NAME: CONTENT}) as server:
        server.status = 503
        with pytest.raises(StorageError, match="503"):
            download(published(server.url(NAME)), tmp_path)


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with serving({NAME: CONTENT}) as server, pytest.raises(StorageError, match=f"{NAME}.part: No space left"):
        download(published(server.url(NAME)), tmp_path)


def test_what_came_before_the_disk_was_full_is_kept(tmp_path):
    with serving({NAME: CONTENT}) as server:
        file = published(server.url(NAME))
        with files_no_longer_than(100_000), pytest.raises(StorageError, match=f"cannot write .*{NAME}.part"):
            download(file, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.part"]
        assert (tmp_path / f"{NAME}.part").stat().st_size == 100_000
        assert download(file, tmp_path).read_bytes() == CONTENT
        assert server.requests[-1] == (NAME, "bytes=100000-")


def test_a_file_in_the_way_of_the_cache_is_named(tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(StorageError, match="cache"):
        download(published("http://127.0.0.1:9/"), tmp_path / "cache")


# --- checksums


def test_the_published_bytes_are_let_through(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    seen = []
    verify(path, published(sha256=hashlib.sha256(CONTENT).hexdigest()), lambda *told: seen.append(told))
    assert seen[-1] == (f"check {NAME}", len(CONTENT), len(CONTENT))
    assert read_verified(path, published()) == CONTENT


@pytest.mark.parametrize("check", [verify, read_verified])
def test_other_bytes_are_refused_with_both_checksums(tmp_path, check):
    path = tmp_path / NAME
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(CorruptedFile) as caught:
        check(path, published())
    for part in (str(path), md5(CONTENT), md5(CONTENT[:-1]), "--data-dir"):
        assert part in str(caught.value)


def test_a_wrong_sha256_is_refused_where_the_md5_is_right(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    with pytest.raises(CorruptedFile, match="sha256"):
        verify(path, published(sha256="0" * 64))


@pytest.mark.parametrize("check", [verify, read_verified])
def test_a_file_may_be_known_by_its_sha256_alone(tmp_path, check):
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    check(path, PublishedFile(NAME, sha256=hashlib.sha256(CONTENT).hexdigest()))
    with pytest.raises(CorruptedFile, match=f"its sha256 is .*, not {'0' * 64}"):
        check(path, PublishedFile(NAME, sha256="0" * 64))


@pytest.mark.parametrize("check", [verify, read_verified])
def test_a_file_that_cannot_be_read_is_named(tmp_path, check):
    with pytest.raises(StorageError, match=f"cannot read .*{NAME}"):
        check(tmp_path / NAME, published())


@pytest.mark.parametrize("level", [None, 1, 9])
def test_gzip_files_count_by_their_content(tmp_path, level):
    file = PublishedFile("x.gz", "0" * 32, unpacked_md5=md5(CONTENT), unpacked_size=len(CONTENT))
    assert file.names == ("x.gz", "x")
    path = tmp_path / "x"
    path.write_bytes(CONTENT if level is None else gzip.compress(CONTENT, level))
    assert read_verified(path, file) == CONTENT


def test_a_gzip_file_that_goes_on_and_on_is_read_no_further_than_its_published_size(tmp_path):
    file = PublishedFile("x.gz", "0" * 32, unpacked_md5=md5(CONTENT), unpacked_size=len(CONTENT))
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(CONTENT + bytes(10**7)))
    with pytest.raises(CorruptedFile, match=md5(CONTENT + b"\0")):  # one byte too many was read, and no more
        read_verified(path, file)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:1000] + b"#" + b[1001:], lambda b: b[:5]])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    file = PublishedFile("x.gz", "0" * 32, unpacked_md5=md5(CONTENT), unpacked_size=len(CONTENT))
    path = tmp_path / "x.gz"
    path.write_bytes(damage(gzip.compress(CONTENT)))
    with pytest.raises(CorruptedFile, match="x.gz"):
        read_verified(path, file)


# --- archives

FILES = {"set/a": b"A" * 5000, "set/deep/b": b"B", "set/readme": b"no", "other/a": b"no", "set": b"no"}


def everything_but_the_readme(name):
    return name != "readme"


@pytest.fixture(params=[tar_gz, zipped], ids=["tar", "zip"])
def pack(request):
    return request.param


def unpacked(tmp_path, content, wanted=everything_but_the_readme, limit=10**6, **options):
    path = tmp_path / NAME
    path.write_bytes(content)
    return unpack(path, tmp_path / "out" / "set", wanted, limit=limit, **options)


def nothing_is_left(tmp_path):
    return not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_what_is_wanted_is_unpacked_and_nothing_else(tmp_path, pack):
    seen = []
    names = unpacked(tmp_path, pack(FILES), report=lambda *told: seen.append(told))
    assert names == ["a", "deep/b"]
    folder = tmp_path / "out" / "set"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {"a", "deep/b"}
    assert (folder / "a").read_bytes() == b"A" * 5000
    assert (folder / "deep" / "b").read_bytes() == b"B"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["set"]
    assert seen == [(f"unpack {NAME}", 5000, 0), (f"unpack {NAME}", 5001, 0)]


def test_names_may_start_with_a_dot_and_folders_may_be_members(tmp_path):
    folder = tarfile.TarInfo("./set/empty")
    folder.type = tarfile.DIRTYPE
    assert unpacked(tmp_path, tar_gz({"./set/a": b"1"}, folder)) == ["a"]


def test_a_folder_that_is_there_is_replaced(tmp_path, pack):
    (tmp_path / "out" / "set" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "set" / "deep" / "old").write_text("old")
    unpacked(tmp_path, pack(FILES))
    assert sorted(p.name for p in (tmp_path / "out" / "set").rglob("*")) == ["a", "b", "deep"]


UNSAFE = ["../outside", "set/../../outside", "/tmp/outside", "set\\..\\outside", "C:/outside", "C:outside"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_name_that_leads_outside_is_refused(tmp_path, pack, name, first):
    members = {name: b"!", **FILES} if first else {**FILES, name: b"!"}
    with pytest.raises(CorruptedFile, match="outside its folder"):
        unpacked(tmp_path, pack(members))
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=repr
)
@pytest.mark.parametrize("name", ["set/link", "elsewhere/link"])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind, name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(CorruptedFile, match=f"{name}', a link or a device"):
        unpacked(tmp_path, tar_gz(FILES, info))
    assert nothing_is_left(tmp_path)


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("set/link")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(CorruptedFile, match="set/link', a link or a device"):
        unpacked(tmp_path, zipped(FILES, info))
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("wanted", [everything_but_the_readme, lambda name: False], ids=["wanted", "unwanted"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, pack, wanted):
    content = pack({"set/a": b"1", "set/bomb": bytes(5_000_000)})
    assert len(content) < 50_000
    with pytest.raises(CorruptedFile, match="unpacks to more than 1,000,000 bytes"):
        unpacked(tmp_path, content, wanted)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, 0.95])
def test_an_archive_that_is_cut_off_is_refused(tmp_path, pack, keep):
    content = pack({"set/a": hashlib.shake_128(b"noise").digest(50_000), "set/b": b"B" * 5000})
    with pytest.raises(CorruptedFile, match="damaged or cut off"):
        unpacked(tmp_path, content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert nothing_is_left(tmp_path)


def test_a_damaged_member_of_a_zip_is_refused(tmp_path):
    noise = hashlib.shake_128(b"noise").digest(50_000)
    content = bytearray(zipped({"set/a": noise}))
    content[25_000] ^= 1
    with pytest.raises(CorruptedFile, match="damaged or cut off"):
        unpacked(tmp_path, bytes(content))
    assert nothing_is_left(tmp_path)


def test_a_member_that_comes_twice_is_refused(tmp_path):
    info = tarfile.TarInfo("set/a")
    with pytest.raises(StorageError, match="exists"):
        unpacked(tmp_path, tar_gz(FILES, info))
    assert nothing_is_left(tmp_path)


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing_behind(tmp_path, pack):
    (tmp_path / NAME).write_bytes(pack(FILES))
    with files_no_longer_than(4000), pytest.raises(StorageError, match="cannot unpack into .*set"):
        unpack(tmp_path / NAME, tmp_path / "out" / "set", everything_but_the_readme, limit=10**6)
    assert nothing_is_left(tmp_path)


def test_a_full_disk_while_unpacking_is_named(tmp_path, pack, monkeypatch):
    def full(source, target, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(StorageError, match="No space left on device"):
        unpacked(tmp_path, pack(FILES))
    assert nothing_is_left(tmp_path)


def test_a_stop_while_unpacking_keeps_the_old_folder(tmp_path, pack):
    (tmp_path / "out" / "set").mkdir(parents=True)
    (tmp_path / "out" / "set" / "old").write_text("old")

    def stop(*told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpacked(tmp_path, pack(FILES), report=stop)
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["set", "old"]


# --- one process at a time


def asked_from_another_process(folder):
    code = f"from filelock import FileLock, Timeout\nlock = FileLock({str(folder / '.lock')!r}, timeout=0)\n"
    code += "try:\n    lock.acquire()\n    print('free')\nexcept Timeout:\n    print('held')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_folder_of_the_cache_is_filled_by_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "new"):
        assert asked_from_another_process(tmp_path / "new") == "held"
    assert asked_from_another_process(tmp_path / "new") == "free"


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), locked(tmp_path / "file" / "set"):
        pytest.fail("there is no such folder")
