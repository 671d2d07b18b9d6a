"""A save that fails or is killed at any moment leaves the old adapter or the new one, and says what happened."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from io_models import adapted, fresh, outputs

import veneer
from veneer import DoRA, LoRA
from veneer.method import VeneerError

pytest.importorskip("resource", reason="a limit on file sizes and fork need a Unix system")

OLD = {"block.*": LoRA(rank=2, alpha=3)}
#: the new adapter: of the same format with another config, or of the native format
NEW = {"peft": {"block.*": LoRA(rank=3, alpha=11), "head": LoRA(rank=1)},
       "native": {"block.0": DoRA(LoRA(rank=3)), "head": LoRA(rank=1)}}


def loaded(path: Path) -> torch.Tensor:
    model = fresh("mixed")
    veneer.load(model, path)
    return outputs(model, "mixed")


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_adapter(fails, tmp_path, monkeypatch):
    old, new = adapted(fresh("mixed"), OLD), adapted(fresh("mixed"), NEW["peft"])
    veneer.save(old, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        raise full

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr("veneer.io.save.write_tensors", lambda file, *rest: (file.write(b"half"), fail()))
        else:
            patch.setattr(f"veneer.io.files.os.{fails}", fail)
        with pytest.raises(VeneerError, match=r"could not write adapter_model.safetensors, .*No space left on device "
                                              r"\([\d,]+ bytes free\)") as error:
            veneer.save(new, tmp_path)
    if fails != "replace":
        assert "What was there before is unchanged" in str(error.value)
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert not list(tmp_path.glob(".veneer-tmp-*"))
    assert torch.equal(loaded(tmp_path), outputs(old, "mixed"))
    veneer.save(new, tmp_path)
    assert torch.equal(loaded(tmp_path), outputs(new, "mixed"))


def test_a_write_that_the_system_refuses(tmp_path):
    """The same with a real limit of the operating system on the size of a file, in a process of its own."""
    old = adapted(fresh("mixed"), OLD)
    veneer.save(old, tmp_path / "a")
    script = tmp_path / "save.py"
    script.write_text(
        "import resource, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from io_models import adapted, fresh\nimport veneer\nfrom veneer import LoRA\n"
        "new = adapted(fresh('mixed'), {'block.*': LoRA(rank=64), 'head': LoRA(rank=64)})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "veneer.save(new, sys.argv[1])\n")
    run = subprocess.run([sys.executable, str(script), str(tmp_path / "a")], capture_output=True, text=True,
                         check=False)
    assert run.returncode == 1
    assert "could not write" in run.stderr
    assert "File too large" in run.stderr
    assert "What was there before is unchanged" in run.stderr
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors",
                                                                  "veneer.json"]
    assert torch.equal(loaded(tmp_path / "a"), outputs(old, "mixed"))


def save_and_die(model, path: Path, at: int) -> bool:
    """Save in a child process that is gone at its `at`-th step on the disk; whether it got to the end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    steps = 0

    def dying(real):
        def step(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == at:
                os._exit(9)
            return real(*args, **kwargs)

        return step

    os.fsync, os.replace, os.unlink = dying(os.fsync), dying(os.replace), dying(os.unlink)
    Path.unlink = dying(Path.unlink)
    try:
        veneer.save(model, path)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("change", ["peft to peft", "native to peft", "peft to native", "native to native"])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(change, tmp_path):
    start, end = change.split(" to ")
    old = adapted(fresh("mixed"), OLD if start == "peft" else {"block.0": DoRA(LoRA(rank=2)), "head": LoRA(rank=2)})
    new = adapted(fresh("mixed"), NEW[end])
    wanted = [outputs(old, "mixed"), outputs(new, "mixed")]
    seen = []
    for at in range(1, 40):
        path = tmp_path / str(at)
        assert veneer.save(old, path).format == start
        done = save_and_die(new, path, at)
        got = loaded(path)
        which = [torch.equal(got, want) for want in wanted]
        assert any(which)
        seen.append(which.index(True))
        config = path / "adapter_config.json"
        if config.is_file():  # what PEFT would see: never one adapter's tensors with the other's config
            _, meta = veneer.io.tensors.read_tensors(path / "adapter_model.safetensors")
            assert json.loads(config.read_text()) == json.loads(meta["veneer.adapter_config"])
        if done:
            break
    assert done
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    assert veneer.save(new, path).format == end
    assert not list(path.glob(".veneer-tmp-*"))


def test_a_save_over_what_peft_wrote_is_complete_at_every_moment(tmp_path):
    old, new = adapted(fresh("mixed"), OLD), adapted(fresh("mixed"), NEW["peft"])
    wanted = [outputs(old, "mixed"), outputs(new, "mixed")]
    for at in range(1, 40):
        path = tmp_path / str(at)
        veneer.save(old, path)
        tensors, _ = veneer.io.tensors.read_tensors(path / "adapter_model.safetensors")
        tensors = {k: t.clone() for k, t in tensors.items()}
        with open(path / "adapter_model.safetensors", "wb") as file:
            veneer.io.tensors.write_tensors(file, tensors, {"format": "pt"})
        (path / "veneer.json").unlink()
        done = save_and_die(new, path, at)
        assert any(torch.equal(loaded(path), want) for want in wanted)
        if done:
            break
    assert done


def test_other_files_stay_and_old_leftovers_go(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"mine")
    (tmp_path / ".veneer-tmp-old").write_bytes(b"x")
    (tmp_path / ".veneer-tmp-young").write_bytes(b"x")
    os.utime(tmp_path / ".veneer-tmp-old", (1, 1))
    veneer.save(adapted(fresh("mixed"), OLD), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        ".veneer-tmp-young", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "veneer.json"]


def test_a_failed_first_save_leaves_no_directory(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("veneer.io.files.os.fsync", fail)
    with pytest.raises(VeneerError, match="No space left on device"):
        veneer.save(adapted(fresh("mixed"), OLD), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(VeneerError, match=r"save needs a directory, and .*a is a file"):
        veneer.save(adapted(fresh("mixed"), OLD), tmp_path / "a")
