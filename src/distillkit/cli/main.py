"""The `distillkit` command: each verb imports what it needs, when it is used."""

import sys

from distillkit.errors import DistillKitError

VERBS = {
    "fit": "train a student",
    "curate": "write the responses of the first round ahead of training",
    "validate": "measure a checkpoint on the validation prompts",
    "test": "measure a checkpoint on the test prompts",
    "evaluate": "measure a student on held-out prompts, and write down what was found",
    "compare": "train several methods at equal cost, and write a report of them",
    "store": "look into response stores, join and export them",
    "plugins": "list the installed parts",
    "new-plugin": "write a package with a part of your own",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; an error raised on purpose becomes one line and exit status 1."""
    arguments = sys.argv[1:] if argv is None else argv
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help"):
        print(_usage())
        return 0
    if verb == "--version":
        from distillkit import __version__

        print(f"distillkit {__version__}")
        return 0
    try:
        if verb == "plugins":
            from distillkit.cli import plugins

            return plugins.run(rest)
        if verb == "new-plugin":
            from distillkit.cli import new_plugin

            return new_plugin.run(rest)
        if verb == "store":
            from distillkit.cli import store

            return store.run(rest)
        if verb == "curate":
            from distillkit.cli import curate

            return curate.run(rest)
        if verb == "compare":
            from distillkit.cli import compare

            return compare.run(rest)
        if verb == "evaluate":
            from distillkit.cli import evaluate

            return evaluate.run(rest)
        if verb in VERBS:
            from distillkit.cli import train

            return train.run(verb, rest)
    except DistillKitError as error:
        print(f"distillkit {verb}: error: {error}", file=sys.stderr)
        return 1
    print(f"distillkit: error: unknown verb {verb!r}: use one of {', '.join(VERBS)}.", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(["usage: distillkit VERB ...", "", *lines, "", "distillkit VERB --help says more."])


if __name__ == "__main__":
    sys.exit(main())
