"""Where text comes from: the hub, files, and GPT-2's own vocabulary files.

Formats, time limits and a client that retries for minutes: what corpus.py and vocab.py need, but
no notebook teaches.
"""
