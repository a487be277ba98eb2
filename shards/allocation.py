"""Keep the memory that large tensors free, so that the next ones need not ask the kernel for it.

glibc gives every large block back to the kernel when it is freed. A training step on a CPU frees
its activations and makes others of the same sizes in the next step, and the kernel then fills each
page with zeros again. That takes a sixth of a step's time. A process that keeps its pages needs a
few percent more memory, because blocks of other sizes do not fit exactly into what was freed.
"""

import ctypes
import os

# Parameters of mallopt, by their numbers in malloc.h, with the values to set.
_SETTINGS = {
    -3: 2**30,  # M_MMAP_THRESHOLD: smaller blocks come from memory that the process keeps
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: how much free memory the process keeps
    -2: 2**26,  # M_TOP_PAD: how much more it asks for than it needs
}


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for this process; call it before the first large tensor.

    Nothing changes where the C library is another one, and where the environment sets glibc's
    allocator (MALLOC_TRIM_THRESHOLD_ and its like, or GLIBC_TUNABLES).

    Returns:
        Whether freed memory is kept from now on.
    """
    if is_chosen_by_user():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(number, value) for number, value in _SETTINGS.items())


def give_back_memory() -> None:
    """Give the freed memory back to the kernel, after work that needs more than the steps do."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def is_chosen_by_user() -> bool:
    """Return whether the environment already tells glibc how to allocate."""
    return "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in os.environ
    )
