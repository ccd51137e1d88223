"""The kinds of failure that a caller may want to tell apart."""


class UserError(ValueError):
    """Bad input, in one sentence that names the value, the bound and the fix.

    The command line prints the sentence and exits with code 2. The sentence holds no line break; its full stop is added if need be.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence if sentence.endswith((".", "?")) else f"{sentence}.")


class OutOfMemoryError(UserError):
    """The model, its KV cache or a request needs more memory than the budget allows."""


class DraftError(UserError):
    """A draft model that runs in the driver failed; the cause is chained. The requests of its step may be asked again."""


class GangError(RuntimeError):
    """The ranks of a model failed again and again: no request is answered any more. One sentence; the cause is chained."""
