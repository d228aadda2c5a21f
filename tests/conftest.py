"""What every test runs under."""

import ctypes
import sys

import pytest


class SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@pytest.fixture(autouse=sys.platform == "linux")
def signal_stack():
    """Give the thread its signal stack back. Models that OpenVINO (seen in 2026.4) compiles put
    another in the place of the one that pytest's faulthandler installed, and leave it unmapped: the
    next signal with a handler in Python (a worker of a DataLoader that ends) would then end the
    process."""
    libc, stack = ctypes.CDLL(None), SignalStack()
    libc.sigaltstack(None, ctypes.byref(stack))
    yield
    libc.sigaltstack(ctypes.byref(stack), None)
