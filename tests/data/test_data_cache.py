import pytest

from undertow.data import cache


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"

    def fail(file):
        file.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cache.write(path, fail)
    assert list(path.parent.iterdir()) == []
    cache.write(path, lambda file: file.write(b"old"))
    cache.write(path, lambda file: file.write(b"whole"))
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"whole")]


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("UNDERTOW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "undertow"
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "ours"))
    assert cache.folder() == tmp_path / "ours"
    assert cache.folder(tmp_path) == tmp_path


def test_digest_sees_where_parts_end():
    assert cache.digest(["ab", "c"]) != cache.digest(["a", "bc"])
    assert cache.digest(["ab", 1]) == cache.digest(["ab", 1])
