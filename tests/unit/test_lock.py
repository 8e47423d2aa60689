"""One writer per folder, also when the one before was killed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Child

from consonar.errors import UserError
from consonar.files import lock
from consonar.files.writers import write_atomically

HOLDER = """
import sys, time
from pathlib import Path
from consonar.files.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/work."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "work")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_has_the_folder_and_a_killed_one_has_it_no_more(holder, tmp_path):
    folder = tmp_path / "work"
    with (
        pytest.raises(
            UserError, match=rf"work: process {holder.pid} on \S+ \(since \d{{4}}-.*\) is writing it"
        ) as caught,
        lock.hold(folder),
    ):
        pass
    assert "\n" not in str(caught.value) and (folder / ".lock").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (folder / ".lock").exists(), "the killed process left its file: the test shows nothing otherwise"
    with lock.hold(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert not (folder / ".lock").exists()


def test_one_who_waits_gets_the_folder_next(tmp_path):
    order = []

    def second():
        with lock.hold(tmp_path, wait=True):
            order.append("second")

    with lock.hold(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_who_waits_makes_nothing_in_a_folder_that_its_holder_removes(tmp_path):
    folder, inside = tmp_path / "work", threading.Event()

    def wait() -> None:
        with lock.hold(folder, wait=True):
            inside.set()

    waiting = threading.Thread(target=wait)
    with lock.hold(folder):
        waiting.start()
        time.sleep(0.05)  # it has looked, and looks again
        shutil.rmtree(folder)
        time.sleep(0.3)
        assert not folder.exists() and not inside.is_set()
    waiting.join(10)
    assert inside.is_set()


def test_many_who_wait_are_inside_one_after_the_other(tmp_path):
    """Each removes the lock file as it leaves, while others look whether theirs is still the one that lies there."""
    (tmp_path / "kept").touch()
    inside, most = [], []

    def enter(_: int) -> None:
        for _ in range(100):
            with lock.hold(tmp_path, wait=True):
                inside.append(None)
                most.append(len(inside))
                inside.pop()

    with ThreadPool(8) as pool:
        pool.map(enter, range(8), chunksize=1)
    assert most == [1] * 800


def test_who_hangs_is_named_and_who_works_is_waited_for(tmp_path, monkeypatch):
    """By a clock of the test's, which goes on by 2 s from look to look."""
    work, now, left = tmp_path / "work", [0], list(range(9))
    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None))
    with ExitStack() as holder:
        beat = holder.enter_context(lock.hold(work))
        os.utime(work / lock.LOCK_FILE, (0, 0))
        beat()
        assert (work / lock.LOCK_FILE).stat().st_mtime > 0

        def works() -> None:
            now[0] += 2
            if left:
                os.utime(work / lock.LOCK_FILE, (0, left.pop()))
            else:
                holder.close()

        with lock.hold(work, wait=True, patience=3, meanwhile=works):
            assert now == [20]

    def hangs() -> None:
        now[0] += 2

    with (
        lock.hold(work),
        pytest.raises(UserError, match=rf"work: process {os.getpid()} on .* has not got on for 4 s; end it"),
        lock.hold(work, wait=True, patience=3, meanwhile=hangs),
    ):
        pass


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path):
    with pytest.raises(UserError, match="wrong"), lock.hold(tmp_path / "runs" / "mine"):
        raise UserError("wrong")
    assert list(tmp_path.iterdir()) == []
    with lock.hold(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["file"]


def killed_while_it_makes(entry):
    with lock.making(entry):
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_entry_of_the_cache_that_a_killed_process_was_making_leaves_no_folder(tmp_path):
    assert Child(killed_while_it_makes, tmp_path / "entry").end().code == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with lock.making(tmp_path / "entry"), lock.making(tmp_path / "entry", wait=False):
        assert len(list(tmp_path.iterdir())) == 1, "the second does not remove the first one's"
    assert list(tmp_path.iterdir()) == []


def test_without_locks_work_goes_on_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.hold(tmp_path / "work"):
        assert (tmp_path / "work" / ".lock").exists()
    assert "do not start a second process" in capsys.readouterr().err
    write_atomically(tmp_path / "file", lambda path: path.write_text("whole"))
    assert capsys.readouterr().err == "" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_another_process_removes_between_two_looks_is_no_file(tmp_path, monkeypatch):
    exists, folder = Path.exists, tmp_path / "work"
    folder.mkdir()

    def removed_after(path, **how):
        found = exists(path, **how)
        if path == folder and not list(folder.iterdir()):
            folder.rmdir()
        return found

    monkeypatch.setattr(Path, "exists", removed_after)
    with lock.hold(folder):
        pass
    (file := tmp_path / "file").touch()
    assert not lock.is_taken(folder) and lock.is_taken(file)
    with pytest.raises(UserError, match="is a file; name a folder"), lock.hold(file):
        pass


def test_leftovers_of_killed_processes_are_no_content_and_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    left = [".lock", ".config.json.17.partial", "checkpoints/.step_00000002.pt.17.partial"]
    for name in left:
        (tmp_path / name).write_text("half")
    assert not lock.is_unused(tmp_path)
    lock.remove_partials(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    (tmp_path / "checkpoints").rmdir()
    assert lock.is_unused(tmp_path)


def test_what_others_are_writing_inside_is_content_and_stays(tmp_path):
    """`evaluate --overwrite` of a folder in which `tokenize` and `convert` write, of runs below one that is resumed."""
    (tmp_path / "best").mkdir()
    others = tmp_path / "best" / ".evaluation.partial"
    with (
        lock.folder_at_once(tmp_path / "tokens.parts" / "shard_0") as unfinished,
        lock.folder_at_once(tmp_path / "model") as model,
        lock.hold(tmp_path / "best"),
    ):
        others.mkdir()
        (unfinished / ".tokens.arrow.17.partial").touch()
        assert not lock.is_unused(tmp_path / "tokens.parts")
        with pytest.raises(UserError, match="exists"), lock.folder_at_once(tmp_path / "tokens.parts"):
            pass

        def writes(partial):
            partial.write_text("{}")
            lock.remove_partials(tmp_path)
            assert model.is_dir() and others.is_dir() and (unfinished / ".tokens.arrow.17.partial").exists()

        write_atomically(tmp_path / "results.json", writes)
    lock.remove_partials(tmp_path)
    assert not others.exists() and (tmp_path / "results.json").exists()


def test_a_folder_that_is_gone_or_not_ours_to_read_is_passed_over(tmp_path, monkeypatch):
    """`lost+found`, or OUT.parts of a job that ends at this moment."""
    for name in ("gone", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".config.json.17.partial").touch()
    every = Path.iterdir

    def listed(path):
        if path.name == "gone":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return every(path)

    monkeypatch.setattr(Path, "iterdir", listed)
    lock.remove_partials(tmp_path)
    monkeypatch.undo()
    assert [path.parent.name for path in tmp_path.rglob("*.partial")] == ["gone"]


def test_a_waiting_process_leaves_no_folder_either(tmp_path):
    folder = tmp_path / "work"

    def second():
        with lock.hold(folder, wait=True):
            pass

    for _ in range(20):
        with lock.hold(folder):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(0.01)
        thread.join()
        assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_is_no_folder_to_hold(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing" / "there")
    with pytest.raises(FileExistsError), lock.hold(tmp_path / "link" / "run"):
        pass


def test_a_folder_is_made_where_a_link_points_and_in_the_place_of_leftovers(tmp_path):
    """A link to an empty folder on a larger disk; a folder in which a process was killed before it wrote anything."""
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / ".lock").touch()
    (tmp_path / "left" / ".config.json.17.partial").touch()
    for name in ("link", "dangling", "left"):
        with lock.folder_at_once(tmp_path / name) as unfinished:
            (unfinished / "file").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large" / "file").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"large", "link", "dangling", "later", "left"}


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match=r"is a mount point.*name a folder in it"), lock.folder_at_once(tmp_path):
        raise AssertionError("nothing may be done for it")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc")
def test_where_no_folder_can_be_made_nobody_waits_for_ever():
    with pytest.raises(OSError), lock.hold(Path("/proc/consonar/x.parts")):
        pass


def test_a_lock_file_that_cannot_be_removed_stops_nobody(tmp_path, monkeypatch):
    def refused(path: Path) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", refused)
        with lock.hold(tmp_path):
            (tmp_path / "work").touch()
    assert (tmp_path / lock.LOCK_FILE).exists()
    with lock.hold(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
