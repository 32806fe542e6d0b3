# SPDX-License-Identifier: Apache-2.0
"""Ask the judge, several requests at a time, and write down each reply as it comes. Needs no torch.

A run that is killed loses at most the replies that were under way, and the next one asks for what
is not in the file. One that stops because the endpoint fails waits a little for them. Refusals are
written down too: what was refused before is asked again, after all else, and being refused again
says nothing about the endpoint.
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from keylayers.errors import JudgeError
from keylayers.evaluation.judge.client import Refused, Reply
from keylayers.evaluation.judge.lines import LineFile, read_lines
from keylayers.evaluation.judge.requests import JudgeRequest
from keylayers.progress import Progress

GRACE_SECONDS = 20.0  # for replies under way when a run stops: they are paid for
MAX_REFUSED_FIRST = 3  # without any reply: then it is not the prompts' fault
MAX_REFUSED_IN_A_ROW = 10  # of those that were not refused before


@runtime_checkable
class Judge(Protocol):
    """Who is asked."""

    def ask(self, prompt: str) -> Reply:
        """The reply to one prompt."""
        ...


@dataclass(frozen=True)
class Asked:
    """What came of the requests of one run.

    Attributes:
        replies: Key -> reply, of this run and of earlier ones.
        refused: Key -> why there is no reply.
        num_new: Replies that were asked for in this run.
    """

    replies: Mapping[str, Reply]
    refused: Mapping[str, str]
    num_new: int


def kept_replies(path: Path) -> tuple[dict[str, Reply], int]:
    """Key -> reply that a file holds, and how many of its lines are damaged."""
    rows, num_damaged = read_lines(path)
    found = {}
    for row in rows:
        reply = _reply_of(row)
        if reply is not None:
            found[row["key"]] = reply
        else:
            num_damaged += not _is_refusal(row)
    return found, num_damaged


def refused_before(path: Path) -> frozenset[str]:
    """Keys of the requests that a file says were refused, whether or not a reply came later."""
    return frozenset(row["key"] for row in read_lines(path)[0] if _is_refusal(row))


def ask_all(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    path: Path,
    num_at_once: int,
    progress: Progress,
) -> Asked:
    """The replies to all requests; those that the file holds are not asked for again.

    Args:
        judge: Who is asked.
        requests: Each once.
        path: File of the replies and refusals, which grows.
        num_at_once: Requests under way at the same time.
        progress: Where to report to.

    Raises:
        JudgeError: the endpoint cannot be used, or refuses whatever it is asked.
        OutputError: the file cannot be written.
    """
    replies, _ = kept_replies(path)
    before = refused_before(path)
    replies = {one.key: replies[one.key] for one in requests if one.key in replies}
    new = [one for one in requests if one.key not in replies]
    new.sort(key=lambda one: one.key in before)
    if not new:
        return Asked(replies, {}, 0)
    refused: dict[str, str] = {}
    with LineFile(path) as file, progress.stage("judging", len(new)) as on_step:
        under_way = _UnderWay(judge, new, file, num_at_once)
        try:
            in_a_row = 0
            for number in range(1, len(new) + 1):
                request, found = under_way.next()
                if isinstance(found, Reply):
                    replies[request.key] = found
                    in_a_row = 0
                else:
                    refused[request.key] = str(found)
                    in_a_row += not replies or request.key not in before
                    _stop_if_hopeless(found, in_a_row, has_any=bool(replies))
                on_step(number, None)
        except JudgeError as error:
            under_way.stop(progress)
            raise _with_what_is_kept(error, path) from error
        except BaseException:  # an interrupt, or a full disk
            under_way.stop(progress)
            raise
    return Asked(replies, refused, len(new) - len(refused))


class _UnderWay:
    """Threads that ask and write; they end with the process if it does not wait for them."""

    def __init__(
        self, judge: Judge, requests: Sequence[JudgeRequest], file: LineFile, num_at_once: int
    ) -> None:
        self._judge = judge
        self._file = file
        self._to_ask: queue.SimpleQueue[JudgeRequest] = queue.SimpleQueue()
        for one in requests:
            self._to_ask.put(one)
        self._found: queue.SimpleQueue[tuple[JudgeRequest, Reply | BaseException]] = (
            queue.SimpleQueue()
        )
        self._is_stopping = threading.Event()
        count = min(num_at_once, len(requests))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def next(self) -> tuple[JudgeRequest, Reply | Refused]:
        """The next request that is done, in whichever order they end; other errors are raised."""
        request, found = self._found.get()
        if isinstance(found, (Reply, Refused)):
            return request, found
        raise found

    def stop(self, progress: Progress) -> None:
        """Begin nothing new, and wait a little for what is under way."""
        self._is_stopping.set()
        if any(thread.is_alive() for thread in self._threads):
            progress.note(
                f"waiting up to {GRACE_SECONDS:.0f} s for replies under way, to keep them"
            )
        for thread in self._threads:
            thread.join(GRACE_SECONDS / len(self._threads))

    def _work(self) -> None:
        while not self._is_stopping.is_set():
            try:
                request = self._to_ask.get_nowait()
            except queue.Empty:
                return
            found: Reply | BaseException
            try:
                found = self._ask(request.prompt)
                said = {"refused": str(found)} if isinstance(found, Refused) else asdict(found)
                self._file.add(request.about() | said)
            except BaseException as error:  # raised again in the thread that waits for it
                found = error
            self._found.put((request, found))

    def _ask(self, prompt: str) -> Reply | Refused:
        try:
            return self._judge.ask(prompt)
        except Refused as refused:
            return refused


def _stop_if_hopeless(found: Refused, in_a_row: int, *, has_any: bool) -> None:
    limit = MAX_REFUSED_IN_A_ROW if has_any else MAX_REFUSED_FIRST
    if in_a_row >= limit:
        which = f"{in_a_row} in a row" if has_any else f"the first {in_a_row}"
        raise JudgeError(
            f"the judge must reply to its prompts, but there was no reply to {which}: {found}"
        )


def _with_what_is_kept(error: JudgeError, path: Path) -> JudgeError:
    """The same error, and what a reader has to fear for."""
    num_kept = len(kept_replies(path)[0])
    if not num_kept:
        return error
    return JudgeError(f"{error}. {num_kept} replies are kept, and the same command goes on")


def _is_refusal(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("key"), str) and isinstance(row.get("refused"), str)


def _reply_of(row: Mapping[str, Any]) -> Reply | None:
    """What a line of the file holds; None if it is no reply."""
    text, reason = row.get("text"), row.get("finish_reason")
    counts = [row.get("prompt_tokens"), row.get("completion_tokens")]
    is_reply = (
        isinstance(row.get("key"), str)
        and isinstance(text, str)
        and isinstance(reason, str | None)
        and all(isinstance(one, int | None) for one in counts)
    )
    return Reply(str(text), reason, counts[0], counts[1]) if is_reply else None
