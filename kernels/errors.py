"""What a kernel refuses, as one sentence with the cause and the way out."""


class KernelError(RuntimeError):
    """A kernel that cannot run where or how it was asked to."""
