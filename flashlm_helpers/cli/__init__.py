"""The command line: `flashlm COMMAND`, or `python -m flashlm_helpers COMMAND`.

One small module per command, each with add_parser() and run(). Results go to stdout, with --json
as exactly one JSON object; notices and progress go to stderr. Nothing else imports this folder.
"""
