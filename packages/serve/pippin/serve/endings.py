"""How completions end, as every protocol tells it."""

from pippin.serve.engine.request import FinishReason

SUCCESS = frozenset({FinishReason.STOP, FinishReason.LENGTH})

# Why a completion ended, where that is no success -> what the caller is told.
MESSAGES = {
    FinishReason.CANCELLED: "The request was cancelled.",
    FinishReason.DEADLINE: "The request's deadline passed.",
    FinishReason.CONSTRAINT: "The constraint allows nothing, or takes too much work to find out what. Simplify it.",
    FinishReason.FAILED: "The server could not compute the next token.",
    FinishReason.SHUTDOWN: "The server stopped. Ask another one.",
}

# When to come again to a server that stops: by then another replica has the traffic.
RETRY_STOPPING_S = 1.0
