"""The verb `curate`: generates, and optionally scores, the responses that `fit` needs before its first step."""

from distillkit.workflows.curation import curate


def run(arguments: list[str]) -> int:
    """Runs `distillkit curate`.

    Args:
        arguments: Command-line arguments after `curate`.

    Raises:
        ConfigError: If a config file or argument is invalid; no model has been loaded then.
    """
    done = curate(arguments=arguments, on_shard_report=print)
    if done.report:
        print("\n".join(done.report))
    return 0
