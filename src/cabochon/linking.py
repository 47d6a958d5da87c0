"""The largest of torch's libraries, linked by a thread before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

_LIBRARY = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"


def link_torch() -> Thread:
    """Have the system link torch's library while Python does something else.

    That takes a fifth of torch's import, and there nothing else of Python could run meanwhile, as
    in `ctypes.CDLL`. Where it cannot be done, the import does it all the same, or says what is
    wrong. The process does not end before the thread: what runs then must not be half there.
    """
    thread = Thread(target=_link, name="linking torch")
    thread.start()
    return thread


def _link() -> None:
    torch = find_spec("torch")  # does not import it
    places = torch.submodule_search_locations if torch else None
    if places and hasattr(os, "RTLD_NOW"):
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        dlopen(os.fsencode(Path(places[0], "lib", _LIBRARY)), os.RTLD_NOW | os.RTLD_LOCAL)
