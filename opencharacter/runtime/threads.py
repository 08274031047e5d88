"""Functions that run side by side in threads of the driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def run_side_by_side(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Run functions in a thread each and wait for all of them.

    The threads do not keep an interrupted process alive, unlike those of an executor.

    Args:
        functions: what to run, without arguments. A single one runs in the calling thread.

    Returns:
        Their results, in the same order.

    Raises:
        Exception: the first error in the order of the functions, once all of them have ended.
    """
    if len(functions) == 1:
        return [functions[0]()]
    results: list[Future[T]] = [Future() for _ in functions]
    for function, result in zip(functions, results, strict=True):
        threading.Thread(target=_run, args=(function, result), daemon=True).start()
    for result in results:
        result.exception()
    return [result.result() for result in results]


def _run(function: Callable[[], Any], result: Future[Any]) -> None:
    try:
        result.set_result(function())
    except Exception as error:  # raised to the caller
        result.set_exception(error)
