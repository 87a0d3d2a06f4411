"""Work in compiled code: its result and its errors come back, and a signal ends the wait for it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from undertow.data.background import Left, heard, while_wanted


def test_results_and_errors_come_back():
    assert heard(lambda left: 3) == 3
    with pytest.raises(KeyError, match="gone"):
        heard(lambda left: {}["gone"])
    with pytest.raises(TimeoutError):  # one of the work's own, too
        heard(lambda left: (_ for _ in ()).throw(TimeoutError()))
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(heard(lambda left: threading.current_thread())))
    thread.start()
    thread.join()
    assert outcome == [thread]  # signals come to the main thread alone


def test_a_signal_while_the_thread_starts_is_told_to_the_work(monkeypatch):
    told, start = threading.Event(), threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    def work(left):
        left.wait(5)
        told.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heard(work)
    assert told.is_set()


def test_a_signal_ends_the_wait_and_the_work_is_told():
    told, working = threading.Event(), threading.Event()

    def work(left):
        try:
            for _ in while_wanted(iter(int, 1), left):
                working.set()
                time.sleep(0.01)
        except Left:
            told.set()

    def interrupt():
        working.wait()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            heard(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told.wait(2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_of_a_tokenizer_on_one_giant_line(tmp_path, number):
    (tmp_path / "a.txt").write_text("x")
    script = (
        "import random, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "from undertow.data.corpus import Document\n"
        "from undertow.data.tokenizer import train_tokenizer\n"
        "text = ''.join(random.choices('ACGT', k=8_000_000))\n"
        "print('begun', flush=True)\n"
        f"train_tokenizer([Document('a', text)], 8192, {str(tmp_path)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(number)
    process.wait(60)
    assert time.monotonic() - begun < 10 and process.returncode in (1, 130, 143, -number)
    assert not list(tmp_path.glob("tokenizer-*"))
