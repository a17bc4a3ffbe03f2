"""The verb `curate`: generates, and optionally scores, the responses that `fit` needs before its first step."""

import itertools

from distillkit.workflows.curation import curate


def run(arguments: list[str]) -> int:
    """Runs `distillkit curate`.

    Args:
        arguments: Command-line arguments after `curate`. A bare `--score` means `--score=true`.

    Raises:
        ConfigError: If a config file or argument is invalid; no model has been loaded then.
    """
    expanded = [
        f"{flag}=true" if flag == "--score" and value not in ("true", "false") else flag
        for flag, value in itertools.pairwise([*arguments, ""])
    ]
    done = curate(arguments=expanded, on_shard_report=print)
    if done.report:
        print("\n".join(done.report))
    return 0
