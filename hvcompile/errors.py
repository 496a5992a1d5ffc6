"""The errors that hvcompile raises on purpose; each message says what, where, what is allowed and what to do."""


class HvcompileError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(HvcompileError, ValueError):
    """What the user gave can't be used; the message is one line: what, where, what is allowed, what to do."""


class OutputError(HvcompileError, OSError):
    """A file can't be written; the message is one line: what, why, and where its content is kept instead."""


class RunError(HvcompileError, RuntimeError):
    """A pipeline failed while it ran, for a reason outside this package; ``__cause__`` is what it raised."""


class OptionError(HvcompileError, ValueError):
    """An option has an unknown key, a wrong type or a value out of range."""


class RequestedPassError(HvcompileError):
    """A pass that was asked for explicitly can't apply to this graph, or failed on it: then ``__cause__`` says how."""


class LoweringError(HvcompileError):
    """Inductor can't compile a graph, for a reason that lies below this package."""


class DisagreementError(HvcompileError, RuntimeError):
    """Ranks that share a sequence are about to do different things, or one of them did not come."""


class OffloadedWeightError(HvcompileError, RuntimeError):
    """Something asks for the values of a weight that is kept on the host."""


class UncompiledModelError(HvcompileError):
    """A model was asked about that this backend has not compiled and run yet."""


class QuantizedWeightError(HvcompileError, RuntimeError):
    """Something asks for the values of a weight that is kept in float8 alone."""


class UntraceableModelError(HvcompileError):
    """A model that is to be explained does not trace as one graph."""


class InvalidRewriteError(HvcompileError, AssertionError):
    """A pass broke an invariant of the pipeline; a fault of the pass, not of its input.

    It reaches a user as ``__cause__`` alone, as do all errors that nobody foresaw.
    """


def one_line(error: BaseException) -> str:
    """The message of an error without its breaks."""
    return " ".join(str(error).split())


def ours_below(error: BaseException | None) -> HvcompileError | None:
    """The error of this package at or below another: Dynamo wraps what a backend raises."""
    while error is not None:
        if isinstance(error, HvcompileError):
            return error
        error = error.__cause__ or getattr(error, "inner_exception", None) or error.__context__
    return None
