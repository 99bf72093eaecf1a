"""What is asked of an endpoint, and what it answered."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a chat model."""

    key: str  # SHA-256 in hexadecimal of everything that decides the answer
    messages: str  # the chat messages, a list in JSON
    prompt_tokens: int  # about as many; the answer tells exactly


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a request; it is final, even where it is of no use."""

    key: str  # of the request
    content: str  # as the model wrote it, "" where there is none
    problem: str  # why there is none: "refused: ...", "rejected: ..."; "" where there is
    prompt_tokens: int
    completion_tokens: int
    dollars: float  # by the configured prices; 0 without them
    model: str  # as the endpoint calls it


@dataclass(frozen=True, slots=True)
class Limits:
    """What an endpoint tells of its limits; None: nothing."""

    remaining_requests: int | None
    remaining_tokens: int | None
    requests_reset_seconds: float | None  # until the limit is whole again
    tokens_reset_seconds: float | None
