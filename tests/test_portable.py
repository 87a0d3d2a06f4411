"""What differs between systems: encodings, signals, folders; the code may not take one of them for granted."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "undertow"
FILES = sorted(SOURCE.rglob("*.py"))
ONE_SYSTEM = re.compile(
    r"\bSIG(KILL|HUP|USR\d|ALRM|CHLD|PIPE)\b|\bimport (fcntl|resource|pwd|grp|termios|posix)\b|[\"'](/tmp|/dev|/home)\b"
    r"|\bos\.(fork|getuid|geteuid|getpgid|killpg|setsid|uname|mkfifo|symlink|link|rename|chown)\b|/proc/(?!cpuinfo)"
)


def unnamed_encodings(text: str) -> list[int]:
    """The lines on which a file is opened as text in whatever encoding the system likes best."""
    found = []
    for call in ast.walk(ast.parse(text)):
        if not isinstance(call, ast.Call) or any(k.arg in ("encoding", None) for k in call.keywords):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        owner = getattr(getattr(call.func, "value", None), "id", None)
        given = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and set(mode) <= set("rwxabt+") for mode in given)
        method = isinstance(call.func, ast.Attribute)
        as_text = {"read_text": not call.args, "write_text": method and len(call.args) == 1, "open": not binary}
        if as_text.get(name) and owner not in ("os", "Image"):
            found.append(call.lineno)
    return found


def test_every_text_file_has_an_encoding():
    for path in FILES:
        assert not unnamed_encodings(path.read_text("utf-8")), path
    assert unnamed_encodings("p.read_text()\nopen(p)\np.open('a')\np.write_text(x)") == [1, 2, 3, 4]
    assert not unnamed_encodings("open(p, 'rb')\np.read_text('utf-8')\nos.open(p, 0)\nopen(p, encoding='utf-8')")


def test_no_name_that_only_one_system_has():
    for path in FILES:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            code = line.split("  # ")[0]
            assert not ONE_SYSTEM.search(code), f"{path}:{number}: {line.strip()}"
            assert "sched_getaffinity" not in line or "hasattr" in line, f"{path}:{number}: {line.strip()}"
    assert ONE_SYSTEM.search("os.kill(pid, signal.SIGKILL)") and not ONE_SYSTEM.search("signal.SIGTERM")
