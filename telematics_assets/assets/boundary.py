"""Where this package's errors become Dagster's.

Belongs here: what a permanent and a transient failure mean to a run, and the run tags that say so.
Does not belong here: raising errors, deciding when to try again (`automation.py`).

https://docs.dagster.io/guides/build/ops/op-retries
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from telematics_assets.errors import TelematicsError, TransientError

#: Set by a run that failed for good. Its value is the run's own id: a run that is started again inherits its parent's
#: tags, and must not inherit the verdict.
PERMANENT_FAILURE_TAG = "telematics/permanent_failure"


@contextmanager
def failures_for_dagster(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext | dg.OpExecutionContext,
) -> Iterator[None]:
    """Let only a transient error reach the retry policy; everything else stops every retry.

    Args:
        context: The context of the asset, check or op that runs inside.

    Raises:
        dagster.Failure: For a permanent `TelematicsError`, with its message, and for an exception that nobody raised on
            purpose: the same call would most likely fail in the same way.
        TransientError: As it came.
    """
    try:
        yield
    except TransientError:
        raise
    except (dg.Failure, dg.RetryRequested):
        raise
    except Exception as error:
        context.instance.add_run_tags(context.run.run_id, {PERMANENT_FAILURE_TAG: context.run.run_id})
        told = str(error)
        if not isinstance(error, TelematicsError):
            told = f"{type(error).__name__}: {told}. This is a fault of the program, or of what it runs on: report it."
        raise dg.Failure(description=told, metadata={"error": type(error).__name__}, allow_retries=False) from error
