"""How the command-line tools end."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import panet_d2
from panet_d2 import ConfigError, PanetError, cli


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("status", [None, 0, 3])
def test_the_status_is_the_tools(status):
    assert cli.run(lambda given: given, status) == (status or 0)


@pytest.mark.parametrize(
    "error", [ConfigError("KEY is 1; it must be 2."), FileNotFoundError(2, "not there", "lost.txt")]
)
def test_what_the_user_can_fix_is_one_sentence(error, capsys):
    assert cli.run(raising(error)) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n" and not captured.out


def test_one_line_whatever_the_message(capsys):
    assert cli.run(raising(PanetError("a\n  b"))) == 1
    assert capsys.readouterr().err == "error: a b\n"


def test_written_at_once(monkeypatch):
    """Messages of several processes that fail at the same time do not mix."""
    written = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=written.append))
    assert cli.run(raising(PanetError("a b"))) == 1
    assert written == ["error: a b\n"]


def test_text_that_the_terminal_cannot_show(monkeypatch):
    """As names of a dataset, in the locale C."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", terminal)
    assert cli.run(lambda: print("größe")) == 0
    assert terminal.buffer.getvalue().split() == [b"gr\\xf6\\xdfe"]


def test_the_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("PANET_D2_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.run(raising(ConfigError("x")))


@pytest.mark.parametrize(
    "name, words", [("cv2", "opencv-python-headless"), ("pkg_resources", "'setuptools<81'")]
)
def test_optional_packages(name, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.run(lambda: importlib.import_module(name)) == 1
    assert words in capsys.readouterr().err


def test_a_missing_package_of_the_user_is_not_ours():
    with pytest.raises(ModuleNotFoundError):
        cli.run(lambda: importlib.import_module("package_of_nobody"))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, AssertionError])
def test_other_errors_are_bugs_and_keep_their_traceback(error):
    with pytest.raises(error):
        cli.run(raising(error("x")))


def test_a_run_of_users_code_keeps_tracebacks_of_oserrors(capsys):
    """As train_net.py: a user's augmentation may raise one."""
    with pytest.raises(OSError):
        cli.run(raising(OSError("x")), errors=(PanetError,))
    assert cli.run(raising(ConfigError("x")), errors=(PanetError,)) == 1


OUT_OF_MEMORY = [
    MemoryError("Unable to allocate 9.00 GiB for an array"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory\nCompile with …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory(error, capsys):
    assert cli.run(raising(error), errors=(PanetError,)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory (") and message.count("\n") == 1
    assert "SOLVER.IMS_PER_BATCH" in message and "INPUT.MIN_SIZE_TEST" in message
    assert "Compile" not in message and "GPU 0" not in message


def test_too_much_memory_for_torch(capsys):
    """Torch's own error, which a later release may word otherwise."""
    assert cli.run(lambda: torch.empty(2**60, dtype=torch.uint8)) == 1
    assert capsys.readouterr().err.startswith("error: out of memory (")


class Killed(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)  # as Linux does when memory ends


def test_no_shared_memory(capsys):
    text = "unable to write to file </torch_12_3_0>: No space left on device (28)"
    error = RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n… {text}")
    assert cli.run(raising(error)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: DataLoader worker failed") and "--shm-size" in message


def test_killed_worker(capsys):
    assert cli.run(lambda: next(iter(DataLoader(Killed(), num_workers=1)))) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: DataLoader worker") and "DATALOADER.NUM_WORKERS" in message


def test_ctrl_c(capsys):
    assert cli.run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_error_is_a_panet_error():
    names = [name for name in panet_d2.__all__ if name.endswith("Error") or "Diverged" in name]
    assert len(names) == 6
    assert all(issubclass(getattr(panet_d2, name), PanetError) for name in names)


@pytest.mark.parametrize("error", [ConfigError, panet_d2.DataError, panet_d2.CheckpointError])
def test_who_caught_a_value_error_still_does(error):
    assert issubclass(error, ValueError)
